"""One training run: the loop of ``fmeta.train.loop`` tied to a run folder and to the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import fmeta
from fmeta.parallel import Votes
from fmeta.train import checkpoint, folder
from fmeta.train.choices import STEPLESS
from fmeta.train.evaluate import per_task, reported
from fmeta.train.experiment import Experiment
from fmeta.train.logging import SILENT, Writer, open_metrics
from fmeta.train.loop import Hooks, Outcome, Progress, Settings, Step, fit
from fmeta.train.terminal import Bar, format_metric, format_seconds, progress_bar, say, stop_signals
from fmeta.types import MetaState, Metrics, TaskBatch, Tree


def run(path: Path, experiment: Experiment) -> Outcome:
    """Train from where the run folder stands, with a progress bar, metrics and checkpoints.

    Args:
        path: the run folder; its ``last`` checkpoint is continued if there is one.
        experiment: what is trained.
    """
    state, progress = starting_point(path, experiment)
    announce(path, experiment, progress)
    settings = settings_of(experiment)
    step = phased(experiment, progress.step)
    metrics = open_metrics(path, progress.step) if experiment.processes.rank == 0 else SILENT
    try:
        with stop_signals() as asked, progress_bar("train", settings.steps, progress.step) as bar:
            hooks = make_hooks(path, experiment, bar, metrics, asked)
            return fit(
                step, experiment.family.train, validation(experiment), state, progress, settings, hooks
            )
    finally:
        metrics.close()


def phased(experiment: Experiment, begin: int) -> Step:
    """The outer step, of the phase that training is in; ``begin`` is the number of the first one."""
    count, made = begin, fmeta.meta_step(experiment.phases[0][1], experiment.outer, experiment.plan)
    current = experiment.phases[0][1]

    def step(state: MetaState, tasks: TaskBatch) -> tuple[MetaState, Metrics]:
        nonlocal count, made, current
        wanted = next(algorithm for start, algorithm in reversed(experiment.phases) if start <= count)
        if wanted is not current:
            current, made = wanted, fmeta.meta_step(wanted, experiment.outer, experiment.plan)
        count += 1
        return made(state, tasks)

    return step


def starting_point(path: Path, experiment: Experiment) -> tuple[MetaState, Progress]:
    """The state of the ``last`` checkpoint if there is one, else a fresh one, drawn or learned by another run."""
    if (path / "last.safetensors").exists():
        state, progress, record = folder.load(path, "last", experiment)
        checkpoint.restore_random_state(record["random_state"], experiment.device)
        return state, progress
    return first_state(experiment), Progress()


def first_state(experiment: Experiment) -> MetaState:
    """The state before the first step."""
    state = fmeta.meta_init(experiment.algorithm, experiment.outer, experiment.params)
    return state._replace(meta=folder.learned_before(experiment.config, state.meta, experiment))


def announce(path: Path, experiment: Experiment, progress: Progress) -> None:
    """Say what is about to run, where, and what the first step will do."""
    config, inner = experiment.config, experiment.config.inner
    weights = sum(leaf.numel() for leaf in experiment.params.values())
    device = str(experiment.device)
    device += f" ({torch.get_num_threads()} threads)" if experiment.device.type == "cpu" else ""
    device += f", {experiment.processes.size} processes" if experiment.processes.size > 1 else ""
    steps = "step" if inner.inner_steps == 1 else "steps"
    adapts = (
        "" if without_steps(experiment) else f", {inner.inner_steps} inner {steps} at rate {inner.inner_lr:g}"
    )
    say(f"{config.recipe}: {inner.algorithm}{adapts}; model of {weights:,} weights; {device}")
    begin = f"from step {progress.step:,} " if progress.step else ""
    if config.start is not None and not progress.step:
        begin = f"from what {config.start} learned "
    say(f"{begin}to step {config.outer.outer_steps:,}, {config.outer.tasks} tasks each; run folder {path}")
    if experiment.plan.compile is False:
        say("not compiled (--compile off)")
    else:
        say("compiled: the first step builds the kernels; about a minute, seconds once they are cached")


def without_steps(experiment: Experiment) -> bool:
    """Whether the algorithm adapts without gradient steps."""
    return experiment.config.inner.algorithm in STEPLESS


def settings_of(experiment: Experiment) -> Settings:
    """The numbers of a config that steer the loop."""
    config = experiment.config
    return Settings(
        steps=config.outer.outer_steps,
        tasks=config.outer.tasks,
        seed=config.outer.seed,
        higher_is_better=experiment.family.metric == "accuracy",
        log_interval=config.report.log_interval,
        val_interval=config.report.val_interval,
        target=config.stop.target,
        patience=config.stop.patience,
        minutes=config.stop.minutes,
        max_bad_steps=config.stop.max_bad_steps,
    )


def validation(experiment: Experiment) -> Callable[[Tree], float]:
    """``(meta) -> mean metric`` of the validation tasks, after as many steps as the result uses."""
    steps = 0 if without_steps(experiment) else experiment.config.inner.test_steps
    metric = experiment.family.metric
    if experiment.plan.tasks == "loop":  # what its models return has no shape of its own
        measure = fmeta.meta_eval(experiment.algorithm, experiment.plan, steps=[steps])
        return lambda meta: reported(measure, meta, experiment.val, metric).mean().item()
    predict = fmeta.meta_predict(experiment.algorithm, experiment.plan, steps=[steps])
    return lambda meta: per_task(predict, meta, experiment.val, metric).mean().item()


def make_hooks(
    path: Path, experiment: Experiment, bar: Bar, metrics: Writer, asked: Callable[[], bool]
) -> Hooks:
    """Send what the loop tells to the bar, the metrics and the checkpoints."""
    name = experiment.family.metric

    def log(step: int, numbers: dict[str, float]) -> None:
        metrics.write("train", step, numbers)
        bar.show(numbers)

    def validated(step: int, value: float, best: bool) -> None:
        metrics.write("validation", step, {name: value})
        mark = "   best so far" if best else ""
        say(f"step {step:>7,}   validation {name} {format_metric(name, value)}{mark}")

    def started(seconds: float) -> None:
        bar.restart_clock()
        if seconds > 1:
            say(f"the first step took {format_seconds(seconds)}")

    return Hooks(
        log=log,
        validated=validated,
        save=lambda kind, state, progress: folder.save(path, kind, state, progress, experiment),
        stepped=bar.stepped,
        started=started,
        interrupted=asked,
        **({"agreed": Votes()} if experiment.processes.size > 1 else {}),
    )


def divergence(path: Path, progress: Progress) -> str:
    """What a run says that stopped because of steps that were not finite."""
    task, inner_step = progress.first_bad
    kept = f"The best checkpoint in {path}, of step {progress.best_step:,}, is intact."
    return (
        f"train: expected finite numbers, got {progress.bad} steps in a row that were not finite, up to step "
        f"{progress.step:,}; in the last of them task {task} went bad first, at inner step {inner_step}. "
        f"{'' if progress.best is None else kept} Start again with a lower --outer-lr or --inner-lr."
    ).replace("  ", " ")
