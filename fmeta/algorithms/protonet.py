"""Prototypical networks: a class is the mean of its support embeddings; nothing adapts by gradient.

``p(y = c | x) = softmax_c(-distance(embed(x), prototype_c))``
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from fmeta.adapt import weights_as_meta
from fmeta.functional import check_apply
from fmeta.losses import outputs
from fmeta.metric import class_means, fitted, unit
from fmeta.types import Algorithm, Batch, Params, Tree

Distance = Callable[[Tensor, Tensor], Tensor]


def euclidean(queries: Tensor, prototypes: Tensor) -> Tensor:
    """Squared Euclidean distance, ``[n, dim], [ways, dim] -> [n, ways]``."""
    return (queries[:, None] - prototypes[None]).square().sum(-1)


def cosine(queries: Tensor, prototypes: Tensor) -> Tensor:
    """``10 (1 - cosine similarity)``, ``[n, dim], [ways, dim] -> [n, ways]``; the 10 is the temperature."""
    return 10 * (1 - unit(queries) @ unit(prototypes).mT)


def protonet(
    apply: Callable[..., Tensor],
    *,
    distance: Literal["euclidean", "cosine"] | Distance = "euclidean",
    ways: int | None = None,
) -> Algorithm:
    """Prototypical networks: learns an embedding. Its meta is the ``Params`` of ``apply``.

    ``prototype_c = mean of apply(meta, x)`` over the support examples of class ``c``.

    **Meta-gradient:** the ordinary gradient of the query loss, through the prototypes; there are no steps.
    **Cost:** one gradient of the embedding on support and query together.

    Args:
        apply: the embedding, ``(params, x) -> [n, dim]``, as ``functionalize`` returns it.
        distance: squared Euclidean (the paper's choice), cosine, or ``(queries, prototypes) -> [n, ways]``.
        ways: number of classes; the default keeps one place for each support example, and classes that do
            not occur score ``-1e9``. Labels run from 0; that they do, and that the support set has an example of
            every class of the query set, is looked at in the first call.

    References:
        Snell, Swersky, Zemel, "Prototypical networks for few-shot learning", 2017, arXiv 1703.05175,
        eq. 1, eq. 2 and algorithm 1.
    """
    named: dict[str, Distance] = {"euclidean": euclidean, "cosine": cosine}
    check_apply("protonet", apply)
    if not callable(distance) and distance not in named:
        raise ValueError(
            f"protonet: distance must be one of {sorted(named)} or a callable, got {distance!r}."
        )
    measure = distance if callable(distance) else named[distance]

    def fit(meta: Params, support: Batch, member: Tensor) -> dict[str, Tensor]:
        return {"prototypes": class_means(outputs(apply, meta, support.x), member)}

    def score(params: dict[str, Tensor], meta: Params, x: Tree) -> Tensor:
        return -measure(outputs(apply, meta, x), params["prototypes"])

    return fitted("protonet", weights_as_meta("protonet"), fit, score, ways=ways)
