"""Products of matrices: as a sum in a loop where they are small, else by the blocks of ``runtime.h``."""

from __future__ import annotations

import math
from typing import Any

from fmeta.parallel.native import shapes
from fmeta.parallel.native.arithmetic import cast
from fmeta.parallel.native.axis import Op
from fmeta.parallel.native.ir import Call, Const, Grid, Unsupported, Value, View, contiguous
from fmeta.parallel.native.lower import Lowering

SMALL = 1000
"""Multiplications below which a product is a loop."""
LANES = 32
"""Bytes of a vector, for the choice of what is vectorised."""


def dimensions(x: View, n: int) -> View:
    """A view with ones in front."""
    ahead = n - len(x.shape)
    return View(x.buffer, (*[1] * ahead, *x.shape), (*[0] * ahead, *x.strides), x.offset)


def product(
    low: Lowering, a: Value, b: Value, tasks: bool, shape: tuple[int, ...], turned: bool = False
) -> Value:
    """``[.., m, k] @ [.., k, n]``, with ``tasks`` summed over them; ``turned``: it is wanted column by column."""
    if shapes.is_(a, 0) or shapes.is_(
        b, 0
    ):  # a tangent that is zero; the other, if infinite, shows elsewhere
        return Const(0.0, shape, a.dtype)
    a, b = (low.copied(x) if isinstance(x, Const) else x for x in (a, b))
    a, b = dimensions(a, 3), dimensions(b, 3)
    low.count(2 * math.prod(a.shape) * b.shape[2], [a, b])
    if tasks and low.place([a, b])[0] == "shared":
        raise Unsupported("a sum over tasks of what they share")
    (_, m, k), n = a.shape, b.shape[2]
    small = m * n * k <= SMALL or k == 1 or min(m, n) == 1
    out = as_sum(low, a, b, tasks) if small else blocked(low, a, b, tasks, turned)
    return out if len(shape) == 3 else View(out.buffer, out.shape[1:], out.strides[1:], out.offset)


def as_sum(low: Lowering, a: View, b: View, tasks: bool) -> View:
    """A product as a sum of products."""
    (z, m, k), n = a.shape, b.shape[2]
    left = View(a.buffer, (z, m, n, k), (a.strides[0], a.strides[1], 0, a.strides[2]), a.offset)
    right = View(b.buffer, (z, m, n, k), (b.strides[0], 0, b.strides[2], b.strides[1]), b.offset)
    if k == 1 and not tasks:
        cut = [v._replace(shape=v.shape[:3], strides=v.strides[:3]) for v in (left, right)]
        return low.map("({0} * {1})", cut, (z, m, n), a.dtype, strides=contiguous((z, m, n)))
    strides = (m * n, n, 1, 1) if n > 1 or m == 1 else (m * n, 1, 1, 1)
    out = low.reduce("sum", "({0} * {1})", [left, right], (z, m, n, k), [3], a.dtype, tasks, strides)
    return View(out.buffer, (z, m, n), out.strides[:3], out.offset)


def blocked(low: Lowering, a: View, b: View, tasks: bool, wanted: bool) -> View:
    """A product by blocks; the one of ``m`` and ``n`` that wastes fewer lanes is vectorised."""
    (_, m, k), n = a.shape, b.shape[2]
    lanes = LANES // a.dtype.itemsize
    ready = b.strides[2] == 1 or n == 1, a.strides[1] == 1 or m == 1
    plain = m * k * math.ceil(n / lanes) + (0 if ready[0] else k * n / 2)
    turned = n * k * math.ceil(m / lanes) + (0 if ready[1] else k * m / 2)
    if turned < plain or (wanted and turned == plain):
        flipped = blocked_plain(low, shapes.permute(b, [0, 2, 1]), shapes.permute(a, [0, 2, 1]), tasks)
        return shapes.permute(flipped, [0, 2, 1])  # type: ignore[return-value]
    return blocked_plain(low, a, b, tasks)


def blocked_plain(low: Lowering, a: Any, b: Any, tasks: bool) -> View:
    """A product whose ``n`` is vectorised."""
    (z, m, k), n = a.shape, b.shape[2]
    if b.strides[2] != 1:
        b = low.copied(b)
    key = ("product", shapes.identity(a), shapes.identity(b), tasks)
    if key not in low.known:
        scope, level = low.place([a, b])
        out, result = low.target("sum", (z, m, n), contiguous((z, m, n)), a.dtype, scope, level, tasks)
        one = rows(a, b, out, m, n, k, a.strides[1], a.strides[2], b.strides[1], tasks)
        if z > 1:
            at = f"z * {a.strides[0]}", f"z * {b.strides[0]}", f"z * {m * n}"
            one.code = f"for (int z = 0; z < {z}; z++) " + one.code.replace(
                "{a}", f"({{a}} + {at[0]})"
            ).replace("{b}", f"({{b}} + {at[1]})").replace("{out}", f"({{out}} + {at[2]})")
        low.statements.append(one)
        low.known[key] = result
    return low.known[key]


def rows(a: View, b: View, out: View, m: int, n: int, k: int, am: int, ak: int, bk: int, adds: bool) -> Call:
    """A product of evenly spaced rows and columns."""
    tables = [Grid(0, ((m, am),)), Grid(0, ((m, n),)), Grid(0, ()), Grid(0, ())]
    return by_tables(a, b, out, n, k, ak, bk, tables, adds)


def by_tables(
    a: View, b: View, out: View, n: int, inner: int, ak: int, bk: int, tables: list[Grid], adds: bool
) -> Call:  # fmt: skip
    """A product whose rows, and blocks of ``inner`` terms, are found by tables: see ``product`` in ``runtime.h``."""
    terms = f"Terms{{{{{{t2}}, {{t3}}, {tables[2].points}, {inner}, {ak}, {bk}}}}}"
    code = (
        f"product({tables[0].points}, {n}, {{a}}, {{t0}}, {{b}}, {{out}}, {{t1}}, "
        f"{terms.replace('{{', '{').replace('}}', '}')}, {str(adds).lower()});"
    )
    return Call(code, [out], [a, b], tables, adds)


def summed(low: Lowering, op: Op) -> bool:
    """Whether a product contracts the dimension of tasks."""
    a, b = op.args[-2:]
    n = len(a.shape)
    if a.axis == n - 1 and b.axis == n - 2:
        return True
    if a.axis == n - 1 or b.axis == n - 2:
        raise Unsupported("a product over tasks of what has none")
    return False


def matmul(low: Lowering, op: Op) -> Value:
    """``mm``, ``bmm``, ``addmm``, ``baddbmm``."""
    tasks = summed(low, op)
    a, b = (low.values[x] for x in op.args[-2:])
    found = product(low, a, b, tasks, op.shape, op in low.flipped)
    if len(op.args) == 3:
        if op.kwargs:
            raise Unsupported("factors of a product and its addend")
        operands: list[Value] = [found, low.value(op.args[0])]
        return low.map(cast("({0} + {1})", operands, op.dtype), operands, op.shape, op.dtype)
    return found


RULES = dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), matmul)
