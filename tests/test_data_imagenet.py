"""mini-ImageNet and tiered-ImageNet from folders in the layouts that people have."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from fmeta.data import Pools, mini_imagenet, tiered_imagenet

CLASSES = {"train": ["n01", "n02", "n03", "n04"], "val": ["n05"], "test": ["n06", "n07"]}


@pytest.fixture(autouse=True)
def thin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Datasets of 4, 1 and 2 classes of 3 images pass for complete ones."""
    module = sys.modules["fmeta.data.imagenet"]
    monkeypatch.setattr(module, "MINI_CLASSES", (4, 1, 2))
    monkeypatch.setattr(module, "MINI_IMAGES", 3)
    monkeypatch.setattr(module, "TIERED_CLASSES", (4, 1, 2))
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FMETA_DATA", raising=False)


def value(name: str, index: int) -> int:
    return 30 * int(name[1:]) + index


def files(name: str) -> list[str]:
    """File names as in the csv lists of Ravi and Larochelle."""
    return [f"{name}0000{index}.jpg" for index in range(3)]


def write_image(path: Path, name: str, index: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (90, 100), (value(name, index),) * 3).save(path, quality=100)


def write_lists(root: Path) -> None:
    for kind, names in CLASSES.items():
        lines = [f"{file},{name}" for name in names for file in files(name)]
        (root / f"{kind}.csv").write_text("\n".join(["filename,label", *lines]) + "\n")


def flat(root: Path) -> None:
    """The lists, and all images in one folder."""
    (root / "images").mkdir(parents=True)
    for names in CLASSES.values():
        for name in names:
            for index, file in enumerate(files(name)):
                write_image(root / "images" / file, name, index)
    write_lists(root)


def packed(root: Path) -> None:
    flat(root)
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for file in sorted((root / "images").iterdir()):
            archive.write(file, f"images/{file.name}")
            file.unlink()
    (root / "images").rmdir()


def by_class(root: Path) -> None:
    """The lists, and the images in folders that the lists do not mention."""
    for names in CLASSES.values():
        for name in names:
            for index, file in enumerate(files(name)):
                write_image(root / "all" / name / file, name, index)
    write_lists(root)


def by_split(root: Path) -> None:
    for kind, names in CLASSES.items():
        for name in names:
            for index, file in enumerate(files(name)):
                write_image(root / kind / name / file, name, index)


def assert_whole(pools: Pools, side: int) -> None:
    for kind, names in CLASSES.items():
        pool = getattr(pools, kind)
        assert pool.names == tuple(names)
        assert pool.x.shape == (3 * len(names), 3, side, side)
        for row, name in enumerate(names):
            found = pool.x[pool.rows[row]].flatten(1).float().mean(1)
            expected = torch.tensor([float(value(name, index)) for index in range(3)])
            assert (found - expected).abs().max() <= 1


@pytest.mark.parametrize("write", [flat, packed, by_class, by_split])
def test_mini_imagenet(tmp_path: Path, write: object) -> None:
    write(tmp_path / "mini")  # type: ignore[operator]
    assert_whole(mini_imagenet(tmp_path / "mini", size=6), 6)


def test_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_split(tmp_path / "mini_imagenet")
    monkeypatch.setenv("FMETA_DATA", str(tmp_path))
    assert mini_imagenet().train.x.shape == (12, 3, 84, 84)
    assert mini_imagenet(grey=True, size=5).val.x.shape == (3, 1, 5, 5)


def test_tiered_imagenet(tmp_path: Path) -> None:
    by_split(tmp_path / "tiered")
    assert_whole(tiered_imagenet(tmp_path / "tiered", size=6), 6)


def test_published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    module = sys.modules["fmeta.data.imagenet"]
    assert (sum(module.MINI_CLASSES), module.MINI_CLASSES, module.MINI_IMAGES) == (100, (64, 16, 20), 600)
    assert (sum(module.TIERED_CLASSES), module.TIERED_CLASSES) == (608, (351, 97, 160))


def test_lists_that_do_not_fit(tmp_path: Path) -> None:
    flat(tmp_path)
    whole = (tmp_path / "test.csv").read_text()
    (tmp_path / "test.csv").write_text(f"{whole}n0999.jpg,n06\n")
    with pytest.raises(
        ValueError, match=r"mini_imagenet: the index lists 1 images that .*, such as n0999\.jpg"
    ):
        mini_imagenet(tmp_path)
    (tmp_path / "test.csv").write_text(f"{whole}n0100002.jpg,n01\n")
    with pytest.raises(ValueError, match=r"line 8 of .*test\.csv puts 'n01' into 'test' after 'train'"):
        mini_imagenet(tmp_path)
    (tmp_path / "test.csv").write_text(whole.replace("n0600001.jpg,n06\n", ""))
    with pytest.raises(ValueError, match="mini_imagenet: every class must have 3 images, but 'n06' has 2"):
        mini_imagenet(tmp_path)
    (tmp_path / "test.csv").write_text("image,label\na,b\n")
    with pytest.raises(ValueError, match=r"must have the columns filename,label, but 'filename' is missing"):
        mini_imagenet(tmp_path)
    (tmp_path / "test.csv").unlink()
    with pytest.raises(ValueError, match=r"mini_imagenet: .* must hold test\.csv, but does not"):
        mini_imagenet(tmp_path)


def test_a_name_that_two_files_have_is_not_enough(tmp_path: Path) -> None:
    by_class(tmp_path)
    write_image(tmp_path / "copy" / "n0100000.jpg", "n01", 0)
    with pytest.raises(ValueError, match=r"lists 1 images that .* does not hold, such as n0100000\.jpg"):
        mini_imagenet(tmp_path)


def test_splits_that_overlap_are_refused(tmp_path: Path) -> None:
    by_split(tmp_path)
    write_image(tmp_path / "test" / "n02" / "x.jpg", "n02", 0)
    for read in (mini_imagenet, tiered_imagenet):
        with pytest.raises(
            ValueError, match="splits must hold different classes, but 'n02' is in test and in tr"
        ):
            read(tmp_path)


def test_incomplete_and_stray_images_are_refused(tmp_path: Path) -> None:
    by_split(tmp_path)
    write_image(tmp_path / "test" / "n08" / "x.jpg", "n08", 0)
    with pytest.raises(
        ValueError,
        match=r"tiered_imagenet: train, val and test must have \(4, 1, 2\) classes, got \(4, 1, 3\)",
    ):
        tiered_imagenet(tmp_path)
    write_image(tmp_path / "extra" / "n08" / "x.jpg", "n08", 0)
    with pytest.raises(ValueError, match=r"but extra/n08/x\.jpg of .* does not\. Move it"):
        tiered_imagenet(tmp_path)
    (tmp_path / "extra" / "n08" / "x.jpg").rename(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"images must lie in train, val or test .* but a\.jpg of"):
        tiered_imagenet(tmp_path)
    with pytest.raises(ValueError, match="mini_imagenet: root must say where the files are, got none"):
        mini_imagenet()
    with pytest.raises(ValueError, match="tiered_imagenet: size must be a positive int, got -1"):
        tiered_imagenet(tmp_path, size=-1)
