"""The baselines without meta-learning: what they start from, are trained on, and how they are fine-tuned."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_trees_close, assert_trees_equal
from tiny_runs import Seen, random_pictures, tiny_few_shot, tiny_sinusoid

import fmeta
from fmeta.train import baselines, experiment, family
from fmeta.train.config import Outer
from fmeta.train.evaluate import scores
from fmeta.train.pictures.config import FewShotTask
from fmeta.types import Batch, Task


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "load_pools", lambda task: random_pictures())


def test_pooled_points_are_all_points_of_the_same_tasks() -> None:
    sampler = fmeta.tasks.sinusoid(tasks=3, shots=4, queries=5)
    task, pooled = sampler(1, 2), family.pooled_points(sampler)(1, 2)
    assert_trees_equal(pooled.query.x, torch.cat([task.support.x, task.query.x], dim=1))
    assert_trees_equal(pooled.query.y, torch.cat([task.support.y, task.query.y], dim=1))


def test_pooled_pictures_have_the_labels_of_their_classes(pictures: None) -> None:
    pool = family.load_pools(FewShotTask()).train
    batch = family.pooled_pictures(pool, 50, FewShotTask())(3, 4).query
    assert batch.x.shape == (1, 50, 1, 16, 16)
    for x, y in zip(batch.x[0], batch.y[0].tolist(), strict=True):
        upright = x.rot90(-(y % 4), (-2, -1))
        row = (pool.x == upright).flatten(1).all(1).nonzero()
        assert pool.y[row].item() == y // 4
    plain = family.pooled_pictures(pool, 50, FewShotTask(rotations=False))(3, 4).query
    assert plain.y.max() < len(pool.names)


def descended(loss: Any, start: Any, scope: str, rate: float) -> Any:
    """Two steps of gradient descent, written out."""
    params = start
    for _ in range(2):
        grads = torch.func.grad(loss)(params)
        moves = lambda name: scope == "all weights" or name.startswith("head")  # noqa: E731
        params = {n: p - rate * grads[n] if moves(n) else p for n, p in params.items()}
    return params


@pytest.mark.parametrize("name", list(baselines.BASELINES))
@pytest.mark.parametrize("scope", list(baselines.SCOPES))
def test_fine_tuning_is_gradient_descent_on_the_support_set(
    tmp_path: Path, pictures: None, name: str, scope: str
) -> None:
    built = experiment.build(tiny_few_shot(tmp_path))
    pretrained = {n: p + 0.1 for n, p in baselines.pooled_model(built)[1].items()}
    algorithm, meta_of = baselines.fine_tuning(built, baselines.BASELINES[name], pretrained)
    apply, _ = fmeta.functionalize(built.family.model(3))
    task = fmeta.tree.select(built.test.sampler(built.test.seed, 0), 0)
    params = {n: leaf for n, leaf in pretrained.items() if not n.startswith("head")}
    torch.manual_seed(built.config.outer.seed)
    for n, leaf in torch.nn.Linear(4, 3).named_parameters():
        params[f"head.{n}"] = torch.zeros_like(leaf) if name.endswith("zero_head") else leaf.detach()
    if name == "from_scratch":
        params = built.params  # what MAML starts from
    loss = lambda p: torch.nn.functional.cross_entropy(apply(p, task.support.x), task.support.y)  # noqa: E731
    adapted = algorithm.adapt(meta_of(baselines.Setting(scope, 0.3)), task.support)
    assert_trees_close(adapted.params, descended(loss, params, scope, 0.3), 1e-5)


def test_fine_tuned_regression_keeps_its_head(tmp_path: Path) -> None:
    built = experiment.build(tiny_sinusoid(tmp_path))
    assert baselines.names(built) == ["from_scratch", "no_meta_learning"]
    pretrained = {n: p + 0.1 for n, p in baselines.pooled_model(built)[1].items()}
    for name, want in (("no_meta_learning", pretrained), ("from_scratch", built.params)):
        _, meta_of = baselines.fine_tuning(built, baselines.BASELINES[name], pretrained)
        assert_trees_equal(meta_of(baselines.Setting("the head", 0.1))["params"], want)


def test_from_scratch_is_the_same_for_every_algorithm(tmp_path: Path, pictures: None) -> None:
    """For those that learn an embedding too: a model with a head, as MAML starts from it."""
    built = experiment.build(tiny_few_shot(tmp_path, "protonet"))
    _, meta_of = baselines.fine_tuning(built, baselines.BASELINES["from_scratch"], None)
    start = meta_of(baselines.Setting("the head", 0.1))["params"]
    assert_trees_equal(start, experiment.build(tiny_few_shot(tmp_path, "maml")).params)


TRAINED = baselines.BASELINES["no_meta_learning"]


def test_best_setting_is_chosen_for_each_number_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = experiment.build(tiny_sinusoid(tmp_path))
    losses = {("all weights", 0.01): [3.0, 1.0, math.nan], ("all weights", 0.1): [3.0, 2.0, math.inf]}
    losses |= {("the head", 0.01): [3.0, 1.5, 4.0], ("the head", 0.1): [3.0, 0.5, math.nan]}
    monkeypatch.setattr(baselines, "RATES", (0.01, 0.1))
    values = iter(losses.values())
    monkeypatch.setattr(baselines, "per_task", lambda *_: torch.tensor([next(values)] * 2))
    tuned = baselines.choose(built, TRAINED, baselines.pooled_model(built)[1], [0, 1, 2])
    assert tuned.rates == {"all weights": [0.01, 0.01, 0.01], "the head": [0.01, 0.1, 0.01]}
    assert [tuple(s) for s in tuned.settings] == [
        ("all weights", 0.01),
        ("the head", 0.1),
        ("the head", 0.01),
    ]


def test_scores_are_those_of_the_chosen_settings(tmp_path: Path, pictures: None) -> None:
    """Every column, of each scope and of the better one, against a measurement with its setting alone."""
    built = experiment.build(tiny_few_shot(tmp_path))
    params, steps = baselines.pooled_model(built)[1], [0, 1, 2, 5]
    algorithm, meta_of = baselines.fine_tuning(built, TRAINED, params)
    rates = {"all weights": [0.1, 0.3, 0.1, 0.3], "the head": [1.0, 1.0, 3.0, 0.1]}
    scopes = ["the head", "all weights", "all weights", "the head"]
    tuned = baselines.FineTuned(algorithm, meta_of, steps, rates, scopes)
    found = baselines.scores_by_scope(built, tuned, built.test)
    for scope, values in rates.items():
        for column, (k, rate) in enumerate(zip(steps, values, strict=True)):
            predict = fmeta.meta_predict(algorithm, built.plan, steps=[k])
            want = scores(predict, meta_of(baselines.Setting(scope, rate)), built.test, "accuracy")
            assert_trees_close(found[scope].values[:, column], want.values[:, 0], 1e-6)
            assert_trees_close(
                fmeta.tree.select(found[scope].reliability, column),
                fmeta.tree.select(want.reliability, 0),
                1e-6,
            )
    best = baselines.best_scores(tuned, found)
    for column, scope in enumerate(scopes):
        assert_trees_equal(best.values[:, column], found[scope].values[:, column])
        assert_trees_equal(
            fmeta.tree.select(best.reliability, column), fmeta.tree.select(found[scope].reliability, column)
        )


def test_baseline_learns_the_training_classes(tmp_path: Path, pictures: None) -> None:
    config = tiny_few_shot(tmp_path)
    config = replace(
        config, task=replace(config.task, rotations=False, channels=8), outer=Outer(tasks=8, outer_lr=0.03)
    )
    built = experiment.build(config)
    params = baselines.pretrain(built, 40, Seen().hooks._replace(save=lambda *_: None))
    apply, _ = baselines.pooled_model(built)
    pool = family.load_pools(config.task).train
    accuracy = (apply(params, pool.x).argmax(1) == pool.y).float().mean().item()
    assert accuracy > 0.5, f"{accuracy:.2f} on 12 classes"


def test_diverging_baseline_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = experiment.build(tiny_sinusoid(tmp_path))
    bad = Batch(torch.full((4, 6, 1), math.nan), torch.zeros(4, 6, 1))
    diverging = built._replace(family=built.family._replace(pooled=lambda seed, step: Task(bad, bad)))
    with pytest.raises(ValueError, match="the baseline diverged at step 10"):
        baselines.pretrain(diverging, 20, Seen().hooks)
    monkeypatch.setattr(baselines, "per_task", lambda *_: torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match="the baseline 'fine-tuned' diverged at every fine-tuning rate"):
        baselines.choose(built, TRAINED, baselines.pooled_model(built)[1], [1])
