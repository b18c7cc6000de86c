"""Operations on one number at a time, as C++."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

aten = torch.ops.aten


class Rule(NamedTuple):
    """``{0}``, ``{1}`` stand for operands, which are first cast to the type of the computation ``as_``.

    ``result``: the type of the result; ``operands``: what the operands promote to.
    """

    code: str
    as_: str = "result"


def both(symbol: str) -> Rule:
    """An operator between two numbers."""
    return Rule(f"({{0}} {symbol} {{1}})")


def compares(symbol: str) -> Rule:
    """A comparison."""
    return Rule(f"({{0}} {symbol} {{1}})", "operands")


def function(name: str, count: int = 1) -> Rule:
    """A function of ``runtime.h`` or the standard library."""
    return Rule(f"{name}({', '.join(f'{{{i}}}' for i in range(count))})")


RULES: dict[Any, Rule] = {
    "mul": both("*"), "div": both("/"), "maximum": function("fm_max", 2), "minimum": function("fm_min", 2),
    "pow": function("fm_pow", 2), "atan2": function("c_atan2", 2), "remainder": function("fm_mod", 2),
    "floor_divide": function("fm_floordiv", 2), "fmod": function("c_fmod", 2),
    "eq": compares("=="), "ne": compares("!="), "lt": compares("<"), "le": compares("<="), "gt": compares(">"),
    "ge": compares(">="),
    "bitwise_and": both("&"), "bitwise_or": both("|"), "bitwise_xor": both("^"),
    "logical_and": Rule("({0} != 0 && {1} != 0)", "operands"),
    "logical_or": Rule("({0} != 0 || {1} != 0)", "operands"),
    "logical_xor": Rule("(({0} != 0) != ({1} != 0))", "operands"), "logical_not": Rule("({0} == 0)", "operands"),
    "neg": Rule("(-{0})"), "abs": function("fm_abs"), "exp": function("fm_exp"), "expm1": function("c_expm1"),
    "log": function("fm_log"), "log1p": function("c_log1p"), "log2": function("c_log2"),
    "sqrt": function("c_sqrt"), "rsqrt": function("fm_rsqrt"), "reciprocal": Rule("(1 / {0})"),
    "sin": function("c_sin"), "cos": function("c_cos"), "tan": function("c_tan"),
    "asin": function("c_asin"), "acos": function("c_acos"), "atan": function("c_atan"),
    "sinh": function("c_sinh"), "cosh": function("c_cosh"), "erfc": function("c_erfc"),
    "asinh": function("c_asinh"), "acosh": function("c_acosh"), "atanh": function("c_atanh"),
    "exp2": function("c_exp2"), "log10": function("c_log10"),
    "tanh": function("fm_tanh"), "sigmoid": function("fm_sigmoid"), "erf": function("fm_erf"),
    "floor": function("c_floor"), "ceil": function("c_ceil"), "round": function("c_nearbyint"),
    "trunc": function("c_trunc"), "sign": function("fm_sign"), "sgn": function("fm_sign"),
    "relu": Rule("({0} < 0 ? 0 : {0})"), "silu": Rule("({0} * fm_sigmoid({0}))"),
    "isnan": Rule("({0} != {0})", "operands"), "isinf": Rule("(fm_abs({0}) == INFINITY)", "operands"),
    "threshold_backward": Rule("({1} <= {2} ? 0 : {0})"),
    "tanh_backward": Rule("({0} * (1 - {1} * {1}))"), "sigmoid_backward": Rule("({0} * ({1} * (1 - {1})))"),
    "leaky_relu": Rule("({0} > 0 ? {0} : {0} * {1})"),
    "leaky_relu_backward": Rule("({1} > 0 ? {0} : {0} * {2})"),
    **dict.fromkeys(("hardshrink_backward", "softshrink_backward"), Rule("({1} >= -{2} && {1} <= {2} ? 0 : {0})")),
    "clamp_min": function("fm_max", 2), "clamp_max": function("fm_min", 2), "square": Rule("({0} * {0})"),
}  # fmt: skip
"""By the name of the operation, whatever its overload."""

GELU = "({0} * (decltype({0})(0.5) * (1 + fm_erf({0} * decltype({0})(0.70710678118654752440)))))"
GELU_SLOPE = (
    "(decltype({0})(0.5) * (1 + fm_erf({0} * decltype({0})(0.70710678118654752440)))"
    " + {0} * (fm_exp({0} * {0} * decltype({0})(-0.5)) * decltype({0})(0.39894228040143267794)))"
)
INNER = "(decltype({0})(0.79788456080286535588) * ({0} + decltype({0})(0.044715) * {0} * {0} * {0}))"
GELU_TANH = f"({{0}} * (decltype({{0}})(0.5) * (1 + fm_tanh{INNER})))"


def promoted(dtypes: list[torch.dtype]) -> torch.dtype:
    """What operands are compared as."""
    found = dtypes[0]
    for other in dtypes[1:]:
        found = torch.promote_types(found, other)
    return found
