"""Matching networks: a query takes the labels of the support examples that it attends to.

``p(y = c | x) = sum over support examples i of class c of softmax_i(scale * cos(embed(x), embed(x_i)))``
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fmeta.adapt import weights_as_meta
from fmeta.functional import check_apply
from fmeta.losses import outputs
from fmeta.metric import ABSENT, fitted, unit
from fmeta.rates import positive
from fmeta.types import Algorithm, Batch, Params, Tree


def matchingnet(apply: Callable[..., Tensor], *, scale: float = 10.0, ways: int | None = None) -> Algorithm:
    """Matching networks: learns an embedding in which attention by cosine classifies. Its meta is ``Params``.

    **Meta-gradient:** the ordinary gradient of the query loss, through both embeddings; there are no steps.
    **Cost:** one gradient of the embedding on support and query together.

    Args:
        apply: the embedding, ``(params, x) -> [n, dim]``, as ``functionalize`` returns it.
        scale: the inverse temperature of the attention, above 0. The paper's formula has 1, with which
            no probability among 5 classes can exceed ``e^2 / (e^2 + 4) = 0.65``.
        ways: see ``protonet``.

    References:
        Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra, "Matching networks for one shot learning", 2016,
        arXiv 1606.04080, eq. 1 and section 2.1.1. Without full context embeddings (section 2.1.2).
    """
    check_apply("matchingnet", apply)
    positive("matchingnet", "scale", scale)

    def fit(meta: Params, support: Batch, member: Tensor) -> dict[str, Tensor]:
        keys = unit(outputs(apply, meta, support.x))
        return {"keys": keys, "member": member.to(keys.dtype)}

    def score(params: dict[str, Tensor], meta: Params, x: Tree) -> Tensor:
        attention = F.log_softmax(scale * unit(outputs(apply, meta, x)) @ params["keys"].mT, dim=-1)
        each = torch.where(params["member"] > 0, attention[:, None], ABSENT)  # [n, ways, shots]
        return each.logsumexp(-1)

    return fitted("matchingnet", weights_as_meta("matchingnet"), fit, score, ways=ways)
