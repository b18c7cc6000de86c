"""Scores on held-out tasks: means with intervals after each number of inner steps, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.train.checkpoint import finite_or_none
from fmeta.types import Metrics, Sampler, TaskBatch, Tree

VALIDATION_SEED = 1_000_001  # above every seed that training may use (config.MAX_SEED)
TEST_SEED = 1_000_002


class Held(NamedTuple):
    """Held-out tasks, the same for all that is compared: ``sampler(seed, 0)``, ``sampler(seed, 1)``, ..."""

    sampler: Sampler
    seed: int
    tasks: int


class Estimate(NamedTuple):
    """A mean over tasks and the half-width of its 95 % interval."""

    mean: float
    interval: float


def per_task(measure: Callable[[Tree, TaskBatch], Metrics], meta: Tree, held: Held, metric: str) -> Tensor:
    """A metric of every held-out task after each number of inner steps.

    Args:
        measure: from ``fmeta.meta_eval`` with a list of steps.
        meta: what it starts from.
        held: the tasks; the last batch is cut to their count.
        metric: ``"loss"`` or ``"accuracy"``.

    Returns:
        ``[held.tasks, len(steps)]``, float64, on the CPU.
    """
    found: list[Tensor] = []
    while sum(map(len, found)) < held.tasks:
        values = measure(meta, held.sampler(held.seed, len(found)))[metric]
        found.append(values.detach().cpu().double())
    return torch.cat(found)[: held.tasks]


def estimate(values: Tensor) -> Estimate:
    """Mean of ``[tasks]`` and 1.96 standard errors, the interval that the few-shot papers report."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), 1.96 * error)


def estimates(values: Tensor) -> list[Estimate]:
    """``estimate`` of each column of ``[tasks, steps]``."""
    return [estimate(column) for column in values.T]


class Compared(NamedTuple):
    """The scores of one run and of its baselines, on the same tasks."""

    steps: list[int]
    metric: str
    learned: Tensor
    """``[tasks, steps]`` of the meta-learned model."""
    baselines: dict[str, Tensor]
    """The same of the models without meta-learning."""


def adapts(compared: Compared) -> bool:
    """Whether the meta-learned model takes steps, so that there is a score without any."""
    return len(compared.steps) > 1


def differences(compared: Compared) -> dict[str, list[Estimate]]:
    """Paired differences, task by task, of the meta-learned model and each baseline after the same steps."""
    learned = compared.learned
    found = {"no_adaptation": estimates(learned - learned[:, :1])} if adapts(compared) else {}
    return found | {name: estimates(learned - values) for name, values in compared.baselines.items()}


def as_json(compared: Compared) -> dict[str, Any]:
    """Scores as plain values for ``results.json``."""
    plain = lambda found: {  # noqa: E731
        "mean": [finite_or_none(e.mean) for e in found],
        "interval_95": [finite_or_none(e.interval) for e in found],
    }
    scores = {"meta_learned": compared.learned}
    scores |= {"no_adaptation": compared.learned[:, :1]} if adapts(compared) else {}
    scores |= compared.baselines
    return {
        "metric": compared.metric,
        "tasks": len(compared.learned),
        "steps": compared.steps,
        "scores": {name: plain(estimates(values)) for name, values in scores.items()},
        "meta_learned_minus": {name: plain(found) for name, found in differences(compared).items()},
    }
