"""Few-shot tasks: who is in them, what rotations mean, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_trees_close
from torch import Tensor

import fmeta
from fmeta.data import Pool, class_pool, from_tensors
from fmeta.tasks import few_shot
from fmeta.types import Batch, Task


def numbered(counts: list[int]) -> Pool:
    """Features (class, row): every example says who it is."""
    y = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x = torch.stack([y, torch.arange(len(y))], 1)[order].float()
    return class_pool(x, y[order], tuple(f"class{i}" for i in range(len(counts))))


def pictures(classes: int = 6, each: int = 5, side: int = 7) -> Pool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (classes * each, 2, side, side), dtype=torch.uint8, generator=generator)
    return class_pool(x, torch.arange(classes).repeat_interleave(each), tuple("abcdefghij"[:classes]))


def both(task: Task) -> Batch:
    return Batch(*[torch.cat(part, 1) for part in zip(task.support, task.query, strict=True)])


def test_shapes_and_dtypes() -> None:
    task = few_shot(pictures(), ways=5, shots=2, queries=3, tasks=4)(0, 0)
    assert task.support.x.shape == (4, 10, 2, 7, 7) and task.query.x.shape == (4, 15, 2, 7, 7)
    assert task.support.y.shape == (4, 10) and task.query.y.shape == (4, 15)
    assert task.support.x.dtype == torch.float32 and task.support.y.dtype == torch.int64


def test_pixels_are_scaled_and_features_are_not() -> None:
    pool = pictures()
    task = few_shot(pool, ways=6, shots=2, queries=3, tasks=1)(0, 0)
    known = {(image.float() / 255).numpy().tobytes() for image in pool.x}
    drawn = {image.numpy().tobytes() for image in both(task).x[0]}
    assert drawn == known, "6 ways of 5 examples are the whole pool"
    features = few_shot(numbered([4, 4]), ways=2, shots=1, queries=1, tasks=1)(0, 0)
    assert features.support.x.max() >= 1 and features.support.x.dtype == torch.float32


@pytest.mark.parametrize("counts", [[9] * 8, [6, 30, 7, 11, 6, 8]])
def test_classes_are_balanced_and_support_and_query_disjoint(counts: list[int]) -> None:
    pool = numbered(counts)
    task = few_shot(pool, ways=5, shots=2, queries=4, tasks=200)(1, 0)
    for batch, each in ((task.support, 2), (task.query, 4)):
        assert (torch.nn.functional.one_hot(batch.y, 5).sum(1) == each).all()
    x, y = both(task)
    for one in range(200):
        rows, classes = x[one, :, 1], x[one, :, 0]
        assert len(rows.unique()) == 30, "no example twice, in support, query or both"
        members = [classes[y[one] == label].unique() for label in range(5)]
        assert all(len(member) == 1 for member in members), "a label is one class"
        assert len(torch.cat(members).unique()) == 5, "classes differ"


def test_every_class_label_and_example_is_as_likely_as_any_other() -> None:
    counts = [6, 12, 8, 7]
    task = few_shot(numbered(counts), ways=3, shots=1, queries=2, tasks=12_000)(0, 0)
    classes, rows = task.support.x[..., 0].long(), task.support.x[..., 1].long()
    table = torch.zeros(4, 3)
    table.index_put_((classes.flatten(), task.support.y.flatten()), torch.ones(36_000), accumulate=True)
    expected = 12_000 / 4  # each class has each label in one of four tasks
    assert (table - expected).abs().max() < 5 * math.sqrt(expected)
    starts = [0, *np.cumsum(counts)]
    for label, count in enumerate(counts):
        drawn = torch.bincount(rows.flatten(), minlength=sum(counts))[starts[label] : starts[label + 1]]
        assert (drawn - 9_000 / count).abs().max() < 5 * math.sqrt(9_000 / count)


def test_order_of_examples_gives_no_label_away() -> None:
    task = few_shot(numbered([6] * 5), ways=5, shots=1, queries=1, tasks=5_000)(0, 0)
    for y in (task.support.y, task.query.y):
        frequency = torch.nn.functional.one_hot(y, 5).double().mean(0)  # [position, label]
        assert (frequency - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / 5_000)
    assert (task.support.y == task.query.y).all(1).double().mean() < 0.05


def test_rotated_classes_are_new_classes() -> None:
    pool = pictures(classes=2, each=5)
    task = few_shot(pool, ways=8, shots=2, queries=3, tasks=3, augment="rotations")(0, 0)
    x, y = both(task)
    turned = {}
    for label in range(2):
        for turn in range(4):
            images = pool.x[pool.rows[label]].numpy() / np.float32(255)
            turned[label, turn] = {np.rot90(image, turn, (1, 2)).tobytes() for image in images}
    for one in range(3):
        kinds = []
        for way in range(8):
            drawn = {image.numpy().tobytes() for image in x[one][y[one] == way]}
            kinds += [kind for kind, images in turned.items() if images == drawn]
        assert sorted(kinds) == sorted(turned), "8 ways are both classes in all four positions"


def test_rotations_give_four_times_the_ways() -> None:
    pool = pictures(classes=2)
    few_shot(pool, ways=8, shots=1, queries=1, tasks=1, augment=["rotations"])
    with pytest.raises(ValueError, match="few_shot: ways must be at most the 8 classes of the pool, got 9"):
        few_shot(pool, ways=9, shots=1, queries=1, tasks=1, augment=["rotations"])


def test_affine_changes_images_and_nothing_else() -> None:
    numbers: dict[str, Any] = dict(ways=3, shots=1, queries=2, tasks=2)
    plain, moved = (few_shot(pictures(), augment=a, **numbers)(0, 0) for a in (None, "affine"))
    assert torch.equal(plain.support.y, moved.support.y) and torch.equal(plain.query.y, moved.query.y)
    assert (plain.query.x != moved.query.x).flatten(2).any(-1).all(), "every image"
    assert 0 <= moved.query.x.min() and moved.query.x.max() <= 1 + 1e-6
    assert torch.equal(few_shot(pictures(), augment="affine", **numbers)(0, 0).query.x, moved.query.x)


def test_augmentations_apply_in_order() -> None:
    seen = []

    def invert(x: Tensor, generator: torch.Generator) -> Tensor:
        seen.append((x.shape, x.dtype, generator.device.type))
        return 1 - x

    def brighten(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + torch.rand(len(x), generator=generator)[:, None, None, None]

    pool = pictures()
    task = few_shot(pool, ways=2, shots=1, queries=2, tasks=4, augment=(invert, brighten))(0, 0)
    assert seen == [((24, 2, 7, 7), torch.float32, "cpu")]
    plain = few_shot(pool, ways=2, shots=1, queries=2, tasks=4)(0, 0)
    added = both(task).x - (1 - both(plain).x)
    assert added.flatten(2).std(-1).max() < 1e-6, "one number an image"
    assert len(added.flatten(2).mean(-1).unique()) == 24


def test_device_is_where_pool_and_tasks_go() -> None:
    pool = pictures()
    numbers: dict[str, Any] = dict(ways=2, shots=1, queries=2, tasks=4)
    task = few_shot(pool, device="meta", **numbers)(0, 0)
    assert task.query.x.device.type == task.query.y.device.type == "meta"
    assert pool.x.device.type == "cpu"
    assert few_shot(pool.to("meta"), **numbers)(0, 0).support.x.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("augment", [None, "rotations"])
def test_tasks_do_not_depend_on_the_device(augment: str | None) -> None:
    numbers: dict[str, Any] = dict(ways=5, shots=1, queries=3, tasks=8, augment=augment)
    here, there = (few_shot(pictures(), device=device, **numbers)(2, 3) for device in ("cpu", "cuda"))
    assert torch.equal(both(here).x, both(there).x.cpu()) and torch.equal(both(here).y, both(there).y.cpu())


@pytest.mark.parametrize("name", ["ways", "shots", "queries", "tasks"])
@pytest.mark.parametrize("value", [0, -2, 1.0, False])
def test_refuses_counts(name: str, value: object) -> None:
    numbers: dict[str, Any] = {"ways": 2, "shots": 1, "queries": 1, "tasks": 1, name: value}
    with pytest.raises(ValueError, match=f"few_shot: {name} must be a positive int, got {value}"):
        few_shot(pictures(), **numbers)


def test_refuses_pools_that_do_not_suffice() -> None:
    numbers: dict[str, Any] = dict(ways=2, shots=2, queries=3, tasks=1)
    pools = from_tensors(torch.zeros(8, 1), torch.arange(8) % 2, split=(1, 0, 0))
    with pytest.raises(TypeError, match=r"pool must be the Pool of one split, got Pools\. Pass pools\.train"):
        few_shot(pools, **numbers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the pool must have classes, but its split is empty"):
        few_shot(pools.test, **numbers)
    with pytest.raises(ValueError, match=r"needs shots \+ queries = 5 examples, but 'class1' has 4"):
        few_shot(numbered([7, 4, 6]), **numbers)
    with pytest.raises(ValueError, match="ways must be at most the 3 classes of the pool, got 4"):
        few_shot(numbered([7, 7, 7]), **{**numbers, "ways": 4})


@pytest.mark.parametrize("augment", ["affine", "rotations", lambda x, _: x])
def test_augmentation_needs_images(augment: Any) -> None:
    with pytest.raises(ValueError, match=r"augment needs images \[n, C, H, W\], got x of shape \[12, 2\]"):
        few_shot(numbered([6, 6]), ways=2, shots=1, queries=1, tasks=1, augment=augment)


def test_refuses_augmentations_that_do_not_fit() -> None:
    numbers: dict[str, Any] = dict(ways=2, shots=1, queries=1, tasks=3)
    wide = class_pool(torch.zeros(4, 1, 5, 6), torch.tensor([0, 0, 1, 1]), ("a", "b"))
    with pytest.raises(ValueError, match=r"rotations need square images, got \[5, 6\]"):
        few_shot(wide, augment="rotations", **numbers)
    unknown: Any
    for unknown in ("rotation", ["affine", "flop"], [3]):
        with pytest.raises(ValueError, match=r"must be 'rotations', 'affine', 'crop', .* a function .* got"):
            few_shot(pictures(), augment=unknown, **numbers)
    with pytest.raises(ValueError, match=r"one image for each of the 12 it gets, got \[6, 2, 7, 7\]"):
        few_shot(pictures(), augment=lambda x, _: x[::2], **numbers)(0, 0)
    with pytest.raises(ValueError, match="one image for each of the 12 it gets, got NoneType"):
        few_shot(pictures(), augment=lambda x, _: None, **numbers)(0, 0)  # type: ignore[arg-type,return-value]


def test_tasks_of_a_seed_stay_what_they_were() -> None:
    """A kept run is measured again on the same tasks, with any later version."""
    task = few_shot(numbered([6, 12, 8, 7]), ways=3, shots=1, queries=2, tasks=2)(3, 14)
    assert task.support.x[..., 0].tolist() == [[3, 1, 2], [2, 1, 3]]
    assert task.support.y.tolist() == [[0, 1, 2], [1, 2, 0]]
    assert task.query.x[..., 1].tolist() == [[14, 25, 18, 27, 7, 32], [24, 14, 6, 27, 22, 31]]


# Unequal shots


def counts(y: Tensor, ways: int) -> Tensor:
    return torch.nn.functional.one_hot(y, ways).sum(1)


def assert_disjoint(task: Task, ways: int) -> None:
    """No example twice, one class a label, different classes."""
    x, y = both(task)
    for rows, labels in zip(x, y, strict=True):
        assert len(rows[:, 1].unique()) == len(rows)
        members = [rows[labels == label, 0].unique() for label in range(ways)]
        assert all(len(member) <= 1 for member in members)
        assert len(torch.cat(members).unique()) == sum(len(member) for member in members)


def test_numbers_of_shots_are_dealt_to_the_labels() -> None:
    shots = [1, 2, 2, 7]
    task = few_shot(numbered([12] * 6), ways=4, shots=shots, queries=3, tasks=4_000)(0, 0)
    assert task.support.x.shape == (4_000, 12, 2) and task.query.x.shape == (4_000, 12, 2)
    found = counts(task.support.y, 4)
    assert (found.sort(1).values == torch.tensor(shots)).all(), "exactly these numbers"
    assert (counts(task.query.y, 4) == 3).all(), "queries stay balanced"
    most = torch.nn.functional.one_hot(found.argmax(1), 4).double().mean(0)
    assert (most - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4_000), "no label tells a size"
    assert_disjoint(Task(*(Batch(b.x[:100], b.y[:100]) for b in task)), 4)


def test_a_range_of_shots_has_a_fixed_sum_and_all_draws_are_alike() -> None:
    task = few_shot(numbered([9] * 5), ways=3, shots=range(1, 6), queries=2, tasks=20_000)(0, 0)
    assert task.support.x.shape == (20_000, 9, 2), "three classes of three on average"
    found = counts(task.support.y, 3)
    assert found.min() == 1 and found.max() == 5 and (found.sum(1) == 9).all()
    draws, times = found.unique(dim=0, return_counts=True)
    possible = [(a, b, 9 - a - b) for a in range(1, 6) for b in range(1, 6) if 1 <= 9 - a - b <= 5]
    assert sorted(map(tuple, draws.tolist())) == possible
    expected = 20_000 / len(possible)
    assert (times - expected).abs().max() < 5 * math.sqrt(expected)
    assert_disjoint(Task(*(Batch(b.x[:100], b.y[:100]) for b in task)), 3)


@pytest.mark.parametrize(
    ("ways", "shots"), [(1, range(1, 10)), (4, range(3, 4)), (2, range(1, 3)), (20, range(1, 30))]
)
def test_ranges_of_every_width(ways: int, shots: range) -> None:
    pool = numbered([40] * 20)
    for step in range(3):
        found = counts(few_shot(pool, ways=ways, shots=shots, queries=1, tasks=5)(0, step).support.y, ways)
        assert (found.sum(1) == ways * (shots[0] + shots[-1]) // 2).all()
        assert shots[0] <= found.min() and found.max() <= shots[-1]


def test_unequal_shots_train_side_by_side() -> None:
    """The tasks have one shape, which is what vmap needs."""
    apply, params = fmeta.functionalize(fmeta.models.mlp([2, 8, 3]))
    algorithm = fmeta.maml(fmeta.losses.cross_entropy(apply), fmeta.sgd(0.1), steps=1)
    task = few_shot(numbered([9] * 4), ways=3, shots=range(1, 6), queries=2, tasks=5)(0, 0)
    side_by_side = fmeta.meta_grad(algorithm, fmeta.Plan(compile=False))(params, task)[0]
    by_turns = fmeta.meta_grad(algorithm, fmeta.Plan(compile=False, tasks="loop"))(params, task)[0]
    assert_trees_close(side_by_side, by_turns)


# Query sets


def test_queries_drawn_in_total() -> None:
    sizes = [6, 12, 8, 20]
    task = few_shot(numbered(sizes), ways=4, shots=2, queries=10, tasks=8_000, query="total")(0, 0)
    assert task.query.x.shape == (8_000, 10, 2)
    x, y = task.query.x[..., 0].long(), task.query.y
    drawn = torch.bincount(x.flatten(), minlength=4).double() / 8_000
    expected = torch.tensor([10 * (size - 2) / (sum(sizes) - 8) for size in sizes])
    assert (drawn - expected).abs().max() < 0.1, "in proportion to what is left of each class"
    assert (counts(y, 4).min(1).values == 0).any(), "a class may be missing"
    assert_disjoint(Task(*(Batch(b.x[:100], b.y[:100]) for b in task)), 4)
    whole = few_shot(numbered(sizes), ways=4, shots=2, queries=38, tasks=3, query="total")(0, 0)
    assert (both(whole).x[..., 1].sort(1).values == torch.arange(46.0)).all(), "all that is left"


@pytest.mark.parametrize(("shots", "left"), [(2, 15), ([1, 4, 3], 13), (range(1, 4), 15)])
def test_all_the_rest_may_be_asked(shots: Any, left: int) -> None:
    task = few_shot(numbered([7] * 5), ways=3, shots=shots, queries=None, tasks=20)(0, 0)
    assert task.query.x.shape == (20, left, 2)
    assert (counts(both(task).y, 3) == 7).all(), "every example of the task's classes"
    assert_disjoint(task, 3)


def test_rotated_classes_have_unequal_shots_too() -> None:
    pool = pictures(classes=3, each=6)
    task = few_shot(pool, ways=7, shots=range(1, 4), queries=6, tasks=4, augment="rotations", query="total")(
        0, 0
    )
    x, y = both(task)
    turned = {}
    for label in range(3):
        for turn in range(4):
            for image in pool.x[pool.rows[label]].numpy() / np.float32(255):
                turned[np.rot90(image, turn, (1, 2)).tobytes()] = (label, turn)
    for images, labels in zip(x, y, strict=True):
        for way in range(7):
            assert len({turned[image.numpy().tobytes()] for image in images[labels == way]}) == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shots": [1, 2]}, r"shots must be a positive int, got \[1, 2\]. Pass .* or 3 numbers, one a class"),
        ({"shots": [1, 0, 2]}, r"shots must be a positive int, got \[1, 0, 2\]"),
        ({"shots": range(3)}, r"shots must be a positive int, got range\(0, 3\)"),
        ({"shots": range(1, 9, 2)}, r"shots must be a positive int, got range\(1, 9, 2\)"),
        ({"shots": "five"}, "shots must be a positive int, got 'five'"),
        ({"query": "all"}, "query must be 'per_class' or 'total', got 'all'"),
        ({"queries": 0}, "queries must be a positive int, got 0"),
        ({"shots": [1, 2, 6]}, r"every class needs shots \+ queries = 8 examples, but 'class1' has 7"),
        ({"shots": range(1, 7)}, r"every class needs shots \+ queries = 8 examples, but 'class1' has 7"),
        ({"shots": 8, "query": "total"}, r"every class needs shots = 8 examples, but 'class1' has 7"),
        ({"queries": 21, "query": "total"}, "the smallest 3 classes leave 20 examples for the query, got queries=21"),
        ({"queries": None}, r"classes have equally many and .* got 'class1' with 7, 'class0' with 9"),
        ({"queries": None, "query": "total"}, r"query='per_class', got .* and query='total'"),
    ],
)  # fmt: skip
def test_refuses_shots_and_queries_that_do_not_fit(change: dict[str, Any], text: str) -> None:
    numbers: dict[str, Any] = {"ways": 3, "shots": 1, "queries": 2, "tasks": 1} | change
    with pytest.raises(ValueError, match=f"few_shot: .*{text}"):
        few_shot(numbered([9, 7, 7, 9]), **numbers)


def test_refuses_when_nothing_is_left_to_ask() -> None:
    with pytest.raises(
        ValueError, match="the smallest 2 classes leave 0 examples for the query, got queries=None"
    ):
        few_shot(numbered([4, 4]), ways=2, shots=4, queries=None, tasks=1)
