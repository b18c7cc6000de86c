"""RMSProp, plain or centred, with momentum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmeta import rates, tree
from fmeta.rates import RateLike
from fmeta.types import Transform, Tree


class RmspropState(NamedTuple):
    """Fields that the hyperparameters do not need are ``()``."""

    t: Tree  # [], int64: updates made so far
    nu: Tree  # like params: mean of the squared gradients
    mu: Tree  # like params: mean of the gradients
    momentum: Tree  # like params


def rmsprop(
    lr: RateLike = 1e-2,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    eps_root: float | None = None,
    momentum: float = 0.0,
    centered: bool = False,
    weight_decay: RateLike = 0.0,
) -> Transform:
    """RMSProp, equal to ``torch.optim.RMSprop``: gradients divided by a running root mean square.

    With ``g = grads + weight_decay * params``::

        nu = alpha * nu + (1 - alpha) * g^2       d = g / (sqrt(nu + eps_root) + eps)
        updates = -lr * d, or with momentum m = momentum * m + d and updates = -lr * m

    and, ``centered``, ``nu - mu^2`` in place of ``nu`` in the root, ``mu = alpha * mu + (1 - alpha) * g``;
    where rounding makes that difference negative torch returns NaN, and here it counts as 0.

    **Meta-gradient:** exact; ``eps_root`` as for :func:`fmeta.optim.adam`.

    Args:
        lr: at least 0; a number, a tensor (may be differentiated), a schedule, or a dict with the
            parameters' keys. The defaults are torch's.
        alpha: decay of the mean square, in [0, 1).
        eps: at least 0, outside the root.
        eps_root: at least 0, inside the root; None for 0 outside and 1e-8 inside an inner loop.
        momentum: in [0, 1).
        centered: divide by the standard deviation.
        weight_decay: at least 0, in any form that ``lr`` may have; added to the gradient.

    References:
        Hinton, "Neural Networks for Machine Learning", 2012, lecture 6e; the centred form is Graves,
        "Generating Sequences With Recurrent Neural Networks", 2013, arXiv 1308.0850, eqs. 38-41, with ``eps``
        outside the root.
    """
    rate, decay = rates.rate("rmsprop", "lr", lr), rates.rate("rmsprop", "weight_decay", weight_decay)
    rates.number("rmsprop", "alpha", alpha, below=1.0)
    rates.number("rmsprop", "eps", eps)
    rates.number("rmsprop", "momentum", momentum, below=1.0)

    def init(params: Tree) -> RmspropState:
        zeros = lambda wanted: tree.zeros_like(params) if wanted else ()  # noqa: E731
        t = rates.start_count(params, rate.scheduled or decay.scheduled)
        return RmspropState(t, zeros(True), zeros(centered), zeros(momentum))

    def make(root: float) -> Transform:
        def scaled(g: Tensor, v: Tensor) -> Tensor:
            return g / (torch.sqrt(v + root) + eps)

        def update(grads: Tree, state: RmspropState, params: Tree) -> tuple[Tree, RmspropState]:
            average = lambda mean, new: alpha * mean + (1 - alpha) * new  # noqa: E731
            grads = rates.decay(grads, decay, state.t, params)
            nu = tree.map(lambda v, g: average(v, g * g), state.nu, grads)
            mu = tree.map(average, state.mu, grads) if centered else ()
            spread = tree.map(lambda v, m: (v - m * m).clamp_min(0), nu, mu) if centered else nu
            direction = tree.map(scaled, grads, spread)
            moment: Tree = ()
            if momentum:
                direction = moment = tree.map(lambda m, d: momentum * m + d, state.momentum, direction)
            updates = rates.descend(direction, rate, state.t, params)
            return updates, RmspropState(rates.next_count(state.t), nu, mu, moment)

        return Transform(init, update)

    return rates.rooted(make, "rmsprop", eps_root)
