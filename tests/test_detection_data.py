"""Pictures with boxes: both formats, what is refused, generated scenes, features on disk, and the task sampler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detection_problems import as_coco, characters, tiny_scenes, write_folder
from helpers import assert_trees_close

from fmeta.data import Featured, box_folder, coco_boxes, featured, scenes
from fmeta.tasks.detection import batch_of, detection, draw, make_task, pictures, pictures_of_step, rounds


def test_a_folder_is_read_and_brought_to_size(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    pool = box_folder(folder, size=160)
    assert pool.images.shape == (6, 3, 96, 160)  # 80 x 40 twice as large, on multiples of 32
    assert pool.sizes.tolist() == [[80, 160]] * 6
    assert pool.boxes[:, 0].tolist() == [[20.0, 20.0, 60.0, 60.0]] * 6
    assert pool.labels[:, 0].tolist() == [1, 2, 1, 2, 1, 2]
    assert pool.names == ("a", "b") and pool.scales.tolist() == [2.0] * 6
    assert int(pool.images[3, 0, 5, 5]) == 60 and int(pool.images[3, :, 80:].max()) == 0
    assert box_folder(folder, split="test", size=64).files == ("2.png", "5.png")
    assert "2 classes, 6 boxes" in repr(pool)
    assert pool.rows(torch.tensor([4, 1])).files == ("4.png", "1.png")


def test_cocos_json_says_the_same_and_its_numbers_may_skip(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    content = as_coco(folder)
    content["annotations"].append({"image_id": 100, "category_id": 3, "bbox": [0, 0, 80, 40], "iscrowd": 1})
    content["images"].append({"id": 5, "file_name": "0.png", "width": 80, "height": 40})  # without a box
    (tmp_path / "coco.json").write_text(json.dumps(content))
    pool, other = coco_boxes(tmp_path / "coco.json", folder / "images", size=64), box_folder(folder, size=64)
    assert pool.names == other.names
    for name in ("images", "boxes", "labels", "sizes"):
        assert_trees_close(getattr(pool, name)[:6], getattr(other, name))
    assert int((pool.labels[6] > 0).sum()) == 0 and not bool(pool.holds()[6].any())
    (folder / "annotations.json").write_text(json.dumps(content))
    assert_trees_close(box_folder(folder, size=64).boxes, pool.boxes)


def test_boxes_at_the_edge_are_cut_on_request(tmp_path: Path) -> None:
    boxes = [[-5, 10, 20, 30], [70, 10, 200, 30], [30, 10, 30, 20]]
    folder = write_folder(tmp_path / "set", boxes=boxes, labels=[1, 2, 1])
    pool = box_folder(folder, size=80, repair=True)
    assert pool.boxes[0, :2].tolist() == [[0.0, 10.0, 20.0, 30.0], [70.0, 10.0, 80.0, 30.0]]
    assert pool.labels[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": [[-5, 10, 20, 30]]}, r"boxes must lie inside of their picture, got \[-5, 10, 20, 30\] in 0.png of"),
        ({"boxes": [[5, 10, 20, 50]]}, r"boxes must lie inside of their picture.*repair=True cuts such boxes"),
        ({"boxes": [[5, 10, 5, 30]]}, r"boxes must have an area, got \[5, 10, 5, 30\] in 0.png"),
        ({"boxes": [[25, 10, 5, 30]]}, r"boxes must have an area"),
        ({"boxes": [[5, 10, 5]]}, r"a box must be four finite numbers, got \[5, 10, 5\] in 0.png"),
        ({"boxes": [[5, 10, float("nan"), 9]]}, r"a box must be four finite numbers"),
        ({"boxes": [["5", 10, 20, 30]]}, r"a box must be four finite numbers, got \['5', 10, 20, 30\] in 0.png"),
        ({"labels": [1, 1]}, r"every box needs a label, got 1 boxes and 2 labels for 0.png"),
        ({"labels": ["a"]}, r"labels must be in 1 .. 2 for 2 classes, got 'a' in 0.png"),
        ({"labels": [3]}, r"labels must be in 1 .. 2 for 2 classes, got 3 in 0.png"),
        ({"labels": [0]}, r"labels must be in 1 .. 2 for 2 classes, got 0 in 0.png"),
        ({"file": "none.png"}, r"the annotations name 1 pictures that .* does not hold, such as none.png"),
        ({"width": 81}, r"0.png must have 81 x 40 pixels, as its annotations say, got 80 x 40"),
    ],
)  # fmt: skip
def test_wrong_annotations_name_the_picture(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"box_folder: {message}"):
        box_folder(write_folder(tmp_path / "set", **changes))


def test_files_that_are_no_annotations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"box_folder: .* must be a json file, but"):
        box_folder(tmp_path)
    folder = write_folder(tmp_path / "set")
    with pytest.raises(ValueError, match=r"must have pictures of split 'val', got test, train"):
        box_folder(folder, split="val")
    content = as_coco(folder)
    for part, number in (("image_id", 9), ("category_id", 1)):
        wrong = [{**content["annotations"][0], part: number}]
        (tmp_path / "coco.json").write_text(json.dumps({**content, "annotations": wrong}))
        kind = part.removesuffix("_id")
        with pytest.raises(
            ValueError, match=f"coco_boxes: every annotation needs a listed {kind}.* {kind} {number}"
        ):
            coco_boxes(tmp_path / "coco.json", folder / "images")
    for kind, key in (("annotations", "bbox"), ("images", "width"), ("categories", "name")):
        first, *rest = content[kind]
        short = {name: value for name, value in first.items() if name != key}
        (tmp_path / "coco.json").write_text(json.dumps({**content, kind: [short, *rest]}))
        with pytest.raises(
            ValueError, match=f"every entry of '{kind}' in .* must have .*number 1 has no '{key}'"
        ):
            coco_boxes(tmp_path / "coco.json", folder / "images")
    for kind, key, wrong, said in (
        ("images", "width", "40", "width must be a number above 0, got '40' in number 1 of 'images'"),
        ("images", "id", [1], "every id in 'images' of .* must be a whole number, or every one a text, got"),
        (
            "categories",
            "id",
            "one",
            "every id in 'categories' of .* must be a whole number, or every one a text",
        ),
    ):
        first, *rest = content[kind]
        (tmp_path / "coco.json").write_text(json.dumps({**content, kind: [{**first, key: wrong}, *rest]}))
        with pytest.raises(ValueError, match=f"^coco_boxes: {said}"):
            coco_boxes(tmp_path / "coco.json", folder / "images")
    for kind in ("images", "categories"):
        (tmp_path / "coco.json").write_text(json.dumps({**content, kind: [*content[kind], content[kind][0]]}))
        with pytest.raises(
            ValueError, match=f"coco_boxes: id must be unique in '{kind}' of .*, got .* twice"
        ):
            coco_boxes(tmp_path / "coco.json", folder / "images")
    (tmp_path / "coco.json").write_text(json.dumps({**content, "images": [], "annotations": []}))
    with pytest.raises(ValueError, match="there must be pictures, got none"):
        coco_boxes(tmp_path / "coco.json", folder / "images")
    (tmp_path / "coco.json").write_text(json.dumps({"images": []}))
    with pytest.raises(
        ValueError, match="must hold images, annotations, categories, but 'annotations' is missing"
    ):
        coco_boxes(tmp_path / "coco.json", folder / "images")
    (folder / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must list its classes, got annotations, categories, images"):
        box_folder(folder, split="train")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "split", "pictures", "classes"), [("det_bccd", "test", 72, 3), ("det_cards", "test", 67, 6)]
)
def test_the_real_sets_are_read(data_root: Path, name: str, split: str, pictures: int, classes: int) -> None:
    pool = box_folder(data_root / name, split=split, size=64)
    assert len(pool.files) == pictures and len(pool.names) == classes
    inside = (pool.boxes[..., 2] <= pool.sizes[:, None, 1] + 1) & (
        pool.boxes[..., 3] <= pool.sizes[:, None, 0] + 1
    )
    assert bool(inside.all()) and bool(pool.holds().any(0).all())


# Scenes


def test_scenes_are_a_function_of_their_seed() -> None:
    pool, again, other = tiny_scenes(seed=1), tiny_scenes(seed=1), tiny_scenes(seed=2)
    for name in ("images", "boxes", "labels"):
        assert torch.equal(getattr(pool, name), getattr(again, name))
    assert not torch.equal(pool.images, other.images)


def test_scenes_label_what_they_show() -> None:
    pool = tiny_scenes(24)
    marked = pool.labels > 0
    boxes = pool.boxes[marked]
    assert bool((boxes[:, 2:] - boxes[:, :2] >= 4).all())
    assert bool((boxes >= 0).all()) and bool((boxes <= 64).all())
    assert int(pool.labels.max()) == 3 and bool(pool.holds().any(0).all())
    assert bool((pool.holds().sum(1) <= 2).all())
    # What is inside of a box differs from what is around it.
    contrast = []
    for row, box in zip(marked.nonzero()[:, 0].tolist(), boxes.long().tolist(), strict=True):
        left, top, right, bottom = box
        image = pool.images[row].float()
        inside = image[:, top:bottom, left:right].mean((1, 2))
        contrast.append((inside - image.mean((1, 2))).abs().max())
    assert torch.stack(contrast).median() > 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 9}, "classes must be in 1 .. 8, which the pool has, got 9"),
        ({"classes": 2, "kinds": 3}, "kinds must be in 1 .. 2"),
        ({"size": 100}, "size must be a multiple of 32 from 64 on, got 100"),
        ({"objects": (3, 2)}, "count must be at least 1 and objects two growing numbers"),
    ],
)
def test_scenes_check_their_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"scenes: {message}"):
        scenes(characters(), **{"count": 1, "size": 64, **options})


# Features


def test_features_are_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path))
    pool, calls = tiny_scenes(10), []

    def compute(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(rows)
        return {"0": pool.images[rows, :, ::8, ::8] / 255, "pool": pool.images[rows, :1, ::32, ::32] / 255}

    weights = {"w": torch.ones(2)}
    first = featured(pool, compute, weights)
    assert len(calls) == 2
    again = featured(pool, compute, weights)
    assert len(calls) == 2 and list(again.features) == ["0", "pool"]
    memory = featured(pool, compute, weights, keep=False)
    rows = torch.tensor([9, 0, 3])
    for source in (first, again, memory):
        found = source.maps(rows)
        assert found["0"].dtype == torch.float32
        torch.testing.assert_close(found["0"], pool.images[rows, :, ::8, ::8] / 255, rtol=0, atol=1e-3)
    featured(pool, compute, {"w": torch.zeros(2)})
    assert len(calls) == 6


# Tasks


def source(count: int = 24, classes: int = 4) -> Featured:
    """A pool whose features say which picture it is."""
    pool = scenes(characters(), count=count, classes=classes, size=64, kinds=2, objects=(1, 3))
    return Featured(pool, {"0": torch.arange(count).view(-1, 1, 1, 1).half()})


def test_tasks_are_a_function_of_seed_and_step() -> None:
    sampler = detection(source(), ways=2, shots=2, queries=1, tasks=3, steps=4, batch=3)
    first, again, other = sampler(0, 5), sampler(0, 5), sampler(1, 5)
    assert_trees_close(first, again)
    seen = [[task.support.x["features"]["0"] for task in tasks] for tasks in (first, other, sampler(0, 6))]
    assert not torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][0], seen[2][0])


def test_a_task_holds_its_pictures_once_and_its_classes_only() -> None:
    given = source()
    sampler = detection(given, ways=2, shots=3, queries=2, tasks=5, steps=6, batch=4)
    for task in sampler(3, 0):
        shown, asked = (batch.x["features"]["0"].flatten().long().tolist() for batch in task)
        assert len(set(shown) | set(asked)) == len(shown) + len(asked) == 10
        labels = task.support.y["labels"]
        assert set(labels.flatten().tolist()) == {0, 1, 2}
        for label in (1, 2):
            assert int((labels == label).any(1).sum()) >= 3
        assert set(task.query.y["labels"].flatten().tolist()) == {0, 1, 2}
        # Objects of other classes are there, but not labelled.
        before = given.pool.labels[shown]
        assert bool(((labels > 0) <= (before > 0)).all())
        assert task.support.x["order"].shape == (6, 4) and int(task.support.x["order"].max()) < 6


def test_every_picture_is_seen_once_in_a_round() -> None:
    order = rounds(6, 5, 4, torch.Generator().manual_seed(0)).flatten()
    assert sorted(order[:6].tolist()) == sorted(order[6:12].tolist()) == list(range(6))
    assert rounds(3, 2, 4, torch.Generator()).shape == (2, 3)


def test_the_pictures_of_a_step() -> None:
    given = source()
    order = torch.tensor([[1, 0], [2, 2]])
    task = make_task(given, torch.tensor([2, 1]), torch.tensor([5, 6, 7]), torch.tensor([8]), order)
    for k, rows in ((0, [6, 5]), (1, [7, 7]), (2, [6, 5])):
        batch = pictures_of_step(task.support, torch.tensor(k))
        assert batch.x["features"]["0"].flatten().long().tolist() == rows
        relabelled = torch.tensor([0, 2, 1, 0, 0])[given.pool.labels[rows]]
        assert torch.equal(batch.y["labels"], relabelled)
    assert pictures_of_step(task.query, torch.tensor(0)) is task.query


def test_sources_take_turns_and_joint_classes_are_numbered_on() -> None:
    small, large = source(classes=3), source(classes=4)
    sampler = detection([small, large], ways=(2, 4), shots=1, queries=1, tasks=4)
    ways = [[int(task.support.y["labels"].max()) for task in sampler(0, step)] for step in range(10)]
    assert (
        max(max(step[0], step[2]) for step in ways) == 3 and max(max(step[1], step[3]) for step in ways) == 4
    )
    joint = pictures([small, large], count=6)(0, 0)
    assert int(joint[0].query.y["labels"].max()) <= 3
    labels = joint[1].query.y["labels"]
    assert set(labels.flatten().tolist()) <= {0, 4, 5, 6, 7} and int(labels.max()) > 3


def test_too_few_pictures_and_wrong_counts() -> None:
    given = source()
    good: dict[str, Any] = {"ways": 2, "shots": 1, "queries": 1, "tasks": 1}
    with pytest.raises(ValueError, match="detection: shots must be a positive int, got 0"):
        detection(given, **good | {"shots": 0})
    with pytest.raises(ValueError, match=r"ways must grow, got 1 pools and \(3, 2\)"):
        detection(given, **good | {"ways": (3, 2)})
    with pytest.raises(ValueError, match="ways must be at most the 4 classes of the pool, got 5"):
        detection(given, **good | {"ways": 5})
    with pytest.raises(ValueError, match=r"every class needs shots \+ queries = 31 pictures, but"):
        detection(given, **good | {"shots": 30})
    holds = torch.tensor([[True, True]])
    with pytest.raises(ValueError, match="needs pictures of its own, got 0 of class"):
        draw(holds, torch.tensor([1, 2]), 1, 0, torch.Generator())


def test_padding_is_no_object() -> None:
    given = source()
    batch = batch_of(given, torch.tensor([1, 2, 3, 4]), torch.arange(24))
    assert bool(((batch.y["labels"] > 0) == (given.pool.labels > 0)).all())
