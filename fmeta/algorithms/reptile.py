"""Reptile: move the initialisation towards where each task's training ends.

``meta-gradient = meta - mean_t adapted_t``, a stated direction that needs no second derivative.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fmeta import tree
from fmeta.adapt import check_loop, from_loop, predictor, weights_as_meta
from fmeta.adjoint import first_order
from fmeta.losses import checked, reported
from fmeta.optim import as_inner
from fmeta.types import Algorithm, InnerLoop, LossFn, Metrics, Params, Task, Transform


def reptile(
    loss_fn: LossFn,
    inner: Transform,
    *,
    steps: int,
    query_loss: LossFn | None = None,
    batches: Literal["whole", "per_step"] = "whole",
) -> Algorithm:
    """Reptile: learns an initialisation close to every task's solution. Its meta is ``Params``.

    With ``sgd(epsilon)`` outside, ``meta <- meta + epsilon * (mean_t adapted_t - meta)``.

    **Meta-gradient:** stated, ``meta - mean_t adapted_t``. It is written as the gradient of
    ``|meta - adapted|^2 / 2`` with ``adapted`` constant, so every engine serves it. The query set is only
    measured: ``metrics["loss"]`` is its loss after adaptation.
    **Cost:** ``steps`` support gradients and one query loss a task; no memory of the loop.

    Args:
        loss_fn: ``(params, batch) -> (scalar, metrics)`` of one task.
        inner: inner optimiser; the paper uses Adam with ``b1=0``.
        steps: number of inner updates; with one step of SGD this is joint training.
        query_loss: what is measured on the query set; the default is ``loss_fn``.
        batches: ``"per_step"`` for fresh examples a step, as the paper trains.

    References:
        Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", 2018, arXiv 1803.02999,
        algorithm 2 (the batched version).
    """
    check_loop("reptile", loss_fn, inner, steps, first_order(), batches)
    inner, measured = as_inner(inner), query_loss or loss_fn

    def outer(params: Params, meta: Params, task: Task) -> tuple[Tensor, Metrics]:
        adapted = tree.detach(params)
        distance = 0.5 * tree.squared_norm(tree.map(lambda m, a: m - a, meta, adapted))
        loss, metrics = reported(
            "reptile", checked("reptile", measured(adapted, task.query), "the query loss")
        )
        return distance, {"loss": loss.detach(), **tree.detach(metrics)}

    loop = InnerLoop(
        start=lambda meta, support: meta,
        loss=lambda params, meta, batch, k: reported("reptile", loss_fn(params, batch)),
        inner=lambda meta, k: inner,
        outer=outer,
        steps=steps,
        adjoint=first_order(),
        batches=batches,
    )
    return from_loop(weights_as_meta("reptile"), loop, predictor(measured, lambda meta, params: params))
