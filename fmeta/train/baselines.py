"""The baseline without meta-learning: one model for all training tasks, fine-tuned on each test task.

It gets what the meta-learned model gets: the same architecture, optimiser, rate, schedule, number of training
steps and, in each step, the same number of examples (support and query pooled). For regression that is one
network for all waves. For classification it is one classifier of all training classes, whose head is then
replaced. Fine-tuning is gradient descent on the support set, of all weights or of the head alone, at one of
several rates; for every number of steps the best scope and rate on the validation tasks are taken.

The usual new head is drawn at random. One of zeros is measured too: its first step puts the mean of a class's
embeddings into the weights of that class, so that it is a nearest-mean classifier with a pre-trained
embedding, which is closer to a prototypical network than to fine-tuning, and harder to beat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fmeta
from fmeta.train.evaluate import Held, per_task
from fmeta.train.experiment import Experiment, make_outer
from fmeta.train.loop import Hooks, Progress, Settings, fit, is_better
from fmeta.types import Algorithm, Params, Tree

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SCOPES = {"all weights": "*", "the head": "head"}
HEADS = {"no_meta_learning": "drawn", "no_meta_learning_zero_head": "zeros"}
"""The new head of each baseline, by its name in results.json."""


class Setting(NamedTuple):
    """How a pre-trained model is fine-tuned."""

    scope: str
    rate: float


class FineTuned(NamedTuple):
    """A pre-trained model with what was chosen on validation tasks."""

    algorithm: Algorithm
    meta: Callable[[Setting], Tree]
    steps: list[int]
    settings: list[Setting]
    """For each number of steps."""


def pooled_model(experiment: Experiment) -> tuple[Callable[..., Any], Params]:
    """The model for all training tasks together, and its initial weights."""
    torch.manual_seed(experiment.config.outer.seed)
    module = experiment.family.model(experiment.family.pooled_outputs)
    return fmeta.functionalize(module.to(experiment.device))


def pretrain(experiment: Experiment, steps: int, hooks: Hooks) -> Params:
    """Train one model on all training tasks together.

    Args:
        experiment: the run that this is the baseline of.
        steps: training steps.
        hooks: how to show progress; nothing is validated or saved.
    """
    config, family = experiment.config, experiment.family
    apply, params = pooled_model(experiment)
    # Without inner steps MAML is ordinary training on the query sets.
    joint = fmeta.maml(family.loss(apply), fmeta.sgd(0.0), steps=0)
    outer = make_outer(config.outer, steps)
    settings = Settings(
        steps=steps,
        tasks=config.outer.tasks,
        seed=config.outer.seed,
        log_interval=config.report.log_interval,
        max_bad_steps=config.stop.max_bad_steps,
    )
    outcome = fit(
        fmeta.meta_step(joint, outer, experiment.plan),
        family.pooled,
        lambda meta: float("nan"),
        fmeta.meta_init(joint, outer, params),
        Progress(),
        settings,
        hooks,
    )
    if outcome.reason == "diverged":
        raise ValueError(
            f"train: the baseline diverged at step {outcome.progress.step}. Leave it out with "
            "--no-baselines, or lower --outer-lr."
        )
    return outcome.state.meta


def needs_head(experiment: Experiment) -> bool:
    """Whether the pre-trained model's outputs are the training classes, and not those of a task."""
    return experiment.family.metric == "accuracy"


def fine_tuning(
    experiment: Experiment, params: Params, head: str
) -> tuple[Algorithm, Callable[[Setting], Tree]]:
    """Gradient descent from the pre-trained weights: the algorithm, and its meta for a scope and rate.

    The rates are data of Meta-SGD, so that all of them share one kernel.

    Args:
        experiment: the run that this is the baseline of.
        params: the pre-trained weights.
        head: ``"drawn"`` or ``"zeros"``, where a new one is needed.
    """
    family = experiment.family
    module = family.model(family.outputs)
    if needs_head(experiment):
        torch.manual_seed(experiment.config.outer.seed)
        new_head(module.head, head)  # type: ignore[arg-type]
    apply, fresh = fmeta.functionalize(module.to(experiment.device))
    kept = {
        name: leaf
        for name, leaf in params.items()
        if not (needs_head(experiment) and name.startswith("head."))
    }
    start = fresh | kept
    algorithm = fmeta.metasgd(family.loss(apply), steps=experiment.config.inner.test_steps, lr=1.0)

    def meta(setting: Setting) -> Tree:
        moving = fmeta.select(start, SCOPES[setting.scope])
        rates = {
            name: torch.full_like(p, setting.rate if name in moving else 0.0) for name, p in start.items()
        }
        return {"params": start, "lr": rates}

    return algorithm, meta


def new_head(layer: nn.Linear, head: str) -> None:
    """Draw a head by torch's own rule, or fill it with zeros."""
    if head == "drawn":
        layer.reset_parameters()
        return
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def choose(experiment: Experiment, params: Params, head: str, steps: list[int]) -> FineTuned:
    """Fine-tune with every scope and rate on the validation tasks; keep the best for each number of steps."""
    algorithm, meta = fine_tuning(experiment, params, head)
    metric = experiment.family.metric
    measure = fmeta.meta_eval(algorithm, experiment.plan, steps=steps)
    tried = [Setting(scope, rate) for scope in SCOPES for rate in RATES]
    means = [per_task(measure, meta(setting), experiment.val, metric).mean(0).tolist() for setting in tried]
    chosen: list[Setting] = []
    for values in zip(*means, strict=True):
        best: int | None = None
        for index, value in enumerate(values):
            if is_better(value, None if best is None else values[best], higher=metric == "accuracy"):
                best = index
        if best is None:
            raise ValueError(
                "train: the baseline diverged at every fine-tuning rate. Leave it out with --no-baselines."
            )
        chosen.append(tried[best])
    return FineTuned(algorithm, meta, steps, chosen)


def scores(experiment: Experiment, tuned: FineTuned, held: Held) -> Tensor:
    """The metric of held-out tasks, ``[tasks, steps]``, each column with the setting chosen for it."""
    measure = fmeta.meta_eval(tuned.algorithm, experiment.plan, steps=tuned.steps)
    metric = experiment.family.metric
    found = {s: per_task(measure, tuned.meta(s), held, metric) for s in dict.fromkeys(tuned.settings)}
    return torch.stack([found[setting][:, column] for column, setting in enumerate(tuned.settings)], dim=1)
