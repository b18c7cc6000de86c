"""Sharp-MAML: MAML that ends where the loss is flat, in the adapted parameters, in meta, or in both.

``params_k+1 = params_k + inner.update(grad L_t(params_k + inner_radius * u_k))``;
``meta - outer * grad_meta mean_t L_t^query(adapt(meta + outer_radius * u))``; ``u_k`` and ``u`` point uphill.
"""

from __future__ import annotations

from typing import Literal

from fmeta.adapt import check_loop, from_loop, predictor, weights_as_meta
from fmeta.adjoint import unroll
from fmeta.losses import reported
from fmeta.optim import as_inner
from fmeta.parts.select import Pattern, select
from fmeta.sharp import with_radii
from fmeta.types import Adjoint, Algorithm, InnerLoop, LossFn, Params, Transform


def sharpmaml(
    loss_fn: LossFn,
    inner: Transform,
    *,
    steps: int,
    inner_radius: float = 5e-4,
    outer_radius: float = 5e-4,
    adjoint: Adjoint = unroll(),
    query_loss: LossFn | None = None,
    adapts: Pattern | None = None,
    batches: Literal["whole", "per_step"] = "whole",
) -> Algorithm:
    """Sharpness-aware MAML: learns initial parameters around which the loss is flat. Its meta is ``Params``.

    The paper's variants: *both* is the default, *up* has ``inner_radius=0``, *low* has ``outer_radius=0``;
    without either this is ``maml``. ``sharpness_aware`` does the same for any other algorithm.

    **Meta-gradient:** see ``sharpness_aware``: exact with ``outer_radius=0``, else that of a point uphill.
    **Cost:** *up* two meta-gradients; *low* about ``9 steps + 2`` support gradients a task, ``steps`` carries; *both*
    twice that.

    Args:
        loss_fn: ``(params, batch) -> (scalar, metrics)`` of one task.
        inner: inner optimiser.
        steps: number of inner updates, at least 0.
        inner_radius: length of the step uphill from the parameters, at least 0. Both defaults are those of the
            authors' command for miniImageNet; their code's other runs use up to 0.05.
        outer_radius: length of the step uphill from meta, at least 0.
        adjoint: what part of the inner loop is differentiated; under ``first_order()`` gradients taken uphill are
            constants.
        query_loss, adapts, batches: see ``maml``. Only what adapts is moved inside; all of meta is outside.

    References:
        Abbas, Xiao, Chen, Chen, Chen, "Sharp-MAML: sharpness-aware model-agnostic meta learning", 2022,
        arXiv 2206.03996, algorithm 1. As in the authors' code, the inner step uphill is differentiated, and adaptation
        at test goes uphill too. Deviation: ``metrics`` are those at meta, not those uphill of it.
    """
    check_loop("sharpmaml", loss_fn, inner, steps, adjoint, batches)
    inner, objective = as_inner(inner), query_loss or loss_fn

    def merge(meta: Params, params: Params) -> Params:
        return params if adapts is None else {**meta, **params}

    loop = InnerLoop(
        start=lambda meta, support: meta if adapts is None else select(meta, adapts),
        loss=lambda params, meta, batch, k: reported("sharpmaml", loss_fn(merge(meta, params), batch)),
        inner=lambda meta, k: inner,
        outer=lambda params, meta, task: reported("sharpmaml", objective(merge(meta, params), task.query)),
        steps=steps,
        adjoint=adjoint,
        batches=batches,
    )
    loop = with_radii("sharpmaml", loop, inner_radius, outer_radius)
    return from_loop(weights_as_meta("sharpmaml"), loop, predictor(objective, merge))
