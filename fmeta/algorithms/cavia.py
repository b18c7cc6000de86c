"""CAVIA: only a small context vector adapts, from zero; all weights are shared by all tasks.

``context_0 = 0``; ``context_k+1 = context_k - lr * grad_context L_t(meta, context_k)``
"""

from __future__ import annotations

from typing import Literal

from fmeta import tree
from fmeta.adapt import check_loop, from_loop, predictor, weights_as_meta
from fmeta.adjoint import unroll
from fmeta.losses import reported
from fmeta.optim import as_inner
from fmeta.parts.select import Pattern, select
from fmeta.types import Adjoint, Algorithm, InnerLoop, LossFn, Params, Transform


def cavia(
    loss_fn: LossFn,
    inner: Transform,
    *,
    steps: int,
    context: Pattern = "context",
    adjoint: Adjoint = unroll(),
    query_loss: LossFn | None = None,
    batches: Literal["whole", "per_step"] = "whole",
) -> Algorithm:
    """Fast context adaptation: learns weights that a few context parameters steer. Its meta is ``Params``.

    **Meta-gradient:** exact to all weights; the context itself starts at zero in every task and gets none.
    **Cost:** carries hold the context only, so memory hardly grows with ``steps``.

    Args:
        loss_fn: ``(params, batch) -> (scalar, metrics)`` of one task; the model reads its context parameters,
            as ``fmeta.models.mlp(sizes, context=5)`` does.
        inner: inner optimiser; the paper uses a rate of 1.
        steps: number of inner updates.
        context: names of the context parameters.
        adjoint: what part of the inner loop is differentiated.
        query_loss: the outer objective; the default is ``loss_fn``.
        batches: see ``maml``.

    Raises:
        ValueError: where no parameter matches ``context``.

    References:
        Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson, "Fast context adaptation via meta-learning", 2019,
        arXiv 1810.03642, eqs. 3 and 4.
    """
    check_loop("cavia", loss_fn, inner, steps, adjoint, batches)
    inner, objective = as_inner(inner), query_loss or loss_fn

    def merge(meta: Params, moved: Params) -> Params:
        return {**meta, **moved}

    def init(params: Params | None) -> Params:
        meta = weights_as_meta("cavia")(params)
        select(meta, context)
        return meta

    loop = InnerLoop(
        start=lambda meta, support: tree.zeros_like(select(meta, context)),
        loss=lambda moved, meta, batch, k: reported("cavia", loss_fn(merge(meta, moved), batch)),
        inner=lambda meta, k: inner,
        outer=lambda moved, meta, task: reported("cavia", objective(merge(meta, moved), task.query)),
        steps=steps,
        adjoint=adjoint,
        batches=batches,
    )
    return from_loop(init, loop, predictor(objective, merge))
