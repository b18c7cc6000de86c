"""Largest numbers of windows, and where they were."""

from __future__ import annotations

import math
from typing import Any

import torch

from fmeta.parallel.native import shapes
from fmeta.parallel.native.axis import Op
from fmeta.parallel.native.indexing import along
from fmeta.parallel.native.ir import Address, Const, Map, Unsupported, Value, View
from fmeta.parallel.native.lower import Lowering


def largest(low: Lowering, op: Op) -> list[Value]:
    """``max_pool2d_with_indices``."""
    x, kernel, *rest = op.args
    given: list[Any] = [*rest, *[[], [0, 0], [1, 1], False][len(rest) :]]
    stride, padding, dilation, up = given
    value = low.values[x]
    if len(x.shape) != 4 or x.axis in (2, 3) or isinstance(value, Const) or up:
        raise Unsupported("pooling over tasks")
    two = lambda v: (v[0], v[-1])  # noqa: E731
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = two(kernel), two(stride or kernel), two(padding), two(dilation)
    (h, w), (hs, ws), shape = x.shape[2:], value.strides[2:], op.results[0].shape
    over = View(value.buffer, shape, (*value.strides[:2], 0, 0), value.offset)
    code = (
        f"fm_pool({{0}}, (int){{d2}} * {sh} - {ph}, (int){{d3}} * {sw} - {pw}, "
        f"{kh}, {kw}, {dh}, {dw}, {h}, {w}, {hs}, {ws})"
    )
    at: Any = low.map(
        code,
        [Address(over)],
        shape,
        torch.int64,
        strides=shapes.laid_out_like(shape, [value._replace(shape=shape)]),
    )
    taken = f"{{1}}[({{0}} / {w}) * {hs} + ({{0}} % {w}) * {ws}]"
    return [low.map(taken, [at, Address(over)], shape, x.dtype, strides=at.strides), at]


def gradient(low: Lowering, op: Op) -> Value:
    """``max_pool2d_with_indices_backward``: numbers added where the largest were."""
    ct, x, at = low.values[op.args[0]], low.values[op.args[1]], low.values[op.args[-1]]
    if isinstance(ct, Const) or isinstance(at, Const):
        return Const(0.0, op.shape, op.dtype)
    strides = shapes.laid_out_like(op.shape, [x])
    if op.shape[2] > 1 and strides[2] != strides[3] * op.shape[3]:
        raise Unsupported("pooling of images in this order")
    scope, level = low.place([ct, at])
    out = low.map(
        "{0}", [Const(0.0, (), op.dtype)], op.shape, op.dtype, scope=scope, key=object(), strides=strides
    )
    out.buffer.level = level
    flat = View(out.buffer, (*op.shape[:2], math.prod(op.shape[2:]), 1), (*strides[:2], strides[3], 0))
    to = along(flat, 2, ct.shape, 0)
    low.statements.append(Map(out, ct.shape, "{1}", [at, ct], "sum", scatter=to, fresh=False))
    return out


RULES = {"max_pool2d_with_indices": largest, "max_pool2d_with_indices_backward": gradient}
