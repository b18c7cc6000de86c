"""From a config to the functions that a run is made of: model, algorithm, samplers, plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

import fmeta
import fmeta.data
import fmeta.tasks
from fmeta.data.pool import Pool, Pools
from fmeta.data.warp import quarter_turns
from fmeta.parallel import ALONE, Processes
from fmeta.tasks.seeding import generator
from fmeta.train.choices import EMBEDDINGS, Given, make_algorithm
from fmeta.train.config import Config, FewShotTask, OmniglotTask, Outer, SinusoidTask
from fmeta.train.device import pick_device
from fmeta.train.evaluate import TEST_SEED, VALIDATION_SEED, Held
from fmeta.train.options import check
from fmeta.types import Algorithm, Batch, LossFn, Params, Plan, Sampler, Task, Transform

HELD_BATCH = 50
"""Validation and test tasks that are measured side by side. It is no option: with another number they would be
other tasks, and results would not compare."""


class Family(NamedTuple):
    """What differs between recipes: the tasks, the model and the loss."""

    model: Callable[[int | None], nn.Module]
    """``(outputs) -> module``; None gives the embedding."""
    outputs: int
    loss: Callable[..., LossFn]
    """``(apply) -> LossFn``."""
    metric: str
    """What validation and the report show: ``"loss"``, lower is better, or ``"accuracy"``."""
    adapts: tuple[str, ...] | None
    """Names of the parameters that adapt; None for all."""
    train: Sampler
    val: Sampler
    test: Sampler
    pooled: Sampler
    """Examples of all training tasks together as one query set, for the baseline without meta-learning."""
    pooled_outputs: int
    """Outputs of the model that learns them."""


class Experiment(NamedTuple):
    """Everything that a run computes with."""

    config: Config[Any]
    family: Family
    algorithm: Algorithm
    outer: Transform
    params: Params
    """Initial weights, drawn from the seed."""
    plan: Plan
    device: torch.device
    val: Held
    test: Held
    processes: Processes


def build(config: Config[Any], processes: Processes = ALONE) -> Experiment:
    """Build a run from its config; draws the initial weights from the config's seed.

    Args:
        config: the complete config.
        processes: those that share the work; this one alone by default.

    Raises:
        ValueError: for options out of range, an unknown device, or a data set that is not there.
    """
    check(config)
    device = pick_device(config.machine.device, processes)
    family = make_family(config, device)
    torch.manual_seed(config.outer.seed)
    module = family.model(None if config.inner.algorithm in EMBEDDINGS else family.outputs)
    apply, params = fmeta.functionalize(module.to(device))
    given = Given(apply, family.loss(apply), config.inner, family.outputs, family.adapts)
    return Experiment(
        config=config,
        family=family,
        algorithm=make_algorithm(given, family.metric, "context" in params),
        outer=make_outer(config.outer),
        params=params,
        plan=make_plan(config),
        device=device,
        val=Held(family.val, VALIDATION_SEED, config.report.val_tasks),
        test=Held(family.test, TEST_SEED, config.report.test_tasks),
        processes=processes,
    )


def build_together(config: Config[Any], processes: Processes) -> Experiment:
    """``build`` in all processes, in the first one first: it may have to download data or to render it."""
    experiment = processes.first(lambda: build(config, processes))
    return experiment._replace(plan=replace(experiment.plan, mesh=processes.mesh(experiment.device)))


def make_outer(outer: Outer, steps: int | None = None) -> Transform:
    """Adam with the config's schedule, over ``steps`` where the config's own number is not meant."""
    rate, steps = outer.outer_lr, steps or outer.outer_steps
    if outer.schedule == "cosine":
        return fmeta.adam(fmeta.schedules.cosine(rate, steps))
    if outer.schedule == "cooldown":
        return fmeta.adam(lambda count: rate * ((steps - count) / (0.1 * steps)).clamp(0, 1))
    return fmeta.adam(rate)


def make_plan(config: Config[Any]) -> Plan:
    """How kernels run."""
    machine = config.machine
    compiled: Any = {"auto": "auto", "on": True, "off": False}[machine.compile]
    return Plan(compile=compiled, precision=machine.precision)


def make_family(config: Config[Any], device: torch.device) -> Family:
    """Tasks, model and loss of a recipe."""
    if isinstance(config.task, SinusoidTask):
        context = config.inner.context if config.inner.algorithm == "cavia" else 0
        return sinusoid_family(config.task, config.outer.tasks, device, context)
    return few_shot_family(config.task, config.outer.tasks, device)


def sinusoid_family(task: SinusoidTask, tasks: int, device: torch.device, context: int = 0) -> Family:
    """Regression of sine waves; training, validation and test tasks differ by their seeds."""
    train = fmeta.tasks.sinusoid(tasks=tasks, shots=task.shots, queries=task.queries, device=device)
    held = fmeta.tasks.sinusoid(
        tasks=HELD_BATCH, shots=task.test_shots, queries=task.test_queries, device=device
    )
    return Family(
        model=lambda outputs: spread_kinks(
            fmeta.models.mlp([1, *task.hidden, outputs or 1], context=context)
        ),
        outputs=1,
        loss=fmeta.losses.mse,
        metric="loss",
        adapts=None,
        train=train,
        val=held,
        test=held,
        pooled=pooled_points(train),
        pooled_outputs=1,
    )


def spread_kinks(module: nn.Module) -> nn.Module:
    """Draw the weights by torch's own rule, whose biases are not zero.

    With zero biases every kink of the network lies at x = 0 to begin with. It then learns slower, and some
    tasks diverge after several inner steps.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return module


def few_shot_family(task: FewShotTask, tasks: int, device: torch.device) -> Family:
    """Classification of classes that training never saw."""
    pools = load_pools(task).to(device)
    queries = task.queries or task.shots
    sizes: dict[str, Any] = {"ways": task.ways, "shots": task.shots}
    held: dict[str, Any] = sizes | {"queries": task.test_queries or queries, "tasks": HELD_BATCH}
    turned = "rotations" if task.rotations else None
    if task.labels:
        train = fmeta.tasks.few_shot(pools.train, **sizes, tasks=tasks, queries=queries, augment=turned)
    else:
        train = fmeta.tasks.umtra(pools.train, **sizes, tasks=tasks, queries=queries, augment="affine")
    channels = pools.train.x.shape[1]
    return Family(
        model=lambda outputs: fmeta.models.conv4(channels, ways=outputs, channels=task.channels),
        outputs=task.ways,
        loss=fmeta.losses.cross_entropy,
        metric="accuracy",
        adapts=("*", "!*.norm"),
        train=train,
        val=fmeta.tasks.few_shot(pools.val, **held),
        test=fmeta.tasks.few_shot(pools.test, **held),
        pooled=pooled_pictures(pools.train, tasks * task.ways * (task.shots + queries), task.rotations),
        pooled_outputs=len(pools.train.names) * (4 if task.rotations else 1),
    )


def load_pools(task: FewShotTask) -> Pools:
    """The pictures of a few-shot recipe."""
    if isinstance(task, OmniglotTask):
        return fmeta.data.omniglot(task.root, download=task.download, split=task.split)
    return fmeta.data.glyphs()


def pooled_points(sampler: Sampler) -> Sampler:
    """The same tasks with support and query points together as the query set."""

    def sample(seed: int, step: int) -> Task:
        support, query = sampler(seed, step)
        return Task(support, Batch(*(torch.cat(pair, dim=1) for pair in zip(support, query, strict=True))))

    return sample


def pooled_pictures(pool: Pool, count: int, rotations: bool) -> Sampler:
    """One task of ``count`` pictures of all training classes with labels; a turned class is another one."""
    turns = 4 if rotations else 1

    def sample(seed: int, step: int) -> Task:
        random = generator(seed, step)
        rows = torch.randint(len(pool.y), (count,), generator=random)
        turn = torch.randint(turns, (count,), generator=random)
        place = rows.to(pool.x.device)
        x, y = pool.x[place], pool.y[place] * turns + turn.to(pool.x.device)
        x = quarter_turns(x, turn) if rotations else x
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        return Task(Batch(x[None, :1], y[None, :1]), Batch(x[None], y[None]))

    return sample
