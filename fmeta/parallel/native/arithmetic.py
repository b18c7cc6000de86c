"""Operations on one number at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from fmeta.parallel.native import shapes
from fmeta.parallel.native.axis import Op
from fmeta.parallel.native.ir import (
    NAMES,
    Const,
    Unsupported,
    Value,
    View,
)
from fmeta.parallel.native.lower import Lowering
from fmeta.parallel.native.pointwise import GELU, GELU_SLOPE, GELU_TANH, promoted
from fmeta.parallel.native.pointwise import RULES as CODES


def cast(code: str, values: list[Any], dtype: torch.dtype, only: list[int] | None = None) -> str:
    """Code with operands cast to the type of the computation; a half is true."""

    def one(match: re.Match[str]) -> str:
        i = int(match[1])
        if only is not None and i not in only:
            return match[0]
        v = values[i]
        if isinstance(v, View) and v.dtype == dtype:
            return match[0]
        return f"({match[0]} != 0)" if dtype == torch.bool else f"(({NAMES[dtype]}){match[0]})"

    return re.sub(r"\{(\d+)\}", one, code)


def computed(low: Lowering, op: Op, code: str, values: list[Value], dtype: torch.dtype) -> Value:
    """Code on operands of the type ``dtype``; on the spot where all are known."""
    if all(isinstance(v, Const) and not isinstance(v.value, str) for v in values):
        numbers: Any = iter(values)
        args = [
            next(numbers).value if isinstance(a, (Op, int, float)) and not isinstance(a, bool) else a
            for a in op.args
        ]
        like = [
            torch.tensor(a, dtype=x.dtype) if isinstance(x, Op) else a
            for a, x in zip(args, op.args, strict=True)
        ]
        return Const(op.target(*like, **op.kwargs).tolist(), op.shape, op.dtype)
    small = all(isinstance(v, Const) for v in values)
    found: Value = low.map(cast(code, values, dtype), values, () if small else op.shape, op.dtype)
    return shapes.expand(found, op.shape)


def pointwise(low: Lowering, op: Op) -> Value:
    """An operation of the table."""
    name = op.called
    rule = CODES[name]
    given = [*op.args, *(argument.default_value for argument in op.target._schema.arguments[len(op.args) :])]
    values = [
        low.value(a) for a in given if isinstance(a, (Op, int, float, tuple)) and not isinstance(a, bool)
    ]
    values = values[: len(set(re.findall(r"\{(\d)\}", rule.code)))]
    tensors = [v for v, a in zip(values, op.args, strict=False) if isinstance(a, Op)]
    if any(option is not None for option in op.kwargs.values()):
        raise Unsupported(f"{name} with {op.kwargs}")
    easy = folded(name, op, values)
    if easy is not None:
        return shapes.expand(easy, op.shape)
    if rule.as_ == "operands":
        dtype = promoted([v.dtype for v in tensors])
        if not dtype.is_floating_point and any(v.dtype.is_floating_point for v in values):
            dtype = torch.float32
    else:
        dtype = op.dtype
    code = rule.code
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
        -0.5: "fm_rsqrt({0})",
    }
    known |= {-2: "(1 / ({0} * {0}))", 4: "(({0} * {0}) * ({0} * {0}))", 1.5: "({0} * c_sqrt({0}))"}
    if isinstance(exponent, Const) and not isinstance(exponent.value, str):
        return known.get(exponent.value, "")
    return ""


def folded(name: str, op: Op, values: list[Value]) -> Value | None:
    """Ones that need no computation; a number times 0 does, since it may be infinite."""
    if not op.dtype.is_floating_point:
        return None
    a, b = values[0], values[1] if len(values) > 1 else None
    if name == "mul" and b is not None:
        for one, other in ((a, b), (b, a)):
            if shapes.is_(one, 1) and other.dtype == op.dtype:
                return other
    if name in ("div", "pow") and b is not None and shapes.is_(b, 1) and a.dtype == op.dtype:
        return a
    if name == "pow" and b is not None and shapes.is_(b, 0):
        return Const(1.0, op.shape, op.dtype)
    return Const(0.0, op.shape, op.dtype) if name == "threshold_backward" and shapes.is_(a, 0) else None


def add(low: Lowering, op: Op) -> Value:
    """``add`` and ``sub`` with their factor."""
    name, (a, b) = op.called, [low.value(x) for x in op.args[:2]]
    factor = low.value(op.kwargs.get("alpha", op.args[2] if len(op.args) > 2 else 1))
    if op.dtype.is_floating_point and shapes.is_(factor, 1):
        if shapes.is_(b, 0) and a.dtype == op.dtype:
            return shapes.expand(a, op.shape)
        if shapes.is_(a, 0) and b.dtype == op.dtype and name == "add":
            return shapes.expand(b, op.shape)
    sign = "+" if name == "add" else "-"
    if shapes.is_(factor, 1):
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
    if value.dtype == op.dtype:
        return value
    if isinstance(value, Const):
        known: Any = value.value
        if not isinstance(known, str):
            known = torch.tensor(known, dtype=op.dtype).tolist()
        return Const(known, op.shape, op.dtype)
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
    if is_one_for_all(values[0], op.shape) and op.dtype in (torch.float32, torch.float64):
        # gcc 12 vectorises no loop with `c ? a : b` in it if c is the same bool in all of it ("relevant stmt not
        # supported"): a guard such as where(finite, state, before) would slow down all that shares its loop
        code = "fm_pick({0}, {1}, {2})"
    else:
        code = "({0} ? {1} : {2})"
    return low.map(cast(code, values, op.dtype, [1, 2]), values, op.shape, op.dtype)


def is_one_for_all(value: Value, shape: Sequence[int]) -> bool:
    """Whether a condition is a single one for all numbers of a tensor that has several."""
    fixed = isinstance(value, View) and all(
        stride == 0 or n == 1 for stride, n in zip(value.strides, value.shape, strict=True)
    )
    return fixed and math.prod(shape) > 1


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
    if len(values) == 2:  # the slope by itself: what else is multiplied by it finds it there
        slope = low.map(GELU_SLOPE, values[1:], op.shape, op.dtype)
        return low.map("({0} * {1})", [values[0], slope], op.shape, op.dtype)
    return low.map(GELU_TANH if smooth else GELU, values, op.shape, op.dtype)


RULES = {
    **dict.fromkeys(CODES, pointwise),
    **dict.fromkeys(("add", "sub"), add),
    "bitwise_not": inverted,
    **dict.fromkeys(("_to_copy", "clone"), converted),
    "where": where,
    "clamp": clamp,
    **dict.fromkeys(("gelu", "gelu_backward"), gelu),
}
