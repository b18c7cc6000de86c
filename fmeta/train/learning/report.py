"""What a learned optimiser is worth: beside ordinary ones, each at the best of 13 rates, on the same trainings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fmeta import learned
from fmeta.learned.comparison import ORDINARY, RATES, SCALE, ordinary
from fmeta.learned.problems import Problem
from fmeta.train import folder
from fmeta.train.evaluate import TEST_SEED, VALIDATION_SEED, estimate
from fmeta.train.learning.problems import make_problem
from fmeta.train.learning.setup import Learning
from fmeta.train.plots import PALETTE, STYLE
from fmeta.train.terminal import say
from fmeta.types import Params

LAST = 10
"""The final loss is the mean over as many last steps: of single batches it is noisy."""
TUNING = 32
"""Trainings that a rate is chosen on, of other classes than it is tested on."""
FURTHER = 5
"""How many times longer the longest test is than the longest training that the optimiser has learned on."""
OWN = "learned"


class Test(NamedTuple):
    """Trainings of one kind that optimisers are compared on."""

    label: str
    problem: Problem
    tuning: Problem
    steps: int


class Scores(NamedTuple):
    """Of one optimiser on the trainings of a test, ``[task]`` each."""

    final: Tensor
    mean: Tensor  # over all steps: the area under the curve
    diverged: Tensor  # whether the final loss is above the first
    curve: Tensor  # [steps], the mean over tasks
    rates: tuple[float, float]  # that the final loss and the mean were measured at


def tests_of(experiment: Learning) -> list[Test]:
    """The problems that were trained on, with unseen data; then wider, deeper, with another activation, and longer."""
    task, longest = experiment.config.task, experiment.lengths[1]
    pools = experiment.pools
    found = [
        Test(test.name, test, val, longest) for test, val in zip(experiment.test, experiment.val, strict=True)
    ]
    if any(name in ("relu", "tanh", "deep") for name in (t.label for t in found)):
        for name, label in (
            ("wide", "4 times wider"),
            ("deeper", "2 times deeper"),
            ("gelu", "another activation"),
        ):
            both = [make_problem(name, task, pool) for pool in (pools.test, pools.val)]
            found.append(Test(label, both[0], both[1], longest))
    found.append(Test(f"{FURTHER} times longer", experiment.test[0], experiment.val[0], FURTHER * longest))
    return found


def scored(curve: Tensor, rates: tuple[float, float] = (math.nan, math.nan)) -> Scores:
    """The numbers of curves ``[task, steps]``."""
    final = curve[:, -LAST:].mean(1)
    return Scores(final, curve.mean(1), ~(final <= curve[:, 0]), curve.mean(0), rates)


def best_of(test: Test, name: str, decays: bool, tasks: Any, experiment: Learning) -> Scores:
    """An ordinary optimiser at the rates that are best on other trainings, for either number."""
    tuning = experiment.sample(test.tuning, VALIDATION_SEED + 1, 1, TUNING, test.steps)
    found = learned.at_rates(test.tuning, name, decays, tuning, test.steps, experiment.plan)
    found = found.nan_to_num(1e4, 1e4, 1e4)
    chosen = [number.mean(1).argmin() for number in (found[:, :, -LAST:].mean(2), found.mean(2))]
    rates = [RATES[int(index)] * SCALE.get(name, 1.0) for index in chosen]
    at = lambda lr: learned.curves(  # noqa: E731
        test.problem, ordinary(name, decays), {"lr": torch.tensor(lr, device=experiment.device)}, tasks, test.steps,
        experiment.plan,
    )  # fmt: skip
    final = scored(at(rates[0]), (rates[0], rates[1]))
    mean = final if rates[0] == rates[1] else scored(at(rates[1]))
    return final._replace(mean=mean.mean)


def measured(test: Test, experiment: Learning, theta: Params, count: int) -> dict[str, Scores]:
    """All optimisers on one test."""
    tasks = experiment.sample(test.problem, TEST_SEED, 0, count, test.steps)
    own = learned.curves(test.problem, experiment.rule, theta, tasks, test.steps, experiment.plan)
    found = {OWN: scored(own)}
    for name in ORDINARY:
        for decays in (False, True):
            label = f"{name}{', cosine' if decays else ''}"
            found[label] = best_of(test, name, decays, tasks, experiment)
    return found


def report(path: Path, experiment: Learning, theta: Params, command: str, count: int) -> int:
    """Measure, print the table, write results.json and the curves; returns the exit code."""
    record: dict[str, Any] = {}
    curves: dict[str, dict[str, Scores]] = {}
    say(
        f"\ntesting on {count} trainings of each kind; others at the best of {len(RATES)} rates, chosen apart"
    )
    for test in tests_of(experiment):
        curves[test.label] = found = measured(test, experiment, theta, count)
        record[test.label] = {"steps": test.steps} | told(test, found)
    config = experiment.config
    result = {
        "recipe": config.recipe, "optimizer": config.task.optimizer, "command": command, "trainings": count,
        "versions": folder.versions(), "tests": record,
    }  # fmt: skip
    folder.write_json(path / "results.json", result)
    with mpl.rc_context(STYLE):
        figure(curves).savefig(path / "curves.png")
    say(f"\nin {path}: results.json, curves.png, {learned.FILE}")
    return 0


def told(test: Test, found: dict[str, Scores]) -> dict[str, Any]:
    """Print one test, and return its numbers."""
    own, numbers = found[OWN], {}
    say(
        f"\n{test.label}, {test.steps} steps   (final loss; mean over all steps; difference to the learned one)"
    )
    for label, one in found.items():
        final, mean = estimate(one.final), estimate(one.mean)
        by = (estimate(own.final - one.final), estimate(own.mean - one.mean))
        numbers[label] = {
            "final": final, "mean": mean, "diverged": int(one.diverged.sum()), "rates": one.rates,
            "learned_minus_this": {"final": by[0], "mean": by[1]},
        }  # fmt: skip
        pair = (
            "" if label == OWN else f"   {by[0][0]:+.4f} ± {by[0][1]:.4f}   {by[1][0]:+.4f} ± {by[1][1]:.4f}"
        )
        gone = f"   {int(one.diverged.sum())} diverged" if one.diverged.any() else ""
        say(f"  {label:<26} {final[0]:.4f} ± {final[1]:.4f}   {mean[0]:.4f} ± {mean[1]:.4f}{pair}{gone}")
    return numbers


def figure(curves: dict[str, dict[str, Scores]]) -> Figure:
    """Curves of the optimisers, a panel a test."""
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    drawn = Figure(figsize=(3.1 * columns, 2.5 * rows))
    axes = drawn.subplots(rows, columns, squeeze=False).flatten()
    for panel, (label, found) in zip(axes, curves.items(), strict=False):
        for index, (name, one) in enumerate(found.items()):
            width, order = (2.2, 3) if name == OWN else (1.0, 2)
            style = "--" if name.endswith("cosine") else "-"
            colour = PALETTE[0] if name == OWN else PALETTE[1 + (index - 1) // 2]
            steps = torch.arange(1, len(one.curve) + 1)
            panel.plot(steps, one.curve.cpu(), style, color=colour, lw=width, zorder=order, label=name)
        panel.set_yscale("log")
        panel.set_title(label)
    for panel in axes[len(curves) :]:
        panel.set_visible(False)
    axes[0].set_ylabel("loss of a batch")
    for panel in axes[max(len(curves) - columns, 0) : len(curves)]:  # those with nothing below
        panel.set_xlabel("steps")
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=5)
    return drawn
