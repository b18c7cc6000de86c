"""Prototypical networks (Snell et al. 2017) with one Python loop over classes and one over queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reference.loops import Episode, Objective


def prototypes(embedded: Tensor, labels: Tensor, ways: int) -> list[Tensor]:
    """Mean embedding of each class (equation 1)."""
    means = []
    for way in range(ways):
        members = [row for row, label in zip(embedded, labels, strict=True) if int(label) == way]
        means.append(sum(members[1:], members[0]) / len(members))
    return means


def similarity(row: Tensor, prototype: Tensor, distance: str, scale: float) -> Tensor:
    """Minus the squared Euclidean distance, or ``scale`` times the cosine of the angle."""
    if distance == "euclidean":
        return -((row - prototype) ** 2).sum()
    return scale * (row * prototype).sum() / (row.norm() * prototype.norm())


def protonet(
    embed: Callable[[Any, Tensor], Tensor], ways: int, distance: str = "euclidean", scale: float = 1.0
) -> Objective:
    """Mean over queries of ``-log softmax`` at the true class (equation 2)."""

    def objective(meta: Any, episode: Episode) -> Tensor:
        (support_x, support_y), (query_x, query_y) = episode
        means = prototypes(embed(meta, support_x), support_y, ways)
        losses = []
        for row, label in zip(embed(meta, query_x), query_y, strict=True):
            logits = torch.stack([similarity(row, mean, distance, scale) for mean in means])
            losses.append(logits.logsumexp(0) - logits[int(label)])
        return torch.stack(losses).mean()

    return objective
