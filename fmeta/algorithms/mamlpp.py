"""MAML++: MAML with learned rates for every parameter and inner step, and a loss after every step.

``params_k+1 = params_k - lr[name][k] * grad L_t(params_k)``;
``objective = sum over k of weights[k] * L_t^query(params_k)``; norms may have weights of their own for every k.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from fmeta import tree
from fmeta.adapt import check_loop
from fmeta.adjoint import unroll
from fmeta.beside import entry, learned_beside
from fmeta.optim import sgd
from fmeta.parts.select import Pattern
from fmeta.rates import positive
from fmeta.types import Adjoint, Algorithm, LossFn, Params, Transform, Tree


def mamlpp(
    loss_fn: LossFn,
    *,
    steps: int,
    lr: float = 0.1,
    weights: tuple[float, ...] | None = None,
    per_step: Pattern | None = None,
    adjoint: Adjoint = unroll(),
    query_loss: LossFn | None = None,
    adapts: Pattern | None = None,
    batches: Literal["whole", "per_step"] = "whole",
) -> Algorithm:
    """MAML++: learns initial parameters and rates. Its meta is ``{"params", "lr"}``, ``lr[name]`` ``[steps]``.

    With ``per_step`` there is a third part, ``per_step[name]`` ``[steps + 1, *shape]``, in place of these
    parameters in ``params``: they do not adapt, and after ``k`` updates the network has entry ``k``.

    The rest of the recipe is settings: a cosine schedule outside, and ``weights`` and ``adjoint`` that change while
    training, which ``mamlpp_schedule`` lists.

    **Meta-gradient:** exact to all parts; under ``first_order()`` rates and ``per_step`` keep theirs.
    **Cost:** as ``maml``; a query loss for every weight that is not zero.

    Args:
        loss_fn: ``(params, batch) -> (scalar, metrics)`` of one task.
        steps: number of inner updates, at least 1. More steps at evaluation repeat the last rates and entry.
        lr: every rate at the start, positive.
        weights: see ``maml``; `multi_step_weights` makes them.
        per_step: names of the parameters that are learned once for every number of updates, ``"*.norm"`` in the
            paper; the default is none.
        adjoint, query_loss, batches: see ``maml``.
        adapts: names of the parameters that adapt; the default is all others. The paper leaves out batch norm.

    Raises:
        ValueError: for ``steps=0``, ``weights`` of a wrong length, or parameters none of which adapts.

    References:
        Antoniou, Edwards, Storkey, "How to train your MAML", 2019, arXiv 1810.09502, section 4 (MSL, BNWB, LSLR, DA,
        CA). Deviations: its code has ``steps`` entries, and the query set after an update sees the entry that the
        support set saw before it. Running statistics for each step (BNRS) are not kept: that code collects them,
        but normalises by the batch in training and test alike, as ``functionalize`` does.
    """
    check_loop("mamlpp", loss_fn, sgd(1.0), steps, adjoint, batches)
    positive("mamlpp", "lr", lr)
    if steps == 0 or (weights is not None and (len(weights) != steps + 1 or not any(weights))):
        raise ValueError(
            f"mamlpp: steps must be at least 1 and weights hold steps + 1 numbers, not all zero, got "
            f"steps={steps} and {weights!r}. The first weight is for the loss before any update."
        )

    def inner(meta: Any, k: Tensor) -> Transform:
        rates, tables = entry(meta["lr"], k), entry(meta.get("per_step", {}), k + 1)

        def update(grads: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
            move = lambda n, g: tables[n] - params[n] if n in tables else -rates[n] * g  # noqa: E731
            return {name: move(name, g) for name, g in grads.items()}, state

        return Transform(lambda params: (), update)

    return learned_beside(
        "mamlpp", loss_fn, "lr", lambda params: tree.map(lambda p: p.new_full((steps,), lr), params), inner,
        steps=steps, adjoint=adjoint, query_loss=query_loss, adapts=adapts, batches=batches, per_step=per_step,
        weights=None if weights is None else tuple(map(float, weights)),
    )  # fmt: skip
