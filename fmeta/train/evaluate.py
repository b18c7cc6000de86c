"""Scores on held-out tasks after each number of inner steps: means with intervals, calibration, differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import tree
from fmeta.losses import Reliability, reliability
from fmeta.train.checkpoint import finite_or_none
from fmeta.types import Metrics, Sampler, TaskBatch, Tree

VALIDATION_SEED = 1_000_001  # above every seed that training may use (config.MAX_SEED)
TEST_SEED = 1_000_002
Predict = Callable[[Tree, TaskBatch], Tensor]
"""``(meta, tasks) -> outputs [task, steps, queries, ...]``, from ``fmeta.meta_predict`` with a list of steps."""


class Held(NamedTuple):
    """Held-out tasks, the same for all that is compared: ``sampler(seed, 0)``, ``sampler(seed, 1)``, ..."""

    sampler: Sampler
    seed: int
    tasks: int


class Estimate(NamedTuple):
    """A mean over tasks and the half-width of its 95 % interval."""

    mean: float
    interval: float


class Scores(NamedTuple):
    """What held-out tasks give after each number of inner steps, in float64, on the CPU."""

    values: Tensor
    """The metric, ``[tasks, steps]``."""
    reliability: Reliability | None
    """Of the queries of all tasks together, ``[steps, bins]``; None for regression."""


class Curve(NamedTuple):
    """The scores of one model."""

    name: str
    steps: list[int]
    """A model without inner steps has the one number 0."""
    scores: Scores


def scores(predict: Predict, meta: Tree, held: Held, metric: str) -> Scores:
    """Measure held-out tasks after each number of inner steps.

    Args:
        predict: see ``Predict``.
        meta: what it starts from.
        held: the tasks; the last batch is cut to their count.
        metric: ``"loss"``, the mean squared error, or ``"accuracy"``.
    """
    values: list[Tensor] = []
    sums: Reliability | None = None
    while sum(map(len, values)) < held.tasks:
        tasks = held.sampler(held.seed, len(values))
        left = held.tasks - sum(map(len, values))
        outputs = predict(meta, tasks)[:left].detach().cpu().double()
        target = tasks.query.y[:left, None].cpu()
        if metric == "loss":
            values.append((outputs - target).square().flatten(2).mean(2))
            continue
        labels = target.expand(outputs.shape[:-1])
        right = (outputs.argmax(-1) == labels) & ~outputs.isnan().any(
            -1
        )  # no class is found by what is no number
        values.append(right.double().mean(-1))
        found = tree.map(lambda x: x.sum(0), reliability(outputs, labels))
        sums = found if sums is None else tree.add(sums, found)
    return Scores(torch.cat(values), sums)


def per_task(predict: Predict, meta: Tree, held: Held, metric: str) -> Tensor:
    """``scores(...).values``: the metric of every held-out task, ``[tasks, steps]``."""
    return scores(predict, meta, held, metric).values


def reported(measure: Callable[[Tree, TaskBatch], Metrics], meta: Tree, held: Held, metric: str) -> Tensor:
    """A metric that the loss itself reports, of every held-out task, ``[tasks, steps]``."""
    found: list[Tensor] = []
    while sum(map(len, found)) < held.tasks:
        found.append(measure(meta, held.sampler(held.seed, len(found)))[metric].detach().cpu().double())
    return torch.cat(found)[: held.tasks]


def joined(columns: list[tuple[Scores, int]]) -> Scores:
    """One column of each of these, side by side."""
    first = columns[0][0].reliability
    sums = [tree.select(one.reliability, i) for one, i in columns] if first else []
    return Scores(
        torch.stack([one.values[:, i] for one, i in columns], dim=1), tree.stack(sums) if sums else None
    )


def estimate(values: Tensor) -> Estimate:
    """Mean of ``[tasks]`` and 1.96 standard errors, the interval that the few-shot papers report."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), 1.96 * error)


def estimates(values: Tensor) -> list[Estimate]:
    """``estimate`` of each column of ``[tasks, steps]``."""
    return [estimate(column) for column in values.T]


def adapts(curve: Curve) -> bool:
    """Whether a model takes steps, so that there is a score without any."""
    return len(curve.steps) > 1


def paired(curve: Curve, other: Curve, end: int) -> Tensor:
    """One model minus another, task by task, after each number of steps of the first, ``[tasks, steps]``.

    Both are taken after the same number of steps. A model without steps has one score, which stands for every
    number; it is itself compared with the other after ``end`` steps.
    """
    last = len(other.steps) - 1
    at = [last if last == 0 else other.steps.index(k if adapts(curve) else end) for k in curve.steps]
    return curve.scores.values - other.scores.values[:, at]


def gains(curve: Curve) -> Tensor:
    """What adaptation changes: the scores minus those before any step, task by task."""
    return curve.scores.values - curve.scores.values[:, :1]


def calibration(curve: Curve) -> list[float] | None:
    """The expected calibration error after each number of steps; None for regression."""
    return None if curve.scores.reliability is None else curve.scores.reliability.error.tolist()


class Compared(NamedTuple):
    """The scores of one run and of its baselines, on the same tasks."""

    metric: str
    learned: Curve
    baselines: dict[str, Curve]
    """Those of the models without meta-learning, by their name in results.json."""


def differences(compared: Compared) -> dict[str, list[Estimate]]:
    """Paired differences, task by task, of the meta-learned model and each baseline after the same steps."""
    learned = compared.learned
    found = {"no_adaptation": estimates(gains(learned))} if adapts(learned) else {}
    end = learned.steps[-1]
    return found | {
        name: estimates(-paired(curve, learned, end)) for name, curve in compared.baselines.items()
    }


def plain(found: list[Estimate]) -> dict[str, Any]:
    """Estimates as JSON values."""
    return {
        "mean": [finite_or_none(e.mean) for e in found],
        "interval_95": [finite_or_none(e.interval) for e in found],
    }


def scores_as_json(curve: Curve) -> dict[str, Any]:
    """The scores of a model as JSON values."""
    found = {"steps": curve.steps, **plain(estimates(curve.scores.values))}
    errors = calibration(curve)
    return found if errors is None else found | {"ece": [finite_or_none(error) for error in errors]}


def as_json(compared: Compared) -> dict[str, Any]:
    """Scores as plain values for ``results.json``."""
    learned = compared.learned
    written = {"meta_learned": scores_as_json(learned)}
    if adapts(learned):
        written["no_adaptation"] = {name: values[:1] for name, values in written["meta_learned"].items()}
    written |= {name: scores_as_json(curve) for name, curve in compared.baselines.items()}
    return {
        "metric": compared.metric,
        "tasks": len(learned.scores.values),
        "steps": learned.steps,
        "scores": written,
        "meta_learned_minus": {name: plain(found) for name, found in differences(compared).items()},
    }
