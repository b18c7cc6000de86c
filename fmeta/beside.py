"""MAML with something learned beside the weights: what Meta-SGD, MAML++, Meta-Curvature and learned updates share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fmeta import tree
from fmeta.adapt import from_loop, predictor, weights_as_meta
from fmeta.losses import reported
from fmeta.parts.select import Pattern, matches, select
from fmeta.types import Adjoint, Algorithm, Batch, InnerLoop, LossFn, Params, Transform, Tree


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
    per_step: Pattern | None = None,
    by_name: bool = True,
    learns_start: bool = True,
) -> Algorithm:
    """An algorithm whose meta is ``{"params", name}``; ``make`` gives the second part for weights that adapt.

    Parameters that ``per_step`` names are tables ``[steps + 1, ...]`` in ``meta["per_step"]`` instead. They stand
    among the parameters with the entry of the moment, which ``inner`` sees to from the first update on.
    ``by_name``: the second part has an entry for each parameter that moves, and for no other. Without
    ``learns_start`` the parameters are constants.
    """
    objective = query_loss or loss_fn

    def start_of(meta: Any) -> Params:
        return meta["params"] if learns_start else tree.detach(meta["params"])

    def begin(meta: Any, support: Batch) -> Params:
        whole = start_of(meta)
        if not by_name:
            return whole if adapts is None else select(whole, adapts)
        moving = {n: p for n, p in whole.items() if n in meta[name]}
        return moving if per_step is None else moving | tree.select(meta["per_step"], 0)

    def merge(meta: Any, params: Params) -> Params:
        return params if adapts is None else {**start_of(meta), **params}

    loop = InnerLoop(
        start=begin,
        loss=lambda params, meta, batch, k: reported(call, loss_fn(merge(meta, params), batch)),
        inner=inner,
        outer=lambda params, meta, task: reported(call, objective(merge(meta, params), task.query)),
        steps=steps,
        weights=weights,
        adjoint=adjoint,
        batches=batches,
    )
    return from_loop(first(call, name, make, steps, adapts, per_step), loop, predictor(objective, merge))


def first(
    call: str,
    name: str,
    make: Callable[[Params], Tree],
    steps: int,
    adapts: Pattern | None,
    per_step: Pattern | None,
) -> Callable[[Params | None], dict[str, Any]]:
    """The ``init`` of such an algorithm: weights, the second part, and tables of what has values of its own a step."""

    def init(params: Params | None) -> dict[str, Any]:
        start = weights_as_meta(call)(params)
        chosen = start if adapts is None else select(start, adapts)
        if per_step is None:
            return {"params": start, name: make(chosen)}
        own = set(matches(per_step, start))
        rest = {n: p for n, p in start.items() if n not in own}
        moving = {n: p for n, p in chosen.items() if n in rest}
        if not moving:
            raise ValueError(
                f"{call}: some parameters must adapt, but per_step={per_step!r} takes all. Name fewer."
            )
        tables = {n: start[n].expand(steps + 1, *start[n].shape).clone() for n in start if n in own}
        return {"params": rest, name: make(moving), "per_step": tables}

    return init


def entry(tables: Tree, k: Tensor) -> Tree:
    """Entry ``k`` of every table ``[steps, ...]``, ``k`` a tensor without dimensions."""
    return tree.map(lambda table: table.index_select(0, k.reshape(1))[0], tables)
