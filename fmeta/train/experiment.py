"""From a config to the functions that a run is made of: algorithms, held-out tasks, optimiser, plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import fmeta
from fmeta.annealing import Phase
from fmeta.parallel import ALONE, Processes
from fmeta.train.choices import EMBEDDINGS, Given, make_algorithm
from fmeta.train.config import Config, Outer
from fmeta.train.device import pick_device
from fmeta.train.evaluate import TEST_SEED, VALIDATION_SEED, Held
from fmeta.train.family import Family, make_family, minibatches
from fmeta.train.options import check
from fmeta.types import Algorithm, Params, Plan, Transform


class Experiment(NamedTuple):
    """Everything that a run computes with."""

    config: Config[Any]
    family: Family
    algorithm: Algorithm
    """For validation and test tasks."""
    phases: tuple[tuple[int, Algorithm], ...]
    """The same for training tasks, which may have more classes: from which outer step on, and what."""
    outer: Transform
    params: Params
    """Initial weights, drawn from the seed."""
    plan: Plan
    device: torch.device
    val: Held
    test: Held
    processes: Processes


def build(
    config: Config[Any], processes: Processes = ALONE, make: Callable[..., Family] = make_family
) -> Experiment:
    """Build a run from its config; draws the initial weights from the config's seed.

    Args:
        config: the complete config.
        processes: those that share the work; this one alone by default.
        make: ``(config, device) -> Family``.

    Raises:
        ValueError: for options out of range, an unknown device, or a data set that is not there.
    """
    check(config)
    if config.recipe == "detection":
        raise ValueError(
            "load: detection has runs of its own kind, got one where a run of another recipe was expected. `fmeta "
            "eval` and `fmeta adapt` take it; in Python, fmeta.train.detection.adapting.load_detector(folder)."
        )
    if config.recipe == "learned-optimizer":
        raise ValueError(
            "load: learned-optimizer has runs of its own kind, got one where a run of another recipe was expected. "
            "Use fmeta.learned.load(folder)."
        )
    device = pick_device(config.machine.device, processes)
    family = make(config, device)
    if config.inner.minibatches:
        family = family._replace(train=minibatches(family.train, config.inner.inner_steps))
    torch.manual_seed(config.outer.seed)
    module = family.model(None if config.inner.algorithm in EMBEDDINGS else family.outputs)
    apply, params = fmeta.functionalize(module.to(device))
    if not params:
        raise ValueError(
            f"train: the run must learn something, but --learns {getattr(config.task, 'learns', '')} takes no weights "
            "of this model. Choose others."
        )
    given = Given(apply, family.loss(apply), config.inner, family.outputs, family.adapts)
    makes = lambda **changes: make_algorithm(given._replace(**changes), family.metric, "context" in params)  # noqa: E731
    trains = lambda phase: makes(outputs=family.train_outputs, phase=phase, trains=True)  # noqa: E731
    return Experiment(
        config=config,
        family=family,
        algorithm=makes(),
        phases=tuple((phase.start if phase else 0, trains(phase)) for phase in annealed(config)),
        outer=make_outer(config.outer),
        params=params,
        plan=replace(make_plan(config), chunk_size=family.chunk_size),
        device=device,
        val=Held(family.val, VALIDATION_SEED, config.report.val_tasks),
        test=Held(family.test, TEST_SEED, config.report.test_tasks),
        processes=processes,
    )


def annealed(config: Config[Any]) -> list[Phase] | list[None]:
    """The phases of a training: those of mamlpp's annealing, or one."""
    inner = config.inner
    if inner.algorithm == "mamlpp" and inner.annealing:
        return fmeta.mamlpp_schedule(inner.inner_steps, config.outer.outer_steps)
    return [None]


def build_together(config: Config[Any], processes: Processes) -> Experiment:
    """``build`` in all processes, in the first one first: it may have to download data or to render it."""
    experiment = processes.first(lambda: build(config, processes))
    return experiment._replace(plan=replace(experiment.plan, mesh=processes.mesh(experiment.device)))


def make_outer(outer: Outer, steps: int | None = None) -> Transform:
    """The config's optimiser and schedule, over ``steps`` where the config's own number is not meant."""
    rate, steps = outer.outer_lr, steps or outer.outer_steps
    make = fmeta.adam if outer.outer_optimizer == "adam" else fmeta.sgd
    if outer.schedule == "cosine":
        return make(fmeta.schedules.cosine(rate, steps))
    if outer.schedule == "cooldown":
        return make(lambda count: rate * ((steps - count) / (0.1 * steps)).clamp(0, 1))
    return make(rate)


def make_plan(config: Config[Any]) -> Plan:
    """How kernels run."""
    machine = config.machine
    compiled: Any = {"auto": "auto", "on": True, "off": False}[machine.compile]
    return Plan(compile=compiled, precision=machine.precision)
