"""Loss curves of trainings under an optimiser, and ordinary optimisers at many rates beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import optim, tree
from fmeta.learned.problems import Problem, Training
from fmeta.learned.rule import LearnedOptimizer
from fmeta.learned.training import training
from fmeta.parallel import Unrolled
from fmeta.types import Plan, Transform, Tree

RATES = tuple(10 ** (-4 + k / 4) for k in range(13))
"""From 1e-4 to 0.1, four a decade."""


def curves(
    problem: Problem,
    rule: LearnedOptimizer | Callable[..., Transform],
    theta: Tree,
    tasks: Training,
    steps: int,
    plan: Plan = Plan(),
    *,
    each: bool = False,
) -> Tensor:
    """The loss of every step's batch, ``[task, steps]``.

    Args:
        problem: what is trained.
        rule: ``(theta, length) -> Transform``.
        theta: weights of the rule; ``each``: ``[task, ...]``, other ones for each task.
        tasks: the trainings.
        steps: how many steps of them.
        plan: ``compile`` is read.
        each: see theta.
    """
    unrolled = Unrolled(training(problem, rule, steps=steps, log=False), plan)
    advance = unrolled.advance_each if each else unrolled.advance
    state = unrolled.start(theta, tasks, each)
    t = torch.zeros_like(tasks.length)
    end = torch.full_like(t, steps)
    losses = []
    for _ in range(steps):
        state, loss = advance(theta, state, tasks, t, end)
        losses.append(loss)
        t = t + 1
    return torch.stack(losses, 1)


def cosine(lr: Tensor, length: Tensor) -> Callable[[Tensor], Tensor]:
    """A rate that falls from ``lr`` to 0 as half a cosine."""
    return lambda count: lr * 0.5 * (1 + torch.cos(torch.pi * (count / length).clamp(0, 1)))


ORDINARY: dict[str, Callable[[Any], Transform]] = {
    "sgd, momentum 0.9": lambda lr: optim.sgd(lr, momentum=0.9),
    "adam": lambda lr: optim.adam(lr),
    "adamw": lambda lr: optim.adamw(lr),
    "lion": lambda lr: optim.lion(lr),
}
"""Optimisers to compare with, as functions of their rate."""
SCALE = {"sgd, momentum 0.9": 10.0, "lion": 0.3}
"""What their rates are multiplied by: the best of SGD lie higher."""


def ordinary(name: str, decays: bool) -> Callable[..., Transform]:
    """One of them as a rule of ``{"lr": []}``, at a constant rate or one that falls as a cosine."""
    make = ORDINARY[name]
    return lambda theta, length: make(cosine(theta["lr"], length) if decays else theta["lr"])


def at_rates(
    problem: Problem, name: str, decays: bool, tasks: Training, steps: int, plan: Plan = Plan()
) -> Tensor:
    """Curves of an ordinary optimiser at every rate of ``RATES``, ``[rate, task, steps]``."""
    count, rates = len(tasks.length), torch.tensor(RATES) * SCALE.get(name, 1.0)
    repeated = tree.map(lambda x: x.repeat(len(rates), *[1] * (x.ndim - 1)), tasks)
    theta = {"lr": rates.repeat_interleave(count).to(tasks.length.device)}
    found = curves(problem, ordinary(name, decays), theta, repeated, steps, plan, each=True)
    return found.reshape(len(rates), count, steps)
