"""Stochastic gradient descent, with momentum."""

from __future__ import annotations

from typing import NamedTuple

from fmeta import rates, tree
from fmeta.rates import RateLike
from fmeta.types import Transform, Tree


class SgdState(NamedTuple):
    """Fields that the hyperparameters do not need are ``()``."""

    t: Tree  # [], int64: updates made so far
    momentum: Tree  # like params


def sgd(
    lr: RateLike,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: RateLike = 0.0,
) -> Transform:
    """Gradient descent, equal to ``torch.optim.SGD``.

    With ``g = grads + weight_decay * params``: ``updates = -lr * g``; with momentum
    ``m = momentum * m + (1 - dampening) * g`` (at the first update ``m = g``) and ``updates = -lr * m``, or
    ``-lr * (g + momentum * m)`` with ``nesterov``.

    It has no square root, so the same rule serves as inner and outer.

    Args:
        lr: at least 0; a number, a tensor (may be differentiated), a schedule, or a dict with the
            parameters' keys.
        momentum: in [0, 1).
        dampening: in [0, 1).
        nesterov: needs ``momentum`` and no ``dampening``.
        weight_decay: at least 0, in any form that ``lr`` may have.

    Example:
        >>> import torch
        >>> rule, params = sgd(0.1), {"w": torch.zeros(2)}
        >>> updates, state = rule.update({"w": torch.ones(2)}, rule.init(params), params)
        >>> updates["w"], state
        (tensor([-0.1000, -0.1000]), ())

    References:
        Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013, eqs. 3-4;
        torch's form of them, where ``lr`` scales the momentum and not what enters it.
    """
    rate, decay = rates.rate("sgd", "lr", lr), rates.rate("sgd", "weight_decay", weight_decay)
    rates.number("sgd", "momentum", momentum, below=1.0)
    rates.number("sgd", "dampening", dampening, below=1.0)
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"sgd: nesterov=True needs momentum > 0 and dampening = 0, got momentum={momentum} and "
            f"dampening={dampening}. Pass momentum=0.9, say, and leave dampening out."
        )
    counts = rate.scheduled or decay.scheduled or (momentum > 0 and dampening > 0)

    def init(params: Tree) -> Tree:
        if not (counts or momentum):
            return ()
        return SgdState(rates.start_count(params, counts), tree.zeros_like(params) if momentum else ())

    def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        t = state.t if state else ()
        grads = rates.decay(grads, decay, t, params)
        direction, moment = _with_momentum(grads, state) if momentum else (grads, ())
        updates = rates.descend(direction, rate, t, params)
        return updates, SgdState(rates.next_count(t), moment) if state else ()

    def _with_momentum(grads: Tree, state: SgdState) -> tuple[Tree, Tree]:
        moment = tree.map(lambda m, g: momentum * m + (1 - dampening) * g, state.momentum, grads)
        if dampening:
            moment = tree.where(state.t == 0, grads, moment)
        return tree.map(lambda g, m: g + momentum * m, grads, moment) if nesterov else moment, moment

    return Transform(init, update)
