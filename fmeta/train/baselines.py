"""Baselines without meta-learning, each fine-tuned on the support set of a task.

``from_scratch``: random weights, drawn as those that MAML starts from with the same seed.
``no_meta_learning``: one model trained on all training tasks together. It gets what the meta-learned model gets:
the same architecture, optimiser, rate, schedule, number of training steps and, in each step, the same number of
examples (support and query pooled). For regression that is one network for all waves. For classification it is
one classifier of all training classes, whose head is then replaced by one drawn at random.
``no_meta_learning_zero_head``: the same with a new head of zeros. Its first step puts the mean of a class's
embeddings into the weights of that class, so that it is a nearest-mean classifier with a pre-trained
embedding, which is closer to a prototypical network than to fine-tuning, and harder to beat.

Fine-tuning is gradient descent on the support set, of all weights or of the head alone, at one of several
rates; for every number of steps the best scope and rate on the validation tasks are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

import fmeta
from fmeta.train.config import Config, Outer
from fmeta.train.evaluate import Held, Scores, joined, per_task, scores
from fmeta.train.experiment import Experiment, make_outer
from fmeta.train.loop import Hooks, Progress, Settings, fit, is_better
from fmeta.train.terminal import progress_bar
from fmeta.types import Algorithm, Params, Tree

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SCOPES = {"all weights": "*", "the head": "head"}


class Baseline(NamedTuple):
    """What a model without meta-learning starts from."""

    title: str
    pretrained: bool
    head: Literal["drawn", "zeros"] = "drawn"
    """The new head of a pre-trained classifier."""


BASELINES = {
    "from_scratch": Baseline("from scratch", pretrained=False),
    "no_meta_learning": Baseline("fine-tuned", pretrained=True),
    "no_meta_learning_zero_head": Baseline("zero head", pretrained=True, head="zeros"),
}
"""By their name in results.json."""


class Setting(NamedTuple):
    """How a model is fine-tuned."""

    scope: str
    rate: float


def settings() -> list[Setting]:
    """All that are tried."""
    return [Setting(scope, rate) for scope in SCOPES for rate in RATES]


class FineTuned(NamedTuple):
    """What a model is fine-tuned from, with what was chosen on validation tasks."""

    algorithm: Algorithm
    meta: Callable[[Setting], Tree]
    steps: list[int]
    rates: dict[str, list[float]]
    """The best rate of each scope, for each number of steps."""
    scopes: list[str]
    """The best scope, for each number of steps."""

    @property
    def settings(self) -> list[Setting]:
        """What was chosen, for each number of steps."""
        return [Setting(scope, self.rates[scope][i]) for i, scope in enumerate(self.scopes)]


def names(experiment: Experiment) -> list[str]:
    """The baselines of a run: without new heads there is one pre-trained model to fine-tune."""
    return [name for name, one in BASELINES.items() if needs_head(experiment) or one.head == "drawn"]


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
    outer = make_outer(outer_of(config), steps)
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
            f"train: the baseline diverged at step {outcome.progress.step}, at rate {outer_of(config).outer_lr:g}. "
            "Leave it out with --no-baselines, or lower --outer-lr where that is Adam's."
        )
    return outcome.state.meta


def outer_of(config: Config[Any]) -> Outer:
    """Its optimiser: the run's Adam, or another where the run's rate is one for reptile's steps, no gradients."""
    plain = config.outer.outer_optimizer == "adam"
    return config.outer if plain else replace(config.outer, outer_optimizer="adam", outer_lr=1e-3)


def needs_head(experiment: Experiment) -> bool:
    """Whether the pre-trained model's outputs are the training classes, and not those of a task."""
    return experiment.family.metric == "accuracy"


def fine_tuning(
    experiment: Experiment, baseline: Baseline, pretrained: Params | None
) -> tuple[Algorithm, Callable[[Setting], Tree]]:
    """Gradient descent from a baseline's weights: the algorithm, and its meta for a scope and rate.

    The rates are data of Meta-SGD, so that all of them share one kernel.

    Args:
        experiment: the run that this is the baseline of.
        baseline: which.
        pretrained: the weights of ``pretrain``, where it starts from them.
    """
    family, seed = experiment.family, experiment.config.outer.seed
    torch.manual_seed(seed)
    module = family.model(family.outputs)
    replaced = baseline.pretrained and needs_head(experiment)
    if replaced:
        torch.manual_seed(seed)
        new_head(module.head, baseline.head)  # type: ignore[arg-type]
    apply, start = fmeta.functionalize(module.to(experiment.device))
    if baseline.pretrained and pretrained is not None:
        start |= {n: leaf for n, leaf in pretrained.items() if not (replaced and n.startswith("head."))}
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


def choose(
    experiment: Experiment, baseline: Baseline, pretrained: Params | None, steps: list[int]
) -> FineTuned:
    """Fine-tune with every scope and rate on the validation tasks; keep the best for each number of steps."""
    algorithm, meta = fine_tuning(experiment, baseline, pretrained)
    metric = experiment.family.metric
    predict = fmeta.meta_predict(algorithm, experiment.plan, steps=steps)
    found: dict[Setting, list[float]] = {}
    with progress_bar(f"fine-tuning {baseline.title}", len(settings())) as bar:
        for setting in settings():
            found[setting] = per_task(predict, meta(setting), experiment.val, metric).mean(0).tolist()
            bar.stepped(len(found))
    rates: dict[str, list[float]] = {scope: [] for scope in SCOPES}
    scopes: list[str] = []
    for column in range(len(steps)):
        values = {setting: means[column] for setting, means in found.items()}
        best = best_of(values, higher=metric == "accuracy")
        if best is None:
            raise ValueError(
                f"train: the baseline {baseline.title!r} diverged at every fine-tuning rate. Leave the baselines "
                "out with --no-baselines."
            )
        scopes.append(best.scope)
        for scope in SCOPES:
            own = {s: value for s, value in values.items() if s.scope == scope}
            # where all of them diverge, the smallest shows that
            rates[scope].append((best_of(own, metric == "accuracy") or Setting(scope, RATES[0])).rate)
    return FineTuned(algorithm, meta, steps, rates, scopes)


def best_of(values: dict[Setting, float], higher: bool) -> Setting | None:
    """The setting with the best value, the first of equals; None if none is finite."""
    best: Setting | None = None
    for setting, value in values.items():
        if is_better(value, None if best is None else values[best], higher):
            best = setting
    return best


def scores_by_scope(experiment: Experiment, tuned: FineTuned, held: Held) -> dict[str, Scores]:
    """The scores of held-out tasks with each scope, every number of steps at the rate chosen for it."""
    found: dict[str, Scores] = {}
    for scope, rates in tuned.rates.items():
        columns: dict[int, tuple[Scores, int]] = {}
        for rate in dict.fromkeys(rates):
            at = [i for i, other in enumerate(rates) if other == rate]
            predict = fmeta.meta_predict(tuned.algorithm, experiment.plan, steps=[tuned.steps[i] for i in at])
            part = scores(predict, tuned.meta(Setting(scope, rate)), held, experiment.family.metric)
            columns |= {i: (part, place) for place, i in enumerate(at)}
        found[scope] = joined([columns[i] for i in range(len(rates))])
    return found


def best_scores(tuned: FineTuned, by_scope: dict[str, Scores]) -> Scores:
    """The scores with the scope that was chosen for each number of steps."""
    return joined([(by_scope[scope], i) for i, scope in enumerate(tuned.scopes)])
