"""Meta-Curvature: the inner gradient is turned by learned matrices, one for each side of every parameter.

``params_k+1 = params_k - lr * MC(grad L_t(params_k))`` with ``MC(G) = M_out G M_in^T`` for a matrix.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fmeta.adapt import check_loop
from fmeta.adjoint import unroll
from fmeta.beside import learned_beside
from fmeta.optim import sgd
from fmeta.parts.select import Pattern
from fmeta.rates import positive
from fmeta.types import Adjoint, Algorithm, LossFn, Params, Transform, Tree

Curvature = dict[str, dict[str, Tensor]]


def metacurvature(
    loss_fn: LossFn,
    *,
    steps: int,
    lr: float = 0.01,
    adjoint: Adjoint = unroll(),
    query_loss: LossFn | None = None,
    adapts: Pattern | None = None,
    batches: Literal["whole", "per_step"] = "whole",
) -> Algorithm:
    """Meta-Curvature: learns initial parameters and a curvature. Its meta is ``{"params", "curvature"}``.

    ``curvature[name]`` holds square matrices for the sides of a parameter: ``"out"`` for the first dimension,
    ``"in"`` for the second, ``"filter"`` for all others as one. They start as identities, with which this is
    MAML.

    **Meta-gradient:** exact to both; under ``first_order()`` the curvature keeps its own.
    **Cost:** as ``maml``, and a product with each matrix a step.

    Args:
        loss_fn, steps, adjoint, query_loss, adapts, batches: see ``maml``.
        lr: the inner rate, positive; not learned.

    References:
        Park, Oliva, "Meta-curvature", 2019, arXiv 1902.03356, section 3.1 (MC2).
    """
    check_loop("metacurvature", loss_fn, sgd(1.0), steps, adjoint, batches)
    positive("metacurvature", "lr", lr)

    def inner(meta: Any, k: Tensor) -> Transform:
        def update(grads: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
            return {name: -lr * turned(g, meta["curvature"][name]) for name, g in grads.items()}, state

        return Transform(lambda params: (), update)

    return learned_beside(
        "metacurvature", loss_fn, "curvature", lambda params: {n: sides(p) for n, p in params.items()}, inner,
        steps=steps, adjoint=adjoint, query_loss=query_loss, adapts=adapts, batches=batches,
    )  # fmt: skip


def sides(p: Tensor) -> dict[str, Tensor]:
    """Identities for the sides of a parameter."""
    sizes = {"out": p.shape[:1], "in": p.shape[1:2], "filter": p.shape[2:]}
    return {side: torch.eye(n.numel()).to(p) for side, n in sizes.items() if len(n)}


def turned(g: Tensor, curvature: dict[str, Tensor]) -> Tensor:
    """A gradient, multiplied along each side."""
    flat = g.flatten(1) if g.dim() > 1 else g.reshape(-1, 1)
    if "filter" in curvature:
        flat = (flat.reshape(-1, curvature["filter"].shape[0]) @ curvature["filter"].mT).reshape(flat.shape)
    if "in" in curvature:
        n = curvature["in"].shape[0]
        flat = (curvature["in"] @ flat.reshape(g.shape[0], n, -1)).reshape(flat.shape)
    if "out" in curvature:
        flat = curvature["out"] @ flat
    return flat.reshape(g.shape)
