"""The result of a run: scores on test tasks beside two baselines, as a table, results.json and plots."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch

import fmeta
from fmeta.train import baselines, checkpoint, folder, plots
from fmeta.train.checkpoint import finite_or_none
from fmeta.train.evaluate import Compared, as_json, estimates, per_task
from fmeta.train.experiment import Experiment
from fmeta.train.loop import Hooks, Progress
from fmeta.train.run import without_steps
from fmeta.train.table import table
from fmeta.train.terminal import progress_bar, say
from fmeta.types import Params, Tree

BASELINE = "baseline.safetensors"


def report(path: Path, experiment: Experiment, name: str, command: str) -> int:
    """Test a checkpoint of a run, print the table, write results.json and the plots; returns 0.

    Args:
        path: the run folder.
        experiment: the run.
        name: ``"best"`` or ``"last"``.
        command: the command line, to be written down.
    """
    state, progress, _ = folder.load(path, name, experiment)
    tuned = fine_tuned(path, experiment) if experiment.config.report.baselines else {}
    say(
        f"testing the {name} checkpoint, of step {progress.step:,}, on {experiment.test.tasks:,} unseen tasks"
    )
    compared = compare(experiment, state.meta, tuned)
    say("\n" + table(experiment, compared, baseline_steps(path, experiment) if tuned else 0))
    found = results(path, experiment, progress, compared, tuned, name, command)
    once = experiment.processes.once
    once(lambda: folder.write_json(path / "results.json", found))
    made = once(lambda: plots.draw(path, experiment, state.meta, compared))
    say(f"\nplots: {', '.join(str(plot) for plot in made)}")
    say(f"numbers: {path / 'results.json'}   again: {shlex.join(['fmeta', 'eval', str(path)])}")
    return 0


def results(
    path: Path,
    experiment: Experiment,
    progress: Progress,
    compared: Compared,
    tuned: dict[str, baselines.FineTuned],
    name: str,
    command: str,
) -> dict[str, Any]:
    """Everything that is in results.json."""
    config = experiment.config
    final = compared.steps.index(0 if without_steps(experiment) else config.inner.test_steps)
    headline = {
        name: finite_or_none(value) for name, value in estimates(compared.learned)[final]._asdict().items()
    }
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
        "headline": {"steps": compared.steps[final], **headline},
        **as_json(compared),
    }
    if tuned:
        found["baseline_steps"] = baseline_steps(path, experiment)
        found["fine_tuning"] = {name: [list(s) for s in one.settings] for name, one in tuned.items()}
    return found


def device_name(device: torch.device) -> str:
    """The device as a result should name it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def steps_shown(experiment: Experiment) -> list[int]:
    """All numbers of inner steps of the result's curve."""
    inner = experiment.config.inner
    return [0] if without_steps(experiment) else list(range(max(10, inner.test_steps, inner.inner_steps) + 1))


def compare(experiment: Experiment, meta: Tree, tuned: dict[str, baselines.FineTuned]) -> Compared:
    """Scores of the run and of the fine-tuned baselines on the test tasks."""
    metric, steps = experiment.family.metric, steps_shown(experiment)
    measure = fmeta.meta_eval(experiment.algorithm, experiment.plan, steps=steps)
    learned = per_task(measure, meta, experiment.test, metric)
    others = {name: baselines.scores(experiment, one, experiment.test) for name, one in tuned.items()}
    if experiment.family.reference:
        algorithm, start = experiment.family.reference()
        measure = fmeta.meta_eval(algorithm, experiment.plan, steps=[0])
        found = per_task(measure, start, experiment.test, metric)
        others["frozen_encoder"] = found.expand(-1, len(steps))
    return Compared(steps, metric, learned, others)


def baseline_steps(path: Path, experiment: Experiment) -> int:
    """Training steps of the baseline: the config's, or as many as the run took."""
    return experiment.config.report.baseline_steps or folder.steps_taken(path)


def fine_tuned(path: Path, experiment: Experiment) -> dict[str, baselines.FineTuned]:
    """The baselines without meta-learning, trained unless the run folder has them already."""
    steps = baseline_steps(path, experiment)
    params = stored_baseline(path, experiment, steps)
    if params is None:
        say(f"baseline without meta-learning: {steps:,} steps on all training tasks together")
        params = trained_baseline(experiment, steps)
        experiment.processes.once(lambda: checkpoint.save(path / BASELINE, params, {"steps": steps}))
    say("choosing its fine-tuning rates on validation tasks")
    # An algorithm without steps is compared with fine-tuning at its end.
    at = [experiment.config.inner.test_steps] if without_steps(experiment) else steps_shown(experiment)
    names = baselines.HEADS if baselines.needs_head(experiment) else ["no_meta_learning"]
    return {name: baselines.choose(experiment, params, baselines.HEADS[name], at) for name in names}


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
