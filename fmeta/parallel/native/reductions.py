"""Sums and the like, over dimensions and over tasks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from fmeta.parallel.native import shapes
from fmeta.parallel.native.arithmetic import cast
from fmeta.parallel.native.axis import Op, Times
from fmeta.parallel.native.ir import (
    NAMES,
    Address,
    Const,
    Unsupported,
    Value,
    View,
)
from fmeta.parallel.native.lower import Lowering
from fmeta.parallel.native.views import without


def reduced(low: Lowering, op: Op) -> Value:
    """Sums and the like, over dimensions and over tasks."""
    name = op.called
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


def spread(low: Lowering, op: Op) -> Any:
    """``var``, ``std``, ``var_mean``: the mean first, then the squares of what is left."""
    x, value, name = op.args[0], low.values[op.args[0]], op.called
    n = len(x.shape)
    given = op.args[1] if len(op.args) > 1 and isinstance(op.args[1], list) else op.kwargs.get("dim")
    dims = sorted({d % n for d in given or range(n)})
    less = op.kwargs.get("correction", 1)
    if x.axis in dims or isinstance(value, Const) or len(op.args) > 2 or isinstance(less, Times):
        raise Unsupported("the variance of all tasks")
    count = math.prod(x.shape[d] for d in dims)
    kind = NAMES[value.dtype]
    total: Any = low.reduce("sum", "{0}", [value], x.shape, dims, value.dtype, False)
    mean: Any = low.map(f"({{0}} / ({kind}){count})", [total], total.shape, value.dtype)
    squares = "(({0} - {1}) * ({0} - {1}))"
    over = [value, shapes.expand(mean, x.shape)]
    found: Any = low.reduce("sum", squares, over, x.shape, dims, value.dtype, False)
    root = "c_sqrt" if name == "std" else ""
    code = f"{root}({{0}} / ({kind})fm_max(0.0, (double){count} - {less}))"
    found = low.map(code, [found], found.shape, value.dtype)
    wanted = op.results[0].shape if op.results else op.shape
    if len(wanted) < n:
        for d in reversed(dims):
            found, mean = without(found, d), without(mean, d)
    return [found, mean] if name == "var_mean" else found


def extreme(low: Lowering, op: Op) -> Any:
    """``max`` and ``min``, of everything or with the places along a dimension."""
    if not op.results:
        return reduced(low, op)
    x, shape = op.args[0], next(iter(op.results.values())).shape
    of = [replace(op, shape=shape, dtype=dtype) for dtype in (x.dtype, torch.int64)]
    return [reduced(low, of[0]), largest(low, of[1])]


def largest(low: Lowering, op: Op) -> Value:
    """``argmax`` and ``argmin``, and the places of ``max`` and ``min``."""
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
    at: Any = without(value._replace(shape=tuple(1 if i == d else n for i, n in enumerate(value.shape))), d)
    sign = "-" if op.called in ("argmin", "min") else ""
    code = f"fm_argmax({{0}}, {value.shape[d]}, {value.strides[d]}, {sign}1)"
    keeps = len(op.shape) == len(at.shape)
    found = low.map(code, [Address(at)], at.shape, op.dtype)
    return found if keeps else View(found.buffer, op.shape, (*found.strides[:d], 0, *found.strides[d:]))


RULES = {
    **dict.fromkeys(("sum", "mean", "amax", "amin", "all", "any", "prod"), reduced),
    **dict.fromkeys(("var", "std", "var_mean"), spread),
    **dict.fromkeys(("argmax", "argmin"), largest),
    **dict.fromkeys(("max", "min"), extreme),
}
