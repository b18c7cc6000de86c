"""The result of a run: scores on test tasks beside its baselines, as a table, results.json and plots."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fmeta
from fmeta.train import baselines, checkpoint, folder, plots
from fmeta.train.checkpoint import finite_or_none
from fmeta.train.evaluate import (
    Compared,
    Curve,
    Scores,
    as_json,
    calibration,
    estimates,
    scores,
    scores_as_json,
)
from fmeta.train.experiment import Experiment
from fmeta.train.loop import Hooks, Progress
from fmeta.train.run import without_steps
from fmeta.train.table import ROWS, table
from fmeta.train.terminal import progress_bar, say
from fmeta.types import Params, Tree

BASELINE = "baseline.safetensors"


class Measured(NamedTuple):
    """A baseline of a run on its test tasks."""

    tuned: baselines.FineTuned
    by_scope: dict[str, Scores]
    curve: Curve
    """With the scope chosen for each number of steps."""


def report(
    path: Path,
    experiment: Experiment,
    name: str,
    command: str,
    steps: Sequence[int] | None = None,
    out: Path | None = None,
) -> int:
    """Test a checkpoint of a run, print the table, write results.json and the plots; returns 0.

    Args:
        path: the run folder.
        experiment: the run.
        name: ``"best"`` or ``"last"``.
        command: the command line, to be written down.
        steps: the numbers of steps that the table shows; those of ``ROWS`` and the config's by default.
        out: where the result is written; the run folder by default.
    """
    out = out or path
    state, progress, _ = folder.load(path, name, experiment)
    shown = sorted({*ROWS, headline_steps(experiment)} if steps is None else steps)
    names = baselines.names(experiment) if experiment.config.report.baselines else []
    others = measured_baselines(path, experiment, names, steps) if names else {}
    say(
        f"testing the {name} checkpoint, of step {progress.step:,}, on {experiment.test.tasks:,} unseen tasks"
    )
    learned = measured(experiment, state.meta, steps)
    curves = {n: one.curve for n, one in others.items()} | reference(experiment)
    compared = Compared(experiment.family.metric, learned, curves)
    tuned = {one.curve.name: one.tuned for one in others.values()}
    trained = f"{baseline_steps(path, experiment):,} steps" if names else ""
    say("\n" + table(experiment.config.recipe, compared, shown, tuned, trained))
    found = results(path, experiment, progress, compared, others, name, command)
    once = experiment.processes.once
    once(lambda: out.mkdir(exist_ok=True))
    once(lambda: folder.write_json(out / "results.json", found))
    made = once(lambda: plots.draw(path, out, experiment, state.meta, compared))
    say(f"\nin {out}: results.json, {', '.join(plot.name for plot in made)}")
    say(f"again: {command if out != path else shlex.join(['fmeta', 'eval', str(path)])}")
    return 0


def results(
    path: Path,
    experiment: Experiment,
    progress: Progress,
    compared: Compared,
    others: dict[str, Measured],
    name: str,
    command: str,
) -> dict[str, Any]:
    """Everything that is in results.json."""
    config = experiment.config
    final = compared.learned.steps.index(headline_steps(experiment))
    mean, interval = estimates(compared.learned.scores.values)[final]
    headline = {"steps": headline_steps(experiment), "mean": mean, "interval": interval}
    errors = calibration(compared.learned)
    headline |= {"ece": errors[final]} if errors else {}
    found = {
        "recipe": config.recipe,
        "algorithm": config.inner.algorithm,
        "command": command,
        "seed": config.outer.seed,
        "checkpoint": name,
        "outer_steps": progress.step,
        "skipped_steps": progress.skipped,
        "wall_s": round(progress.wall_s, 1),
        "device": device_name(experiment.device),
        "threads": torch.get_num_threads(),
        "processes": experiment.processes.size,
        "versions": folder.versions(),
        "headline": {key: finite_or_none(value) for key, value in headline.items()},
        **as_json(compared),
    }
    if others:
        found["baseline_steps"] = baseline_steps(path, experiment)
        found["fine_tuning"] = {n: fine_tuning_as_json(one) for n, one in others.items()}
    return found


def fine_tuning_as_json(one: Measured) -> dict[str, Any]:
    """What was chosen for each number of steps, and each scope by itself."""
    scopes = {
        scope: {"rates": one.tuned.rates[scope], **scores_as_json(Curve(scope, one.tuned.steps, found))}
        for scope, found in one.by_scope.items()
    }
    return {"steps": one.tuned.steps, "chosen": [list(s) for s in one.tuned.settings], "scopes": scopes}


def device_name(device: torch.device) -> str:
    """The device as a result should name it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def headline_steps(experiment: Experiment) -> int:
    """The number of inner steps that a run's result is about."""
    return 0 if without_steps(experiment) else experiment.config.inner.test_steps


def steps_measured(experiment: Experiment, asked: Sequence[int] | None = None) -> list[int]:
    """All numbers of steps of the curves: up to 10 or the config's own, and what is asked for."""
    inner = experiment.config.inner
    return sorted({*range(max(10, inner.test_steps, inner.inner_steps) + 1), *(asked or ())})


def measured(experiment: Experiment, meta: Tree, steps: Sequence[int] | None = None) -> Curve:
    """The scores of a run on its test tasks."""
    at = [0] if without_steps(experiment) else steps_measured(experiment, steps)
    predict = fmeta.meta_predict(experiment.algorithm, experiment.plan, steps=at)
    found = scores(predict, meta, experiment.test, experiment.family.metric)
    return Curve(experiment.config.inner.algorithm, at, found)


def measured_baselines(
    path: Path, experiment: Experiment, names: Sequence[str], steps: Sequence[int] | None = None
) -> dict[str, Measured]:
    """The scores of baselines without meta-learning, by their names in results.json.

    The pre-trained model is trained first unless the run folder has it already.
    """
    chosen = {name: baselines.BASELINES[name] for name in names}
    params = pretrained(path, experiment) if any(one.pretrained for one in chosen.values()) else None
    say("fine-tuning the baselines: scopes and rates are chosen on validation tasks")
    found: dict[str, Measured] = {}
    for i, (name, one) in enumerate(chosen.items(), 1):
        say(f"  {i} of {len(chosen)}: {one.title}, {len(baselines.settings())} settings")
        tuned = baselines.choose(experiment, one, params, steps_measured(experiment, steps))
        by_scope = baselines.scores_by_scope(experiment, tuned, experiment.test)
        best = baselines.best_scores(tuned, by_scope)
        found[name] = Measured(tuned, by_scope, Curve(one.title, tuned.steps, best))
    return found


def reference(experiment: Experiment) -> dict[str, Curve]:
    """The scores of what the recipe's result is to be better than and that nothing is trained for."""
    if experiment.family.reference is None:
        return {}
    algorithm, meta = experiment.family.reference()
    predict = fmeta.meta_predict(algorithm, experiment.plan, steps=[0])
    found = scores(predict, meta, experiment.test, experiment.family.metric)
    return {"frozen_encoder": Curve("frozen encoder", [0], found)}


def baseline_steps(path: Path, experiment: Experiment) -> int:
    """Training steps of the baseline: the config's, or as many as the run took."""
    return experiment.config.report.baseline_steps or folder.steps_taken(path)


def pretrained(path: Path, experiment: Experiment) -> Params:
    """The weights of one model for all training tasks, trained unless the run folder has them already."""
    steps = baseline_steps(path, experiment)
    params = stored_baseline(path, experiment, steps)
    if params is None:
        say(f"baseline without meta-learning: {steps:,} steps on all training tasks together")
        params = trained_baseline(experiment, steps)
        experiment.processes.once(lambda: checkpoint.save(path / BASELINE, params, {"steps": steps}))
    return params


def stored_baseline(path: Path, experiment: Experiment, steps: int) -> Params | None:
    """The baseline's weights in the run folder, if they were trained for as many steps."""
    if not (path / BASELINE).exists() or checkpoint.read(path / BASELINE)[1]["steps"] != steps:
        return None
    return checkpoint.load(path / BASELINE, baselines.pooled_model(experiment)[1])[0]


def trained_baseline(experiment: Experiment, steps: int) -> Params:
    """Train the baseline behind a progress bar of its own."""
    with progress_bar("baseline", steps) as bar:
        hooks = Hooks(
            log=lambda step, numbers: bar.show(numbers),
            validated=lambda step, value, best: None,
            save=lambda name, state, progress: None,
            stepped=bar.stepped,
            started=lambda seconds: bar.restart_clock(),
            interrupted=lambda: False,
        )
        return baselines.pretrain(experiment, steps, hooks)
