"""The command behind ``fmeta train learned-optimizer``: meta-training of an optimiser on many small trainings."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fmeta
from fmeta import learned, tree
from fmeta.learned.files import FILE
from fmeta.learned.problems import Training
from fmeta.parallel import launched
from fmeta.train import checkpoint, folder
from fmeta.train.config import Config
from fmeta.train.evaluate import VALIDATION_SEED
from fmeta.train.learning.config import LearningTask
from fmeta.train.learning.setup import Learning, build
from fmeta.train.logging import open_metrics
from fmeta.train.loop import Hooks, Progress, Settings, fit
from fmeta.train.options import check
from fmeta.train.run import divergence
from fmeta.train.terminal import format_seconds, progress_bar, say, stop_signals
from fmeta.types import MetaState, Metrics, Params, Tree


def train(config: Config[LearningTask], command: str) -> int:
    """Train or continue a run that learns an optimiser, and test it; returns the exit code.

    Args:
        config: the complete config.
        command: the command line, to be written down.

    Raises:
        ValueError: as for every recipe; for a problem that is not known, or lengths that do not fit.
    """
    check(config)
    if launched().size > 1:
        raise ValueError(
            f"train: learned-optimizer runs in one process, got {launched().size}. Start it without torchrun."
        )
    if config.machine.threads:
        torch.set_num_threads(config.machine.threads)
    experiment = build(config)
    first_weights(experiment)  # says what is wrong with a run to start from before there is a folder
    path = folder.check_resumable(config) if config.resume else folder.create(config, command)
    folder.write_config(path, config, command)
    outcome = meta_train(path, experiment)
    if outcome.reason == "diverged":
        raise ValueError(divergence(path, outcome.progress))
    if outcome.reason == "interrupted":
        again = shlex.join(["fmeta", "train", config.recipe, "--resume", str(path)])
        say(f"Stopped and saved. Continue with:\n  {again}")
        return 130
    say(f"{outcome.progress.step:,} outer steps in {format_seconds(outcome.progress.wall_s)}.")
    learned.save(path / FILE, experiment.rule, weights(path, experiment, "best"))
    return report(path, command)


def report(path: Path, command: str, name: str = "best", tasks: int | None = None) -> int:
    """Compare a run's optimiser with ordinary ones; see ``fmeta.train.learning_report``."""
    from fmeta.train.learning.report import report as told

    config = folder.read_config(path)
    experiment = finished(path)
    return told(path, experiment, weights(path, experiment, name), command, tasks or config.report.test_tasks)


def finished(path: Path) -> Learning:
    """A run to be tested, with the rule that its file holds: one of an earlier version may lack a setting."""
    experiment = build(folder.read_config(path))
    return experiment._replace(rule=learned.load(path).rule) if (path / FILE).exists() else experiment


class Drawn(NamedTuple):
    """What the sampler gives an outer step: tasks of one of the problems."""

    problem: int
    tasks: Training
    step: int


def first_state(experiment: Learning) -> MetaState:
    """The state before the first step; its carry has the tasks under way of every problem."""
    config, theta = experiment.config, first_weights(experiment)
    carries = []
    for index, problem in enumerate(experiment.train):
        tasks = experiment.sample(
            problem, config.outer.seed + 1 + index, 0, config.outer.tasks, experiment.lengths
        )
        system = experiment.system(problem)
        state = fmeta.estimate_init(system, experiment.estimator, experiment.outer, theta, tasks, seed=index)
        carries.append(state.carry)
    step = torch.zeros((), dtype=torch.int64, device=experiment.device)
    return MetaState(theta, experiment.outer.init(theta), step, tuple(carries))


def first_weights(experiment: Learning) -> Params:
    """The optimiser's weights before the first step: drawn, or those that the run of ``--start`` learned."""
    config = experiment.config
    if config.start is None:
        return tree.map(lambda x: x.to(experiment.device), experiment.rule.init(config.outer.seed))
    before = folder.read_config(config.start)
    if (before.recipe, getattr(before.task, "optimizer", "")) != (config.recipe, config.task.optimizer):
        raise ValueError(
            f"train: --start needs a run that learned {config.task.optimizer}, got {config.start}. `fmeta list` shows "
            "what runs are of."
        )
    return weights(config.start, experiment, "best")


def make_step(experiment: Learning) -> Callable[[MetaState, Any], tuple[MetaState, Metrics]]:
    """An outer step on the tasks of one problem; problems take turns."""
    seed = experiment.config.outer.seed
    steps = [
        fmeta.estimate_step(
            experiment.system(problem),
            experiment.estimator,
            experiment.outer,
            experiment.plan,
            each=fmeta.unit_norm,
        )
        for problem in experiment.train
    ]

    def step(state: MetaState, drawn: Drawn) -> tuple[MetaState, Metrics]:
        own = state._replace(carry=state.carry[drawn.problem])
        after, metrics = steps[drawn.problem](own, drawn.tasks, seed + 1_000_003 * drawn.step)
        carries = list(state.carry)
        carries[drawn.problem] = after.carry
        nowhere = torch.full((2,), -1)
        return after._replace(carry=tuple(carries)), {**metrics, "first_bad": nowhere}

    return step


def make_validation(experiment: Learning) -> Callable[[Tree], float]:
    """``(theta) -> mean loss over all steps`` of trainings on classes that are not trained on."""
    count, (_, longest) = experiment.config.report.val_tasks, experiment.lengths
    held = [experiment.sample(problem, VALIDATION_SEED, 0, count, longest) for problem in experiment.val]

    def validate(theta: Tree) -> float:
        found = [
            learned.curves(problem, experiment.rule, theta, tasks, longest, experiment.plan)
            for problem, tasks in zip(experiment.val, held, strict=True)
        ]
        return torch.stack([curve.mean() for curve in found]).mean().item()

    return validate


def meta_train(path: Path, experiment: Learning) -> Any:
    """The training loop of every recipe, on tasks that are trainings."""
    config, problems = experiment.config, experiment.train
    state, progress = first_state(experiment), Progress()
    if (path / "last.safetensors").exists():
        state, record = checkpoint.load(path / "last.safetensors", state)
        saved = record["progress"]
        progress = Progress(**saved | {"first_bad": tuple(saved["first_bad"])})
    names = ", ".join(problem.name for problem in problems)
    count = sum(leaf.numel() for leaf in state.meta.values())
    say(f"{config.recipe}: {config.task.optimizer} of {count:,} weights, on trainings of {names}")
    say(f"to step {config.outer.outer_steps:,}, {config.outer.tasks} trainings each; run folder {path}")
    say("compiled: the first steps build the kernels, some seconds for each problem")

    def sampler(seed: int, step: int) -> Any:
        index = step % len(problems)
        lengths = experiment.lengths
        tasks = experiment.sample(problems[index], seed, step + 1, config.outer.tasks, lengths)
        return Drawn(index, tasks, step)

    def validated(step: int, value: float, best: bool) -> None:
        metrics.write("validation", step, {"loss": value})
        say(f"step {step:>7,}   validation loss {value:.4f}{'   best so far' if best else ''}")

    def log(step: int, numbers: dict[str, float]) -> None:
        metrics.write("train", step, numbers)
        bar.show(numbers)

    def save(kind: str, state: MetaState, progress: Progress) -> None:
        record = {"progress": progress._asdict(), "seed": config.outer.seed}
        checkpoint.save(path / f"{kind}.safetensors", state, record)

    report, stop = config.report, config.stop
    settings = Settings(
        steps=config.outer.outer_steps, tasks=config.outer.tasks, seed=config.outer.seed, higher_is_better=False,
        log_interval=report.log_interval, val_interval=report.val_interval, target=stop.target,
        patience=stop.patience, minutes=stop.minutes, max_bad_steps=stop.max_bad_steps,
    )  # fmt: skip
    metrics = open_metrics(path, progress.step)
    try:
        with stop_signals() as asked, progress_bar("train", settings.steps, progress.step) as bar:
            hooks = Hooks(log, validated, save, bar.stepped, lambda seconds: bar.restart_clock(), asked)
            validation = make_validation(experiment)
            return fit(make_step(experiment), sampler, validation, state, progress, settings, hooks)
    finally:
        metrics.close()


def weights(path: Path, experiment: Learning, name: str) -> Params:
    """The optimiser's weights in a checkpoint; of a run that was kept without, those in its file of weights."""
    if name == "best" and not (path / "best.safetensors").exists() and (path / FILE).exists():
        return tree.map(lambda x: x.to(experiment.device), learned.load(path).theta)
    found, record = checkpoint.read(path / f"{name}.safetensors")
    prefix = "" if record.get("meta_only") else "meta."
    return {key: found[f"{prefix}{key}"].to(experiment.device) for key in experiment.rule.shapes}
