"""Training by an optimiser as a ``System``: what estimators differentiate and comparisons run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad_and_value

from fmeta import tree
from fmeta.learned.problems import Problem, Training, rows_of
from fmeta.learned.rule import LearnedOptimizer
from fmeta.optim import as_inner
from fmeta.types import System, Transform, Tree

FLOOR = 1e-4
"""Added to losses, of which the logarithm has no bottom; a loss below zero counts as zero."""
CEILING = 1e4


def training(
    problem: Problem, rule: LearnedOptimizer | Callable[..., Transform], *, steps: int, log: bool = True
) -> System:
    """Every step of a training: a batch, its gradient, an update by the rule; the loss is that of the batch.

    Args:
        problem: what is trained.
        rule: ``(theta, length) -> Transform``: a ``LearnedOptimizer``, or ``lambda theta, _: fmeta.adam(theta["lr"])``.
        steps: the longest training.
        log: take the logarithm of losses, so that every task counts as much.

    Returns:
        A ``System`` whose tasks are ``Training`` records.
    """

    def inner(theta: Tree, task: Training) -> Transform:
        return as_inner(rule(theta, task.length.to(tree.leaves(task.params)[0].dtype)))

    def start(theta: Tree, task: Training) -> Tree:
        return task.params, inner(theta, task).init(task.params)

    def step(theta: Tree, state: Tree, task: Training, t: Tensor) -> tuple[Tree, Tensor]:
        params, opt_state = state
        batch = rows_of(task.data, t, problem.batch)
        grads, loss = grad_and_value(lambda p: problem.loss(p, batch)[0])(params)
        updates, opt_state = inner(theta, task).update(grads, opt_state, params)
        loss = torch.where(torch.isfinite(loss), loss, CEILING).clamp(max=CEILING)
        return (tree.add(params, updates), opt_state), torch.log(loss.clamp(min=0) + FLOOR) if log else loss

    return System(start, step, steps, lambda task: task.length)
