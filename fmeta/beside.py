"""MAML with something learned beside the weights: what Meta-SGD, MAML++ and Meta-Curvature have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fmeta.adapt import from_loop, predictor, weights_as_meta
from fmeta.losses import reported
from fmeta.select import Pattern, select
from fmeta.types import Adjoint, Algorithm, InnerLoop, LossFn, Params, Transform, Tree


def learned_beside(
    call: str,
    loss_fn: LossFn,
    name: str,
    make: Callable[[Params], Tree],
    inner: Callable[[Any, Tensor], Transform],
    *,
    steps: int,
    adjoint: Adjoint,
    query_loss: LossFn | None,
    adapts: Pattern | None,
    batches: Any,
    weights: tuple[float, ...] | None = None,
) -> Algorithm:
    """An algorithm whose meta is ``{"params", name}``; ``make`` gives the second part for weights that adapt."""
    objective = query_loss or loss_fn

    def chosen(params: Params) -> Params:
        return params if adapts is None else select(params, adapts)

    def init(params: Params | None) -> dict[str, Any]:
        start = weights_as_meta(call)(params)
        return {"params": start, name: make(chosen(start))}

    def merge(meta: Any, params: Params) -> Params:
        return params if adapts is None else {**meta["params"], **params}

    loop = InnerLoop(
        start=lambda meta, support: chosen(meta["params"]),
        loss=lambda params, meta, batch, k: reported(call, loss_fn(merge(meta, params), batch)),
        inner=inner,
        outer=lambda params, meta, task: reported(call, objective(merge(meta, params), task.query)),
        steps=steps,
        weights=weights,
        adjoint=adjoint,
        batches=batches,
    )
    return from_loop(init, loop, predictor(objective, merge))
