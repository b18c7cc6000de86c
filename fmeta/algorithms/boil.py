"""BOIL: the body adapts and the head does not, so that features must change from task to task.

``body_k+1 = body_k - lr * grad_body L_t(body_k, head)``
"""

from __future__ import annotations

from typing import Literal

from fmeta.adapt import check_loop, from_loop, predictor, weights_as_meta
from fmeta.adjoint import unroll
from fmeta.losses import reported
from fmeta.optim import as_inner
from fmeta.parts.select import Pattern, matches
from fmeta.types import Adjoint, Algorithm, InnerLoop, LossFn, Params, Transform


def boil(
    loss_fn: LossFn,
    inner: Transform,
    *,
    steps: int,
    keeps: Pattern = "head",
    adjoint: Adjoint = unroll(),
    query_loss: LossFn | None = None,
    batches: Literal["whole", "per_step"] = "whole",
) -> Algorithm:
    """Body only update in the inner loop: MAML whose inner loop leaves the head alone. Its meta is ``Params``.

    With ``keeps="*.warp"`` and the network of ``fmeta.models.warped`` it is a T-net, with WarpGrad's inner loop:
    layers between those that adapt are meta-learned, and shape every inner gradient.

    **Meta-gradient:** exact for body and head.
    **Cost:** as ``maml``; carries hold the body only.

    Args:
        loss_fn: ``(params, batch) -> (scalar, metrics)`` of one task, of all parameters.
        inner: inner optimiser.
        steps: number of inner updates, at least 0.
        keeps: names of the parameters that do not adapt; the default is the module called ``head``.
        adjoint: what part of the inner loop is differentiated.
        query_loss: the outer objective; the default is ``loss_fn``.
        batches: see ``maml``.

    Raises:
        ValueError: where no parameter matches ``keeps``, or all do.

    References:
        Oh, Yoo, Kim, Yun, "BOIL: towards representation change for few-shot learning", 2021,
        arXiv 2008.08882, section 2. Lee, Choi, "Gradient-based meta-learning with learned layerwise metric and
        subspace", 2018, arXiv 1801.05558 (T-nets).
    """
    check_loop("boil", loss_fn, inner, steps, adjoint, batches)
    inner, objective = as_inner(inner), query_loss or loss_fn

    def moving(meta: Params) -> Params:
        kept = set(matches(keeps, meta))
        return {name: value for name, value in meta.items() if name not in kept}

    def merge(meta: Params, body: Params) -> Params:
        return {**meta, **body}

    def init(params: Params | None) -> Params:
        meta = weights_as_meta("boil")(params)
        if not moving(meta):
            raise ValueError(f"boil: some parameters must adapt, but {keeps!r} keeps all. Keep fewer.")
        return meta

    loop = InnerLoop(
        start=lambda meta, support: moving(meta),
        loss=lambda body, meta, batch, k: reported("boil", loss_fn(merge(meta, body), batch)),
        inner=lambda meta, k: inner,
        outer=lambda body, meta, task: reported("boil", objective(merge(meta, body), task.query)),
        steps=steps,
        adjoint=adjoint,
        batches=batches,
    )
    return from_loop(init, loop, predictor(objective, merge))
