"""MAML++: MAML with learned rates for every parameter and inner step, and a loss after every step.

``params_k+1 = params_k - lr[name][k] * grad L_t(params_k)``;
``objective = sum over k of weights[k] * L_t^query(params_k)``.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from fmeta import tree
from fmeta.adapt import check_loop
from fmeta.adjoint import unroll
from fmeta.beside import learned_beside
from fmeta.optim import sgd
from fmeta.rates import number, positive
from fmeta.select import Pattern
from fmeta.types import Adjoint, Algorithm, LossFn, Transform


def mamlpp(
    loss_fn: LossFn,
    *,
    steps: int,
    lr: float = 0.1,
    weights: tuple[float, ...] | None = None,
    adjoint: Adjoint = unroll(),
    query_loss: LossFn | None = None,
    adapts: Pattern | None = None,
    batches: Literal["whole", "per_step"] = "whole",
) -> Algorithm:
    """MAML++: learns initial parameters and rates. Its meta is ``{"params", "lr"}``, ``lr[name]`` ``[steps]``.

    The rest of the recipe is settings: ``weights=multi_step_weights(steps, progress)`` and
    ``adjoint=first_order()`` early in training, None and ``unroll()`` later; a cosine schedule outside.

    **Meta-gradient:** exact to both; under ``first_order()`` the rates keep theirs.
    **Cost:** as ``maml``; a query loss for every weight that is not zero.

    Args:
        loss_fn: ``(params, batch) -> (scalar, metrics)`` of one task.
        steps: number of inner updates, at least 1. More steps at evaluation repeat the last rates.
        lr: every rate at the start, positive.
        weights: see ``maml``; `multi_step_weights` makes them.
        adjoint, query_loss, batches: see ``maml``.
        adapts: names of the parameters that adapt; the default is all. The paper leaves out batch norm.

    References:
        Antoniou, Edwards, Storkey, "How to train your MAML", 2019, arXiv 1810.09502, section 4 (MSL, LSLR, DA,
        CA). Deviation: no statistics, weights or biases of batch norm of their own for each step.
    """
    check_loop("mamlpp", loss_fn, sgd(1.0), steps, adjoint, batches)
    positive("mamlpp", "lr", lr)
    if steps == 0 or (weights is not None and (len(weights) != steps + 1 or not any(weights))):
        raise ValueError(
            f"mamlpp: steps must be at least 1 and weights hold steps + 1 numbers, not all zero, got "
            f"steps={steps} and {weights!r}. The first weight is for the loss before any update."
        )

    def inner(meta: Any, k: Tensor) -> Transform:
        return sgd(tree.map(lambda rates: rates.index_select(0, k[None])[0], meta["lr"]))

    return learned_beside(
        "mamlpp", loss_fn, "lr", lambda params: tree.map(lambda p: p.new_full((steps,), lr), params), inner,
        steps=steps, adjoint=adjoint, query_loss=query_loss, adapts=adapts, batches=batches,
        weights=None if weights is None else tuple(map(float, weights)),
    )  # fmt: skip


def multi_step_weights(steps: int, progress: float) -> tuple[float, ...]:
    """Weights of the query losses after 0, 1, ... ``steps`` updates: even at first, then nearly all on the last.

    ``progress`` is 0 at the start of the annealing and 1 at its end, when each early weight is 0.03 / steps.
    Antoniou et al., 2019, section 4 (MSL); the linear decay is that of its code.

    >>> multi_step_weights(2, 0.0)
    (0.0, 0.5, 0.5)
    """
    number("multi_step_weights", "progress", progress)
    early = max((1 - progress) / steps, 0.03 / steps)
    return (0.0, *[early] * (steps - 1), 1 - early * (steps - 1))
