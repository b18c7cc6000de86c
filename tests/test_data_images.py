"""Folders and zips of images."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fmeta.data import image_folder
from fmeta.tasks import few_shot


def picture(value: int, size: tuple[int, int] = (20, 12), kind: str = "PNG") -> bytes:
    """The middle square has one colour, (value, value / 2, 0); what is left and right of it is white."""
    pixels = np.full((size[1], size[0], 3), 255, np.uint8)
    margin = (size[0] - size[1]) // 2
    pixels[:, margin : size[0] - margin] = (value, value // 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def middle(x: Tensor) -> Tensor:
    """Pixels of 8 by 8 images that no resizing filter mixes with what lies outside the square."""
    return x[..., 3:5, 3:5]


def noise() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


CLASSES = {"cat": 40, "dog": 80, "emu": 120, "fox": 160, "owl": 200}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five classes of three images; the colour tells the class."""
    root = tmp_path / "animals"
    for name, value in CLASSES.items():
        (root / name).mkdir(parents=True)
        for index in range(3):
            (root / name / f"{index}.png").write_bytes(picture(value + index))
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "cat" / ".hidden.png").write_text("not an image either")
    return root


def zipped(folder: Path) -> Path:
    path = folder.parent / "animals.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder).as_posix())
        archive.writestr("__MACOSX/cat/._0.png", b"resource fork")
    return path


@pytest.mark.parametrize("form", [lambda folder: folder, zipped], ids=["folder", "zip"])
def test_classes_are_folders(folder: Path, form: Callable[[Path], Path]) -> None:
    pools = image_folder(form(folder), size=8, split=(0.6, 0.2, 0.2))
    assert [len(pool.names) for pool in (pools.train, pools.val, pools.test)] == [3, 1, 1]
    assert pools.train.x.shape == (9, 3, 8, 8) and pools.train.x.dtype == torch.uint8
    for pool in (pools.train, pools.val, pools.test):
        for label, name in enumerate(pool.names):
            pixels = middle(pool.x)[pool.rows[label]]
            assert pixels[:, 0].unique().tolist() == [CLASSES[name] + index for index in range(3)]
            assert pixels[:, 1].max() == (CLASSES[name] + 2) // 2 and pixels[:, 2].max() == 0
        assert pool.x[:, 2].float().mean() < 60, "the white on both sides is cut off"


def test_grey_images_have_one_channel(folder: Path) -> None:
    pools = image_folder(folder, size=8, grey=True, split=(1, 0, 0))
    assert pools.train.x.shape == (15, 1, 8, 8)
    expected = Image.fromarray(np.full((1, 1, 3), (40, 20, 0), np.uint8)).convert("L").getpixel((0, 0))
    assert middle(pools.train.x)[pools.train.rows[0, 0]].unique().tolist() == [expected]


def test_seed_chooses_the_classes_of_a_split(folder: Path) -> None:
    train = {image_folder(folder, size=2, split=(0.6, 0.2, 0.2), seed=seed).train.names for seed in range(8)}
    assert len(train) > 1
    assert (
        image_folder(folder, size=2, seed=5).train.names == image_folder(folder, size=2, seed=5).train.names
    )


def test_split_by_mapping_and_nested_folders(folder: Path) -> None:
    (folder / "birds").mkdir()
    for name in ("emu", "owl"):
        (folder / name).rename(folder / "birds" / name)
    split = {"cat": "train", "dog": "train", "fox": "val", "birds/emu": "test", "birds/owl": "test"}
    pools = image_folder(folder, size=2, split=split)
    assert pools.test.names == ("birds/emu", "birds/owl") and pools.val.names == ("fox",)


def index(folder: Path, lines: list[str]) -> Path:
    path = folder.parent / "index.csv"
    path.write_text("\n".join(lines))
    return path


def test_index_says_which_files_are_what(folder: Path) -> None:
    lines = ["file,label,split", "cat/0.png,small,train", "dog/1.png,small,train", "owl/2.png,bird,val"]
    pools = image_folder(zipped(folder), size=8, split=index(folder, lines))
    assert (pools.train.names, pools.val.names, pools.test.names) == (("small",), ("bird",), ())
    assert middle(pools.train.x)[:, 0, 0, 0].tolist() == [40, 81]
    with pytest.raises(ValueError, match="few_shot: the pool must have classes, but its split is empty"):
        few_shot(pools.test, ways=1, shots=1, queries=1, tasks=1)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["file,label"], r"must have the columns file,label,split, but 'split' is missing"),
        (["file,label,split"], r"must list images, but has no lines"),
        (["file,label,split", "cat/0.png,a,train", "cat/1.png,a,test"], r"line 3 .* puts 'a' into 'test'"),
        (["file,label,split", "cat/9.png,a,train"], r"1 images that .* does not hold, such as cat/9"),
        (["file,label,split", "cat/0.png,a,dev"], r"got 'dev' for class 'a'"),
    ],
)  # fmt: skip
def test_index_that_does_not_fit(folder: Path, lines: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=f"image_folder: .*{text}"):
        image_folder(folder, split=index(folder, lines))


def test_refuses_folders_without_images(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere must be a folder or a zip file, but there is nothing"):
        image_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty must hold one folder of images a class, but has no images"):
        image_folder(tmp_path / "empty")
    (folder / "ant").mkdir()
    with pytest.raises(ValueError, match=r"folder ant of .*animals has no images"):
        image_folder(folder)
    (folder / "ant").rmdir()
    (folder / "stray.png").write_bytes(picture(1))
    with pytest.raises(ValueError, match=r"in the folder of its class, but stray\.png lies in none"):
        image_folder(folder)


def test_refuses_a_bad_index_path_size_and_split(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"split must be an index file, but there is no file missing\.csv"):
        image_folder(folder, split="missing.csv")
    for size in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match=f"image_folder: size must be a positive int, got {size}"):
            image_folder(folder, size=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split must name every class, but 4 of 5 are missing, 'dog' among"):
        image_folder(folder, split={"cat": "train"})


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.8])
def test_names_the_image_that_is_cut_short(folder: Path, kind: str, part: float) -> None:
    data = picture(9, (64, 64), kind) if kind != "PNG" else noise()
    (folder / "dog" / f"bad.{kind.lower()}").write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match=rf"dog/bad\.{kind.lower()} in .*animals must be a readable image"):
        image_folder(folder, size=4)


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_refuses_a_zip_that_is_cut_short(folder: Path, part: float) -> None:
    path = zipped(folder)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"animals\.zip must be a complete zip file, but it is cut short"):
        image_folder(path)


def test_names_the_damaged_file_in_a_zip(folder: Path) -> None:
    path = zipped(folder)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("fox/1.png").header_offset
    data = bytearray(path.read_bytes())
    data[start + 60] ^= 255
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"fox/1\.png in .*animals\.zip must be a readable image.*CRC"):
        image_folder(path)


@pytest.mark.data
def test_caltech(data_root: Path) -> None:
    root = data_root / "caltech101_84"
    pools = image_folder(root / "images.zip", split=root / "index.csv")
    assert [len(pool.names) for pool in (pools.train, pools.val, pools.test)] == [60, 16, 0]
    assert len(pools.train.x) + len(pools.val.x) == 3993 and pools.train.x.shape[1:] == (3, 84, 84)
    assert pools.train.counts.min() >= 31
