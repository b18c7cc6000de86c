"""Adaptation that ends early, as a loop with ``break``."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.loops import Episode, Loss, Objective, Weights, gradient
from reference.rules import Rule


def stopped(
    loss: Loss, rule: Rule, params: Weights, support: tuple[Tensor, Tensor], steps: int, **when: float
) -> list[Weights]:
    """Weights after each update that is taken."""
    visited, state, best, stale = [params], rule.start(params), float("inf"), 0
    for k in range(steps):
        value = loss(visited[-1], support)
        number = float(value.detach())
        better = number < best - when.get("min_delta", 0.0)
        best, stale = (number, 0) if better else (best, stale + 1)
        if number <= when.get("below", -1.0) or stale >= when.get("patience", steps + 1):
            break
        after, state = rule.step(visited[-1], gradient(value, visited[-1]), state, k)
        visited.append(after)
    return visited


def maml(loss: Loss, rule: Rule, steps: int, **when: float) -> Objective:
    """The query loss where the inner loop of a task ended."""

    def objective(meta: Weights, episode: Episode) -> Tensor:
        start = {name: p if p.requires_grad else p.clone().requires_grad_() for name, p in meta.items()}
        with torch.enable_grad():
            return loss(stopped(loss, rule, start, episode[0], steps, **when)[-1], episode[1])

    return objective
