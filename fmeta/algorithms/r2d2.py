"""R2D2: the classifier is a ridge regression on the embedded support set, solved exactly.

``W = X^T (X X^T + ridge I)^-1 Y`` and scores ``scale * X' W + bias``.
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


def r2d2(
    apply: Callable[..., Tensor], *, ridge: float = 1.0, scale: float = 10.0, ways: int | None = None
) -> Algorithm:
    """Ridge regression as the base learner: learns an embedding and the regression's own numbers.

    Its meta is ``{"params", "log_ridge", "scale", "bias"}``. The system solved has one row a support example,
    whatever the width of the embedding (Woodbury's identity).

    **Meta-gradient:** exact, through the solution.
    **Cost:** one gradient of the embedding, and a system of ``ways * shots`` equations a task.

    Args:
        apply: the embedding, ``(params, x) -> [n, dim]``, as ``functionalize`` returns it.
        ridge: the penalty at the start, above 0; its logarithm is learned.
        scale: of the scores at the start, above 0. Labels are 1 and 0, so that at 1 even perfect scores leave the
            softmax nearly flat, and training is slow until the scale has grown.
        ways: see ``protonet``.

    References:
        Bertinetto, Henriques, Torr, Vedaldi, "Meta-learning with differentiable closed-form solvers", 2019,
        arXiv 1805.08136, section 3.2. Labels are 1 and 0, as there.
    """
    check_apply("r2d2", apply)
    positive("r2d2", "ridge", ridge)
    positive("r2d2", "scale", scale)

    def init(params: Params | None) -> dict[str, Any]:
        weights = weights_as_meta("r2d2")(params)
        like = tree.leaves(weights)[0]
        scalar = lambda x: torch.full((), x, dtype=like.dtype, device=like.device)  # noqa: E731
        return {
            "params": weights, "log_ridge": scalar(math.log(ridge)), "scale": scalar(scale), "bias": scalar(0.0),
        }  # fmt: skip

    def fit(meta: Tree, support: Batch, member: Tensor) -> dict[str, Tensor]:
        X = outputs(apply, meta["params"], support.x)
        wide = X.float() if X.dtype in (torch.float16, torch.bfloat16) else X  # LAPACK has no half precision
        gram = wide @ wide.mT + meta["log_ridge"].exp() * torch.eye(len(X), dtype=wide.dtype, device=X.device)
        return {"weight": X.mT @ solve(gram, member.to(wide.dtype).mT).to(X.dtype)}

    def score(params: dict[str, Tensor], meta: Tree, x: Tree) -> Tensor:
        return meta["scale"] * (outputs(apply, meta["params"], x) @ params["weight"]) + meta["bias"]

    return fitted("r2d2", init, fit, score, ways=ways)
