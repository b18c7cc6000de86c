"""Inner update rules, written from their equations as pairs of functions on dicts of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Rate = float | Tensor | Weights | Callable[[int], float]


class Rule(NamedTuple):
    """``start(params) -> state`` and ``step(params, grads, state, k) -> (params, state)``."""

    start: Callable[[Weights], Any]
    step: Callable[[Weights, Weights, Any, int], tuple[Weights, Any]]


def rate_at(rate: Rate, name: str, k: int) -> float | Tensor:
    """The rate of one tensor at inner step ``k``: a number, a function of the step, or a rate a tensor."""
    if callable(rate):
        return rate(k)
    return rate[name] if isinstance(rate, dict) else rate


def sgd(rate: Rate, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> Rule:
    """``v <- momentum v + g``; ``p <- p - rate v``, as torch.optim.SGD without dampening."""

    def start(params: Weights) -> Weights:
        return {name: torch.zeros_like(value) for name, value in params.items()}

    def step(params: Weights, grads: Weights, velocity: Weights, k: int) -> tuple[Weights, Weights]:
        new, kept = {}, {}
        for name, value in params.items():
            slope = grads[name] + weight_decay * value
            kept[name] = momentum * velocity[name] + slope
            direction = slope + momentum * kept[name] if nesterov else kept[name]
            new[name] = value - rate_at(rate, name, k) * direction
        return new, kept

    return Rule(start, step)


def adam(
    rate: Rate, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0
) -> Rule:
    """Adam (Kingma and Ba 2015, algorithm 1) with ``eps_root`` added inside the root."""

    def start(params: Weights) -> tuple[Weights, Weights]:
        zeros = {name: torch.zeros_like(value) for name, value in params.items()}
        return zeros, dict(zeros)

    def step(params: Weights, grads: Weights, state: tuple[Weights, Weights], k: int) -> tuple[Weights, Any]:
        new, first, second = {}, {}, {}
        for name, value in params.items():
            first[name] = beta1 * state[0][name] + (1 - beta1) * grads[name]
            second[name] = beta2 * state[1][name] + (1 - beta2) * grads[name] ** 2
            mean = first[name] / (1 - beta1 ** (k + 1))
            square = second[name] / (1 - beta2 ** (k + 1))
            new[name] = value - rate_at(rate, name, k) * mean / ((square + eps_root).sqrt() + eps)
        return new, (first, second)

    return Rule(start, step)


def clipped(rule: Rule, max_norm: float) -> Rule:
    """Scale gradients whose joint norm passes ``max_norm`` down to it, then take the rule's step."""

    def step(params: Weights, grads: Weights, state: Any, k: int) -> tuple[Weights, Any]:
        norm = torch.cat([value.flatten() for value in grads.values()]).norm()
        if norm > max_norm:
            grads = {name: value * (max_norm / norm) for name, value in grads.items()}
        return rule.step(params, grads, state, k)

    return Rule(rule.start, step)


def anchored(rate: float, pull: float) -> Rule:
    """``p <- p - rate (g + pull (p - p_0))``: its state is where the loop started."""

    def step(params: Weights, grads: Weights, anchor: Weights, k: int) -> tuple[Weights, Weights]:
        new = {}
        for name, value in params.items():
            new[name] = value - rate * (grads[name] + pull * (value - anchor[name]))
        return new, anchor

    return Rule(dict, step)
