"""Shapes and strides: what views are of each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fmeta.parallel.native.axis import Op
from fmeta.parallel.native.ir import Address, Buffer, Const, Indirect, Unsupported, Value, View, contiguous

VIEWS = (
    "view", "_unsafe_view", "reshape", "_reshape_alias", "alias", "detach", "t", "transpose", "permute", "unsqueeze",
    "squeeze", "expand", "select", "slice", "split", "split_with_sizes", "unbind", "lift_fresh", "view_of",
    "diagonal", "as_strided",
)  # fmt: skip
FILLED = {
    "zeros": 0, "ones": 1, "new_zeros": 0, "new_ones": 1, "zeros_like": 0, "ones_like": 1, "empty": 0, "new_empty": 0,
    "empty_like": 0, "_new_zeros_with_same_feature_meta": 0, "_efficientzerotensor": 0,
}  # fmt: skip
"""Operations that make a tensor full of one number, of which at most the shape of another is read."""


def writes(name: str) -> bool:
    """Whether an operation writes to its first argument."""
    return name.endswith("_")


def identity(x: Any) -> Any:
    """What a value is, as a key."""
    if isinstance(x, View):
        return (x.buffer, x.buffer.changed, *x[1:])
    if isinstance(x, (Indirect, Address)):
        return (identity(x.view), *x[1:])
    return (type(x.value), repr(x.value), x.shape, x.dtype)


def expand(x: Value, shape: tuple[int, ...]) -> Value:
    """A value repeated over a larger shape."""
    if isinstance(x, Const):
        return x._replace(shape=shape)
    ahead = len(shape) - len(x.shape)
    strides = [0] * ahead
    for have, want, stride in zip(x.shape, shape[ahead:], x.strides, strict=True):
        if have != want and have != 1:
            raise Unsupported(f"a shape {x.shape} as {shape}")
        strides.append(stride if have == want and have != 1 else 0)
    return View(x.buffer, shape, tuple(strides), x.offset)


def reach(view: View) -> tuple[int, int]:
    """The first and the last place of a view."""
    steps = [(n - 1) * d for n, d in zip(view.shape, view.strides, strict=True)]
    return view.offset + sum(d for d in steps if d < 0), view.offset + sum(d for d in steps if d > 0)


def is_(value: Value, number: float) -> bool:
    """Whether a value is this number everywhere."""
    return isinstance(value, Const) and not isinstance(value.value, str) and value.value == number


def permute(x: Value, order: list[int]) -> Value:
    """Dimensions in another order."""
    order = [d % len(x.shape) for d in order]
    shape = tuple(x.shape[d] for d in order)
    if isinstance(x, Const):
        return x._replace(shape=shape)
    return View(x.buffer, shape, tuple(x.strides[d] for d in order), x.offset)


def reshaped(x: View, shape: tuple[int, ...]) -> View | None:
    """The same numbers, row by row, in another shape; None where that takes a copy."""
    old = [(n, s) for n, s in zip(x.shape, x.strides, strict=True) if n != 1]
    runs: list[tuple[int, int]] = []  # maximal runs of numbers that are evenly spaced
    for n, s in old:
        if runs and runs[-1][1] == n * s:
            runs[-1] = (runs[-1][0] * n, s)
        else:
            runs.append((n, s))
    strides, rest = [], list(reversed(runs))
    left, step = rest.pop(0) if rest else (1, 1)
    for n in reversed(shape):
        if n == 1:
            strides.append(step)
            continue
        if left == 1 and rest:
            left, step = rest.pop(0)
        if left % n:
            return None
        strides.append(step)
        left, step = left // n, step * n
    return View(x.buffer, shape, tuple(reversed(strides)), x.offset)


def tasks_first(buffer: Buffer, shape: tuple[int, ...], axis: int | None) -> View:
    """A tensor in order, but for the dimension of tasks, which is outermost."""
    if axis is None:
        return View(buffer, shape, contiguous(shape))
    return View(buffer, shape, dense(shape, [axis, *(d for d in range(len(shape)) if d != axis)]))


def dense(shape: tuple[int, ...], order: list[int]) -> tuple[int, ...]:
    """Strides of numbers without gaps, the dimensions from the outermost to the innermost."""
    moved = contiguous(tuple(shape[d] for d in order))
    return tuple(moved[order.index(d)] for d in range(len(shape)))


def order_of(x: View) -> list[int]:
    """Dimensions from the outermost in memory to the innermost."""
    return sorted(range(len(x.shape)), key=lambda d: (-x.strides[d] if x.shape[d] > 1 else 0, d))


def same(a: View, b: View) -> bool:
    """Whether two views place their numbers alike."""
    strides = [(x, y) for n, x, y in zip(a.shape, a.strides, b.strides, strict=True) if n > 1]
    return a.shape == b.shape and a.offset == b.offset and all(x == y for x, y in strides)


def size(shape: tuple[int, ...]) -> int:
    """How many numbers."""
    return math.prod(shape)


def before(shape: tuple[int, ...], axis: int) -> int:
    """Numbers in the dimensions before the tasks'."""
    return math.prod(shape[:axis])


def laid_out_like(shape: tuple[int, ...], values: list[Any]) -> tuple[int, ...]:
    """Strides for a new tensor, in the order of dimensions of the first value that has all of them."""
    for x in values:
        if (
            isinstance(x, View)
            and x.shape == shape
            and all(s for n, s in zip(shape, x.strides, strict=True) if n > 1)
        ):
            return dense(shape, order_of(x))
    return contiguous(shape)


def narrowed(x: Any, shape: tuple[int, ...]) -> Any:
    """A value with some dimensions cut to one."""
    return x._replace(shape=shape) if isinstance(x, (View, Const)) and len(x.shape) == len(shape) else x


def varying(values: list[Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the dimensions along which all values, views and constants, are the same."""
    views = [x for x in values if isinstance(x, View)]
    if not views or not all(isinstance(x, (View, Const)) for x in values):
        return shape
    return tuple(n if any(x.strides[d] for x in views) else 1 for d, n in enumerate(shape))


def changed_in_place(ops: list[Op]) -> set[Op]:
    """Operations whose result is written to later; every view of one is followed to its root."""
    roots: set[Op] = set()
    for op in ops:
        if writes(op.called):
            found = op.args[0]
            while isinstance(found, Op):
                roots.add(found)
                name = found.called
                follows = name in VIEWS or name == "" or writes(name)
                found = found.args[0] if follows and found.args else None
    return roots


def needed(ops: list[Op], outputs: list[Op]) -> set[Op]:
    """Operations whose numbers a result depends on; of some, like ``zeros_like``, the shape alone is read."""
    found = set(outputs)
    for op in reversed(ops):
        name = op.called
        if op in found or any(r in found for r in op.results.values()) or writes(name):
            found.add(op)
            if name not in FILLED:
                found.update(operands((op.args, op.kwargs)))
    return found


TURNS = ("t", "transpose", "permute")
KEEPS = ("add", "mul", "neg", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze")


def flipped(ops: list[Op], outputs: list[Op]) -> set[Op]:
    """Matrices of which nothing but the transposed one is used, if only after additions and the like."""
    users: dict[Op, list[Op]] = {op: [] for op in ops}
    for op in ops:
        for x in operands((op.args, op.kwargs)):
            users.setdefault(x, []).append(op)
    found: set[Op] = set()
    for op in reversed(ops):
        after = users[op] and all(u.called in TURNS or (u.called in KEEPS and u in found) for u in users[op])
        if after and op not in outputs and op.called in ("mm", "bmm", *KEEPS):
            found.add(op)
    return found


def operands(args: Any) -> Iterator[Op]:
    """Operations among arguments."""
    if isinstance(args, Op):
        yield args
    elif isinstance(args, (list, tuple, dict)):
        for x in args.values() if isinstance(args, dict) else args:
            yield from operands(x)
