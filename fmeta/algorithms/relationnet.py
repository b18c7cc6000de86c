"""Relation networks: a second network learns how similar a query and a class are.

``r_c = sigmoid(relate(cat(embed(x), sum of embed over the support examples of c)))``, towards 1 or 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmeta.adapt import weights_as_meta
from fmeta.functional import check_apply
from fmeta.losses import outputs
from fmeta.metric import fitted
from fmeta.types import Algorithm, Batch, Tree


def relationnet(
    apply: Callable[..., Tensor], relate: Callable[..., Tensor], *, ways: int | None = None
) -> Algorithm:
    """Relation networks: learns an embedding and a similarity. Its meta is ``{"embedding", "relation"}``.

    The objective is the squared error of the relation scores; a prediction is the class of the largest.

    **Meta-gradient:** the ordinary gradient of the query loss to both networks; there are no steps.
    **Cost:** one gradient of the embedding, and of ``relate`` on ``queries * ways`` pairs.

    Args:
        apply: the embedding, ``(params, x) -> [n, dim, ...]``: vectors or feature maps.
        relate: ``(params, pairs) -> [m, 1]`` of pairs ``[m, 2 dim, ...]``, the class first; a logit.
        ways: see ``protonet``.

    Returns:
        An algorithm whose ``init`` takes ``{"embedding": params, "relation": params}``.

    References:
        Sung, Yang, Zhang, Xiang, Torr, Hospedales, "Learning to compare: relation network for few-shot
        learning", 2018, arXiv 1711.06025, eqs. 1 and 2. The error is averaged, not summed, over pairs.
    """
    check_apply("relationnet", apply)
    check_apply("relationnet", relate, "relate")
    parts = ("embedding", "relation")

    def init(params: Any) -> dict[str, Any]:
        if not isinstance(params, dict) or set(params) != set(parts):
            got = sorted(map(str, params)) if isinstance(params, dict) else type(params).__name__
            raise TypeError(
                f"relationnet: params must be {{'embedding': ..., 'relation': ...}}, got {got}. Use the params "
                "of two functionalized modules."
            )
        return {part: weights_as_meta("relationnet")(params[part]) for part in parts}

    def fit(meta: Tree, support: Batch, member: Tensor) -> dict[str, Tensor]:
        embedded = outputs(apply, meta["embedding"], support.x)
        sums = member.to(embedded.dtype) @ embedded.flatten(1)
        return {"classes": sums.unflatten(1, embedded.shape[1:])}

    def logits(params: dict[str, Tensor], meta: Tree, x: Tree) -> Tensor:
        queries, classes = outputs(apply, meta["embedding"], x), params["classes"]
        shape = (len(queries), len(classes), *classes.shape[1:])
        pairs = torch.cat([classes[None].expand(shape), queries[:, None].expand(shape)], 2).flatten(0, 1)
        return outputs(relate, meta["relation"], pairs).reshape(shape[:2])

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        right = (labels[:, None] == torch.arange(scores.shape[1], device=labels.device)).to(scores.dtype)
        return F.mse_loss(scores.sigmoid(), right)

    return fitted("relationnet", init, fit, logits, ways=ways, loss=loss)
