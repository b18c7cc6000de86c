"""Datasets of torchvision, read from small files in their real formats."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.datasets as tv
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from vision_files import CIFAR100, NEEDS_SCIPY, WRITERS, Written, cifar100, colour, eurosat, grey, splits

from fmeta.data import Pools, cifar_fs, fc100, from_dataset, torchvision_pool
from fmeta.data.registry import REGISTRY
from fmeta.tasks import few_shot


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FMETA_DATA", raising=False)


def assert_holds(pools: Pools, written: Written) -> None:
    """Every class is in one split, under its name, with its images and no others."""
    found = [name for pool in splits(pools) for name in pool.names]
    assert sorted(found) == sorted(written.names)
    label = {name: index for index, name in enumerate(written.names)}
    for pool in splits(pools):
        assert pool.counts.tolist() == [written.each] * len(pool.names)
        for row, name in enumerate(pool.names):
            pixels = pool.x[pool.rows[row]].float().mean((0, 2, 3))
            shade = grey(label[name])
            expected = (shade, shade, shade) if written.grey else colour(label[name])
            assert (pixels - torch.tensor(expected)).abs().max() <= 3, name


@pytest.mark.parametrize("name", REGISTRY)
def test_every_dataset_is_read_from_its_own_format(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in NEEDS_SCIPY:
        pytest.importorskip("scipy", reason="torchvision reads this format with scipy")
    written = WRITERS[name](tmp_path / "files", monkeypatch)
    pools = torchvision_pool(name, tmp_path / "files", size=12)
    assert pools.train.x.dtype == torch.uint8 and pools.train.x.shape[1:] == (3, 12, 12)
    assert_holds(pools, written)


@pytest.mark.parametrize(
    ("name", "sizes", "tested"),
    [
        ("fgvc_aircraft", [70, 15, 15], "Spitfire"),
        ("dtd", [33, 7, 7], "woven"),
        ("flowers102", [71, 15, 16], "canterbury bells"),
    ],
)
def test_published_splits(
    name: str, sizes: list[int], tested: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in NEEDS_SCIPY:
        pytest.importorskip("scipy", reason="torchvision reads this format with scipy")
    WRITERS[name](tmp_path, monkeypatch)
    pools = torchvision_pool(name, tmp_path, size=4)
    assert [len(pool.names) for pool in splits(pools)] == sizes
    # The third class of flowers102 is number 3, which trains; number 5 is tested.
    known = tv.Flowers102.classes
    assert (known[4] if name == "flowers102" else tested) in pools.test.names
    assert name != "flowers102" or known[2] in pools.train.names
    own = torchvision_pool(name, tmp_path, size=4, split=(0.5, 0.25, 0.25))
    assert [len(pool.names) for pool in splits(own)] != sizes, "unless another split is asked for"


def test_cifar_fs_is_the_split_of_its_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = cifar100(tmp_path, monkeypatch)
    pools = cifar_fs(tmp_path)
    assert [len(pool.names) for pool in splits(pools)] == [64, 16, 20]
    assert pools.train.x.shape == (128, 3, 32, 32)
    assert_holds(pools, written)
    # Classes that a random split would hardly put there together.
    assert {"baby", "man", "woman", "pickup_truck", "worm"} <= set(pools.test.names)
    assert {"otter", "beaver", "shark", "crab"} <= set(pools.val.names)
    assert {"boy", "girl", "apple", "bus", "train", "willow_tree"} <= set(pools.train.names)


def superclasses() -> dict[str, int]:
    """Number of the superclass of each fine label, as CIFAR-100's files give it (``coarse_labels``)."""
    numbers = """
        4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5 5 19 8 8 15 13
        14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15 13 16 19 2 4 6 19 5 5 8 19
        18 1 2 15 6 0 17 8 14 13
    """
    return dict(zip(CIFAR100, map(int, numbers.split()), strict=True))


def test_fc100_divides_superclasses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = cifar100(tmp_path, monkeypatch)
    pools = fc100(tmp_path)
    assert_holds(pools, written)
    of = superclasses()
    found = [{of[name] for name in pool.names} for pool in splits(pools)]
    # The numbers of the paper.
    assert found == [{1, 2, 3, 4, 5, 6, 9, 10, 15, 17, 18, 19}, {8, 11, 13, 16}, {0, 7, 12, 14}]
    assert [len(pool.names) for pool in splits(pools)] == [60, 20, 20]


def test_published_splits_need_all_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vision_files import cifar

    cifar(tmp_path, monkeypatch, tv.CIFAR100, CIFAR100[:-1], ["train", "test"], "fine_labels")
    with pytest.raises(ValueError, match="fc100: the published split needs all 100 classes, got 99"):
        fc100(tmp_path)


def test_second_start_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar100(tmp_path / "files", monkeypatch)
    first = cifar_fs(tmp_path / "files")
    monkeypatch.setattr(tv, "CIFAR100", None)  # opening it would fail
    again = cifar_fs(tmp_path / "files")
    for a, b in zip(splits(first), splits(again), strict=True):
        assert a.names == b.names and torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    path = tmp_path / "files" / "cifar-100-python" / "train"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(TypeError, match="not callable"):
        cifar_fs(tmp_path / "files")


def test_grey_size_and_fractions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS["gtsrb"](tmp_path, monkeypatch)
    pools = torchvision_pool("gtsrb", tmp_path, size=5, grey=True, split=(0.5, 0.3, 0.2), seed=1)
    assert pools.train.x.shape[1:] == (1, 5, 5)
    assert sum(len(pool.names) for pool in splits(pools)) == 43
    other = torchvision_pool("gtsrb", tmp_path, size=5, grey=True, split=(0.5, 0.3, 0.2), seed=2)
    assert other.train.names != pools.train.names


def test_pools_do_not_depend_on_what_was_cached_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eurosat(tmp_path, monkeypatch)
    by_seed = {seed: torchvision_pool("eurosat", tmp_path, size=4, seed=seed) for seed in (0, 1, 2)}
    for seed, pools in by_seed.items():
        monkeypatch.setenv("FMETA_CACHE", str(tmp_path / f"other{seed}"))
        alone = torchvision_pool("eurosat", tmp_path, size=4, seed=seed)
        for a, b in zip(splits(pools), splits(alone), strict=True):
            assert a.names == b.names and torch.equal(a.x, b.x) and torch.equal(a.rows, b.rows)


def test_default_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"torchvision_pool: root must say where the files are, got none"):
        torchvision_pool("eurosat")
    eurosat(tmp_path / "data" / "eurosat", monkeypatch)
    monkeypatch.setenv("FMETA_DATA", str(tmp_path / "data"))
    assert len(torchvision_pool("eurosat", size=4).train.x) > 0


def test_download_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = tv.EuroSAT

    def fetch(root: str, download: bool) -> Any:
        calls.append(download)
        if download and not (Path(root) / "eurosat").exists():
            eurosat(Path(root), monkeypatch)
        return real(root)

    monkeypatch.setattr(tv, "EuroSAT", fetch)
    pools = torchvision_pool("eurosat", tmp_path / "new" / "folder", download=True, size=4)
    assert sum(len(pool.names) for pool in splits(pools)) == 4 and all(calls)
    count = len(calls)
    torchvision_pool("eurosat", tmp_path / "new" / "folder", download=True, size=4)
    assert len(calls) == count, "what is there is neither fetched nor opened again"

    def fail(root: str, download: bool) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(tv, "EuroSAT", fail)
    with pytest.raises(
        ValueError, match=r"torchvision could not fetch or open EuroSAT in .*other \(no route to host\)"
    ):
        torchvision_pool("eurosat", tmp_path / "other", download=True)


def test_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"torchvision_pool: name must be one of caltech101, .*got 'cifar'"):
        torchvision_pool("cifar", tmp_path)
    with pytest.raises(
        ValueError, match=r"torchvision_pool: .* must hold train_32x32\.mat and test_32x32\.mat, but does not"
    ):
        torchvision_pool("svhn", tmp_path)
    with pytest.raises(ValueError, match=r"cifar_fs: .* must hold cifar-100-python, but does not"):
        cifar_fs(tmp_path)
    with pytest.raises(ValueError, match="torchvision_pool: size must be a positive int, got 0"):
        torchvision_pool("svhn", tmp_path, size=0)
    eurosat(tmp_path, monkeypatch)
    with pytest.raises(
        ValueError, match="torchvision_pool: split must name every class, but 3 of 4 are miss"
    ):
        torchvision_pool("eurosat", tmp_path, size=4, split={"River": "train"})


def test_damaged_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar100(tmp_path / "cifar", monkeypatch)
    path = tmp_path / "cifar" / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cifar_fs: torchvision could not open CIFAR100 in .*corrupted"):
        cifar_fs(tmp_path / "cifar")
    eurosat(tmp_path, monkeypatch)
    (tmp_path / "eurosat" / "2750" / "Forest" / "two.jpg").write_bytes(b"\xff\xd8 no image")
    with pytest.raises(ValueError, match=r"item 3 of EuroSAT must be a readable image, .*two\.jpg"):
        torchvision_pool("eurosat", tmp_path, size=4)


def test_missing_scipy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train_32x32.mat", "test_32x32.mat"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(tv.SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ValueError, match=r"torchvision could not open SVHN in .*scipy"):
        torchvision_pool("svhn", tmp_path)


# Any dataset


def test_from_dataset_reads_items() -> None:
    fake = tv.FakeData(60, (3, 20, 14), num_classes=5)
    pools = from_dataset(fake, size=6, split=(0.6, 0.2, 0.2), seed=3)
    assert [len(pool.names) for pool in splits(pools)] == [3, 1, 1]
    expected: dict[str, list[bytes]] = {}
    for index in range(60):
        image, label = fake[index]
        cut = image.resize((6, 6), Image.Resampling.LANCZOS, box=(0, 3, 14, 17))
        expected.setdefault(str(int(label)), []).append(cut.tobytes())
    for pool in splits(pools):
        for row, name in enumerate(pool.names):
            members = pool.x[pool.rows[row, : pool.counts[row]]].permute(0, 2, 3, 1).contiguous()
            assert [image.numpy().tobytes() for image in members] == expected[name]
    few_shot(pools.train, ways=3, shots=1, queries=2, tasks=2)(0, 0)


class Pairs:
    """A dataset of the simplest kind."""

    def __init__(self, labels: list[int], make: Any = None) -> None:
        self.labels, self.make = labels, make

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return (self.make or (lambda label: Image.new("L", (9, 9), label)))(self.labels[index]), self.labels[
            index
        ]


def test_from_dataset_joins_parts_and_leaves_out_classes_without_items() -> None:
    parts = (Pairs([7, 3, 7]), Pairs([3, 9]))
    pools = from_dataset(*parts, size=3, grey=True, split={"3": "train", "7": "train", "9": "test"})
    assert pools.train.names == ("3", "7") and pools.test.names == ("9",)
    assert pools.train.x[:, 0, 0, 0].tolist() == [3, 3, 7, 7]
    joined: Any = ConcatDataset([Subset(parts[0], [0, 1]), parts[1]])  # type: ignore[arg-type,list-item]
    assert from_dataset(joined, size=3, split=(1, 0, 0)).train.counts.tolist() == [2, 1, 1]


def test_from_dataset_reads_classes_that_a_transform_changes() -> None:
    dataset: Any = Pairs([0, 1, 1, 0])
    dataset.targets = [4, 5, 5, 4]  # as they were before
    dataset.target_transform = lambda number: number - 4
    assert from_dataset(dataset, size=4, split=(1, 0, 0)).train.names == ("0", "1")


def test_from_dataset_refuses() -> None:
    for nothing in ((), (Pairs([]),), (5,)):
        with pytest.raises(TypeError, match="from_dataset: datasets must be one or more datasets with items"):
            from_dataset(*nothing)
    with pytest.raises(ValueError, match="from_dataset: classes must be numbered from 0, got -1"):
        from_dataset(Pairs([0, -1]))
    tensors = Pairs([0, 1, 2], lambda label: torch.zeros(3, 8, 8))
    with pytest.raises(
        TypeError, match="items must be pairs of a PIL image and a class, got Tensor from Pairs"
    ):
        from_dataset(tensors)

    def broken(label: int) -> None:
        raise OSError("cut short")

    with pytest.raises(ValueError, match=r"item 0 of Pairs must be a readable image.*\(cut short\)"):
        from_dataset(Pairs([0, 1, 2], broken), split=(1, 0, 0))
