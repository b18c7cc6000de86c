"""MAML: learn an initialisation from which a few gradient steps solve a new task.

``meta - outer * grad_meta mean_t L_t^query(adapt(meta, support_t))``
"""

from __future__ import annotations

from typing import Literal

from fmeta.adapt import check_loop, from_loop, predictor, weights_as_meta
from fmeta.adjoint import unroll
from fmeta.losses import reported
from fmeta.optim import as_inner
from fmeta.parts.select import Pattern, select
from fmeta.types import Adjoint, Algorithm, InnerLoop, LossFn, Params, Transform


def maml(
    loss_fn: LossFn,
    inner: Transform,
    *,
    steps: int,
    adjoint: Adjoint = unroll(),
    query_loss: LossFn | None = None,
    adapts: Pattern | None = None,
    batches: Literal["whole", "per_step"] = "whole",
    weights: tuple[float, ...] | None = None,
) -> Algorithm:
    """Model-agnostic meta-learning: learns the initial parameters. Its meta is ``Params``.

    ``params_0 = meta``; ``params_k+1 = params_k + inner.update(grad(loss_fn)(params_k, support))``; the
    objective is ``query_loss(params_steps, query)``, averaged over tasks.

    **Meta-gradient:** exact; with ``adjoint=first_order()`` that of FOMAML.
    **Cost:** about ``4 steps + 2`` support gradients a task and ``steps`` carries of memory (parameters and
    inner optimiser state); see ``Plan(remat=...)``.

    Args:
        loss_fn: ``(params, batch) -> (scalar, metrics)`` of one task.
        inner: inner optimiser, made safe to differentiate (``eps_root``) by itself.
        steps: number of inner updates, at least 0.
        adjoint: what part of the inner loop is differentiated.
        query_loss: the outer objective; the default is ``loss_fn``.
        adapts: names of the parameters that adapt, as ``fmeta.select`` takes them; the others are
            meta-learned and shared. The default is all.
        batches: ``"per_step"`` gives every inner step its own examples: support leaves are
            ``[steps, shots, ...]``.
        weights: weight of the query loss after 0, 1, ... ``steps`` updates, for a multi-step objective;
            the default counts only the last.

    Raises:
        ValueError: for negative ``steps`` or ``weights`` of another length than ``steps + 1``.

    Example:
        >>> import fmeta
        >>> apply, params = fmeta.functionalize(fmeta.models.mlp([1, 40, 40, 1]))
        >>> algorithm = fmeta.maml(fmeta.losses.mse(apply), fmeta.sgd(0.01), steps=1)
        >>> state = fmeta.meta_init(algorithm, fmeta.adam(1e-3), params)
        >>> int(state.step)
        0

    References:
        Finn, Abbeel, Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", 2017,
        arXiv 1703.03400, eq. 1 and algorithm 2. The multi-step objective is eq. 4 of Antoniou, Edwards,
        Storkey, "How to train your MAML", 2019, arXiv 1810.09502.
    """
    check_loop("maml", loss_fn, inner, steps, adjoint, batches)
    if weights is not None and (len(weights) != steps + 1 or not any(weights)):
        raise ValueError(
            f"maml: weights must hold steps + 1 = {steps + 1} numbers that are not all zero, got {weights!r}. "
            "The first is for the loss before any update."
        )
    inner, objective = as_inner(inner), query_loss or loss_fn

    def merge(meta: Params, params: Params) -> Params:
        return params if adapts is None else {**meta, **params}

    loop = InnerLoop(
        start=lambda meta, support: meta if adapts is None else select(meta, adapts),
        loss=lambda params, meta, batch, k: reported("maml", loss_fn(merge(meta, params), batch)),
        inner=lambda meta, k: inner,
        outer=lambda params, meta, task: reported("maml", objective(merge(meta, params), task.query)),
        steps=steps,
        weights=None if weights is None else tuple(float(w) for w in weights),
        adjoint=adjoint,
        batches=batches,
    )
    return from_loop(weights_as_meta("maml"), loop, predictor(objective, merge))
