"""Lion."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fmeta import rates, tree
from fmeta.rates import RateLike
from fmeta.types import Transform, Tree


class LionState(NamedTuple):
    """``t`` is ``()`` where no hyperparameter needs it."""

    t: Tree  # [], int64: updates made so far
    momentum: Tree  # like params


def lion(
    lr: RateLike = 1e-4, *, b1: float = 0.9, b2: float = 0.99, weight_decay: RateLike = 0.0
) -> Transform:
    """Lion: steps of exactly ``lr``, in the direction of the sign of an interpolated momentum.

    ``updates = -lr * (sign(b1 * m + (1 - b1) * grads) + weight_decay * params)``, then
    ``m = b2 * m + (1 - b2) * grads``.

    **Meta-gradient:** exact, but the sign has a zero derivative wherever it has one: as an inner rule nothing
    of the inner gradients is differentiated. What remains is the path through the parameters themselves
    (``1 - lr * weight_decay`` a step) and the derivatives to ``lr`` and ``weight_decay``: ``unroll()`` gives
    what ``first_order()`` gives. It has no root, so one rule serves as inner and outer.

    Args:
        lr: at least 0; a number, a tensor (may be differentiated), a schedule, or a dict with the
            parameters' keys. The defaults are the paper's.
        b1: weight of the momentum in the step's direction, in [0, 1).
        b2: decay of the momentum, in [0, 1).
        weight_decay: at least 0, in any form that ``lr`` may have; decoupled, as in AdamW.

    References:
        Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, arXiv 2302.06675, Algorithm 2.
    """
    rate, decay = rates.rate("lion", "lr", lr), rates.rate("lion", "weight_decay", weight_decay)
    rates.number("lion", "b1", b1, below=1.0)
    rates.number("lion", "b2", b2, below=1.0)

    def init(params: Tree) -> LionState:
        t = rates.start_count(params, rate.scheduled or decay.scheduled)
        return LionState(t, tree.zeros_like(params))

    def update(grads: Tree, state: LionState, params: Tree) -> tuple[Tree, LionState]:
        sign = lambda m, g: torch.sign(b1 * m + (1 - b1) * g)  # noqa: E731
        direction = rates.decay(tree.map(sign, state.momentum, grads), decay, state.t, params)
        momentum = tree.map(lambda m, g: b2 * m + (1 - b2) * g, state.momentum, grads)
        updates = rates.descend(direction, rate, state.t, params)
        return updates, LionState(rates.next_count(state.t), momentum)

    return Transform(init, update)
