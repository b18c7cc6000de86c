"""Plots of a run, as PNG files in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fmeta import tree
from fmeta.adapt import run
from fmeta.tasks import sinusoid_waves
from fmeta.train.config import SinusoidTask
from fmeta.train.curves import Look, metric_label, reliability_figure, step_figure
from fmeta.train.evaluate import Compared, adapts
from fmeta.train.experiment import Experiment
from fmeta.train.family import HELD_BATCH
from fmeta.train.logging import read_metrics
from fmeta.train.run import without_steps
from fmeta.train.text.config import TextTask
from fmeta.types import Task, Tree

LEARNED, TUNED, FAINT, SCRATCH, PLAIN, INK = (
    *("#1f5fa8", "#d9772b", "#c9a227", "#8f7aa8"),
    *("#9aa0a6", "#202124"),
)
BASELINES = {
    "from_scratch": (SCRATCH, "from scratch"),
    "no_meta_learning": (TUNED, "trained on all tasks\ntogether, fine-tuned"),
    "no_meta_learning_zero_head": (FAINT, "the same from\na head of zeros"),
    "frozen_encoder": (FAINT, "the encoder as it came,\nclass means"),
}
PALETTE = ("#1f5fa8", "#d9772b", "#188038", "#9c4bb0", "#00838f", "#c5221f", "#8a6d00", "#5c6bc0")
"""Colours of several runs in one plot."""
SHARED = "#5f6368"
"""The colour of a baseline that they have in common."""
RIGHT, WRONG = "#188038", "#d93025"
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#80868b",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#5f6368",
    "ytick.color": "#5f6368",
    "legend.frameon": False,
    "figure.dpi": 160,
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
}


def draw(path: Path, out: Path, experiment: Experiment, meta: Tree, compared: Compared) -> list[Path]:
    """Draw all plots of a run into the folder ``out``; returns their paths."""
    with mpl.rc_context(STYLE):
        figures = {"learning_curve": learning_curve(path, experiment)}
        if any(adapts(look.curve) for look in looks(compared)):
            figures["steps"] = step_figure(looks(compared), compared.metric, start=adapts(compared.learned))
        if compared.metric == "accuracy":
            figures["calibration"] = calibration_figure(compared, experiment)
        if isinstance(experiment.config.task, SinusoidTask):
            figures["adaptation"] = waves(experiment, meta)
        elif not isinstance(experiment.config.task, TextTask):
            figures["episode"] = episodes(experiment, meta)
        for name, figure in figures.items():
            figure.savefig(out / f"{name}.png")
    return [out / f"{name}.png" for name in figures]


def learning_curve(path: Path, experiment: Experiment) -> Figure:
    """Training and validation over the outer steps."""
    lines, metric, inner = read_metrics(path), experiment.family.metric, experiment.config.inner
    after = (lambda steps: "") if without_steps(experiment) else lambda steps: f", {steps_of(steps)}"
    scale = 100 if metric == "accuracy" else 1
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.add_subplot()
    looks: dict[str, dict[str, Any]] = {
        "train": {"color": PLAIN, "lw": 0.8, "label": f"training{after(inner.inner_steps)}"},
        "validation": {
            "color": LEARNED,
            "marker": "o",
            "ms": 3,
            "label": f"validation{after(inner.test_steps)}",
        },
    }
    for kind, look in looks.items():
        mine = [line for line in lines if line["kind"] == kind and line.get(metric) is not None]
        found = [(line["step"], line[metric]) for line in mine]
        if found:
            steps, values = zip(*found, strict=True)
            axes.plot(steps, [scale * value for value in values], **look)
    if metric == "loss":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set(xlabel="outer step", ylabel=metric_label(metric))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return figure


def steps_of(count: int) -> str:
    """``1 step``, ``10 steps``."""
    return f"{count} step" + ("" if count == 1 else "s")


def looks(compared: Compared) -> list[Look]:
    """The curves of a run and its baselines, and how they are drawn."""
    learned = compared.learned
    style = "-" if adapts(learned) else "--"
    found = [Look(learned, LEARNED, f"meta-learned ({learned.name})", style, 2.2)]
    return found + [Look(curve, *BASELINES[name]) for name, curve in compared.baselines.items()]


def calibration_figure(compared: Compared, experiment: Experiment) -> Figure:
    """The reliability diagram after as many steps as the result is about."""
    shown, steps = looks(compared), experiment.config.inner.test_steps
    at = [look.curve.steps.index(steps) if adapts(look.curve) else 0 for look in shown]
    adapting = [look for look in shown if adapts(look.curve)]
    title = f"after {steps_of(steps)} of adaptation" if adapting else ""
    if adapting and not adapts(compared.learned):
        title = f"baselines {title}"
    return reliability_figure(shown, at, title)


AFTER: dict[int, dict[str, Any]] = {
    0: {"color": PLAIN, "ls": ":"},
    1: {"color": TUNED},
    10: {"color": LEARNED, "lw": 1.8},
}
"""Numbers of steps that the waves are drawn after, and how."""


def waves(experiment: Experiment, meta: Tree, rows: int = 2, columns: int = 3) -> Figure:
    """Unseen sine waves: the truth, the support points, and the model after 0, 1 and 10 steps."""
    held = experiment.test
    tasks = held.sampler(held.seed, 0)
    amplitudes, phases = sinusoid_waves(held.seed, 0, tasks=HELD_BATCH)
    x = torch.linspace(-5, 5, 201)
    figure = Figure(figsize=(8, 4.3))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for index, axes in enumerate(grid.flat):
        task = tree.select(tasks, index)
        truth = amplitudes[index, 0] * torch.sin(x - phases[index, 0])
        axes.plot(x.numpy(), truth.numpy(), color=INK, lw=1, label="truth")
        errors = []
        for steps, look in AFTER.items():
            says = predicted(experiment, meta, task, x[:, None], steps)[:, 0]
            errors.append(f"{(says - truth).square().mean():.2f}")
            axes.plot(x.numpy(), says.numpy(), label=f"after {steps_of(steps)}", **look)
        points = task.support.x.cpu().numpy(), task.support.y.cpu().numpy()
        axes.plot(*points, "o", ms=5, color=INK, mec="white", mew=0.8, label="support points", zorder=5)
        axes.set_title("error " + " → ".join(errors), loc="right")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def predicted(experiment: Experiment, meta: Tree, task: Task, x: Tensor, steps: int) -> Tensor:
    """What the model says of ``x`` after some steps of adaptation to a task's support set."""
    algorithm = experiment.algorithm
    with torch.no_grad():
        adapted = run(algorithm.inner_loop, meta, task.support, steps)
        return algorithm.predict(meta, adapted, x.to(experiment.device)).cpu()


def episodes(experiment: Experiment, meta: Tree, count: int = 4) -> Figure:
    """Unseen tasks, a line each: the pictures shown, with labels, then queries and what the model says."""
    ways = experiment.family.outputs
    names = [chr(ord("A") + label) if ways <= 26 else str(label) for label in range(ways)]
    tasks = experiment.test.sampler(experiment.test.seed, 0)
    seen = experiment.family.shown(experiment.test.seed, 0) if experiment.family.shown else tasks
    figure = Figure(figsize=(1.9 * ways + 0.4, 1.2 * count + 0.4))
    left, right = figure.subfigures(1, 2, wspace=0.04)  # type: ignore[misc]  # an array of two
    left.suptitle("Learned from: one of each class", x=0.01, ha="left", size="medium")
    right.suptitle(
        f"Queries of {names[0]} to {names[-1]}: what the model says", x=0.01, ha="left", size="medium"
    )
    grids = [side.subplots(count, ways, squeeze=False) for side in (left, right)]
    for index in range(count):
        task, view = tree.select(tasks, index), tree.select(seen, index)
        says = said(experiment, meta, task)
        shown, asked = first_of_class(task.support.y, ways), first_of_class(task.query.y, ways)
        for label, axes in enumerate(grids[0][index]):
            picture(axes, view.support.x[shown[label]], names[label], INK)
        for axes, place in zip(grids[1][index], asked, strict=True):
            correct = says[place] == task.query.y[place].item()
            picture(axes, view.query.x[place], names[says[place]], RIGHT if correct else WRONG, framed=True)
    return figure


def said(experiment: Experiment, meta: Tree, task: Task) -> list[int]:
    """The label that the adapted model gives to each query of a task."""
    steps = experiment.algorithm.inner_loop.steps and experiment.config.inner.test_steps
    return predicted(experiment, meta, task, task.query.x, steps).argmax(1).tolist()


def first_of_class(labels: Tensor, ways: int) -> list[int]:
    """Where each class occurs first."""
    return [int((labels == label).nonzero()[0]) for label in range(ways)]


def picture(axes: Axes, x: Tensor, name: str, color: str, framed: bool = False) -> None:
    """One picture, dark ink on white, with its label below."""
    ink = x.detach().cpu().float()
    shown = 1 - ink[0] if len(ink) == 1 else ink.movedim(0, 2)
    axes.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(name, color=color, fontweight="bold", labelpad=2)
    for spine in axes.spines.values():
        spine.set(visible=True, color=color if framed else "#dadce0", linewidth=1.6 if framed else 0.8)
