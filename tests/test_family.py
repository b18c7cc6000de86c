"""The few-shot recipes: sizes of training and test tasks, networks, a folder of the user's own pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_trees_equal
from PIL import Image
from tiny_runs import random_pictures, tiny_few_shot

import fmeta
from fmeta.train import cli, commands, family, folder
from fmeta.train.config import Config
from fmeta.train.experiment import build
from fmeta.train.folder import load_run
from fmeta.train.pictures.adapting import load_picture_classifier
from fmeta.train.pictures.config import ImagesTask
from fmeta.train.recipes import RECIPES


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "load_pools", lambda task: random_pictures())


def changed(config: Config[Any], **task: Any) -> Config[Any]:
    return replace(config, task=replace(config.task, **task))


def test_training_tasks_may_have_more_classes_than_test_tasks(tmp_path: Path, pictures: None) -> None:
    config = changed(tiny_few_shot(tmp_path / "run", "protonet"), train_ways=6, train_shots=2)
    built = build(config)
    assert built.family.train(0, 0).support.y.shape == (2, 12)
    assert built.family.test(0, 0).support.y.shape == (50, 3)
    assert commands.train(config, "fmeta train glyphs") == 0
    _, meta = load_run(tmp_path / "run")
    task = built.family.test(1, 1)
    one = fmeta.Task(*(fmeta.Batch(part.x[0], part.y[0]) for part in task))
    assert built.algorithm.predict(meta, one.support, one.query.x).shape == (len(one.query.y), 3)


def test_more_classes_in_training_need_a_head_that_is_made(tmp_path: Path, pictures: None) -> None:
    with pytest.raises(ValueError, match="train: --train-ways may differ from --ways for protonet"):
        build(changed(tiny_few_shot(tmp_path, "maml"), train_ways=6))
    assert build(changed(tiny_few_shot(tmp_path, "maml"), train_ways=3)).family.train_outputs == 3


@pytest.mark.parametrize("labels", ["given", "umtra", "cactus"])
def test_training_pictures_are_changed_and_no_others(tmp_path: Path, pictures: None, labels: str) -> None:
    unlabelled = {"unlabelled": labels, "clusters": 8, "embedding_steps": 0} if labels != "given" else {}
    config = changed(
        tiny_few_shot(tmp_path / "run", "protonet"), rotations=False, labels=labels == "given", **unlabelled
    )
    plain, moved, flipped = (
        build(changed(config, augment=names)).family for names in ((), ("crop",), ("flip",))
    )
    assert_trees_equal(plain.test(0, 0), moved.test(0, 0))
    assert_trees_equal(plain.val(0, 0), moved.val(0, 0))
    one, other, mirrored = (f.train(3, 4).query for f in (plain, moved, flipped))
    assert one.x.shape == other.x.shape and not torch.equal(one.x, other.x)
    pool = family.load_pools(config.task).train.x
    either = {bytes(x.numpy()) for x in torch.cat([pool, pool.flip(-1)])}
    assert all(bytes(x.numpy()) in either for x in mirrored.x.flatten(0, 1))
    assert not torch.equal(plain.pooled(3, 4).query.x, moved.pooled(3, 4).query.x)
    assert torch.equal(plain.pooled(3, 4).query.y, moved.pooled(3, 4).query.y)


def test_augmentation_is_kept_in_a_run(tmp_path: Path, pictures: None) -> None:
    config = changed(tiny_few_shot(tmp_path / "run", "protonet"), augment=("affine", "flip"))
    assert commands.train(config, "fmeta train glyphs") == 0
    assert folder.read_config(tmp_path / "run").task.augment == ("affine", "flip")
    asked = cli.parse("train omniglot --augment crop jitter --ways 3".split())
    assert asked.config.task.augment == ("crop", "jitter")


def test_a_run_is_not_continued_with_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another folder, or of the same one after somebody added a picture."""
    config = tiny_few_shot(tmp_path / "run", "protonet")
    pools = random_pictures()
    fewer = fmeta.data.from_tensors(pools.train.x[1:], pools.train.y[1:], split=(0.4, 0.3, 0.3))
    again = replace(
        config, resume=True, outer=replace(config.outer, outer_steps=config.outer.outer_steps + 1)
    )
    monkeypatch.setattr(family, "load_pools", lambda task: pools)
    assert commands.train(replace(config, outer=replace(config.outer, schedule="constant")), "") == 0
    again = replace(again, outer=replace(again.outer, schedule="constant"))
    monkeypatch.setattr(family, "load_pools", lambda task: fewer)
    with pytest.raises(
        ValueError, match=r"^train: .*run began with other data than there is now: its classes, or"
    ):
        commands.train(again, "")
    assert folder.read_config(tmp_path / "run").outer.outer_steps == config.outer.outer_steps, (
        "nothing is written"
    )
    monkeypatch.setattr(family, "load_pools", lambda task: pools)
    assert commands.train(again, "") == 0


@pytest.mark.parametrize(
    ("options", "features"),
    [
        ({"network": "mlp"}, 64),
        ({"network": "resnet12"}, 640),
        ({"channels": 8}, 8),
        ({"channels": 8, "flatten": True, "size": 16}, 8),
        ({"channels": 8, "pool": "max", "flatten": True}, 8),
    ],
)
def test_networks_by_name(options: dict[str, Any], features: int) -> None:
    task = ImagesTask(**{"rotations": False} | options)
    x = torch.rand(2, 3, 16, 16)
    assert family.network(task, x.shape[1:], None)(x).shape == (2, features)
    assert family.network(task, x.shape[1:], 7)(x).shape == (2, 7)


def test_inner_steps_of_adam_without_momentum(tmp_path: Path, pictures: None) -> None:
    config = tiny_few_shot(tmp_path, "fomaml")
    rates = {"inner_lr": 0.01, "inner_optimizer": "adam", "inner_steps": 1}
    built = build(replace(config, inner=replace(config.inner, **rates)))
    task = built.family.train(0, 0)
    support = fmeta.Batch(task.support.x[0], task.support.y[0])
    adapted = built.algorithm.adapt(built.params, support).params
    moves = torch.cat([(adapted[n] - built.params[n]).abs().flatten() for n in adapted])
    assert 0.0099 < moves.max() < 0.0101  # the first step of Adam is its rate
    assert not any("norm" in name for name in adapted)


def of_colours(path: Path, classes: int, each: int, steps: int) -> Config[ImagesTask]:
    """A run on a folder of pictures of one colour each, alike within a class."""
    for c in range(classes):
        (path / "data" / f"c{c}").mkdir(parents=True)
        for i in range(each):
            color = tuple(int(v) for v in torch.randint(20 * c, 20 * c + 16, (3,)))
            Image.new("RGB", (20, 24), color).save(path / "data" / f"c{c}" / f"{i}.png")
    config: Any = RECIPES["images"]()
    config = replace(
        config,
        outer=replace(config.outer, outer_steps=steps),
        report=replace(config.report, val_tasks=4, test_tasks=6, baselines=False),
        machine=replace(config.machine, device="cpu", compile="off"),
        out=path / "run",
    )
    shares = (0.5, 0.25, 0.25)
    return changed(config, root=path / "data", size=16, ways=2, queries=2, channels=4, shares=shares)


def test_a_folder_of_pictures_is_trained_on(tmp_path: Path) -> None:
    config = of_colours(tmp_path, classes=12, each=5, steps=3)
    assert commands.train(config, "fmeta train images") == 0
    built, _ = load_run(tmp_path / "run")
    assert built.family.train(0, 0).support.x.shape == (4, 2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"train: images needs a folder of pictures. Give it with --root"):
        build(changed(config, root=None))
    for option, value in (("weights", "w.pt"), ("learns", "norms"), ("norm_eps", 1e-3)):
        with pytest.raises(
            ValueError, match=rf"^train: --{option.replace('_', '-')} needs --backbone, got .* without"
        ):
            build(changed(config, **{option: value}))
    with pytest.raises(ValueError, match=r"^train: --colour-std must be above 0, got 0.0"):
        build(changed(config, backbone="resnet20", colour_std=(0.0, 1.0, 1.0)))


def test_more_classes_than_the_test_split_has_are_adapted_to(tmp_path: Path) -> None:
    config = of_colours(tmp_path, classes=8, each=3, steps=2)
    config = replace(config, inner=replace(config.inner, algorithm="protonet"))
    assert commands.train(config, "fmeta train images") == 0
    files = sorted((tmp_path / "data").rglob("*.png"))
    learner = load_picture_classifier(tmp_path / "run")
    classifier = learner.fit(files, [file.parent.name for file in files])
    assert len(classifier.names) == 8 and len(classifier.predict(files[:2])) == 2
    with pytest.raises(TypeError, match=r"^adapt: examples must be a list of paths, got"):
        classifier.predict(str(files[0]))
    with pytest.raises(ValueError, match="few_shot: ways must be at most the 2 classes"):
        commands.train(replace(changed(config, ways=3), out=tmp_path / "more"), "test")
    assert not (tmp_path / "more").exists()


def test_annealing_changes_the_algorithm_while_training(tmp_path: Path, pictures: None) -> None:
    config = tiny_few_shot(tmp_path / "run", "mamlpp")
    config = replace(
        config,
        inner=replace(config.inner, annealing=True, inner_steps=2),
        outer=replace(config.outer, outer_steps=60),
    )
    built = build(config)
    starts = [start for start, _ in built.phases]
    orders = [algorithm.inner_loop.adjoint.last for _, algorithm in built.phases]
    weights = [algorithm.inner_loop.weights for _, algorithm in built.phases]
    assert starts[:2] == [0, 1] and orders[0] == 0 and orders[-1] is None
    assert weights[0] == (0.0, 0.5, 0.5) and weights[-1] is None
    assert commands.train(config, "fmeta train glyphs") == 0
    _, meta = load_run(tmp_path / "run")
    assert all(leaf.shape[0] == 3 for leaf in meta["per_step"].values()) and meta["per_step"]


def test_training_tasks_from_clusters(tmp_path: Path, pictures: None) -> None:
    pytest.importorskip("sklearn", reason="k-means is scikit-learn's")
    config = changed(
        tiny_few_shot(tmp_path / "run"), labels=False, unlabelled="cactus", clusters=8, embedding_steps=0
    )
    built = build(config)
    task = built.family.train(0, 0)
    assert task.support.y.shape == (2, 3) and task.query.y.shape == (2, 6)
    assert_trees_equal(task, built.family.train(0, 0))
    assert commands.train(config, "fmeta train glyphs") == 0
