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


def logistic(embed: Embed, ways: int, iterations: int) -> Objective:
    """One against the rest, Newton's method on the weights themselves (Bertinetto et al. 2019)."""

    def objective(meta: Any, episode: Episode) -> Tensor:
        (x, y), (queries, labels) = episode
        X, rows = embed(meta["params"], x), []
        penalty = meta["log_ridge"].exp() * torch.eye(X.shape[1], dtype=X.dtype)
        for way in range(ways):
            w = torch.zeros_like(X[0])
            for _ in range(iterations):
                mu = torch.sigmoid(X @ w)
                s = mu * (1 - mu) + 1e-6
                z = X @ w + ((y == way).double() - mu) / s
                w = torch.linalg.inv(X.T @ (s[:, None] * X) + penalty) @ (X.T @ (s * z))
            rows.append(w)
        scores = meta["scale"] * embed(meta["params"], queries) @ torch.stack(rows).T
        return average([nll(row, label) for row, label in zip(scores, labels, strict=True)])

    return objective


def nearest(row: Tensor, cap: Tensor, C: float) -> Tensor:
    """The point below ``cap`` with sum 0 that is nearest, by trying how many entries are not at their cap."""
    z = sorted((cap - row).unbind(), key=lambda x: float(x.detach()), reverse=True)
    for used in range(len(z), 0, -1):
        level = (sum(z[1:used], z[0]) - C) / used
        if float(z[used - 1].detach()) > float(level.detach()):
            return cap - torch.clamp(cap - row - level, min=0)
    raise AssertionError("one entry is always free")


def machine(embed: Embed, ways: int, C: float, iterations: int) -> Objective:
    """Crammer and Singer's support vector machine, its dual by FISTA row by row (Lee et al. 2019)."""

    def objective(meta: Any, episode: Episode) -> Tensor:
        (x, y), (queries, labels) = episode
        X = embed(meta["params"], x)
        Y, gram = torch.stack([(y == way).double() for way in range(ways)], 1), X @ X.T
        rate = 1 / (gram.abs().sum(1).max() + 1e-12)
        a = ahead = torch.zeros_like(Y)
        t = 1.0
        for _ in range(iterations):
            moved = ahead + rate * (Y - gram @ ahead)
            new = torch.stack([nearest(row, C * cap, C) for row, cap in zip(moved, Y, strict=True)])
            faster = (1 + (1 + 4 * t * t) ** 0.5) / 2
            ahead, a, t = new + (t - 1) / faster * (new - a), new, faster
        scores = meta["scale"] * (embed(meta["params"], queries) @ (X.T @ a))
        return average([nll(row, label) for row, label in zip(scores, labels, strict=True)])

    return objective
