"""Adaptation by a learned optimiser: what is meta-learned is the update, with the initial weights or without.

``params_k+1 = params_k + rule(theta).update(grad L_t(params_k), ...)``; ``objective = L_t^query(params_K)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from fmeta import tree
from fmeta.adapt import check_loop
from fmeta.adjoint import unroll
from fmeta.beside import learned_beside
from fmeta.optim import as_inner, sgd
from fmeta.parts.select import Pattern
from fmeta.types import Adjoint, Algorithm, LossFn, Params, Transform


class Rule(Protocol):
    """An optimiser with weights of its own, as ``fmeta.learned`` makes them."""

    @property
    def init(self) -> Callable[[int], Params]:
        """``(seed) -> theta``."""

    def __call__(self, theta: Params, steps: float | None = None) -> Transform: ...  # noqa: D102


def learned_update(
    loss_fn: LossFn,
    rule: Rule,
    *,
    steps: int,
    learns_start: bool = True,
    seed: int = 0,
    adjoint: Adjoint = unroll(),
    query_loss: LossFn | None = None,
    adapts: Pattern | None = None,
    batches: Literal["whole", "per_step"] = "whole",
) -> Algorithm:
    """Learns an optimiser for ``steps`` updates on tasks like these. Its meta is ``{"params", "theta"}``.

    **Meta-gradient:** exact to both; that of ``params`` is zero without ``learns_start``.
    **Cost:** as ``maml``, and that of the rule.

    Args:
        loss_fn: ``(params, batch) -> (scalar, metrics)`` of one task.
        rule: ``fmeta.learned.meta_transformer()``, say; it is told ``steps``.
        steps: number of inner updates. At evaluation more steps go on with the rule as it is.
        learns_start: whether the initial weights are meta-learned too. Without, they stay as they were drawn: what is
            learned is only how to train.
        seed: of the rule's first weights.
        adjoint, query_loss, batches: see ``maml``.
        adapts: names of the parameters that adapt; the default is all.

    Raises:
        TypeError: for a rule that is none.

    References:
        Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", 2016, arXiv 1606.04474,
        equation 3; Ravi and Larochelle, "Optimization as a model for few-shot learning", 2017, section 3, which learns
        both.
    """
    check_loop("learned_update", loss_fn, sgd(1.0), steps, adjoint, batches)
    if not callable(rule) or not hasattr(rule, "init"):
        raise TypeError(
            f"learned_update: rule must be a learned optimiser, got {type(rule).__name__}. fmeta.learned has them; "
            "for sgd and its like use maml."
        )
    return learned_beside(
        "learned_update", loss_fn, "theta",
        lambda params: tree.map(lambda x: x.to(tree.device(params)), rule.init(seed)),
        lambda meta, k: as_inner(rule(meta["theta"], max(steps, 1))),
        steps=steps, adjoint=adjoint, query_loss=query_loss, adapts=adapts, batches=batches,
        by_name=False, learns_start=learns_start,
    )  # fmt: skip
