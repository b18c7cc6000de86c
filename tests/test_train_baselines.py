"""The baseline without meta-learning: what it is trained on, and how it is fine-tuned."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_trees_close, assert_trees_equal
from tiny_runs import Seen, random_pictures, tiny_few_shot, tiny_sinusoid

import fmeta
from fmeta.train import baselines, experiment, family
from fmeta.train.config import FewShotTask, Outer
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
    batch = family.pooled_pictures(pool, 50, rotations=True)(3, 4).query
    assert batch.x.shape == (1, 50, 1, 16, 16)
    for x, y in zip(batch.x[0], batch.y[0].tolist(), strict=True):
        upright = x.rot90(-(y % 4), (-2, -1))
        row = (pool.x == upright).flatten(1).all(1).nonzero()
        assert pool.y[row].item() == y // 4
    plain = family.pooled_pictures(pool, 50, rotations=False)(3, 4).query
    assert plain.y.max() < len(pool.names)


@pytest.mark.parametrize("head", ["drawn", "zeros"])
@pytest.mark.parametrize("scope", list(baselines.SCOPES))
def test_fine_tuning_is_gradient_descent_on_the_support_set(
    tmp_path: Path, pictures: None, head: str, scope: str
) -> None:
    built = experiment.build(tiny_few_shot(tmp_path))
    pretrained = baselines.pooled_model(built)[1]
    algorithm, meta_of = baselines.fine_tuning(built, pretrained, head)
    apply, _ = fmeta.functionalize(built.family.model(3))
    task = fmeta.tree.select(built.test.sampler(built.test.seed, 0), 0)
    params = {name: leaf for name, leaf in pretrained.items() if not name.startswith("head")}
    torch.manual_seed(built.config.outer.seed)
    new = torch.nn.Linear(4, 3)
    for name, leaf in new.named_parameters():
        params[f"head.{name}"] = leaf.detach() if head == "drawn" else torch.zeros_like(leaf)
    for _ in range(2):
        loss = lambda p: torch.nn.functional.cross_entropy(apply(p, task.support.x), task.support.y)  # noqa: E731
        grads = torch.func.grad(loss)(params)
        moves = lambda name: scope == "all weights" or name.startswith("head")  # noqa: E731
        params = {n: p - 0.3 * grads[n] if moves(n) else p for n, p in params.items()}
    adapted = algorithm.adapt(meta_of(baselines.Setting(scope, 0.3)), task.support)
    assert_trees_close(adapted.params, params, 1e-5)


def test_fine_tuned_regression_keeps_its_head(tmp_path: Path) -> None:
    built = experiment.build(tiny_sinusoid(tmp_path))
    pretrained = baselines.pooled_model(built)[1]
    _, meta_of = baselines.fine_tuning(built, pretrained, "zeros")
    assert_trees_equal(meta_of(baselines.Setting("the head", 0.1))["params"], pretrained)


def test_best_setting_is_chosen_for_each_number_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = experiment.build(tiny_sinusoid(tmp_path))
    losses = {("all weights", 0.01): [3.0, 1.0, math.nan], ("all weights", 0.1): [3.0, 2.0, 5.0]}
    losses |= {("the head", 0.01): [3.0, 1.5, 4.0], ("the head", 0.1): [3.0, math.inf, math.nan]}
    monkeypatch.setattr(baselines, "RATES", (0.01, 0.1))
    values = iter(losses.values())
    monkeypatch.setattr(baselines, "per_task", lambda *_: torch.tensor([next(values)] * 2))
    tuned = baselines.choose(built, baselines.pooled_model(built)[1], "drawn", [0, 1, 2])
    assert [tuple(s) for s in tuned.settings] == [
        ("all weights", 0.01),
        ("all weights", 0.01),
        ("the head", 0.01),
    ]
    monkeypatch.setattr(baselines, "per_task", lambda measure, meta, held, metric: torch.full((2, 3), sum(
        leaf.sum().item() for leaf in meta["lr"].values()
    )))  # fmt: skip
    found = baselines.scores(built, tuned, built.test)
    assert found.shape == (2, 3)
    assert found[0, 0] == found[0, 1] > found[0, 2] > 0, "the head has fewer weights that move"


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
    with pytest.raises(ValueError, match="the baseline diverged at every fine-tuning rate"):
        baselines.choose(built, baselines.pooled_model(built)[1], "drawn", [1])
