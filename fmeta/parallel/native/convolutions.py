"""Convolutions in two dimensions and their derivatives: products whose rows are found in padded images.

Images are ``[n, h, w, c]`` in memory. For an output position a row of the left matrix is its patch, which is never
laid out: it is found kernel position by kernel position, a run of channels each.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

from fmeta.parallel.native import shapes
from fmeta.parallel.native.arithmetic import cast
from fmeta.parallel.native.axis import Op, Times
from fmeta.parallel.native.ir import Const, Grid, Map, Unsupported, Value, View
from fmeta.parallel.native.lower import Lowering
from fmeta.parallel.native.products import by_tables
from fmeta.parallel.native.views import pad

GROUPS = 16
"""Most groups that are taken one by one."""


class Setting(NamedTuple):
    """How a convolution moves."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def setting(args: list[Any]) -> Setting:
    """From the arguments that follow the tensors."""
    stride, padding, dilation, transposed, _, groups = args
    if transposed or any(isinstance(n, Times) for n in (*stride, *padding, *dilation)):
        raise Unsupported("a transposed convolution")
    of_one = int(groups.factor) if isinstance(groups, Times) else groups
    two = lambda v: (v[0], v[-1])  # noqa: E731
    if of_one > GROUPS:
        raise Unsupported("a convolution of many groups")
    return Setting(two(stride), two(padding), two(dilation), of_one)


def last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of ``[n, c, h, w]`` with channels last."""
    _, c, h, w = shape
    return (h * w * c, 1, w * c, c)


def grid(*sides: tuple[int, int]) -> Grid:
    """Points of a grid by the sizes and steps of its sides."""
    return Grid(0, sides)


def padded(low: Lowering, x: View, s: Setting) -> View:
    """Images with zeros around them."""
    n, c, h, w = x.shape
    shape = (n, c, h + 2 * s.padding[0], w + 2 * s.padding[1])
    return pad(low, x, {2: s.padding[0], 3: s.padding[1]}, shape, 0.0, last(shape))


def by_filter(low: Lowering, w: View) -> View:
    """Weights ``[f, c, kh, kw]`` as ``[kh, kw, f, c]``."""
    return low.copied(shapes.permute(w, [2, 3, 0, 1]))


def by_channel(low: Lowering, w: View) -> View:
    """Weights ``[f, c, kh, kw]`` as ``[kh, kw, c, f]``; by way of the other order, since both copies are fast."""
    return low.copied(shapes.permute(by_filter(low, w), [0, 1, 3, 2]))


def known(low: Lowering, key: tuple[Any, ...], make: Any) -> Any:
    """Computed once."""
    if key not in low.known:
        low.known[key] = make()
    return low.known[key]


def taps(s: Setting, kh: int, kw: int, row: int, c: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the kernel positions are from the first."""
    return (kh, s.dilation[0] * row), (kw, s.dilation[1] * c)


def output(low: Lowering, x: View, w: View, s: Setting, shape: tuple[int, ...]) -> View:
    """The convolution."""
    (n, f, oh, ow), (_, c, kh, kw) = shape, w.shape
    x = padded(low, x, s)
    (_, all_c, hp, wp), g = x.shape, s.groups
    w = by_channel(low, w)
    out = low.target("sum", shape, last(shape), x.dtype, *low.place([x, w]), False)[0]
    row = wp * all_c
    places = grid((n, hp * row), (oh, s.stride[0] * row), (ow, s.stride[1] * all_c))
    tables = [places, grid((n * oh * ow, f)), grid(*taps(s, kh, kw, row, all_c)), grid((kh * kw, c * f))]
    for i in range(g):
        a, b, to = moved(x, i * c), moved(w, i * (f // g)), moved(out, i * (f // g))
        low.statements.append(by_tables(a, b, to, f // g, c, 1, f, tables, False))
    low.count(2 * n * oh * ow * f * c * kh * kw, [x, w])
    return out


def moved(x: View, by: int) -> View:
    """A view further on."""
    return x._replace(offset=x.offset + by)


def weight(low: Lowering, ct: View, x: View, s: Setting, shape: tuple[int, ...], tasks: bool) -> View:
    """The derivative to the weight: over positions, inputs times cotangents."""
    (f, c, kh, kw), (n, _, oh, ow), g = shape, ct.shape, s.groups
    x = padded(low, x, s)
    ct = pad(low, ct, {}, ct.shape, 0.0, last(ct.shape))
    (_, all_c, hp, wp) = x.shape
    scope, level = low.place([x, ct])
    strides = (1, f, kw * c * f, c * f)
    out, result = low.target("sum", shape, strides, x.dtype, scope, level, tasks)
    row = wp * all_c
    places = grid(*taps(s, kh, kw, row, all_c), (c, 1))
    tables = [
        places,
        grid((kh * kw * c, f)),
        grid((n, hp * row), (oh, s.stride[0] * row)),
        grid((n * oh, ow * f)),
    ]
    for i in range(g):
        a, b, to = moved(x, i * c), moved(ct, i * (f // g)), moved(out, i * (f // g))
        low.statements.append(by_tables(a, b, to, f // g, ow, s.stride[1] * all_c, f, tables, tasks))
    low.count(2 * n * oh * ow * f * c * kh * kw, [x, ct])
    return result


def image(low: Lowering, ct: View, w: View, s: Setting, shape: tuple[int, ...], tasks: bool) -> View:
    """The derivative to the images.

    An input at ``stride * q + r`` of the padded image was read at positions ``q - m`` by the kernel positions
    ``r + m * stride``: for every remainder r, a product over these and the filters.
    """
    if s.dilation != (1, 1):
        raise Unsupported("the derivative of a dilated convolution")
    (n, _, h, wide), (_, f, oh, ow), (_, c, kh, kw) = shape, ct.shape, w.shape
    back = (kh - 1) // s.stride[0], (kw - 1) // s.stride[1]
    most = [(size + p - 1) // st for size, p, st in zip((h, wide), s.padding, s.stride, strict=True)]
    size = tuple(b + max(o, q + 1) for b, o, q in zip(back, (oh, ow), most, strict=True))
    ct = pad(low, ct, {2: back[0], 3: back[1]}, (n, f, *size), 0.0, last((n, f, *size)))
    w = by_filter(low, w)
    scope, level = low.place([ct, w])
    out, result = low.target("sum", shape, last(shape), ct.dtype, scope, level, tasks)
    if (kh < s.stride[0] or kw < s.stride[1]) and not tasks:
        low.statements.append(Map(out, shape, "{0}", [Const(0.0, shape, ct.dtype)]))
    for r in itertools.product(range(min(kh, s.stride[0])), range(min(kw, s.stride[1]))):
        tables = meeting(r, s, shape, (kh, kw), (f, c), size, back)
        for i in range(s.groups if tables[0].points else 0):
            a, b, to = moved(ct, i * (f // s.groups)), moved(w, i * (f // s.groups) * c), moved(out, i * c)
            low.statements.append(by_tables(a, b, to, c, f // s.groups, 1, c, tables, tasks))
    low.count(2 * n * oh * ow * f * c * kh * kw, [ct, w])
    return result


def meeting(
    r: tuple[int, int], s: Setting, shape: tuple[int, ...], kernel: tuple[int, int], channels: tuple[int, int],
    size: tuple[int, ...], back: tuple[int, int],
) -> list[Grid]:  # fmt: skip
    """The tables of one remainder."""
    (n, all_c, h, w), (f, c), (sh, sw), (kh, kw) = shape, channels, s.stride, kernel
    spans = []
    for rest, p, st, extent in zip(r, s.padding, s.stride, (h, w), strict=True):
        spans.append(range(max(0, math.ceil((p - rest) / st)), (extent + p - 1 - rest) // st + 1))
    (q, t), (many, wide) = (span.start for span in spans), map(len, spans)
    first = ((q + back[0]) * size[1] + t + back[1]) * f
    rows = Grid(first, ((n, size[0] * size[1] * f), (many, size[1] * f), (wide, f)))
    first = ((sh * q + r[0] - s.padding[0]) * w + sw * t + r[1] - s.padding[1]) * all_c
    to = Grid(first, ((n, h * w * all_c), (many, sh * w * all_c), (wide, sw * all_c)))
    down, right = len(range(r[0], kh, sh)), len(range(r[1], kw, sw))
    ka = grid((down, -size[1] * f), (right, -f))
    kb = Grid((r[0] * kw + r[1]) * f * c, ((down, sh * kw * f * c), (right, sw * f * c)))
    return [rows, to, ka, kb]


def forward(low: Lowering, op: Op) -> Value:
    """``convolution``."""
    x, w, bias, *rest = op.args
    s, a, b = setting(rest), low.values[x], low.values[w]
    check(x, w, rest[-1], op)
    if shapes.is_(a, 0) or shapes.is_(b, 0):
        found: Value = Const(0.0, op.shape, op.dtype)
    else:
        a, b = (low.copied(v) if isinstance(v, Const) else v for v in (a, b))
        key = ("convolution", shapes.identity(a), shapes.identity(b), s)
        found = known(low, key, lambda: output(low, a, b, s, op.shape))
    if bias is not None:
        one = low.value(bias)
        wide = one._replace(shape=(1, one.shape[0], 1, 1))
        if isinstance(wide, View):
            wide = wide._replace(strides=(0, one.strides[0], 0, 0))  # type: ignore[union-attr]
        operands = [found, wide]
        return low.map(cast("({0} + {1})", operands, op.dtype), operands, op.shape, op.dtype)
    return found


def check(x: Op, w: Op, groups: Any, op: Op) -> None:
    """Refuse what is not one convolution for each task."""
    each = isinstance(groups, Times)
    allowed = [(None, None), (0, None), (None, 0)] if not each else [(1, 0)]
    if len(op.args[0].shape) != 4 or (x.axis, w.axis) not in allowed:
        raise Unsupported("a convolution of other tasks or dimensions")


def backward(low: Lowering, op: Op) -> list[Any]:
    """``convolution_backward``."""
    ct, x, w, _, *rest = op.args
    s = setting(rest[:-1])
    check(x, w, rest[5], op)
    c, a, b = (low.values[v] for v in (ct, x, w))
    found: list[Any] = [None, None, None]
    for i, other in op.results.items():
        if i == 2:
            if isinstance(c, Const):
                c = low.copied(c)
            tasks = other.axis is None and low.place([c])[0] == "task"
            kept = low.reduce("sum", "{0}", [c], c.shape, [0, 2, 3], other.dtype, tasks)
            found[2] = View(kept.buffer, other.shape, (kept.strides[1],), kept.offset)
            continue
        second = (b, a)[i]
        if shapes.is_(c, 0) or shapes.is_(second, 0):
            found[i] = Const(0.0, other.shape, other.dtype)
            continue
        first, second = (low.copied(v) if isinstance(v, Const) else v for v in (c, second))
        tasks = other.axis is None and op_has_tasks(ct, (w, x)[i])
        if tasks and low.place([first, second])[0] == "shared":
            raise Unsupported("a sum over tasks of what they share")
        key = ("backward", i, shapes.identity(first), shapes.identity(second), s, tasks, other.shape)
        make = (image, weight)[i]
        found[i] = known(
            low, key, lambda m=make, p=first, q=second, o=other, t=tasks: m(low, p, q, s, o.shape, t)
        )
    return found


def op_has_tasks(*ops: Op) -> bool:
    """Whether any has a dimension of tasks."""
    return any(op.axis is not None for op in ops)


RULES = {"convolution": forward, "convolution_backward": backward}
