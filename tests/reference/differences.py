"""Derivatives without differentiation: central differences along a direction, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

STEP = 2e-3


def directional_derivative(
    function: Callable[[Any], Tensor], point: Any, direction: Any, step: float = STEP
) -> float:
    """``d/dt function(point + t direction)`` at 0, by the five-point formula.

    Its error is ``step**4 f^(5) / 30`` from the formula and about ``1e-16 |f| / step`` from rounding: 1e-10
    and better on the smooth problems of these tests.
    """

    def at(multiple: float) -> float:
        moved = pytree.tree_map(lambda leaf, towards: leaf + multiple * step * towards, point, direction)
        return function(moved).detach().double().item()

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


def random_direction(tree: Any, seed: int) -> Any:
    """A random direction of norm 1 with the structure of ``tree``."""
    generator = torch.Generator().manual_seed(seed)
    leaves, structure = pytree.tree_flatten(tree)
    drawn = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in leaves]
    norm = torch.stack([value.pow(2).sum() for value in drawn]).sum().sqrt()
    return pytree.tree_unflatten([value / norm for value in drawn], structure)
