"""LR-D2: the classifier is a logistic regression on the embedded support set, by a few steps of Newton's method.

One class against the rest: ``w <- X^T (X X^T + ridge S^-1)^-1 z`` with ``S = diag(mu (1 - mu))``, ``mu =
sigmoid(X w)`` and ``z = X w + S^-1 (y - mu)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import tree
from fmeta.adapt import weights_as_meta
from fmeta.functional import check_apply
from fmeta.functional.linalg import solve
from fmeta.losses import outputs
from fmeta.metric import fitted
from fmeta.rates import positive
from fmeta.types import Algorithm, Batch, Params, Tree


def lrd2(
    apply: Callable[..., Tensor], *, ridge: float = 1.0, iterations: int = 5, ways: int | None = None
) -> Algorithm:
    """Logistic regression as the base learner. Its meta is ``{"params", "log_ridge", "scale"}``.

    **Meta-gradient:** exact, through the iterations.
    **Cost:** one gradient of the embedding; ``iterations * ways`` systems of ``ways * shots`` equations a task.

    Args:
        apply: the embedding, ``(params, x) -> [n, dim]``, as ``functionalize`` returns it.
        ridge: the penalty at the start, above 0; its logarithm is learned.
        iterations: of Newton's method, at least 1.
        ways: see ``protonet``.

    References:
        Bertinetto, Henriques, Torr, Vedaldi, "Meta-learning with differentiable closed-form solvers", 2019,
        arXiv 1805.08136, section 3.3 (iteratively reweighted least squares). There for two classes.
    """
    check_apply("lrd2", apply)
    positive("lrd2", "ridge", ridge)
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"lrd2: iterations must be a positive int, got {iterations!r}. The paper uses 5.")

    def init(params: Params | None) -> dict[str, Any]:
        weights = weights_as_meta("lrd2")(params)
        like = tree.leaves(weights)[0]
        return {
            "params": weights,
            "log_ridge": like.new_full((), math.log(ridge)),
            "scale": like.new_ones(()),
        }

    def fit(meta: Tree, support: Batch, member: Tensor) -> dict[str, Tensor]:
        X = outputs(apply, meta["params"], support.x)
        wide = X.float() if X.dtype in (torch.float16, torch.bfloat16) else X  # LAPACK has no half precision
        gram, y = wide @ wide.mT, member.to(wide.dtype)
        f = torch.zeros_like(y)  # [ways, n]
        dual = f
        for _ in range(iterations):
            mu = f.sigmoid()
            s = mu * (1 - mu) + 1e-6
            z = f + (y - mu) / s
            dual = solve(gram + torch.diag_embed(meta["log_ridge"].exp() / s), z[..., None])[..., 0]
            f = dual @ gram
        return {"weight": (dual @ wide).to(X.dtype)}

    def score(params: dict[str, Tensor], meta: Tree, x: Tree) -> Tensor:
        return meta["scale"] * (outputs(apply, meta["params"], x) @ params["weight"].mT)

    return fitted("lrd2", init, fit, score, ways=ways)
