"""Several runs on the same test tasks: one table, one plot, paired differences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

import fmeta
from fmeta.train import folder, plots
from fmeta.train.config import Config
from fmeta.train.evaluate import estimates, per_task
from fmeta.train.experiment import build
from fmeta.train.options import to_json
from fmeta.train.report import steps_shown
from fmeta.train.table import aligned, written
from fmeta.train.terminal import say
from fmeta.train.text_config import TextTask

HELD = ("ways", "shots", "test_shots", "queries", "test_queries", "split", "fold", "model", "max_length")
"""Options of a task that test tasks depend on."""


class Curve(NamedTuple):
    """The scores of a run."""

    name: str
    steps: list[int]
    values: Tensor
    """``[tasks, steps]``."""


def compare(paths: Sequence[Path], out: Path, *, test_tasks: int, checkpoint: str, root: Path | None) -> int:
    """Test runs on the same tasks; print a table, write ``compare.json`` and ``compare.png``; returns 0.

    Differences are paired, task by task, with the first run, after the same number of steps. A run without inner
    steps stands at 0 steps and is compared with the last of the others'.

    Raises:
        ValueError: for runs of different recipes or tasks, whose scores do not compare.
    """
    configs = [folder.read_config(path) for path in paths]
    check_same(paths, configs)
    names = labels(paths, configs)
    curves, metric = [], ""
    for path, config, name in zip(paths, configs, names, strict=True):
        say(f"testing {path}")
        curve, metric = measured(path, config, name, test_tasks, checkpoint, root)
        curves.append(curve)
    first = curves[0]
    columns: dict[str, list[str]] = {"run": [], "steps": [], "test": [], f"minus {first.name}": []}
    for curve in curves:
        shown = [i for i, k in enumerate(curve.steps) if k in (0, 1, 3, 5, 10)]
        columns["run"] += [curve.name] * len(shown)
        columns["steps"] += [str(curve.steps[i]) for i in shown]
        columns["test"] += written(estimates(curve.values), shown, metric)
        found = written(estimates(paired(curve, first)), shown, metric, signed=True)
        columns[f"minus {first.name}"] += found if curve is not first else [""] * len(shown)
    say("\n" + "\n".join(aligned(columns)))
    out.mkdir(parents=True, exist_ok=True)
    folder.write_json(out / "compare.json", as_json(paths, configs, curves, metric))
    draw(out / "compare.png", curves, metric)
    say(f"\nplot: {out / 'compare.png'}   numbers: {out / 'compare.json'}")
    return 0


def draw(path: Path, curves: Sequence[Curve], metric: str) -> None:
    """Means with intervals by steps of adaptation; a run without steps is a dashed line."""
    scale = 100 if metric == "accuracy" else 1
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(6.4, 3.6))
        axes = figure.add_subplot()
        top = 1.2 * max(estimates(curve.values)[0].mean for curve in curves)
        for i, curve in enumerate(curves):
            found, color = estimates(curve.values), f"C{i % 10}"
            if len(curve.steps) == 1:
                axes.axhline(scale * found[0].mean, color=color, ls="--", lw=1.2, label=curve.name)
                continue
            if metric == "loss":  # one that diverges ends there
                found = list(itertools.takewhile(lambda e: e.mean < top, found))
            mean, steps = [scale * e.mean for e in found], curve.steps[: len(found)]
            low, high = (
                [m + sign * scale * e.interval for m, e in zip(mean, found, strict=True)] for sign in (-1, 1)
            )
            axes.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
            axes.plot(steps, mean, color=color, marker="o", ms=3.5, label=curve.name)
        axes.set(xlabel="steps of adaptation", ylabel=plots.metric_label(metric))
        if metric == "loss":
            axes.set_ylim(0, top)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        figure.savefig(path)


def measured(
    path: Path, config: Config[Any], name: str, tasks: int, checkpoint: str, root: Path | None
) -> tuple[Curve, str]:
    """The scores of a run on its test tasks, and what they are."""
    place = "data" if isinstance(config.task, TextTask) else "root"
    task = config.task if root is None else replace(config.task, **{place: root})
    config = replace(config, task=task, report=replace(config.report, test_tasks=tasks))
    experiment = build(config)
    state, _, _ = folder.load(path, checkpoint, experiment)
    steps, metric = steps_shown(experiment), experiment.family.metric
    measure = fmeta.meta_eval(experiment.algorithm, experiment.plan, steps=steps)
    return Curve(name, steps, per_task(measure, state.meta, experiment.test, metric)), metric


def paired(curve: Curve, first: Curve) -> Tensor:
    """Differences to another run on the same tasks."""
    at = [min(k, first.steps[-1]) if len(curve.steps) > 1 else first.steps[-1] for k in curve.steps]
    return curve.values - first.values[:, [first.steps.index(k) for k in at]]


def check_same(paths: Sequence[Path], configs: Sequence[Config[Any]]) -> None:
    """Refuse runs whose test tasks differ."""
    of = lambda c: {"recipe": c.recipe, **{n: getattr(c.task, n) for n in HELD if hasattr(c.task, n)}}  # noqa: E731
    for path, config in zip(paths, configs, strict=True):
        wrong = [n for n, value in of(config).items() if value != of(configs[0]).get(n)]
        if wrong:
            raise ValueError(
                f"compare: runs must have the same test tasks, but {path} differs from {paths[0]} in "
                f"{wrong[0]}. Compare runs of one recipe and one kind of task."
            )


def labels(paths: Sequence[Path], configs: Sequence[Config[Any]]) -> list[str]:
    """The algorithms, or the folders where two runs have the same."""
    names = [config.inner.algorithm for config in configs]
    return [n if names.count(n) == 1 else path.name for n, path in zip(names, paths, strict=True)]


def as_json(
    paths: Sequence[Path], configs: Sequence[Config[Any]], curves: Sequence[Curve], metric: str
) -> dict[str, Any]:
    """Means and intervals, and the configs."""

    def entry(path: Path, config: Config[Any], curve: Curve) -> dict[str, Any]:
        return {
            "run": str(path), "name": curve.name, "steps": curve.steps, "config": to_json(config),
            "scores": [e._asdict() for e in estimates(curve.values)],
            "minus_first": [e._asdict() for e in estimates(paired(curve, curves[0]))],
        }  # fmt: skip

    rows = [entry(*row) for row in zip(paths, configs, curves, strict=True)]
    return {
        "metric": metric,
        "tasks": len(curves[0].values),
        "runs": rows,
        "versions": {"torch": torch.__version__, "fmeta": fmeta.__version__},
    }
