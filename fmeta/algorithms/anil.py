"""ANIL: almost no inner loop. Only the head adapts; the body is meta-learned and shared by all tasks.

``head_k+1 = head_k - lr * grad_head L_t(body, head_k)``
"""

from __future__ import annotations

from typing import Literal

from fmeta.adapt import check_loop, from_loop, predictor, weights_as_meta
from fmeta.adjoint import unroll
from fmeta.losses import reported
from fmeta.optim import as_inner
from fmeta.parts.select import Pattern, select
from fmeta.types import Adjoint, Algorithm, InnerLoop, LossFn, Params, Transform


def anil(
    loss_fn: LossFn,
    inner: Transform,
    *,
    steps: int,
    adapts: Pattern = "head",
    adjoint: Adjoint = unroll(),
    query_loss: LossFn | None = None,
    batches: Literal["whole", "per_step"] = "whole",
) -> Algorithm:
    """Almost no inner loop: MAML whose inner loop moves the head only. Its meta is ``Params``.

    **Meta-gradient:** exact for head and body, with the mixed derivative of the support loss to the body.
    **Cost:** carries hold the head only; the body is evaluated in every inner step.

    Args:
        loss_fn: ``(params, batch) -> (scalar, metrics)`` of one task, of all parameters.
        inner: inner optimiser.
        steps: number of inner updates, at least 0.
        adapts: names of the parameters that adapt; the default is the module called ``head``, as the models
            of ``fmeta.models`` name it.
        adjoint: what part of the inner loop is differentiated.
        query_loss: the outer objective; the default is ``loss_fn``.
        batches: see ``maml``.

    Raises:
        ValueError: where no parameter matches ``adapts``.

    References:
        Raghu, Raghu, Bengio, Vinyals, "Rapid learning or feature reuse?", 2020, arXiv 1909.09157, section 4.
    """
    check_loop("anil", loss_fn, inner, steps, adjoint, batches)
    inner, objective = as_inner(inner), query_loss or loss_fn

    def merge(meta: Params, head: Params) -> Params:
        return {**meta, **head}

    def init(params: Params | None) -> Params:
        meta = weights_as_meta("anil")(params)
        select(meta, adapts)
        return meta

    loop = InnerLoop(
        start=lambda meta, support: select(meta, adapts),
        loss=lambda head, meta, batch, k: reported("anil", loss_fn(merge(meta, head), batch)),
        inner=lambda meta, k: inner,
        outer=lambda head, meta, task: reported("anil", objective(merge(meta, head), task.query)),
        steps=steps,
        adjoint=adjoint,
        batches=batches,
    )
    return from_loop(init, loop, predictor(objective, merge))
