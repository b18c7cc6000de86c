"""Folders and zips of images."""

from __future__ import annotations

import io
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fmeta.data import Pools, image_folder
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


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
        (["file,label,split", "cat/0.png,a,train", "cat/0.png,b,train"], r"line 3 .* cat/0\.png 'b' after 'a'"),
        (["file,label,split", "cat/0.png,,train"], r"line 2: label is empty"),
        (["file,label,split", "cat/only.png,a,train", "only.png,b,train"], r"lists cat/only\.png twice, as 'a' and as"),
    ],
)  # fmt: skip
def test_index_that_does_not_fit(folder: Path, lines: list[str], text: str) -> None:
    shutil.copy(folder / "cat" / "0.png", folder / "cat" / "only.png")
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


# Sizes and modes


def save(folder: Path, name: str, image: Image.Image, **options: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def test_images_of_all_sizes_and_modes_become_alike(tmp_path: Path) -> None:
    """Every file shows the same brown, as far as its mode can."""
    brown = (200, 100, 0)
    grey = int(np.array(Image.new("RGB", (1, 1), brown).convert("L"))[0, 0])
    flat = Image.new("RGB", (30, 50), brown)
    palette = flat.convert("P", palette=Image.Palette.ADAPTIVE)
    deep = Image.fromarray(np.full((40, 30), grey * 257, np.uint16))
    files = {
        "rgb/a.png": flat, "rgb/b.jpg": flat.resize((9, 200)), "rgba/a.png": flat.convert("RGBA"),
        "palette/a.png": palette, "palette/b.gif": palette, "cmyk/a.jpg": flat.convert("CMYK"),
        "cmyk/b.tif": flat.convert("CMYK"), "l/a.png": Image.new("L", (7, 8), grey),
        "la/a.png": Image.new("LA", (8, 8), (grey, 255)), "deep/a.png": deep, "deep/b.tif": deep,
        "deep/c.pgm": deep, "one/a.png": Image.new("1", (64, 64), 1),
    }  # fmt: skip
    for name, image in files.items():
        save(tmp_path / "modes", name, image, **({"quality": 100} if name.endswith("jpg") else {}))
    pool = image_folder(tmp_path / "modes", size=4, split=(1, 0, 0)).train
    assert pool.x.shape == (13, 3, 4, 4)
    shades = {"one": (255, 255, 255), "l": (grey,) * 3, "la": (grey,) * 3, "deep": (grey,) * 3}
    for row, name in enumerate(pool.names):
        for index in pool.rows[row, : pool.counts[row]]:
            difference = pool.x[index].int() - torch.tensor(shades.get(name, brown))[:, None, None]
            assert difference.abs().max() <= (2 if name in ("rgb", "cmyk") else 0), name
    in_grey = image_folder(tmp_path / "modes", size=4, grey=True, split=(1, 0, 0)).train
    assert in_grey.x.shape == (13, 1, 4, 4)
    dark = [row for row, name in enumerate(in_grey.names) if name != "one"]
    assert (in_grey.x[in_grey.rows[dark].unique()].int() - grey).abs().max() <= 2


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    indexed = Image.new("P", (8, 8), 3)
    indexed.putpalette([0, 0, 0] * 3 + [255, 0, 0] + [0, 0, 0] * 252)
    for name, image, options in (
        ("full.png", clear, {}),
        ("part.png", Image.new("LA", (8, 8), (0, 51)), {}),
        ("index.png", indexed, {"transparency": 3}),
        ("bytes.png", indexed, {"transparency": bytes([255, 255, 255, 0])}),
        ("colour.png", Image.new("RGB", (8, 8), (1, 2, 3)), {"transparency": (1, 2, 3)}),
    ):
        save(tmp_path / "clear" / "a", name, image, **options)
    pool = image_folder(tmp_path / "clear", size=2, split=(1, 0, 0)).train
    # bytes.png, colour.png, full.png, index.png, part.png
    assert pool.x[:, :, 0, 0].tolist() == [[255] * 3] * 4 + [[204] * 3]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_refuses_32_bits_whose_range_is_unknown(tmp_path: Path, mode: str) -> None:
    save(tmp_path / "deep", "a/1.tif", Image.new(mode, (8, 8), 3))
    with pytest.raises(ValueError, match=r"a/1\.tif in .*deep must be a readable image.*got 32, whose range"):
        image_folder(tmp_path / "deep", size=2)


def test_the_first_unreadable_image_is_named(folder: Path) -> None:
    (folder / "dog" / "1.png").write_bytes(b"no image")
    (folder / "fox" / "1.png").write_bytes(b"no image")
    split = dict.fromkeys(CLASSES, "train")
    with pytest.raises(ValueError, match=r"image_folder: dog/1\.png in .*animals must be a readable image"):
        image_folder(folder, size=4, split=split)
    assert not list((folder.parent / "cache").glob("*.safetensors"))


# The cache


def same(a: Pools, b: Pools) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("train", "val", "test")]
    return all(p.names == q.names and torch.equal(p.x, q.x) and torch.equal(p.y, q.y) for p, q in pairs)


@pytest.mark.parametrize("form", [lambda folder: folder, zipped], ids=["folder", "zip"])
def test_second_start_decodes_nothing(
    folder: Path, form: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = form(folder)
    first = image_folder(path, size=8)
    monkeypatch.setattr("fmeta.data.images.Image.open", None)  # decoding would fail
    assert same(first, image_folder(path, size=8))
    assert same(first, image_folder(str(path), size=8, seed=0))
    image_folder(path, size=8, seed=1)  # another division of the same pixels
    for other in ({"size": 9}, {"size": 8, "grey": True}):
        with pytest.raises(TypeError, match="not callable"):
            image_folder(path, **other)  # type: ignore[arg-type]


def test_changed_files_are_decoded_again(folder: Path) -> None:
    split = dict.fromkeys(CLASSES, "train")
    before = image_folder(folder, size=8, split=split).train
    path = folder / "cat" / "1.png"
    time = path.stat().st_mtime_ns
    path.write_bytes(picture(7))
    os.utime(path, ns=(time, time + 1))
    after = image_folder(folder, size=8, split=split).train
    assert middle(before.x)[1, 0, 0, 0] == 41 and middle(after.x)[1, 0, 0, 0] == 7
    (folder / "cat" / "9.png").write_bytes(picture(90))
    assert image_folder(folder, size=8, split=split).train.counts.tolist() == [4, 3, 3, 3, 3]
    assert len(list((folder.parent / "cache").glob("*.safetensors"))) == 1, "the old file is replaced"


def test_an_index_that_changes_is_read_again(folder: Path) -> None:
    head = "file,label,split"
    path = index(folder, [head, "cat/0.png,small,train"])
    assert image_folder(folder, size=4, split=path).train.names == ("small",)
    path.write_text(f"{head}\ncat/0.png,tiny,train\ndog/0.png,big,val\n")
    pools = image_folder(folder, size=4, split=path)
    assert (pools.train.names, pools.val.names) == (("tiny",), ("big",))


def test_splits_are_pieces_of_one_mapped_file(folder: Path) -> None:
    pools = image_folder(folder, size=8, split=(0.6, 0.2, 0.2))
    end = pools.train.x.data_ptr()
    for pool in (pools.train, pools.val, pools.test):
        assert pool.x.data_ptr() == end, "one lies behind the other, nothing is copied"
        end += pool.x.numel()
    assert pools.train.x.untyped_storage().data_ptr() == pools.test.x.untyped_storage().data_ptr()


def test_pools_do_not_depend_on_what_was_cached_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [image_folder(folder, size=8, seed=seed) for seed in range(4)]
    for seed, pools in enumerate(found):
        monkeypatch.setenv("FMETA_CACHE", str(folder.parent / f"cache{seed}"))
        assert same(pools, image_folder(folder, size=8, seed=seed))


def test_folders_behind_links_are_read(folder: Path) -> None:
    (folder / "owl").rename(folder.parent / "owl")
    (folder / "owl").symlink_to(folder.parent / "owl")
    (folder / "owl" / "circle").symlink_to(folder)
    pool = image_folder(folder, size=8, split=(1, 0, 0)).train
    assert pool.names == tuple(CLASSES) and len(pool.x) == 15


@pytest.mark.data
def test_caltech(data_root: Path) -> None:
    root = data_root / "caltech101_84"
    pools = image_folder(root / "images.zip", split=root / "index.csv")
    assert [len(pool.names) for pool in (pools.train, pools.val, pools.test)] == [60, 16, 0]
    assert len(pools.train.x) + len(pools.val.x) == 3993 and pools.train.x.shape[1:] == (3, 84, 84)
    assert pools.train.counts.min() >= 31


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text are possible on Linux")
def test_a_class_may_have_a_name_that_is_no_text(folder: Path) -> None:
    (folder / "cat").rename(folder / os.fsdecode(b"c\xe9t"))
    pools = image_folder(folder, size=8)
    assert sum(len(pool.names) for pool in (pools.train, pools.val, pools.test)) == len(
        list(folder.iterdir())
    )
