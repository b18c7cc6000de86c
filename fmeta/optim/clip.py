"""Limits on gradients, or on updates where they come after an optimiser in a chain."""

from __future__ import annotations

import torch
from torch import Tensor

from fmeta import rates, tree
from fmeta.types import Transform, Tree


def clip_by_norm(max_norm: float, *, eps: float = 1e-6, eps_root: float | None = None) -> Transform:
    """Scale all gradients together so that their joint norm is at most ``max_norm``.

    ``updates = grads * min(1, max_norm / (sqrt(|grads|^2 + eps_root) + eps))``, equal to
    ``torch.nn.utils.clip_grad_norm_``. The norm is that of ONE task's gradients in an inner loop, and is
    computed in float32 at least.

    **Meta-gradient:** exact. The norm has no derivative where all gradients are 0; ``eps_root`` gives it one,
    as for :func:`fmeta.optim.adam`.

    Args:
        max_norm: positive.
        eps: at least 0; the default is torch's.
        eps_root: at least 0; None for 0 outside and 1e-8 inside an inner loop.
    """
    _positive("clip_by_norm", "max_norm", max_norm)
    rates.number("clip_by_norm", "eps", eps)

    def make(root: float) -> Transform:
        def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
            if not tree.leaves(grads):
                return grads, state
            wide = tree.map(lambda g: g.to(torch.promote_types(g.dtype, torch.float32)), grads)
            factor = (max_norm / (torch.sqrt(tree.squared_norm(wide) + root) + eps)).clamp_max(1)
            return tree.map(lambda g: (factor * g).to(g.dtype), grads), state

        return Transform(lambda params: (), update)

    return rates.rooted(make, "clip_by_norm", eps_root)


def clip_by_value(limit: float) -> Transform:
    """Clamp every entry to ``[-limit, limit]``, as ``torch.nn.utils.clip_grad_value_``.

    **Meta-gradient:** exact; a clamped entry passes no derivative.

    Args:
        limit: positive.
    """
    _positive("clip_by_value", "limit", limit)

    def clamped(g: Tensor) -> Tensor:
        return g.clamp(-limit, limit)

    return Transform(lambda params: (), lambda grads, state, params: (tree.map(clamped, grads), state))


def _positive(call: str, name: str, value: float) -> None:
    rates.number(call, name, value)
    if value == 0:
        raise ValueError(
            f"{call}: {name} must be positive, got 0. Leave the clipping out, or freeze instead."
        )
