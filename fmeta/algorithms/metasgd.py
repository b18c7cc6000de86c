"""Meta-SGD: learn the initialisation and, beside it, a rate for every single weight.

``params_k+1 = params_k - lr * grad L_t(params_k)`` with ``lr`` a tree like ``params``, both meta-learned.
"""

from __future__ import annotations

from typing import Literal

import torch

from fmeta import tree
from fmeta.adapt import check_loop
from fmeta.adjoint import unroll
from fmeta.beside import learned_beside
from fmeta.optim import sgd
from fmeta.parts.select import Pattern
from fmeta.types import Adjoint, Algorithm, LossFn


def metasgd(
    loss_fn: LossFn,
    *,
    steps: int,
    lr: float = 0.01,
    adjoint: Adjoint = unroll(),
    query_loss: LossFn | None = None,
    adapts: Pattern | None = None,
    batches: Literal["whole", "per_step"] = "whole",
) -> Algorithm:
    """Meta-SGD: learns initial parameters and per-weight rates. Its meta is ``{"params", "lr"}``.

    **Meta-gradient:** exact to both; under ``first_order()`` the rates keep theirs (only Hessians drop).
    **Cost:** as ``maml``, and meta is twice as large.

    Args:
        loss_fn: ``(params, batch) -> (scalar, metrics)`` of one task.
        steps: number of inner updates.
        lr: every rate at the start, positive; the paper draws them from U[0.005, 0.1].
        adjoint: what part of the inner loop is differentiated.
        query_loss: the outer objective; the default is ``loss_fn``.
        adapts: names of the parameters that adapt; the default is all.
        batches: see ``maml``.

    References:
        Li, Zhou, Chen, Li, "Meta-SGD: learning to learn quickly for few-shot learning", 2017,
        arXiv 1707.09835, eq. 2 and algorithm 1. As there, nothing keeps a rate positive.
    """
    check_loop("metasgd", loss_fn, sgd(1.0), steps, adjoint, batches)
    if not isinstance(lr, int | float) or isinstance(lr, bool):
        raise TypeError(
            f"metasgd: lr must be a positive float, got {type(lr).__name__}. Rates are learned from there."
        )
    if not lr > 0:
        raise ValueError(
            f"metasgd: lr must be a positive float, got {lr!r}. The paper starts in [0.005, 0.1]."
        )
    return learned_beside(
        "metasgd", loss_fn, "lr", lambda params: tree.map(lambda p: torch.full_like(p, lr), params),
        lambda meta, k: sgd(meta["lr"]),
        steps=steps, adjoint=adjoint, query_loss=query_loss, adapts=adapts, batches=batches,
    )  # fmt: skip
