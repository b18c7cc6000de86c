"""The training loop: outer steps, metrics every so often, validation, and the reasons to stop.

The loop knows neither files nor the terminal: what is to be shown or saved goes through ``Hooks``. Metrics
stay on the device until they are read, every ``log_interval`` steps, so that a step never waits for a number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from fmeta.types import MetaState, Metrics, Sampler, TaskBatch, Tree

Reason = Literal["steps", "target", "patience", "minutes", "interrupted", "diverged"]
Step = Callable[[MetaState, TaskBatch], tuple[MetaState, Metrics]]


class Progress(NamedTuple):
    """Where a run stands, as JSON values: what resuming needs beside ``MetaState``."""

    step: int = 0
    """Outer steps taken, those without effect included: the position of the sampler."""
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    """Validations since the best one."""
    bad: int = 0
    """Steps in a row, up to now, that were not finite."""
    skipped: int = 0
    """All steps that were not finite."""
    first_bad: tuple[int, int] = (-1, -1)
    """Task and inner step where the last such step went bad."""
    wall_s: float = 0.0
    window: dict[str, list[float]] = {}  # noqa: RUF012
    """Metrics of the finite steps since the last line was logged."""


class Settings(NamedTuple):
    """Numbers that steer the loop; see ``fmeta.train.config`` for their meaning."""

    steps: int
    tasks: int
    seed: int = 0
    higher_is_better: bool = False
    log_interval: int = 100
    val_interval: int = 0
    target: float | None = None
    patience: int | None = None
    minutes: float | None = None
    max_bad_steps: int = 10


class Hooks(NamedTuple):
    """What the loop tells the world."""

    log: Callable[[int, dict[str, float]], None]
    """``(step, numbers)`` every ``log_interval`` steps."""
    validated: Callable[[int, float, bool], None]
    """``(step, value, whether it is the best so far)``."""
    save: Callable[[str, MetaState, Progress], None]
    """``("best" or "last", state, progress)``."""
    stepped: Callable[[int], None]
    """``(step)`` after every step."""
    started: Callable[[float], None]
    """``(seconds)`` after the first step of this process, which compiles."""
    interrupted: Callable[[], bool]
    """Whether someone asks the run to stop."""
    agreed: Callable[[int], int] = lambda number: number
    """``(number) -> the largest that any process gave``: Ctrl-C and clocks differ, the decision must not."""


class Outcome(NamedTuple):
    """What is left when the loop ends."""

    state: MetaState
    progress: Progress
    reason: Reason


def fit(
    step: Step,
    sampler: Sampler,
    validate: Callable[[Tree], float],
    state: MetaState,
    progress: Progress,
    settings: Settings,
    hooks: Hooks,
) -> Outcome:
    """Take outer steps from where ``progress`` stands until there is a reason to stop.

    Args:
        step: ``(state, tasks) -> (state, metrics)``, from ``fmeta.meta_step``; a step that is not finite
            returns the state it was given.
        sampler: ``(seed, step) -> tasks``.
        validate: ``(meta) -> value``.
        state: from ``fmeta.meta_init`` or a checkpoint.
        progress: ``Progress()``, or a checkpoint's.
        settings: numbers.
        hooks: what to do with metrics and checkpoints.

    Returns:
        The last state, the progress, and why it ended. After ``"diverged"`` nothing has been saved since
        the last validation; after ``"interrupted"`` there was no last validation.
    """
    clock = _stopwatch(progress.wall_s)
    start, mark = progress.step, (clock(), progress.step)  # mark: where the stretch that is timed began
    pending: list[Metrics] = []
    reason = _reason_to_stop(progress, settings, hooks)
    while reason is None:
        state, metrics = step(state, sampler(settings.seed, progress.step))
        pending.append(metrics)
        progress = progress._replace(step=progress.step + 1, wall_s=clock())
        hooks.stepped(progress.step)
        reason = _reason_to_stop(progress, settings, hooks)
        first = progress.step == start + 1
        if first or reason or _is_due(progress.step, settings.log_interval, settings.max_bad_steps):
            progress, pending = absorb(progress, pending, settings.max_bad_steps), []
            reason = "diverged" if progress.bad >= settings.max_bad_steps else reason
        if first:
            hooks.started(clock() - mark[0])
            mark = (clock(), progress.step)
        if _is_due(progress.step, settings.log_interval):
            hooks.log(progress.step, _line(progress, settings, mark, clock()))
            progress, mark = progress._replace(window={}), (clock(), progress.step)
        if reason == "diverged":
            break
        if _is_due(progress.step, settings.val_interval) or reason not in (None, "interrupted"):
            progress = _validated(validate(state.meta), state, progress, settings, hooks)
            progress = progress._replace(wall_s=clock())
            hooks.save("last", state, progress)
            reason = reason or _reason_to_stop(progress, settings, hooks)
            mark = (clock(), progress.step)
    if reason == "interrupted":  # what was asked for: stop soon, so nothing is validated that was not due
        hooks.save("last", state, progress)
    return Outcome(state, progress, reason)


def absorb(progress: Progress, pending: list[Metrics], max_bad_steps: int) -> Progress:
    """Read the metrics of the latest steps from the device into the progress."""
    if not pending:
        return progress
    names = [name for name in ("loss", "accuracy") if name in pending[0]]
    finite = torch.stack([metrics["finite"] for metrics in pending]).tolist()
    window = dict(progress.window)
    for name in names:
        values = torch.stack([metrics[name] for metrics in pending]).tolist()
        window[name] = window.get(name, []) + [v for v, ok in zip(values, finite, strict=True) if ok]
    progress = progress._replace(window=window, skipped=progress.skipped + finite.count(False))
    for ok, metrics in zip(finite, pending, strict=True):
        if progress.bad >= max_bad_steps:
            break  # a good step behind so many bad ones does not hide them
        progress = progress._replace(bad=0 if ok else progress.bad + 1)
        if not ok:
            task, inner_step = (int(value) for value in metrics["first_bad"].flatten().tolist())
            progress = progress._replace(first_bad=(task, inner_step))
    return progress


def is_better(value: float, than: float | None, higher: bool) -> bool:
    """Whether a validation value beats the best so far; a value that is not finite beats nothing."""
    if not math.isfinite(value):
        return False
    return than is None or (value > than if higher else value < than)


def _is_due(step: int, *intervals: int) -> bool:
    return any(interval and step % interval == 0 for interval in intervals)


def _stopwatch(before: float) -> Callable[[], float]:
    begun = time.monotonic()
    return lambda: before + time.monotonic() - begun


def _reason_to_stop(progress: Progress, settings: Settings, hooks: Hooks) -> Reason | None:
    target, best = settings.target, progress.best
    late = settings.minutes is not None and progress.wall_s >= 60 * settings.minutes
    asked = hooks.agreed(2 if hooks.interrupted() else int(late))
    if asked == 2:
        return "interrupted"
    if progress.step >= settings.steps:
        return "steps"
    if target is not None and best is not None and not is_better(target, best, settings.higher_is_better):
        return "target"
    if settings.patience is not None and progress.stale >= settings.patience:
        return "patience"
    if asked:
        return "minutes"
    return None


def _line(progress: Progress, settings: Settings, mark: tuple[float, int], now: float) -> dict[str, float]:
    """The numbers of one line of metrics: means since the last line, speed, time, steps without effect."""
    means = {name: sum(values) / len(values) for name, values in progress.window.items() if values}
    taken, seconds = progress.step - mark[1], now - mark[0]
    speed = {"tasks_per_s": settings.tasks * taken / seconds} if taken and seconds > 0 else {}
    skipped = {"skipped": float(progress.skipped)} if progress.skipped else {}
    return means | speed | {"wall_s": now} | skipped


def _validated(
    value: float, state: MetaState, progress: Progress, settings: Settings, hooks: Hooks
) -> Progress:
    """Compare with the best so far and keep the better; the metrics are written before the checkpoints."""
    best = is_better(value, progress.best, settings.higher_is_better)
    if best:
        progress = progress._replace(best=value, best_step=progress.step, stale=0)
    else:
        progress = progress._replace(stale=progress.stale + 1)
    hooks.validated(progress.step, value, best)
    if best:
        hooks.save("best", state, progress)
    return progress
