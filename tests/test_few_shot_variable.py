"""Tasks of random sizes: the sizes are Meta-Dataset's, the examples few-shot ones."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from helpers import assert_trees_close, unstacked
from torch import Tensor
from torch.nn import functional as F

import fmeta
from fmeta.data import Pool, class_pool
from fmeta.tasks import variable_few_shot
from fmeta.types import Task


def numbered(sizes: list[int]) -> Pool:
    """Features (class, row): every example says who it is."""
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x = torch.stack([y, torch.arange(len(y))], 1).float()
    return class_pool(x, y, tuple(f"class{i}" for i in range(len(sizes))))


SIZES = [20 + 7 * (i % 13) + i for i in range(60)]


def shapes(task: Task) -> tuple[int, Tensor, Tensor]:
    """Ways, and support and query examples of every label."""
    ways = int(task.support.y.max()) + 1
    return ways, torch.bincount(task.support.y, minlength=ways), torch.bincount(task.query.y, minlength=ways)


def classes_of(task: Task, ways: int) -> list[int]:
    """The class behind each label; every example of a label is of it."""
    x, y = (torch.cat(pair) for pair in zip(task.support, task.query, strict=True))
    assert len(x[:, 1].unique()) == len(x), "no example twice"
    found = [x[y == label, 0].unique() for label in range(ways)]
    assert all(len(one) == 1 for one in found)
    return [int(one) for one in found]


def drawn(count: int, sizes: list[int] = SIZES, **options: Any) -> list[Task]:
    found = variable_few_shot(numbered(sizes), tasks=count, **options)(0, 0)
    assert isinstance(found, list)
    return found


def test_sizes_obey_the_paper() -> None:
    """Every number is one that the formulas can give, from the counts of the classes alone."""
    for task in drawn(300):
        ways, support, query = shapes(task)
        size = torch.tensor([SIZES[one] for one in classes_of(task, ways)])
        assert 5 <= ways <= 50 and len(task.support.y) <= 500
        assert (query == min(10, int(size.min()) // 2)).all(), "queries are balanced"
        rest = size - query
        assert (support >= 1).all() and (support <= rest).all()
        most = min(500, int(rest.clamp(max=100).sum()))
        share = 2 * size / (2 * size + 0.5 * (size.sum() - size))
        assert (support <= (share * (most - ways)).floor() + 1).all()
        assert task.support.x.dtype == torch.float32 and task.support.y.dtype == torch.int64


def uniform(values: Tensor) -> bool:
    """Whether numbers may be uniform in 0 .. 1 (Kolmogorov's distance, one error in a million)."""
    ordered = values.double().sort().values
    expected = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    return bool((ordered - expected).abs().max() < math.sqrt(math.log(2e6) / 2 / len(ordered)))


def test_ways_are_uniform_and_classes_alike() -> None:
    tasks = drawn(3_000, [8] * 12)
    times = Counter(shapes(task)[0] for task in tasks)
    assert sorted(times) == list(range(5, 13)), "at most the classes that there are"
    expected = 3_000 / 8
    assert max(abs(count - expected) for count in times.values()) < 5 * math.sqrt(expected)
    used = Counter(one for task in tasks for one in classes_of(task, shapes(task)[0]))
    mean = sum(used.values()) / 12
    assert len(used) == 12 and max(abs(count - mean) for count in used.values()) < 5 * math.sqrt(mean)


def test_support_sizes_are_uniform_and_unequal_between_classes() -> None:
    # 10 classes of 1010 examples: q = 10 and the support has ceil(100 beta) examples a class, at most 500.
    tasks = drawn(3_000, [1010] * 10, ways=10)
    # Floors take less than one example a class.
    each = torch.tensor([len(task.support.y) for task in tasks]).add(9) // 10
    assert each.min() == 1 and each.max() == 50
    assert ((each == 50).double().mean() - 0.51).abs() < 5 * 0.5 / math.sqrt(3_000)
    assert uniform((each[each < 50] - 0.5) / 49)
    ratio = []
    for task in tasks:
        support = shapes(task)[1]
        if support.sum() > 400:
            ratio.append(float(support.max() / support.min()))
    assert max(ratio) < 4.3 and max(ratio) > 3.4, "exp(alpha) differs by 4 at most"
    assert sum(one > 1.5 for one in ratio) > 0.95 * len(ratio)


def test_bounds_are_arguments() -> None:
    tasks = drawn(100, ways=(3, 6), queries=4, max_shots=2, max_support=9)
    for task in tasks:
        ways, _, query = shapes(task)
        assert 3 <= ways <= 6 and len(task.support.y) <= 9 and (query == 4).all()
    assert {shapes(task)[0] for task in drawn(20, ways=7)} == {7}


def test_small_classes_give_half_to_the_query() -> None:
    for task in drawn(50, [2, 3, 30, 30, 30, 30], ways=6):
        _, support, query = shapes(task)
        assert (query == 1).all() and support.max() <= 29
    pairs = drawn(20, [2] * 8)
    assert all((shapes(task)[1] == 1).all() for task in pairs)


def test_all_the_rest_may_be_asked() -> None:
    for task in drawn(30, queries=None):
        ways, support, query = shapes(task)
        size = torch.tensor([SIZES[one] for one in classes_of(task, ways)])
        assert (support + query == size).all()
        assert (query >= min(10, int(size.min()) // 2)).all()


def test_alike_tasks_have_one_shape_a_step() -> None:
    sampler = variable_few_shot(numbered(SIZES), tasks=12, alike=True)
    seen, dealt = set(), []
    for step in range(10):
        task = sampler(0, step)
        assert isinstance(task, Task)
        each = unstacked(task)
        found = [shapes(one) for one in each]
        ways, support, query = found[0]
        groups = [classes_of(one, ways) for one in each]
        for other, shots, queries in found:
            assert other == ways and torch.equal(shots.sort().values, support.sort().values)
            assert torch.equal(queries, query)
        assert all(len(set(group)) == ways for group in groups)
        assert len({tuple(sorted(group)) for group in groups}) > 1, "other classes in other tasks"
        dealt.append(len({tuple(shots.tolist()) for _, shots, _ in found}))
        seen.add((ways, task.support.x.shape[1]))
    assert len(seen) > 5, "other steps have other shapes"
    assert sorted(dealt)[3] > 3, "the same numbers at other labels"


def test_alike_tasks_choose_among_all_classes_that_are_large_enough() -> None:
    sizes = [4] * 6 + [40] * 6
    used: Counter[int] = Counter()
    for step in range(60):
        task = variable_few_shot(numbered(sizes), tasks=8, ways=(2, 5), alike=True)(1, step)
        assert isinstance(task, Task)
        x = torch.cat([task.support.x, task.query.x], 1)
        for one in x:
            classes, examples = one[:, 0].long().unique(return_counts=True)
            used.update(classes.tolist())
            assert all(count <= sizes[which] for which, count in zip(classes, examples.tolist(), strict=True))
    assert len(used) == 12
    for half in (range(6), range(6, 12)):
        mean = sum(used[one] for one in half) / 6
        assert all(abs(used[one] - mean) < 5 * math.sqrt(mean) for one in half)


def test_order_of_examples_gives_no_label_away() -> None:
    tasks = drawn(2_000, [30] * 5, ways=5, queries=2)
    first = torch.tensor([int(task.query.y[0]) for task in tasks])
    frequency = F.one_hot(first, 5).double().mean(0)
    assert (frequency - 0.2).abs().max() < 5 * math.sqrt(0.16 / 2_000)


def images() -> Pool:
    x = torch.randint(256, (40, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return class_pool(x, torch.arange(40) % 4, tuple("abcd"))


def test_augmentations_see_all_images_of_a_step_at_once() -> None:
    seen = []

    def note(x: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(len(x))
        return 1 - x

    options: dict[str, Any] = dict(tasks=3, ways=(2, 4))
    tasks = variable_few_shot(images(), augment=note, **options)(0, 0)
    plain = variable_few_shot(images(), **options)(0, 0)
    assert seen == [sum(len(batch.y) for task in tasks for batch in task)]
    for a, b in zip(tasks, plain, strict=True):
        assert torch.allclose(a.support.x, 1 - b.support.x) and torch.equal(a.query.y, b.query.y)


def test_rotations_make_classes() -> None:
    pool = images()
    known = {
        image.rot90(turn, (1, 2)).contiguous().numpy().tobytes(): (int(label), turn)
        for image, label in zip(pool.x.float().div(255), pool.y, strict=True)
        for turn in range(4)
    }
    for task in variable_few_shot(pool, tasks=5, ways=(9, 16), augment="rotations")(0, 0):
        ways = shapes(task)[0]
        x, y = (torch.cat(pair) for pair in zip(task.support, task.query, strict=True))
        kinds = [{known[image.numpy().tobytes()] for image in x[y == label]} for label in range(ways)]
        assert all(len(kind) == 1 for kind in kinds) and len(set().union(*kinds)) == ways >= 9


def test_device_is_where_pool_and_tasks_go() -> None:
    for task in variable_few_shot(images(), tasks=2, ways=3, device="meta")(0, 0):
        assert task.support.x.device.type == task.query.y.device.type == "meta"


def test_algorithms_take_them() -> None:
    """Prototypes do not depend on the number of ways: one task after another, and alike side by side."""
    apply, params = fmeta.functionalize(fmeta.models.mlp([2, 8, 4]).double())
    algorithm = fmeta.protonet(apply)
    options: dict[str, Any] = dict(tasks=3, ways=(2, 5), max_support=30)
    loop = fmeta.Plan(tasks="loop", compile=False)
    pool = class_pool(numbered(SIZES).x.double() / 100, numbered(SIZES).y, numbered(SIZES).names)
    tasks = variable_few_shot(pool, **options)(0, 0)
    grads, metrics = fmeta.meta_grad(algorithm, loop)(params, tasks)
    assert len({task.support.x.shape for task in tasks}) > 1
    one_by_one = [fmeta.meta_grad(algorithm, loop)(params, [task])[0] for task in tasks]
    mean = {name: sum(one[name] for one in one_by_one) / 3 for name in params}
    assert_trees_close(grads, mean)
    assert bool(metrics["finite"])
    alike = variable_few_shot(pool, alike=True, **options)(0, 0)
    a, b = (fmeta.meta_grad(algorithm, plan)(params, alike)[0] for plan in (loop, fmeta.Plan(compile=False)))
    assert_trees_close(a, b)


@pytest.mark.parametrize(
    ("sizes", "options", "text"),
    [
        ([5, 5, 1, 5, 5], {}, "every class needs 2 examples, .* but 'class2' has 1"),
        ([5] * 4, {}, "ways must be at most the 4 classes of the pool, got 5"),
        ([5] * 6, {"ways": (6, 5)}, r"ways must be a positive int or a pair .* got \(6, 5\)"),
        ([5] * 6, {"ways": 0}, "ways must be a positive int or a pair .* got 0"),
        ([5] * 6, {"ways": (1, 2, 3)}, r"got \(1, 2, 3\)"),
        ([5] * 6, {"ways": True}, "got True"),
        ([5] * 6, {"max_support": 5}, "max_support must be at least the most ways = 6, got 5"),
        ([5] * 6, {"max_shots": 0}, "max_shots must be a positive int, got 0"),
        ([5] * 6, {"queries": 0}, "queries must be a positive int, got 0"),
        (
            [5] * 6,
            {"alike": True, "queries": None},
            "alike=True needs one number of queries, got queries=None",
        ),
        ([5] * 6, {"augment": "flip"}, r"augment needs images \[n, C, H, W\]"),
    ],
)
def test_refuses(sizes: list[int], options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"variable_few_shot: .*{text}"):
        variable_few_shot(numbered(sizes), **{"tasks": 1} | options)
