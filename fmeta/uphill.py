"""A gradient taken a little uphill of where it is used: what sharpness-aware minimisation needs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fmeta import tree
from fmeta.rates import INNER_EPS_ROOT
from fmeta.types import Batch, InnerLoop, Tree

Gradient = Callable[[InnerLoop, Tree, Tree, Batch, Tensor], tuple[Tree, Tensor]]
"""``(loop, params, meta, batch, k) -> (gradient, value)`` of the support loss of one task at inner step ``k``."""


def uphill(at: Tree, gradient: Tree, radius: float) -> Tree:
    """``at + radius * gradient / |gradient|``, the norm over all leaves; ``at`` where the gradient is zero.

    The norm has ``INNER_EPS_ROOT`` inside its root, so that the direction has a derivative everywhere: without, that
    of a vanishing gradient is infinite. A gradient shorter than 1e-4 is therefore followed less far. Integer leaves
    stay.

    References:
        Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-aware minimization for efficiently improving
        generalization", 2021, arXiv 2010.01412, eq. 2 with p = 2.

    >>> uphill(torch.zeros(2), torch.tensor([3.0, 4.0]), 10.0)
    tensor([6., 8.])
    """
    floats = [g for g in tree.leaves(gradient) if g.is_floating_point()]
    factor = radius * torch.rsqrt(tree.squared_norm(floats) + INNER_EPS_ROOT)
    return tree.map(lambda x, g: (x + factor * g).to(x.dtype) if x.is_floating_point() else x, at, gradient)


def from_uphill(gradient: Gradient) -> Gradient:
    """The gradient from ``loop.inner_radius`` uphill of the parameters, and the value at the parameters."""

    @functools.wraps(gradient)
    def taken(loop: InnerLoop, params: Tree, meta: Tree, batch: Batch, k: Tensor) -> tuple[Tree, Tensor]:
        grads, value = gradient(loop, params, meta, batch, k)
        if loop.inner_radius:
            grads, _ = gradient(loop, uphill(params, grads, loop.inner_radius), meta, batch, k)
        return grads, value

    return taken
