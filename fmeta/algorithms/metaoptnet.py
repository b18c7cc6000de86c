"""MetaOptNet: the classifier is a multi-class support vector machine on the embedded support set.

``max over a of sum_n a[n, y_n] - |X^T a|^2 / 2`` with ``a[n, k] <= C [k = y_n]`` and rows that sum to 0;
``W = X^T a`` and scores ``scale * X' W``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import tree
from fmeta.adapt import weights_as_meta
from fmeta.functional import check_apply
from fmeta.losses import outputs
from fmeta.metric import fitted
from fmeta.rates import positive
from fmeta.types import Algorithm, Batch, Params, Tree


def metaoptnet(
    apply: Callable[..., Tensor],
    *,
    C: float = 0.1,
    iterations: int = 30,
    scale: float = 10.0,
    ways: int | None = None,
) -> Algorithm:
    """A support vector machine as the base learner (MetaOptNet-SVM). Its meta is ``{"params", "scale"}``.

    The dual problem is solved by accelerated projected gradients, a fixed number of them, so that one kernel
    serves all tasks.

    **Meta-gradient:** exact, through the iterations.
    **Cost:** one gradient of the embedding, and ``iterations`` products with a matrix of all support pairs.

    Args:
        apply: the embedding, ``(params, x) -> [n, dim]``, as ``functionalize`` returns it.
        C: the price of a margin that is missed, above 0.
        iterations: of the solver, at least 1.
        scale: of the scores at the start, above 0; it is learned.
        ways: see ``protonet``.

    References:
        Lee, Maji, Ravichandran, Soatto, "Meta-learning with differentiable convex optimization", 2019,
        arXiv 1904.03758, section 3.2, eqs. 5 and 6 (the dual of Crammer and Singer's machine). Deviation: they call
        a QP solver and differentiate its optimality conditions.
    """
    check_apply("metaoptnet", apply)
    positive("metaoptnet", "C", C)
    positive("metaoptnet", "scale", scale)
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"metaoptnet: iterations must be a positive int, got {iterations!r}. Use 30, say.")

    def init(params: Params | None) -> dict[str, Any]:
        weights = weights_as_meta("metaoptnet")(params)
        return {"params": weights, "scale": tree.leaves(weights)[0].new_full((), scale)}

    def fit(meta: Tree, support: Batch, member: Tensor) -> dict[str, Tensor]:
        X = outputs(apply, meta["params"], support.x)
        wide = X.float() if X.dtype in (torch.float16, torch.bfloat16) else X  # projections amplify rounding
        dual = svm_dual(wide @ wide.mT, member.mT.to(wide.dtype), C, iterations)
        return {"weight": (wide.mT @ dual).to(X.dtype)}

    def score(params: dict[str, Tensor], meta: Tree, x: Tree) -> Tensor:
        return meta["scale"] * (outputs(apply, meta["params"], x) @ params["weight"])

    return fitted("metaoptnet", init, fit, score, ways=ways)


def svm_dual(gram: Tensor, member: Tensor, C: float, iterations: int) -> Tensor:
    """The dual variables, ``[n, n], [n, ways] -> [n, ways]``, by FISTA from zero (Beck and Teboulle 2009)."""
    rate = 1 / (gram.abs().sum(-1).max() + 1e-12)  # below 1 / the largest eigenvalue
    a = ahead = torch.zeros_like(member)
    t = 1.0
    for _ in range(iterations):
        before, a = a, feasible(ahead + rate * (member - gram @ ahead), member, C)
        t, last = (1 + (1 + 4 * t * t) ** 0.5) / 2, t
        ahead = a + (last - 1) / t * (a - before)
    return a


def feasible(a: Tensor, member: Tensor, C: float) -> Tensor:
    """The nearest point with ``a <= C member`` and rows that sum to 0: a projection on the simplex."""
    z = C * member - a
    ordered = z.sort(-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    level = (ordered.cumsum(-1) - C) / count
    used = (ordered > level).sum(-1, keepdim=True)
    return C * member - (z - level.gather(-1, used - 1)).clamp(min=0)
