"""Views that go through a tensor by other steps than its dimensions."""

from __future__ import annotations

import math
from typing import Any

from fmeta.parallel.native import shapes
from fmeta.parallel.native.axis import Op
from fmeta.parallel.native.ir import Const, Unsupported, Value, View, contiguous
from fmeta.parallel.native.lower import Lowering


def diagonal(low: Lowering, op: Op) -> Value:
    """``diagonal``, the last dimension of the result."""
    x, value = op.args[0], low.values[op.args[0]]
    if isinstance(value, Const):
        return value._replace(shape=op.shape)
    given: list[Any] = [*op.args[1:], *(0, 0, 1)[len(op.args) - 1 :]]
    offset, a, b = given
    a, b = a % len(x.shape), b % len(x.shape)
    if x.axis in (a, b):
        raise Unsupported("the diagonal of all tasks")
    begin = value.offset + (offset * value.strides[b] if offset > 0 else -offset * value.strides[a])
    kept = [stride for d, stride in enumerate(value.strides) if d not in (a, b)]
    return View(value.buffer, op.shape, (*kept, value.strides[a] + value.strides[b]), begin)


def eye(low: Lowering, op: Op) -> Value:
    """``eye``."""
    if op.axis is not None:
        raise Unsupported("a row or column for every task")
    return low.map("({d0} == {d1})", [], op.shape, op.dtype)


def as_strided(low: Lowering, op: Op) -> Value:
    """``as_strided``, of memory that torch lays out in order: gradients of what was changed in place have it."""
    x, _, steps, *rest = op.args
    offset = rest[0] if rest and rest[0] is not None else 0
    value, number = low.values[x], math.prod(x.shape)
    if isinstance(value, Const) and in_order(x):
        return value._replace(shape=op.shape)
    ready = isinstance(value, View) and value.strides == contiguous(value.shape) and value.offset == 0
    if (
        not ready
        or not in_order(x)
        or x.axis not in (None, 0)
        or x.axis != op.axis
        or not whole_numbers(steps)
    ):
        raise Unsupported("memory in another order")
    view = View(value.buffer, op.shape, tuple(steps), offset)  # type: ignore[union-attr]
    of_one = op.axis is None or op.shape[0] * steps[0] == number
    if not of_one or not isinstance(offset, int) or shapes.reach(view)[1] >= number:
        raise Unsupported("memory of several tasks")
    return view


def in_order(x: Op) -> bool:
    """Whether a tensor's memory is known to be in order, whatever was written to it."""
    while shapes.writes(x.called):
        x = x.args[0]
    return x.called in shapes.FILLED and not x.called.endswith("_like")


def whole_numbers(steps: Any) -> bool:
    """Whether no step depends on how many tasks there are."""
    return all(isinstance(step, int) for step in steps)


RULES = {"diagonal": diagonal, "eye": eye, "as_strided": as_strided}
