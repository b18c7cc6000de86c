"""Pools, class splits, and tensors as data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fmeta.data import Pools, class_pool, from_tensors
from fmeta.data.split import assign_splits, shuffled


def numbered(classes: int, each: int) -> tuple[Tensor, Tensor]:
    """Examples whose value is their row, classes interleaved."""
    return torch.arange(classes * each, dtype=torch.float32)[:, None], torch.arange(classes * each) % classes


# Pools


def test_pool_lists_the_rows_of_each_class() -> None:
    y = torch.tensor([2, 0, 2, 1, 2, 0])
    pool = class_pool(torch.zeros(6, 1), y, ("a", "b", "c"))
    assert pool.counts.tolist() == [2, 1, 3]
    for label in range(3):
        rows = pool.rows[label, : pool.counts[label]]
        assert rows.tolist() == (y == label).nonzero().flatten().tolist()
        assert (y[pool.rows[label]] == label).all(), "padding belongs to the class too"
    many = class_pool(torch.zeros(6000, 1), torch.arange(6000) * 7 % 3, ("a", "b", "c"))
    assert (many.rows.diff(dim=1) > 0).all(), "in the order of the data"
    assert repr(pool) == "Pool(3 classes, x=float32[6, 1], device=cpu)"


def test_pool_moves_examples_and_keeps_its_index_on_the_cpu() -> None:
    pools = from_tensors(*numbered(4, 3), split=(0.5, 0.25, 0.25)).to("meta")
    for pool in (pools.train, pools.val, pools.test):
        assert pool.x.device.type == pool.y.device.type == "meta"
        assert pool.rows.device.type == pool.counts.device.type == "cpu"


@pytest.mark.parametrize(
    ("x", "y", "names", "error", "text"),
    [
        (np.zeros((2, 1)), torch.zeros(2).long(), ("a",), TypeError, "x must be .* of uint8 or floating"),
        (torch.zeros(2, 1).long(), torch.zeros(2).long(), ("a",), TypeError, r"numbers, got torch\.int64"),
        (torch.zeros(2, 1), torch.zeros(2), ("a",), TypeError, r"integer classes, got torch\.float32"),
        (torch.zeros(3, 1), torch.zeros(2).long(), ("a",), ValueError, r"\[3, 1\] and y of shape \[2\]"),
        (torch.zeros(2, 1), torch.tensor([0, 1]), ("a", "a"), ValueError, "'a' occurs twice"),
        (torch.zeros(2, 1), torch.tensor([0, 2]), ("a", "b"), ValueError, r"0 \.\. 1 for 2 .*from 0 to 2"),
        (torch.zeros(2, 1), torch.tensor([0, -1]), ("a", "b"), ValueError, "from -1 to 0"),
        (torch.zeros(2, 1), torch.tensor([0, 0]), ("a", "b"), ValueError, "class 'b' has none"),
    ],
)  # fmt: skip
def test_pool_refuses(x: Tensor, y: Tensor, names: tuple[str, ...], error: type, text: str) -> None:
    with pytest.raises(error, match=f"class_pool: .*{text}"):
        class_pool(x, y, names)


def test_splits_of_one_dataset_share_no_class() -> None:
    a = class_pool(torch.zeros(2, 1), torch.tensor([0, 1]), ("x", "y"))
    b = class_pool(torch.zeros(1, 1), torch.tensor([0]), ("y",))
    empty = class_pool(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64), ())
    assert len(Pools(a, empty, empty).val.names) == 0
    with pytest.raises(ValueError, match="train and test share 1, 'y' among them"):
        Pools(a, empty, b)
    with pytest.raises(ValueError, match="val and test share 1"):
        Pools(empty, b, b)


# Splits


def test_fractions_divide_all_classes_by_seed() -> None:
    names = [f"class{i}" for i in range(100)]
    split = assign_splits(names, (0.64, 0.16, 0.2), 0, "demo")
    assert [sum(kind == k for kind in split.values()) for k in ("train", "val", "test")] == [64, 16, 20]
    assert sorted(split) == sorted(names)
    assert split == assign_splits(names[::-1], (0.64, 0.16, 0.2), 0, "demo"), (
        "the order of classes is no matter"
    )
    assert split != assign_splits(names, (0.64, 0.16, 0.2), 1, "demo")
    # The order of sha256("0/a"), ...: a saved run must find its classes again with any version of anything.
    assert shuffled(["a", "b", "c", "d", "e"], 0) == ["c", "b", "e", "d", "a"]


@pytest.mark.parametrize(
    ("split", "text"),
    [
        ((0.5, 0.5), r"three fractions .* got \(0.5, 0.5\)"),
        ((0.5, 0.4, 0.2), "sum to 1"),
        ((1.2, -0.2, 0.0), "sum to 1"),
        ("abc", "got 'abc'"),
        ({"a": "train"}, "1 of 2 are missing, 'b' among them"),
        ({"a": "train", "b": "test", "c": "val"}, "names class 'c', but none of the 2 found"),
        ({"a": "train", "b": "dev"}, "got 'dev' for class 'b'"),
    ],
)
def test_split_refuses(split: object, text: str) -> None:
    with pytest.raises(ValueError, match=f"demo: .*{text}"):
        assign_splits(["a", "b"], split, 0, "demo")  # type: ignore[arg-type]


# Tensors


def test_from_tensors_keeps_examples_with_their_classes() -> None:
    x, y = numbered(10, 4)
    pools = from_tensors(x, y + 100, split=(0.5, 0.2, 0.3), seed=3)
    found = []
    for pool, classes in ((pools.train, 5), (pools.val, 2), (pools.test, 3)):
        assert len(pool.names) == classes
        for row, label in zip(pool.x[:, 0], pool.y, strict=True):
            assert int(pool.names[label]) == 100 + int(row) % 10
        found += pool.x[:, 0].tolist()
    assert sorted(found) == x[:, 0].tolist()


def test_from_tensors_takes_a_mapping_of_labels() -> None:
    pools = from_tensors(*numbered(3, 2), split={0: "test", 1: "train", 2: "test"})
    assert (pools.train.names, pools.val.names, pools.test.names) == (("1",), (), ("0", "2"))
    assert pools.test.x[:, 0].tolist() == [0, 2, 3, 5] and pools.test.y.tolist() == [0, 1, 0, 1]
    assert pools.val.x.shape == (0, 1)


def test_from_tensors_refuses() -> None:
    x, y = numbered(3, 2)
    with pytest.raises(TypeError, match=r"from_tensors: y must .* got torch.float32 of shape \[6\]"):
        from_tensors(x, y.float())
    with pytest.raises(TypeError, match=r"from_tensors: y must .* got list"):
        from_tensors(x, y.tolist())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="from_tensors: x and y must have one row an example"):
        from_tensors(torch.zeros(7, 1), y)
    with pytest.raises(TypeError, match="from_tensors: x must be a tensor"):
        from_tensors(x.numpy(), y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="from_tensors: split must name every class"):
        from_tensors(x, y, split={0: "train"})
