"""Numbers found by index, added or set by index, and changed in place."""

from __future__ import annotations

from typing import Any

import torch

from fmeta.parallel.native import shapes
from fmeta.parallel.native.arithmetic import cast
from fmeta.parallel.native.axis import Op
from fmeta.parallel.native.ir import (
    Const,
    Indirect,
    Map,
    Unsupported,
    Value,
    View,
    contiguous,
)
from fmeta.parallel.native.lower import Lowering
from fmeta.parallel.native.pointwise import RULES as CODES


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
    name, x = op.called, op.args[0]
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
    d, index, src = op.args[1] % len(op.shape), op.args[2], low.value(op.args[3])
    if op.axis == d or len(op.args) > 4 or op.kwargs.get("reduce"):
        raise Unsupported("tasks by index")
    at = low.values[index]
    if isinstance(at, Const):
        at = low.copied(at)
    out = copied_for(low, op, [at, src])
    where_to = along(out, d, index.shape, 0)
    kind = "sum" if op.called == "scatter_add" else "store"
    operands: list[Any] = [
        at,
        shapes.expand(src, index.shape) if isinstance(src, Const) else src._replace(shape=index.shape),
    ]
    code = cast("{1}", operands, op.dtype)
    low.statements.append(Map(out, index.shape, code, operands, kind, scatter=where_to, fresh=False))
    return out


def put(low: Lowering, op: Op) -> Value:
    """``index_put`` by a single tensor: a copy, some of whose rows are set or added to."""
    _, indices, values, *adds = op.args
    found = [(d, v) for d, v in enumerate(indices) if v is not None]
    if len(found) != 1 or found[0][1].dtype == torch.bool or op.axis == found[0][0]:
        raise Unsupported("an index of several tensors, or of conditions")
    (d, index), src = found[0], low.values[values]
    at = low.copied(low.values[index])
    shape, k = (*op.shape[:d], *index.shape, *op.shape[d + 1 :]), len(index.shape)
    out = copied_for(low, op, [at, src])
    over = View(at.buffer, shape, (*[0] * d, *at.strides, *[0] * (len(shape) - d - k)), at.offset)
    strides = (*out.strides[:d], *[0] * k, *out.strides[d + 1 :])
    to = Indirect(View(out.buffer, shape, strides), out.strides[d], op.shape[d], 0, True)
    operands: list[Any] = [over, shapes.expand(src, shape)]
    kind = "sum" if any(adds) or op.kwargs.get("accumulate") else "store"
    low.statements.append(
        Map(out, shape, cast("{1}", operands, op.dtype), operands, kind, scatter=to, fresh=False)
    )
    return out


def copied_for(low: Lowering, op: Op, others: list[Value]) -> View:
    """A copy of the first argument, where others are known that change it."""
    scope, level = low.place(others)
    base = low.values[op.args[0]]
    out = low.map("{0}", [base], op.shape, op.dtype, scope=scope, key=object(), strides=contiguous(op.shape))
    out.buffer.level = max(out.buffer.level, level)
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


PLAIN = (("alpha", 1), ("non_blocking", False))
"""Options that change nothing."""


def in_place(low: Lowering, op: Op) -> Value:
    """``copy_``, ``div_`` and their like."""
    name, x = op.called[:-1], op.args[0]
    value = low.values[x]
    if isinstance(value, Const) or value.buffer.place == "argument":
        raise Unsupported("an argument written to")
    others = [low.value(a) for a in op.args[1:] if not isinstance(a, bool)]
    codes = {key: rule.code for key, rule in CODES.items()}
    codes |= {
        "masked_fill": "({1} ? {2} : {0})",
        "copy": "{1}",
        "fill": "{1}",
        "zero": "0",
        "add": "({0} + {1})",
        "sub": "({0} - {1})",
    }
    said = {key: x for key, x in op.kwargs.items() if x is not None and (key, x) not in PLAIN}
    if name not in codes or said:
        raise Unsupported(f"the operation {op.target} with {said}")
    operands = [value, *(shapes.expand(v, value.shape) for v in others)]
    if name in CODES and CODES[name].as_ == "operands" and any(v.dtype != value.dtype for v in others):
        raise Unsupported("numbers of two types compared in place")
    scope, level = low.place(operands)
    if scope != value.buffer.scope or level > value.buffer.level:
        raise Unsupported("a shared tensor written to by tasks")
    code = cast(codes[name], operands, value.dtype)
    low.statements.append(Map(value, value.shape, code, operands, fresh=False))
    value.buffer.changed += 1
    return value


RULES = {
    "gather": gather,
    **dict.fromkeys(("embedding", "index_select", "index"), indexed),
    **dict.fromkeys(("scatter", "scatter_add"), scattered),
    "index_put": put,
    "embedding_dense_backward": embedding_gradient,
    **dict.fromkeys(
        (f"{name}_" for name in (*CODES, "masked_fill", "copy", "fill", "zero", "add", "sub")), in_place
    ),
}
