"""Operations that give the same numbers in another shape or place, or make new ones from nothing."""

from __future__ import annotations

import math
from typing import Any

from fmeta.parallel.native import shapes
from fmeta.parallel.native.axis import Op, Times
from fmeta.parallel.native.ir import Buffer, Const, Map, Unsupported, Value, View, contiguous
from fmeta.parallel.native.lower import Lowering


def same(low: Lowering, op: Op) -> Value:
    """The value itself."""
    return low.values[op.args[0]]


def reshape(low: Lowering, op: Op) -> Value:
    """``view``: a copy where the strides do not allow one."""
    x, value = op.args[0], low.values[op.args[0]]
    if isinstance(value, Const):
        return value._replace(shape=op.shape)
    if (
        x.axis is not None
        and op.axis is not None
        and shapes.before(x.shape, x.axis) != shapes.before(op.shape, op.axis)
    ):
        raise Unsupported("tasks inside another dimension")
    found = shapes.reshaped(value, op.shape)
    if found is None and value.buffer in low.changing:
        raise Unsupported("a view, of a tensor that changes in place, which needs a copy here")
    return found or View(low.copied(value).buffer, op.shape, contiguous(op.shape))


def permute(low: Lowering, op: Op) -> Value:
    """``permute``, ``transpose``, ``t``."""
    value, n, name = low.values[op.args[0]], len(op.shape), op.called
    order = list(range(n))
    if name == "permute":
        order = op.args[1]
    elif name == "transpose":
        a, b = op.args[1] % n, op.args[2] % n
        order[a], order[b] = b, a
    elif n == 2:
        order = [1, 0]
    return shapes.permute(value, order)


def ones(low: Lowering, op: Op) -> Value:
    """``unsqueeze``, ``squeeze``: dimensions of one come or go."""
    value, x = low.values[op.args[0]], op.args[0]
    if isinstance(value, Const):
        return value._replace(shape=op.shape)
    if op.called == "unsqueeze":
        return with_one(value, op.args[1] % len(op.shape))
    dims = op.args[1] if len(op.args) > 1 else list(range(len(x.shape)))
    dims = [d % len(x.shape) for d in (dims if isinstance(dims, list) else [dims])]
    gone = [d for d in dims if x.shape[d] == 1 and d != x.axis]
    kept = [d for d in range(len(x.shape)) if d not in gone]
    return View(value.buffer, op.shape, tuple(value.strides[d] for d in kept), value.offset)


def expand(low: Lowering, op: Op) -> Value:
    """``expand``."""
    return shapes.expand(low.values[op.args[0]], op.shape)


def part(value: Value, d: int, begin: int, count: int, step: int = 1) -> Value:
    """Some rows of a dimension."""
    shape = (*value.shape[:d], count, *value.shape[d + 1 :])
    if isinstance(value, Const):
        return value._replace(shape=shape)
    strides = (*value.strides[:d], value.strides[d] * step, *value.strides[d + 1 :])
    return View(value.buffer, shape, strides, value.offset + begin * value.strides[d])


def with_one(value: Value, d: int) -> Value:
    """A dimension of one more."""
    shape = (*value.shape[:d], 1, *value.shape[d:])
    if isinstance(value, Const):
        return value._replace(shape=shape)
    return View(value.buffer, shape, (*value.strides[:d], 0, *value.strides[d:]), value.offset)


def without(value: Value, d: int) -> Value:
    """A dimension of one gone."""
    shape = (*value.shape[:d], *value.shape[d + 1 :])
    if isinstance(value, Const):
        return value._replace(shape=shape)
    return View(value.buffer, shape, (*value.strides[:d], *value.strides[d + 1 :]), value.offset)


def select(low: Lowering, op: Op) -> Value:
    """``select``."""
    x, d, index = op.args[0], op.args[1] % len(op.args[0].shape), op.args[2]
    if d == x.axis or not isinstance(index, int):
        raise Unsupported("one task selected among all")
    return without(part(low.values[x], d, index % x.shape[d], 1), d)


def slice_(low: Lowering, op: Op) -> Value:
    """``slice``."""
    x, *rest = op.args
    given: list[Any] = [*rest, *[0, None, None, 1][len(rest) :]]
    d, begin, end, step = given
    d %= len(x.shape)
    if d == x.axis:
        if op.shape != x.shape or begin not in (None, 0):
            raise Unsupported("some tasks sliced from all")
        return low.values[x]
    begin, end, step = slice(begin, end, step).indices(x.shape[d])
    return part(low.values[x], d, begin, op.shape[d], step)


def flip(low: Lowering, op: Op) -> Value:
    """``flip``."""
    value, x = low.values[op.args[0]], op.args[0]
    for d in {d % len(x.shape) for d in op.args[1]}:
        if d == x.axis:
            raise Unsupported("tasks in another order")
        value = part(value, d, x.shape[d] - 1, x.shape[d], -1)
    return value


def split(low: Lowering, op: Op) -> list[Value]:
    """``split``, ``split_with_sizes``, ``unbind``."""
    x, sizes = op.args[0], op.args[1] if len(op.args) > 1 else 0
    d = (op.args[2] if len(op.args) > 2 else op.kwargs.get("dim", 0)) if op.called != "unbind" else sizes
    d %= len(x.shape)
    if d == x.axis:
        raise Unsupported("tasks split")
    n, value = x.shape[d], low.values[x]
    if op.called == "unbind":
        return [without(part(value, d, i, 1), d) for i in range(n)]
    if isinstance(sizes, int):
        sizes = [min(sizes, n - i) for i in range(0, n, sizes)]
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    return [part(value, d, begin, size) for begin, size in zip(begins, sizes, strict=True)]


def constant(low: Lowering, op: Op) -> Value:
    """Tensors filled with one number."""
    name = op.called
    at = {"full": 1, "full_like": 1, "scalar_tensor": 0, "new_full": 2}
    number = low.value(shapes.FILLED[name] if name in shapes.FILLED else op.args[at[name]])
    return Const(number.value, op.shape, op.dtype)  # type: ignore[union-attr]


def arange(low: Lowering, op: Op) -> Value:
    """Numbers in order; of tasks, where what each of them has begins."""
    start, end, step = {1: (0, *op.args, 1), 2: (*op.args, 1), 3: tuple(op.args)}[len(op.args)]
    if op.axis is not None:
        if start != 0 or not isinstance(end, Times) or end.inverse or end.factor != step or op.shape != (1,):
            raise Unsupported("tasks numbered")
        low.relative[op] = step
        return Const(0, op.shape, op.dtype)
    return low.map(f"({start} + {{d0}} * {step})", [], op.shape, op.dtype)


def joined(low: Lowering, op: Op) -> Value:
    """``cat``, ``stack``."""
    parts, d = op.args[0], (op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)) % len(op.shape)
    values = [low.values[x] for x in parts]
    stacks = op.called == "stack"
    if op.axis == d or (op.axis is not None and any(x.axis is None for x in parts)):
        raise Unsupported("tasks joined")
    if stacks:
        values = [with_one(v, d) for v in values]
    values = [v for v in values if math.prod(v.shape)]
    key = ("joined", d, op.shape, op.dtype, tuple(map(shapes.identity, values)))
    if key not in low.known:
        scope, level = low.place(values)
        buffer = Buffer(op.dtype, math.prod(op.shape), scope, level)
        whole, at = View(buffer, op.shape, contiguous(op.shape)), 0
        for value in values:
            out: Any = part(whole, d, at, value.shape[d])
            low.statements.append(Map(out, value.shape, "{0}", [value]))
            at += value.shape[d]
        low.known[key] = whole
    return low.known[key]


def padded(low: Lowering, op: Op) -> Value:
    """``constant_pad_nd``."""
    value, pads = low.values[op.args[0]], op.args[1]
    fill = op.args[2] if len(op.args) > 2 else 0
    n = len(op.shape)
    by = {n - 1 - i // 2: (pads[i], pads[i + 1]) for i in range(0, len(pads), 2)}
    if isinstance(value, Const):
        if value.value == fill:
            return Const(fill, op.shape, op.dtype)
        value = low.copied(value)
    if op.args[0].axis in by and by[op.args[0].axis] != (0, 0):
        raise Unsupported("tasks padded")
    inside: Any = value
    for d, (begin, end) in by.items():
        inside = part(inside, d, max(0, -begin), inside.shape[d] + min(0, begin) + min(0, end))
    return pad(low, inside, {d: max(0, b) for d, (b, _) in by.items()}, op.shape, fill)


def pad(
    low: Lowering, value: View, begins: dict[int, int], shape: tuple[int, ...], fill: Any, strides: Any = None
) -> View:
    """A larger tensor with a value inside it."""
    if value.shape == shape and (strides is None or shapes.same(value, value._replace(strides=strides))):
        return value
    if value.shape == shape:
        return low.copied(value, strides)
    key = ("pad", shapes.identity(value), tuple(sorted(begins.items())), shape, fill, strides)
    if key not in low.known:
        strides = strides or shapes.dense(shape, shapes.order_of(value))
        whole: Any = View(Buffer(value.dtype, math.prod(shape), *low.place([value])), shape, strides)
        inside = whole
        edges: list[Any] = []
        for d, begin in begins.items():
            end = begin + value.shape[d]
            spans = [(at, count) for at, count in ((0, begin), (end, shape[d] - end)) if count]
            edges += [part(whole, d, at, count) for at, count in spans]
            inside = part(inside, d, begin, value.shape[d])
        fills = [Map(e, e.shape, "{0}", [Const(fill, e.shape, value.dtype)]) for e in edges]
        writers = [i for i, s in enumerate(low.statements) if value.buffer in s.writes()]
        place = writers[-1] if writers else len(low.statements)
        low.statements[place:place] = (
            fills  # before the value, which may then be written right into its place
        )
        low.statements.append(Map(inside, value.shape, "{0}", [value]))
        low.known[key] = whole
    return low.known[key]


RULES = {
    **dict.fromkeys(("alias", "detach", "lift_fresh", "contiguous"), same),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), reshape),
    **dict.fromkeys(("permute", "transpose", "t"), permute),
    **dict.fromkeys(("unsqueeze", "squeeze"), ones),
    "expand": expand,
    "select": select,
    "slice": slice_,
    "flip": flip,
    **dict.fromkeys(("split", "split_with_sizes", "unbind"), split),
    **dict.fromkeys((*shapes.FILLED, "full", "full_like", "scalar_tensor", "new_full"), constant),
    "arange": arange,
    **dict.fromkeys(("cat", "stack"), joined),
    "constant_pad_nd": padded,
}  # fmt: skip
