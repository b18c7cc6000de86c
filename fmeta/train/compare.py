"""Several runs on the same test tasks: one table and one plot, with paired differences to the first run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from torch import Tensor

import fmeta
from fmeta.train import folder, plots
from fmeta.train.baselines import BASELINES
from fmeta.train.checkpoint import finite_or_none
from fmeta.train.curves import Look, step_figure
from fmeta.train.evaluate import Curve, adapts, calibration, estimates, paired
from fmeta.train.experiment import build
from fmeta.train.options import to_json
from fmeta.train.report import (
    Measured,
    fine_tuning_as_json,
    measured,
    measured_baselines,
)
from fmeta.train.runs import Run, looked_at, owned
from fmeta.train.table import ROWS, Block, aligned, choices, heading, notes, rows
from fmeta.train.terminal import say


class Line(NamedTuple):
    """A run or a baseline in the table and in compare.json."""

    curve: Curve
    run: Run
    baseline: str = ""
    """Its name in results.json, where it is one."""
    measured: Measured | None = None


def compare(
    paths: Sequence[Path],
    out: Path,
    *,
    tasks: int,
    steps: Sequence[int] | None = None,
    checkpoint: str = "best",
    root: Path | None = None,
    with_baselines: bool = False,
    baseline_steps: int | None = None,
) -> int:
    """Test runs on the same tasks; print a table, write ``compare.json`` and ``compare.png``; returns 0.

    Differences are paired, task by task, with the first run, after the same number of steps. A run without inner
    steps has one score, which is compared with the others' after the last number of steps shown.

    Args:
        paths: run folders.
        out: folder of the results.
        tasks: test tasks.
        steps: the numbers of steps that the table shows.
        checkpoint: ``"best"`` or ``"last"`` of each run.
        root: folder of the data set, if it is not where it was in training.
        with_baselines: whether the runs' baselines without meta-learning are lines of the table too.
        baseline_steps: training steps of the pre-trained ones; by default as many as their run took.

    Raises:
        ValueError: for runs whose test tasks differ, so that their scores do not compare.
    """
    runs = looked_at(paths, tasks, root, with_baselines, baseline_steps)
    at = sorted({k for run in runs for k in (*run.steps, *(steps or ()))})
    shown = sorted({*ROWS, *(run.headline for run in runs)} if steps is None else steps)
    owners = owned(runs)
    found: list[Line] = []
    for run in runs:
        say(f"testing {run.path}")
        experiment = build(run.config)
        state, _, _ = folder.load(run.path, checkpoint, experiment)
        found.append(Line(measured(experiment, state.meta, at)._replace(name=run.name), run))
    for run in runs:
        names = [name for name in run.baselines if owners[name, run.baselines[name]] is run]
        if names:
            say(f"baselines of {run.path}")
            others = measured_baselines(run.path, build(run.config), names, at)
            found += [
                Line(titled(one.curve, name, run, owners), run, name, one) for name, one in others.items()
            ]
    metric = "loss" if found[0].curve.scores.reliability is None else "accuracy"
    say("\n" + table(found, metric, shown))
    out.mkdir(parents=True, exist_ok=True)
    folder.write_json(out / "compare.json", as_json(found, metric, shown[-1]))
    with mpl.rc_context(plots.STYLE):
        step_figure(looks(found), metric).savefig(out / "compare.png")
    say(f"\nin {out}: compare.json, compare.png")
    return 0


def titled(curve: Curve, name: str, run: Run, owners: dict[tuple[str, Any], Run]) -> Curve:
    """A baseline's curve, named after its run where another run has another such baseline."""
    alone = [other for other, _ in owners].count(name) == 1
    return curve if alone else curve._replace(name=f"{curve.name} ({run.name})")


def table(found: Sequence[Line], metric: str, shown: Sequence[int]) -> str:
    """All lines as text."""
    first = found[0].curve
    blocks = [Block(first, None)]
    blocks += [Block(line.curve, paired(line.curve, first, shown[-1])) for line in found[1:]]
    lines = aligned(rows(blocks, metric, shown, f"minus {first.name}"))
    counts = {line.run.trained for line in found if line.baseline}
    trained = f"{counts.pop():,} steps" if len(counts) == 1 else "as many steps as its run"
    said = notes(metric, True, list({line.baseline: 0 for line in found if line.baseline}), trained)
    tuned = {line.curve.name: line.measured.tuned for line in found if line.measured}
    title = heading(found[0].run.config.recipe, metric, len(first.scores.values))
    return "\n".join([title, "", *lines, "", *said, *choices(tuned, shown)])


def looks(found: Sequence[Line]) -> list[Look]:
    """Runs in colours, dashed where they take no steps; baselines dashed without points, grey where all share one."""
    dashes = {"from_scratch": ":", "no_meta_learning": "-.", "no_meta_learning_zero_head": "--"}
    paths = dict.fromkeys(line.run.path for line in found)
    colors = dict(zip(paths, itertools.cycle(plots.PALETTE), strict=False))
    drawn: list[Look] = []
    for line in found:
        name, color = line.curve.name, colors[line.run.path]
        if line.baseline:
            shared = name == BASELINES[line.baseline].title
            color = plots.SHARED if shared else color
            drawn.append(Look(line.curve, color, name, dashes[line.baseline], 1.3, ""))
        else:
            drawn.append(Look(line.curve, color, name, "-" if adapts(line.curve) else "--"))
    return drawn


def as_json(found: Sequence[Line], metric: str, end: int) -> dict[str, Any]:
    """Means, intervals and calibration of all lines, and the configs."""
    first = found[0].curve

    def plain(values: Tensor) -> list[dict[str, float | None]]:
        return [
            {name: finite_or_none(value) for name, value in e._asdict().items()} for e in estimates(values)
        ]

    def entry(line: Line) -> dict[str, Any]:
        errors = calibration(line.curve)
        return {
            "run": str(line.run.path),
            "name": line.curve.name,
            "steps": line.curve.steps,
            "scores": plain(line.curve.scores.values),
            "minus_first": plain(paired(line.curve, first, end if adapts(first) else 0)),
            **({} if errors is None else {"ece": [finite_or_none(error) for error in errors]}),
        }

    runs = [entry(line) | {"config": to_json(line.run.config)} for line in found if not line.measured]
    others = [
        entry(line) | {"baseline": line.baseline, "fine_tuning": fine_tuning_as_json(line.measured)}
        for line in found
        if line.measured
    ]
    return {
        "metric": metric,
        "tasks": len(first.scores.values),
        "runs": runs,
        **({"baselines": others} if others else {}),
        "versions": {"torch": torch.__version__, "fmeta": fmeta.__version__},
    }
