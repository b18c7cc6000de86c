"""AdaGrad."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmeta import rates, tree
from fmeta.rates import RateLike
from fmeta.types import Transform, Tree


class AdagradState(NamedTuple):
    """``t`` is ``()`` where no hyperparameter needs it."""

    t: Tree  # [], int64: updates made so far
    total: Tree  # like params: sum of the squared gradients


def adagrad(
    lr: RateLike = 1e-2,
    *,
    lr_decay: float = 0.0,
    initial_accumulator: float = 0.0,
    eps: float = 1e-10,
    eps_root: float | None = None,
    weight_decay: RateLike = 0.0,
) -> Transform:
    """AdaGrad, equal to ``torch.optim.Adagrad``: rates that fall with all squared gradients so far.

    With ``g = grads + weight_decay * params`` and ``t`` updates made before this one::

        total = total + g^2
        updates = -lr / (1 + t * lr_decay) * g / (sqrt(total + eps_root) + eps)

    **Meta-gradient:** exact; ``eps_root`` as for :func:`fmeta.optim.adam`. A positive
    ``initial_accumulator`` makes the root safe as well, so then ``eps_root`` stays 0 unless you set it.

    Args:
        lr: at least 0; a number, a tensor (may be differentiated), a schedule, or a dict with the
            parameters' keys. The defaults are torch's.
        lr_decay: at least 0.
        initial_accumulator: ``total`` before the first update, at least 0.
        eps: at least 0, outside the root.
        eps_root: at least 0, inside the root; None for 0 outside and 1e-8 inside an inner loop.
        weight_decay: at least 0, in any form that ``lr`` may have; added to the gradient.

    References:
        Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
        Optimization", 2011, figure 1 (diagonal), with ``eps`` outside the root, as in torch.
    """
    rate, decay = rates.rate("adagrad", "lr", lr), rates.rate("adagrad", "weight_decay", weight_decay)
    rates.number("adagrad", "lr_decay", lr_decay)
    rates.number("adagrad", "initial_accumulator", initial_accumulator)
    rates.number("adagrad", "eps", eps)

    def init(params: Tree) -> AdagradState:
        t = rates.start_count(params, rate.scheduled or decay.scheduled or lr_decay > 0)
        return AdagradState(t, tree.map(lambda p: torch.full_like(p, initial_accumulator), params))

    def make(root: float) -> Transform:
        def scaled(g: Tensor, s: Tensor) -> Tensor:
            return g / (torch.sqrt(s + root) + eps)

        def update(grads: Tree, state: AdagradState, params: Tree) -> tuple[Tree, AdagradState]:
            grads = rates.decay(grads, decay, state.t, params)
            total = tree.map(lambda s, g: s + g * g, state.total, grads)
            direction = tree.map(scaled, grads, total)
            if lr_decay:
                direction = tree.scale(direction, 1 / (1 + lr_decay * rates.real_count(state.t, params)))
            updates = rates.descend(direction, rate, state.t, params)
            return updates, AdagradState(rates.next_count(state.t), total)

        return Transform(init, update)

    if eps_root is None and initial_accumulator > 0:
        return make(0.0)
    return rates.rooted(make, "adagrad", eps_root)
