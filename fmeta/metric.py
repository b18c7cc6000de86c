"""Algorithms without inner steps: a classifier is fitted to the embedded support set in one go."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fmeta.adapt import from_loop
from fmeta.losses import check_integers, check_occur
from fmeta.optim import sgd
from fmeta.types import Adapted, Algorithm, Batch, InnerLoop, Metrics, Params, Task, Tree

ABSENT = -1e9
"""The score of a class without support examples: finite, so that no derivative is NaN."""
Fit = Callable[[Tree, Batch, Tensor], dict[str, Tensor]]
"""``(meta, support, member) -> fitted`` with ``member`` ``[ways, shots]``: 1 where an example is of a class."""
Score = Callable[[dict[str, Tensor], Tree, Tree], Tensor]
"""``(fitted, meta, x) -> [n, ways]``."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""``(scores [n, ways], labels [n]) -> scalar``."""


def fitted(
    call: str,
    init: Callable[[Params | None], Tree],
    fit: Fit,
    score: Score,
    *,
    ways: int | None,
    loss: Loss = F.cross_entropy,
) -> Algorithm:
    """An algorithm out of how its classifier is fitted and how it scores.

    ``ways`` is the number of classes; None keeps one place for each support example. Classes that do not
    occur in the support set score ``ABSENT``.
    """

    def start(meta: Tree, support: Batch) -> dict[str, Tensor]:
        classes = torch.arange(ways or len(support.y), device=support.y.device)
        member = (support.y[None] == classes[:, None]).to(torch.get_default_dtype())
        found = fit(meta, support, member)
        return {**found, "present": member.sum(1).to(next(iter(found.values())).dtype)}

    def scores(params: Tree, meta: Tree, x: Tree) -> Tensor:
        return torch.where(params["present"] > 0, score(params, meta, x), ABSENT)

    def outer(params: Tree, meta: Tree, task: Task) -> tuple[Tensor, Metrics]:
        for labels in (task.support.y, task.query.y):
            check_integers(call, labels)
        check_occur(call, task.query.y, task.support.y, ways or len(task.support.y))
        found = scores(params, meta, task.query.x)
        accuracy = (found.argmax(-1) == task.query.y).to(found.dtype).mean()
        return loss(found, task.query.y.long()), {"accuracy": accuracy}

    def no_loss(params: Tree, meta: Tree, batch: Batch, k: Tensor) -> tuple[Tensor, Metrics]:
        raise ValueError(f"{call}: there is no inner loss, got steps above 0. Evaluate with steps=0 or None.")

    loop = InnerLoop(start=start, loss=no_loss, inner=lambda meta, k: sgd(0.0), outer=outer, steps=0)

    def predict(meta: Tree, adapted: Adapted, x: Tree) -> Tensor:
        return scores(adapted.params, meta, x)

    return from_loop(init, loop, predict)


def class_means(embedded: Tensor, member: Tensor) -> Tensor:
    """Mean embedding of each class, ``[n, dim], [ways, n] -> [ways, dim]``; zero for one without examples."""
    member = member.to(embedded.dtype)
    return member @ embedded / member.sum(1, keepdim=True).clamp(min=1)


def unit(x: Tensor) -> Tensor:
    """Vectors of length one along the last dimension; the zero vector stays, with a derivative."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-12)
