"""Classifiers fitted to a support set, query by query and class by class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reference.loops import Episode, Objective
from reference.prototypes import prototypes

Embed = Callable[[Any, Tensor], Tensor]


def nll(logits: Tensor, label: Any) -> Tensor:
    return logits.logsumexp(0) - logits[int(label)]


def average(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean()


def matching(embed: Embed, ways: int, scale: float) -> Objective:
    """Attention by cosine over support examples (Vinyals et al. 2016, equation 1)."""

    def objective(meta: Any, episode: Episode) -> Tensor:
        (x, y), (queries, labels) = episode
        keys, losses = embed(meta, x), []
        for row, label in zip(embed(meta, queries), labels, strict=True):
            cosines = torch.stack([(row * key).sum() / (row.norm() * key.norm()) for key in keys])
            weights = torch.exp(scale * cosines) / torch.exp(scale * cosines).sum()
            losses.append(-torch.log(weights[y == label].sum()))
        return average(losses)

    return objective


def relation(embed: Embed, relate: Embed, ways: int) -> Objective:
    """Squared error of learned similarities (Sung et al. 2018, equations 1 and 2)."""

    def objective(meta: Any, episode: Episode) -> Tensor:
        (x, y), (queries, labels) = episode
        embedded, losses = embed(meta["embedding"], x), []
        for row, label in zip(embed(meta["embedding"], queries), labels, strict=True):
            for way in range(ways):
                pair = torch.cat([embedded[y == way].sum(0), row])
                score = torch.sigmoid(relate(meta["relation"], pair[None]))[0, 0]
                losses.append((score - float(int(label) == way)) ** 2)
        return average(losses)

    return objective


def ridge(embed: Embed, ways: int) -> Objective:
    """Ridge regression by the normal equations in the width of the embedding (Bertinetto et al. 2019)."""

    def objective(meta: Any, episode: Episode) -> Tensor:
        (x, y), (queries, labels) = episode
        X = embed(meta["params"], x)
        Y = torch.stack([(y == way).double() for way in range(ways)], 1)
        penalty = meta["log_ridge"].exp() * torch.eye(X.shape[1], dtype=X.dtype)
        W = torch.linalg.inv(X.T @ X + penalty) @ (X.T @ Y)
        scores = meta["scale"] * (embed(meta["params"], queries) @ W) + meta["bias"]
        return average([nll(row, label) for row, label in zip(scores, labels, strict=True)])

    return objective


def centroid(embed: Embed, ways: int, mean: Tensor) -> Objective:
    """Nearest class mean of centred features of length one (Wang et al. 2019)."""

    def features(meta: Any, x: Tensor) -> Tensor:
        return torch.stack([(row - mean) / (row - mean).norm() for row in embed(meta, x)])

    def objective(meta: Any, episode: Episode) -> Tensor:
        (x, y), (queries, labels) = episode
        means = prototypes(features(meta, x), y, ways)
        losses = []
        for row, label in zip(features(meta, queries), labels, strict=True):
            losses.append(nll(torch.stack([-((row - m) ** 2).sum() for m in means]), label))
        return average(losses)

    return objective
