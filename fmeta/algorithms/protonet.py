"""Prototypical networks: a class is the mean of its support embeddings; nothing adapts by gradient.

``p(y = c | x) = softmax_c(-distance(embed(x), prototype_c))``
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fmeta.adapt import from_loop, weights_as_meta
from fmeta.losses import check_integers, check_occur, outputs
from fmeta.optim import sgd
from fmeta.types import Adapted, Algorithm, Batch, InnerLoop, Metrics, Params, Task, Tree

Distance = Callable[[Tensor, Tensor], Tensor]
ABSENT = -1e9  # the score of a class without support examples: finite, so that no derivative is NaN


def euclidean(queries: Tensor, prototypes: Tensor) -> Tensor:
    """Squared Euclidean distance, ``[n, dim], [ways, dim] -> [n, ways]``."""
    return (queries[:, None] - prototypes[None]).square().sum(-1)


def cosine(queries: Tensor, prototypes: Tensor) -> Tensor:
    """``10 (1 - cosine similarity)``, ``[n, dim], [ways, dim] -> [n, ways]``; the 10 is the temperature."""
    unit = lambda v: v * torch.rsqrt(v.square().sum(-1, keepdim=True) + 1e-12)  # noqa: E731
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
    if not callable(apply):
        raise TypeError(
            f"protonet: apply must be a callable (params, x) -> embedding, got {type(apply).__name__}. "
            "Use `apply, params = fmeta.functionalize(module)`."
        )
    if not callable(distance) and distance not in named:
        raise ValueError(
            f"protonet: distance must be one of {sorted(named)} or a callable, got {distance!r}."
        )
    measure = distance if callable(distance) else named[distance]

    def start(meta: Params, support: Batch) -> dict[str, Tensor]:
        embedded = outputs(apply, meta, support.x)
        classes = torch.arange(ways or len(support.y), device=support.y.device)
        member = (support.y[None] == classes[:, None]).to(embedded.dtype)  # [ways, shots]
        count = member.sum(1, keepdim=True)
        return {"prototypes": member @ embedded / count.clamp(min=1), "present": count.squeeze(1)}

    def scores(params: Tree, meta: Params, x: Tree) -> Tensor:
        distances = measure(outputs(apply, meta, x), params["prototypes"])
        return torch.where(params["present"] > 0, -distances, ABSENT)

    def outer(params: Tree, meta: Params, task: Task) -> tuple[Tensor, Metrics]:
        for labels in (task.support.y, task.query.y):
            check_integers("protonet", labels)
        check_occur("protonet", task.query.y, task.support.y, ways or len(task.support.y))
        logits = scores(params, meta, task.query.x)
        accuracy = (logits.argmax(-1) == task.query.y).to(logits.dtype).mean()
        return F.cross_entropy(logits, task.query.y.long()), {"accuracy": accuracy}

    def no_loss(params: Tree, meta: Params, batch: Batch, k: Tensor) -> tuple[Tensor, Metrics]:
        raise ValueError(
            "protonet: there is no inner loss, got steps above 0. Evaluate with steps=0 or None."
        )

    loop = InnerLoop(start=start, loss=no_loss, inner=lambda meta, k: sgd(0.0), outer=outer, steps=0)

    def predict(meta: Params, adapted: Adapted, x: Tree) -> Tensor:
        return scores(adapted.params, meta, x)

    return from_loop(weights_as_meta("protonet"), loop, predict)
