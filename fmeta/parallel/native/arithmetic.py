"""Operations on numbers: one at a time, reduced, or found by index."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from fmeta.parallel.native import shapes
from fmeta.parallel.native.axis import Op
from fmeta.parallel.native.ir import (
    NAMES,
    Address,
    Const,
    Indirect,
    Map,
    Unsupported,
    Value,
    View,
    contiguous,
)
from fmeta.parallel.native.lower import Lowering
from fmeta.parallel.native.pointwise import GELU, GELU_SLOPE, GELU_TANH, promoted, spelled
from fmeta.parallel.native.pointwise import RULES as CODES
from fmeta.parallel.native.views import without


def cast(code: str, values: list[Any], dtype: torch.dtype, only: list[int] | None = None) -> str:
    """Code with operands cast to the type of the computation."""
    name = "int" if dtype == torch.bool else NAMES[dtype]

    def one(match: re.Match[str]) -> str:
        i = int(match[1])
        if only is not None and i not in only:
            return match[0]
        v = values[i]
        return match[0] if isinstance(v, View) and v.dtype == dtype else f"(({name}){match[0]})"

    return re.sub(r"\{(\d+)\}", one, code)


def computed(low: Lowering, op: Op, code: str, values: list[Value], dtype: torch.dtype) -> Value:
    """Code on operands of the type ``dtype``; on the spot where all are known."""
    if all(isinstance(v, Const) and not isinstance(v.value, str) for v in values):
        numbers = iter(values)
        args = [
            next(numbers).value if isinstance(a, (Op, int, float)) and not isinstance(a, bool) else a
            for a in op.args
        ]
        like = [
            torch.tensor(a, dtype=x.dtype) if isinstance(x, Op) else a
            for a, x in zip(args, op.args, strict=True)
        ]
        return Const(op.target(*like, **op.kwargs).item(), op.shape, op.dtype)
    small = all(isinstance(v, Const) for v in values)
    found: Value = low.map(cast(code, values, dtype), values, () if small else op.shape, op.dtype)
    return shapes.expand(found, op.shape)


def is_(value: Value, number: float) -> bool:
    """Whether a value is this number everywhere."""
    return isinstance(value, Const) and not isinstance(value.value, str) and value.value == number


def pointwise(low: Lowering, op: Op) -> Value:
    """An operation of the table."""
    name = spelled(op.target)
    rule = CODES[name]
    values = [
        low.value(a) for a in op.args if isinstance(a, (Op, int, float, tuple)) and not isinstance(a, bool)
    ]
    values = values[: len(set(re.findall(r"\{(\d)\}", rule.code)))]
    tensors = [v for v, a in zip(values, op.args, strict=False) if isinstance(a, Op)]
    if op.kwargs.get("rounding_mode"):
        raise Unsupported(f"{name} with a rounding mode")
    easy = folded(name, op, values)
    if easy is not None:
        return shapes.expand(easy, op.shape)
    if rule.as_ == "operands":
        dtype = promoted([v.dtype for v in tensors])
        if not dtype.is_floating_point and any(v.dtype.is_floating_point for v in values):
            dtype = torch.float32
    else:
        dtype = torch.bool if rule.as_ == "bool" else op.dtype
    code = "({0} != 0)" if False else rule.code
    if name == "pow":
        code = power(values[1]) or code
    if name == "div" and not op.dtype.is_floating_point:
        raise Unsupported("division of whole numbers")
    return computed(low, op, code, values, dtype)


def power(exponent: Value) -> str:
    """A power without ``pow``."""
    known = {
        2: "({0} * {0})",
        3: "({0} * {0} * {0})",
        -1: "(1 / {0})",
        0.5: "c_sqrt({0})",
        -0.5: "(1 / c_sqrt({0}))",
    }
    known |= {-2: "(1 / ({0} * {0}))", 4: "(({0} * {0}) * ({0} * {0}))", 1.5: "({0} * c_sqrt({0}))"}
    if isinstance(exponent, Const) and not isinstance(exponent.value, str):
        return known.get(exponent.value, "")
    return ""


def folded(name: str, op: Op, values: list[Value]) -> Value | None:
    """Zeros and ones that need no computation."""
    if not op.dtype.is_floating_point:
        return None
    a, b = values[0], values[1] if len(values) > 1 else None
    nothing = Const(0.0, op.shape, op.dtype)
    if name == "mul" and b is not None:
        if is_(a, 0) or is_(b, 0):
            return nothing
        for one, other in ((a, b), (b, a)):
            if is_(one, 1) and other.dtype == op.dtype:
                return other
    if name == "div" and b is not None:
        if is_(a, 0):
            return nothing
        if is_(b, 1) and a.dtype == op.dtype:
            return a
    if name == "pow" and b is not None:
        if is_(b, 1) and a.dtype == op.dtype:
            return a
        if is_(b, 0):
            return Const(1.0, op.shape, op.dtype)
    if name in ("threshold_backward", "tanh_backward", "sigmoid_backward", "leaky_relu_backward") and is_(
        a, 0
    ):
        return nothing
    return None


def add(low: Lowering, op: Op) -> Value:
    """``add`` and ``sub`` with their factor."""
    name, (a, b) = spelled(op.target), [low.value(x) for x in op.args[:2]]
    factor = low.value(op.kwargs.get("alpha", op.args[2] if len(op.args) > 2 else 1))
    if op.dtype.is_floating_point and is_(factor, 1):
        if is_(b, 0) and a.dtype == op.dtype:
            return shapes.expand(a, op.shape)
        if is_(a, 0) and b.dtype == op.dtype and name == "add":
            return shapes.expand(b, op.shape)
    sign = "+" if name == "add" else "-"
    if is_(factor, 1):
        return computed(low, op, f"({{0}} {sign} {{1}})", [a, b], op.dtype)
    if isinstance(a, Const) and isinstance(b, Const):
        a = low.map("{0}", [a], op.shape, op.dtype)
    return low.map(
        cast(f"({{0}} {sign} {{1}} * {{2}})", [a, b, factor], op.dtype), [a, b, factor], op.shape, op.dtype
    )


def inverted(low: Lowering, op: Op) -> Value:
    """``bitwise_not``."""
    code = "(!{0})" if op.dtype == torch.bool else "(~{0})"
    return computed(low, op, code, [low.value(op.args[0])], op.dtype)


def converted(low: Lowering, op: Op) -> Value:
    """``_to_copy``, ``clone``: another type, or nothing."""
    value = low.value(op.args[0])
    if value.dtype == op.dtype and op.args[0] in low.roots:  # a copy from before a change
        return low.map("{0}", [value], op.shape, op.dtype, key=object())
    if value.dtype == op.dtype:
        return value
    if isinstance(value, Const):
        number = (
            value.value if isinstance(value.value, str) else torch.tensor(value.value, dtype=op.dtype).item()
        )
        return Const(number, op.shape, op.dtype)
    code = "({0} != 0)" if op.dtype == torch.bool else cast("{0}", [value], op.dtype)
    return low.map(code, [value], op.shape, op.dtype)


def where(low: Lowering, op: Op) -> Value:
    """``where``."""
    values = [low.value(a) for a in op.args]
    if isinstance(values[0], Const) and not isinstance(values[0].value, str):
        chosen = values[1] if values[0].value else values[2]
        if chosen.dtype == op.dtype or isinstance(chosen, Const):
            return (
                shapes.expand(chosen, op.shape)
                if isinstance(chosen, View)
                else Const(chosen.value, op.shape, op.dtype)
            )
    if all(isinstance(v, Const) for v in values[1:]) and values[1].value == values[2].value:  # type: ignore[union-attr]
        return Const(values[1].value, op.shape, op.dtype)  # type: ignore[union-attr]
    return low.map(cast("({0} ? {1} : {2})", values, op.dtype, [1, 2]), values, op.shape, op.dtype)


def clamp(low: Lowering, op: Op) -> Value:
    """``clamp``."""
    code, values = "{0}", [low.value(op.args[0])]
    for name, bound in zip(("fm_max", "fm_min"), [*op.args[1:], None, None], strict=False):
        if bound is not None:
            code = f"{name}({code}, {{{len(values)}}})"
            values.append(low.value(bound))
    return low.map(cast(code, values, op.dtype), values, op.shape, op.dtype)


def gelu(low: Lowering, op: Op) -> Value:
    """``gelu`` and its derivative."""
    smooth = op.kwargs.get("approximate", "none") == "tanh"
    values = [low.values[a] for a in op.args if isinstance(a, Op)]
    if len(values) == 2 and smooth:
        raise Unsupported("the derivative of gelu by tanh")
    code = GELU_SLOPE if len(values) == 2 else (GELU_TANH if smooth else GELU)
    return low.map(code, values, op.shape, op.dtype)


def reduced(low: Lowering, op: Op) -> Value:
    """Sums and the like, over dimensions and over tasks."""
    name = spelled(op.target)
    x, value = op.args[0], low.values[op.args[0]]
    n = len(x.shape)
    given = (
        op.args[1]
        if len(op.args) > 1 and op.args[1] not in (None, [])
        else op.kwargs.get("dim") or list(range(n))
    )
    if isinstance(given, bool):
        given = list(range(n))
    dims = sorted({d % n for d in (given if isinstance(given, list) else [given])} if n else set())
    tasks, count = x.axis in dims and x.axis is not None, math.prod(x.shape[d] for d in dims)
    kind = {"mean": "sum", "amax": "max", "amin": "min"}.get(name, name)
    total: Value
    if isinstance(value, Const):
        if isinstance(value.value, str) or kind in ("prod", "all", "any"):
            value = low.copied(value)
        else:
            many = value.value * count if kind == "sum" else value.value
            code = f"({many!r} * T)" if tasks and kind == "sum" else many
            if name == "mean":
                code = value.value
            return Const(code, op.shape, op.dtype)
    outside = tasks and value.buffer.scope == "shared"
    code = (
        "({0} != 0)"
        if kind in ("all", "any") and value.dtype != torch.bool
        else cast("{0}", [value], op.dtype)
    )
    total = low.reduce(kind, code, [value], x.shape, dims, op.dtype, tasks and not outside)
    if len(op.shape) < n:
        for d in reversed(dims):
            total = without(total, d)
    if outside and kind == "sum" and name != "mean":
        total = low.map(f"({{0}} * ({NAMES[op.dtype]})T)", [total], op.shape, op.dtype)
    if name == "mean":
        many = f"(({NAMES[op.dtype]}){count} * T)" if tasks and not outside else str(count)
        total = (
            low.map(f"({{0}} / ({NAMES[op.dtype]}){many})", [total], op.shape, op.dtype)
            if many != "1"
            else total
        )
    return total


def largest(low: Lowering, op: Op) -> Value:
    """``argmax`` and ``argmin``."""
    x, value = op.args[0], low.values[op.args[0]]
    d = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim")
    if isinstance(value, Const):
        return Const(0, op.shape, op.dtype)
    if d is None:
        if x.axis is not None:
            raise Unsupported("the largest of all tasks")
        shape = (math.prod(x.shape),)
        value, d = shapes.reshaped(value, shape) or View(low.copied(value).buffer, shape, (1,)), 0
    d %= len(value.shape)
    if x.axis == d:
        raise Unsupported("the largest of all tasks")
    at = without(value._replace(shape=tuple(1 if i == d else n for i, n in enumerate(value.shape))), d)
    sign = "-" if spelled(op.target) == "argmin" else ""
    code = f"fm_argmax({{0}}, {value.shape[d]}, {value.strides[d]}, {sign}1)"
    keeps = len(op.shape) == len(at.shape)
    found = low.map(code, [Address(at)], at.shape, op.dtype)  # type: ignore[arg-type, list-item]
    return found if keeps else View(found.buffer, op.shape, (*found.strides[:d], 0, *found.strides[d:]))


def along(value: View, d: int, shape: tuple[int, ...], operand: int, wraps: bool = False) -> Indirect:
    """A view over ``shape`` whose dimension ``d`` is found by another operand."""
    strides = tuple(0 if i == d else s for i, s in enumerate(value.strides))
    return Indirect(
        View(value.buffer, shape, strides, value.offset), value.strides[d], value.shape[d], operand, wraps
    )


def gather(low: Lowering, op: Op) -> Value:
    """``gather``."""
    x, d, index = op.args[0], op.args[1] % len(op.shape), op.args[2]
    value = low.values[x]
    if isinstance(value, Const):
        return value._replace(shape=op.shape)
    if x.axis == d:
        raise Unsupported("tasks by index")
    return low.map("{1}", [low.values[index], along(value, d, op.shape, 0)], op.shape, op.dtype)


def indexed(low: Lowering, op: Op) -> Value:
    """``embedding``, ``index_select`` and ``index`` by a single tensor."""
    name, x = spelled(op.target), op.args[0]
    if name == "embedding":
        d, index = 0, op.args[1]
    elif name == "index_select":
        d, index = op.args[1] % len(x.shape), op.args[2]
    else:
        found = [(i, v) for i, v in enumerate(op.args[1]) if v is not None]
        if len(found) != 1:
            raise Unsupported("an index of several tensors")
        d, index = found[0]
    value, at = low.values[x], low.values[index]
    if isinstance(value, Const):
        return value._replace(shape=op.shape)
    within = low.relative.get(index) == x.shape[d] and x.axis == d
    if (x.axis == d) != within or index.dtype == torch.bool or isinstance(at, Const):
        raise Unsupported("tasks by index")
    k = len(index.shape)
    over = View(at.buffer, op.shape, (*[0] * d, *at.strides, *[0] * (len(op.shape) - d - k)), at.offset)
    strides = (*value.strides[:d], *[0] * k, *value.strides[d + 1 :])
    source = Indirect(
        View(value.buffer, op.shape, strides, value.offset),
        value.strides[d],
        value.shape[d],
        0,
        name == "index",
    )
    return low.map("{1}", [over, source], op.shape, op.dtype)


def scattered(low: Lowering, op: Op) -> Value:
    """``scatter``, ``scatter_add``: a copy, some of whose numbers are set or added to by index."""
    base, d, index, src = op.args[0], op.args[1] % len(op.shape), op.args[2], low.value(op.args[3])
    if op.axis == d or len(op.args) > 4 or op.kwargs.get("reduce"):
        raise Unsupported("tasks by index")
    at = low.values[index]
    if isinstance(at, Const):
        at = low.copied(at)
    from_ = low.place([at, *([src] if isinstance(src, View) else [])])
    out = low.map(
        "{0}",
        [low.values[base]],
        op.shape,
        op.dtype,
        scope=from_[0],
        key=object(),
        strides=contiguous(op.shape),
    )
    out.buffer.level = max(out.buffer.level, from_[1])
    where_to = along(out, d, index.shape, 0)
    kind = "sum" if spelled(op.target) == "scatter_add" else "store"
    operands: list[Any] = [
        at,
        shapes.expand(src, index.shape) if isinstance(src, Const) else src._replace(shape=index.shape),
    ]
    code = cast("{1}", operands, op.dtype)
    low.statements.append(Map(out, index.shape, code, operands, kind, scatter=where_to, fresh=False))
    return out


def embedding_gradient(low: Lowering, op: Op) -> Value:
    """The derivative of ``embedding``: rows added where they came from."""
    ct, index, rows, skipped, by_count = op.args
    value, at = low.values[ct], low.values[index]
    within = low.relative.get(index) == op.shape[0] and op.axis == 0
    if skipped >= 0 or by_count or (op.axis is not None) != within or isinstance(at, Const):
        raise Unsupported("an embedding with padding")
    value = low.copied(value) if isinstance(value, Const) else value
    scope, level = low.place([value, at], "task" if within else "shared")
    tasks = scope == "task" and not within
    out, result = low.target("sum", op.shape, contiguous(op.shape), op.dtype, scope, level, tasks)
    rows = op.shape[0]
    if not tasks:
        low.statements.append(Map(out, op.shape, "{0}", [Const(0, op.shape, op.dtype)]))
    over = View(at.buffer, ct.shape, (*at.strides, 0), at.offset)
    to = Indirect(
        View(out.buffer, ct.shape, (*[0] * (len(ct.shape) - 1), out.strides[1])),
        out.strides[0],
        rows,
        0,
        False,
    )
    low.statements.append(Map(out, ct.shape, "{1}", [over, value], "sum", scatter=to, fresh=False))
    return result


def in_place(low: Lowering, op: Op) -> Value:
    """``copy_``, ``div_`` and their like."""
    name, x = spelled(op.target)[:-1], op.args[0]
    value = low.values[x]
    if isinstance(value, Const) or value.buffer.place == "argument":
        raise Unsupported("an argument written to")
    others = [low.value(a) for a in op.args[1:] if not isinstance(a, bool)]
    codes = {"copy": "{1}", "fill": "{1}", "zero": "0", "div": "({0} / {1})", "mul": "({0} * {1})"}
    codes |= {"add": "({0} + {1})", "sub": "({0} - {1})"}
    if name not in codes or op.kwargs.get("alpha", 1) != 1:
        raise Unsupported(f"the operation {op.target}")
    operands = [value, *(shapes.expand(v, value.shape) for v in others)]
    scope, level = low.place(operands)
    if scope != value.buffer.scope or level > value.buffer.level:
        raise Unsupported("a shared tensor written to by tasks")
    low.statements.append(
        Map(value, value.shape, cast(codes[name], operands, value.dtype), operands, fresh=False)
    )
    value.buffer.changed += 1
    return value


RULES = {
    **dict.fromkeys(CODES, pointwise),
    **dict.fromkeys(("add", "sub"), add),
    "bitwise_not": inverted,
    **dict.fromkeys(("_to_copy", "clone"), converted),
    "where": where,
    "clamp": clamp,
    **dict.fromkeys(("gelu", "gelu_backward"), gelu),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "all", "any", "prod"), reduced),
    **dict.fromkeys(("argmax", "argmin"), largest),
    "gather": gather,
    **dict.fromkeys(("embedding", "index_select", "index"), indexed),
    **dict.fromkeys(("scatter", "scatter_add"), scattered),
    "embedding_dense_backward": embedding_gradient,
    **dict.fromkeys(("copy_", "fill_", "zero_", "div_", "mul_", "add_", "sub_"), in_place),
}
