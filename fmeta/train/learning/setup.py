"""What a run that learns an optimiser is made of: the rule, problems on three kinds of data, the estimator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import fmeta
from fmeta import learned, tree
from fmeta.data.pool import Pools
from fmeta.learned.problems import Problem, Training
from fmeta.train.config import Config
from fmeta.train.device import pick_device
from fmeta.train.experiment import make_outer, make_plan
from fmeta.train.learning.config import LearningTask
from fmeta.train.learning.problems import make_problems, pools_of
from fmeta.types import Plan

RULES: dict[str, Callable[[float, int], learned.LearnedOptimizer]] = {
    "meta_transformer": lambda lr, longest: learned.meta_transformer(lr=lr, longest=longest),
    "policy": lambda lr, longest: learned.meta_transformer(lr=lr, knowledge=False),
    "schedule": lambda lr, longest: learned.schedule(lr=lr, longest=longest),
    "mlp": lambda lr, longest: learned.mlp(lr=lr),
    "lstm": lambda lr, longest: learned.lstm(lr=lr / 1e-3),
}
"""By first rate and longest training, for the transformer's clock; policy and lstm read none, mlp reads it as it is."""


class Learning(NamedTuple):
    """Everything that a run computes with."""

    config: Config[LearningTask]
    rule: learned.LearnedOptimizer
    pools: Pools
    train: list[Problem]
    val: list[Problem]
    test: list[Problem]
    estimator: fmeta.Estimator
    outer: fmeta.Transform
    plan: Plan
    device: torch.device

    @property
    def lengths(self) -> tuple[int, int]:
        """Shortest and longest training."""
        return self.config.task.shortest, self.config.task.longest

    def system(self, problem: Problem) -> fmeta.System:
        """A training of a problem by the rule."""
        return learned.training(problem, self.rule, steps=self.lengths[1])

    def sample(self, problem: Problem, seed: int, step: int, tasks: int, length: Any) -> Training:
        """Tasks on the run's device."""
        return tree.map(lambda x: x.to(self.device), problem.sample(seed, step, tasks, length))


def build(config: Config[LearningTask]) -> Learning:
    """A run from its config."""
    task = config.task
    if task.shortest > task.longest:
        raise ValueError(
            f"train: --shortest must not be above --longest, got {task.shortest} and {task.longest}."
        )
    pools = pools_of(task)
    problems = [make_problems(task.problems, task, pool) for pool in (pools.train, pools.val, pools.test)]
    truncation = task.truncation or None
    if task.estimator == "pes":
        estimator = fmeta.pes(task.std, truncation=truncation or task.longest)
    else:
        estimator = fmeta.bptt(truncation) if task.estimator == "bptt" else fmeta.es(task.std)
    return Learning(
        config=config,
        rule=RULES[task.optimizer](task.start_lr, task.longest),
        pools=pools,
        train=problems[0],
        val=problems[1],
        test=problems[2],
        estimator=estimator,
        outer=fmeta.chain(fmeta.clip_by_norm(1.0), make_outer(config.outer)),
        plan=make_plan(config),
        device=pick_device(config.machine.device),
    )
