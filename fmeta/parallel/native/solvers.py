"""Factors of small matrices, systems solved by them, and rows in order, with the functions of ``solvers.h``.

A matrix without an inverse gives numbers that are not finite, as it does in inductor's kernels: the check for one
is no part of a traced graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fmeta.parallel.native import shapes
from fmeta.parallel.native.axis import Op
from fmeta.parallel.native.ir import Buffer, Call, Const, Unsupported, Value, View, contiguous
from fmeta.parallel.native.lower import Lowering

LARGEST = 256
"""Rows from which the blocks of LAPACK are worth a kernel of inductor."""


def given(low: Lowering, op: Op, x: Any, batch: tuple[int, ...], turned: bool = False) -> View:
    """An argument (transposed, if ``turned``) for every matrix of a batch, row by row in memory."""
    whole = x.axis is not None and x.axis >= len(x.shape) - (1 if x.dtype == torch.int32 else 2)
    if whole or (op.shape and max(op.shape[-2:]) > LARGEST):
        raise Unsupported("a system of all tasks, or a large one")
    value, own = low.values[x], x.shape[-1:] if x.dtype == torch.int32 else x.shape[-2:]
    value = shapes.expand(value, (*batch, *own))
    if turned:
        value = shapes.permute(value, [*range(len(batch)), -1, -2])
    ready = isinstance(value, View) and value.strides == contiguous(value.shape)
    return value if ready else low.copied(value)  # type: ignore[return-value]


def called(low: Lowering, code: str, ins: list[View], outs: list[tuple[tuple[int, ...], Any]]) -> list[View]:
    """Results of a call, each in memory of its own; ``{n}`` in the code stands for how many matrices there are."""
    key = ("solver", code, *map(shapes.identity, ins))
    if key not in low.known:
        scope, level = low.place(ins)
        found = [View(Buffer(dtype, math.prod(s), scope, level), s, contiguous(s)) for s, dtype in outs]
        low.statements.append(Call(code, found, ins))
        low.known[key] = found
    return low.known[key]


def count(batch: tuple[int, ...], *sides: int) -> str:
    """How many matrices, and their sides, as arguments."""
    return ", ".join(map(str, (math.prod(batch), *sides)))


def lu_factor(low: Lowering, op: Op) -> list[Value]:
    """``linalg_lu_factor_ex``: both factors in one matrix, pivots, and 0 for what LAPACK tells besides."""
    x = op.args[0]
    (*batch, rows, n), pivot = x.shape, op.kwargs.get("pivot", True)
    if rows != n or not pivot:
        raise Unsupported("factors of matrices that are not square, or without pivots")
    a = given(low, x, x, tuple(batch))
    results = [(tuple(x.shape), x.dtype), ((*batch, n), torch.int32)]
    factors, pivots = called(low, f"fm_lu({count(tuple(batch), n)}, {{a}}, {{out}}, {{out1}});", [a], results)
    return [factors, pivots, Const(0, tuple(batch), torch.int32)]


def lu_solve(low: Lowering, op: Op) -> Value:
    """``linalg_lu_solve``; a system from the right is the transposed one from the left."""
    factors, pivots, b = op.args
    left, adjoint = op.kwargs.get("left", True), op.kwargs.get("adjoint", False)
    batch = op.shape[:-2]
    ins = [
        given(low, op, factors, batch),
        given(low, op, b, batch, turned=not left),
        given(low, op, pivots, batch),
    ]
    shape = ins[1].shape
    sides = count(batch, *shape[-2:])
    code = f"fm_lu_solve({sides}, {{a}}, {{c}}, {{b}}, {{out}}, {int(adjoint is left)});"
    (found,) = called(low, code, ins, [(shape, op.dtype)])
    return found if left else shapes.permute(found, [*range(len(batch)), -1, -2])


def solve_triangular(low: Lowering, op: Op) -> Value:
    """``linalg_solve_triangular``."""
    a, b = op.args
    left, batch = op.kwargs.get("left", True), op.shape[:-2]
    upper, unit = op.kwargs["upper"] is left, op.kwargs.get("unitriangular", False)
    ins = [given(low, op, x, batch, turned=not left) for x in (a, b)]
    shape = ins[1].shape
    code = f"fm_triangular({count(batch, *shape[-2:])}, {{a}}, {{b}}, {{out}}, {int(upper)}, {int(unit)});"
    (found,) = called(low, code, ins, [(shape, op.dtype)])
    return found if left else shapes.permute(found, [*range(len(batch)), -1, -2])


def cholesky(low: Lowering, op: Op) -> list[Value]:
    """``linalg_cholesky_ex``: the factor, of which the other half is zero, and 0."""
    x, n = op.args[0], op.args[0].shape[-1]
    batch = tuple(x.shape[:-2])
    a = given(low, x, x, batch)
    (found,) = called(low, f"fm_cholesky({count(batch, n)}, {{a}}, {{out}});", [a], [(a.shape, x.dtype)])
    upper = op.kwargs.get("upper", False)
    factor = shapes.permute(found, [*range(len(batch)), -1, -2]) if upper else found
    return [factor, Const(0, batch, torch.int32)]


def along_rows(low: Lowering, op: Op) -> tuple[View, list[int]]:
    """The argument with the dimension of ``sort`` and the like last, and where its dimensions come from then."""
    x, n = op.args[0], len(op.args[0].shape)
    d = (op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", -1)) % max(n, 1)
    if not n or d == x.axis or x.shape[d] > LARGEST or x.dtype not in (torch.float32, torch.float64):
        raise Unsupported("all tasks in order, or many numbers, or not of the reals")
    order = [*(i for i in range(n) if i != d), d]
    return low.copied(shapes.permute(low.values[x], order)), [order.index(i) for i in range(n)]


def sort(low: Lowering, op: Op) -> list[Value]:
    """``sort``, which leaves equal numbers in their order, as torch does on a CPU."""
    value, back = along_rows(low, op)
    falling = op.args[2] if len(op.args) > 2 else op.kwargs.get("descending", False)
    code = f"fm_sort({count(value.shape[:-1], value.shape[-1])}, {{a}}, {{out}}, {{out1}}, {int(falling)});"
    found = called(low, code, [value], [(value.shape, value.dtype), (value.shape, torch.int64)])
    return [shapes.permute(v, back) for v in found]


def so_far(low: Lowering, op: Op) -> Value:
    """``cumsum`` and ``cumprod``."""
    value, back = along_rows(low, op)
    if op.dtype != value.dtype:
        raise Unsupported("sums or products of another type")
    sides = count(value.shape[:-1], value.shape[-1])
    code = f"fm_so_far({sides}, {{a}}, {{out}}, {int(op.called == 'cumprod')});"
    return shapes.permute(called(low, code, [value], [(value.shape, value.dtype)])[0], back)


RULES = {
    **dict.fromkeys(("cumsum", "cumprod"), so_far),
    "sort": sort,
    "linalg_lu_factor_ex": lu_factor,
    "linalg_lu_solve": lu_solve,
    "linalg_solve_triangular": solve_triangular,
    "linalg_cholesky_ex": cholesky,
}
