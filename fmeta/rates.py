"""What optimisation rules share: rates, the step count, weight decay, and the ranges of hyperparameters.

A rate (a learning rate, a weight decay) may be a number, a tensor, a schedule, or a tree of these that is a
prefix of the parameters. This file is the only place that knows so; the rules see one value per parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import tree
from fmeta.types import Transform, Tree

Schedule = Callable[[Tensor], Tensor]
"""``(count) -> rate``: the number of updates made so far, an int64 tensor without dimensions, to a tensor."""
RateLike = float | Tensor | Schedule | Mapping[str, Any]
"""What a user may give for a rate; a mapping has the parameters' keys, and rates or mappings as values."""

INNER_EPS_ROOT = 1e-8
"""Added inside a square root whose slope at zero would otherwise be infinite in a meta-gradient."""


class Rate(NamedTuple):
    """A rate that passed its checks."""

    zero: bool  # a plain 0, so that its term need not be computed
    scheduled: bool  # some part is a function of the step count
    at: Callable[[Tree, Tree], Tree]
    """``(count, params) -> tree like params``: numbers or tensors that broadcast to each."""


def rate(call: str, name: str, value: RateLike) -> Rate:
    """Check the rate ``name`` of the rule ``call`` and make it readable per parameter.

    Raises:
        TypeError: a leaf is no number, floating-point tensor or callable.
        ValueError: a number is negative or not finite. A tensor's value is never looked at.
    """
    given = tree.leaves(value)
    for leaf in given:
        _check_leaf(call, name, leaf)
    scheduled = any(callable(leaf) for leaf in given)

    def at(count: Tree, params: Tree) -> Tree:
        now = tree.map(lambda leaf: _evaluated(call, name, leaf, count), value) if scheduled else value
        _, spec = tree.flatten(params)
        return tree.unflatten(_spread(now, params, call, name), spec)

    return Rate(isinstance(value, Real) and value == 0, scheduled, at)


def _check_leaf(call: str, name: str, leaf: Any) -> None:
    if callable(leaf) or (isinstance(leaf, Tensor) and leaf.is_floating_point()):
        return
    if isinstance(leaf, Real) and not isinstance(leaf, bool):
        number(call, name, leaf)
        return
    kind = f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
    raise TypeError(
        f"{call}: {name} must be a number, a floating-point tensor, a schedule or a dict of these with the "
        f"parameters' keys, got {kind}. Pass a float such as 1e-3, or a schedule from fmeta.schedules."
    )


def _evaluated(call: str, name: str, leaf: Any, count: Tensor) -> Any:
    if not callable(leaf):
        return leaf
    value = leaf(count)
    if not isinstance(value, (Real, Tensor)):
        raise TypeError(
            f"{call}: the schedule given as {name} must return a tensor, got {type(value).__name__}. "
            "A schedule is a function of the step count alone."
        )
    return value


def _spread(value: Any, params: Tree, call: str, name: str) -> list[Any]:
    """One rate per leaf of ``params``, in the order of its leaves, from a rate that is a prefix of it."""
    if isinstance(value, (Mapping, tuple, list)):
        rates, parts = _items(value), _items(params)
        if rates.keys() != parts.keys():
            missing, unknown = [*(parts.keys() - rates.keys())], [*(rates.keys() - parts.keys())]
            raise ValueError(
                f"{call}: {name} must have the keys of the parameters, got missing "
                f"{sorted(missing, key=str)} and unknown {sorted(unknown, key=str)}. Give one rate per "
                "parameter, or a single rate for all."
            )
        return [r for key, part in parts.items() for r in _spread(rates[key], part, call, f"{name}[{key!r}]")]
    leaves = tree.leaves(params)
    if isinstance(value, Tensor) and value.ndim:
        for leaf in leaves:
            _check_broadcast(value, leaf, call, name)
    return [value] * len(leaves)


def _items(node: Any) -> dict[Any, Any]:
    if isinstance(node, Mapping):
        return dict(node)
    if isinstance(node, (tuple, list)):
        return dict(zip(getattr(node, "_fields", range(len(node))), node, strict=True))
    return {}


def _check_broadcast(value: Tensor, leaf: Tensor, call: str, name: str) -> None:
    ends = zip(reversed(value.shape), reversed(leaf.shape), strict=False)
    if value.ndim > leaf.ndim or any(size not in (1, wanted) for size, wanted in ends):
        raise ValueError(
            f"{call}: {name} has shape {tuple(value.shape)}, which does not broadcast to a parameter of "
            f"shape {tuple(leaf.shape)}. Give a rate without dimensions, or a dict with one rate a parameter."
        )


def number(call: str, name: str, value: Any, low: float = 0.0, below: float = math.inf) -> None:
    """Raise unless ``value`` is a plain number in ``[low, below)``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{call}: {name} must be a number, got {type(value).__name__}. Pass a Python float.")
    if not low <= float(value) < below:
        raise ValueError(
            f"{call}: {name} must be in [{low:g}, {below:g}), got {value}. Pass a value in that range."
        )


def positive(call: str, name: str, value: Any) -> None:
    """Raise unless ``value`` is a plain number above 0."""
    number(call, name, value)
    if value == 0:
        raise ValueError(f"{call}: {name} must be above 0, got {value}. Pass a positive number.")


def start_count(params: Tree, needed: bool = True) -> Tree:
    """The number of updates made so far: an int64 zero on the parameters' device, or ``()`` if not needed."""
    leaves = tree.leaves(params)
    return torch.zeros((), dtype=torch.int64, device=leaves[0].device if leaves else None) if needed else ()


def next_count(count: Tree) -> Tree:
    """``count + 1``; ``()`` stays ``()``."""
    return count + 1 if isinstance(count, Tensor) else ()


def real_count(count: Tensor, params: Tree) -> Tensor:
    """The count in the parameters' widest floating-point type, at least float32: bfloat16 counts to 256."""
    dtype = torch.float32
    for leaf in tree.leaves(params):
        dtype = torch.promote_types(dtype, leaf.dtype)
    return count.to(dtype)


def decay(grads: Tree, weight_decay: Rate, count: Tree, params: Tree) -> Tree:
    """``grads + weight_decay * params``, the gradient of an added ``weight_decay / 2 * |params|^2``."""
    if weight_decay.zero:
        return grads
    add = lambda g, rate, p: (g + rate * p).to(g.dtype)  # noqa: E731
    return tree.map(add, grads, weight_decay.at(count, params), params)


def descend(direction: Tree, lr: Rate, count: Tree, params: Tree) -> Tree:
    """``-lr * direction`` in the parameters' dtypes: what the caller adds to the parameters."""
    return tree.map(lambda d, rate, p: (-rate * d).to(p.dtype), direction, lr.at(count, params), params)


def rooted(make: Callable[[float], Transform], call: str, eps_root: float | None) -> Transform:
    """The rule with ``eps_root`` inside its square root.

    None means 0, and :data:`INNER_EPS_ROOT` for the rule used inside an inner loop.
    """
    if eps_root is None:
        return make(0.0)._replace(inner=lambda: make(INNER_EPS_ROOT))
    number(call, "eps_root", eps_root)
    return make(eps_root)
