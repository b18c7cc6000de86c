"""Omniglot: both splits, in every form the files come in, on a synthetic copy and on the real one."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fmeta.data import Pools, cache_dir, omniglot

# 30 alphabets with 964 characters, 20 with 659, as in the release.
DRAWINGS = 2  # of 20, to save time; the test on the real data has them all
SHAPES = {"images_background": (30, 964), "images_evaluation": (20, 659)}


@pytest.fixture(autouse=True)
def thin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "data_root" not in request.fixturenames:
        monkeypatch.setattr(sys.modules["fmeta.data.omniglot"], "DRAWINGS", DRAWINGS)


def drawing(number: int) -> bytes:
    """White paper of 56 by 56 with one black bar whose place tells the character."""
    pixels = np.ones((56, 56), bool)
    pixels[:, number % 50 : number % 50 + 4] = False
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def characters(part: str) -> list[str]:
    alphabets, count = SHAPES[part]
    return [f"{part}_{i % alphabets:02d}/character{i // alphabets + 1:02d}" for i in range(count)]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thin copy of the release: two zips in omniglot-py, and the class lists of the Vinyals split."""
    root = tmp_path_factory.mktemp("omniglot")
    (root / "omniglot-py").mkdir()
    names = []
    for part in SHAPES:
        with zipfile.ZipFile(root / "omniglot-py" / f"{part}.zip", "w") as archive:
            for number, name in enumerate(characters(part)):
                data = drawing(number)
                for person in range(DRAWINGS):
                    archive.writestr(f"{part}/{name}/{number:04d}_{person + 1:02d}.png", data)
        names += characters(part)
    bounds = {"train": (0, 1028), "val": (1028, 1200), "test": (1200, 1623)}
    for kind, (first, last) in bounds.items():
        turned = [f"{name}/rot{angle:03d}" for name in names[first:last] for angle in (0, 90, 180, 270)]
        (root / f"vinyals_{kind}.txt").write_text("\n".join(turned) + "\n")
    return root


def sizes(pools: Pools) -> list[int]:
    return [len(pool.names) for pool in (pools.train, pools.val, pools.test)]


def test_maml_split(release: Path) -> None:
    pools = omniglot(release)
    assert sizes(pools) == [1100, 100, 423]
    for pool in (pools.train, pools.val, pools.test):
        assert pool.counts.unique().tolist() == [DRAWINGS] and pool.x.shape[1:] == (1, 28, 28)
    assert omniglot(release, seed=0).train.names == pools.train.names
    other = omniglot(release, seed=1)
    assert sizes(other) == [1100, 100, 423] and other.train.names != pools.train.names


def test_vinyals_split_has_base_characters_only(release: Path) -> None:
    pools = omniglot(release, split="vinyals")
    assert sizes(pools) == [1028, 172, 423]
    assert not any("rot" in name for name in pools.train.names)
    assert set(pools.val.names) == set(
        (characters("images_background") + characters("images_evaluation"))[1028:1200]
    )


def test_ink_is_255_and_pixels_stay_with_their_character(release: Path) -> None:
    pool = omniglot(release, split="vinyals").train
    number = {name: i for part in SHAPES for i, name in enumerate(characters(part))}
    for label in range(0, len(pool.names), 97):
        bar = number[pool.names[label]] % 50
        column = pool.x[pool.rows[label, 0], 0, 0].float()
        # A bar 4 pixels wide of 56 becomes 2 of 28, in the same place.
        assert column.sum() == pytest.approx(2 * 255, abs=1)
        middle = float((column * (torch.arange(28) + 0.5)).sum() / column.sum())
        assert middle == pytest.approx((bar + 2) / 2, abs=0.01)


def test_second_call_reads_the_cache(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = omniglot(release)
    monkeypatch.setattr("fmeta.data.images.Image.open", None)  # decoding would fail
    assert torch.equal(omniglot(release).train.x, pools.train.x)
    part = release / "omniglot-py" / "images_background.zip"
    stat = part.stat()
    os.utime(part, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(TypeError, match="not callable"):
        omniglot(release)
    os.utime(part, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_extracted_folders_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"CHARACTERS": 12, "DRAWINGS": 3, "MAML_TRAIN": 8, "MAML_VAL": 2}
    for name, value in small.items():
        monkeypatch.setattr(sys.modules["fmeta.data.omniglot"], name, value)
    (tmp_path / "zips").mkdir()
    for part, count in (("images_background", 7), ("images_evaluation", 5)):
        with zipfile.ZipFile(tmp_path / "zips" / f"{part}.zip", "w") as archive:
            for number, name in enumerate(characters(part)[:count]):
                for person in range(3):
                    archive.writestr(f"{part}/{name}/{number}_{person}.png", drawing(9 * number + person))
            archive.extractall(tmp_path / "folders" / "omniglot-py")
    a, b = omniglot(tmp_path / "zips"), omniglot(tmp_path / "folders")
    assert sizes(a) == [6, 2, 4]
    assert a.test.names == b.test.names and torch.equal(a.test.x, b.test.x)
    left_out = tmp_path / "folders" / "omniglot-py" / "images_evaluation" / characters("images_evaluation")[4]
    next(left_out.iterdir()).unlink()
    with pytest.raises(ValueError, match=r"must have 3 drawings, but images_evaluation_04/character01 has 2"):
        omniglot(tmp_path / "folders")
    shutil.rmtree(left_out)
    with pytest.raises(ValueError, match="together must have 12 characters, got 11"):
        omniglot(tmp_path / "folders")


def test_default_root(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    omniglot(release)
    for file in cache_dir().glob("omniglot-*.safetensors"):
        shutil.copy(file, tmp_path)
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path))
    monkeypatch.delenv("FMETA_DATA", raising=False)
    with pytest.raises(ValueError, match=r"root must say where the files are, got none\. Pass root="):
        omniglot()
    monkeypatch.setenv("FMETA_DATA", str(tmp_path))
    missing = (
        "omniglot must hold images_background and images_evaluation, as folders or zips, but one is missing"
    )
    with pytest.raises(ValueError, match=missing):
        omniglot()
    (tmp_path / "omniglot").symlink_to(release)
    assert sizes(omniglot()) == [1100, 100, 423]
    monkeypatch.delenv("FMETA_DATA")
    assert sizes(omniglot()) == [1100, 100, 423], "the cache directory, where a download would go"


def test_download_is_torchvisions(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch(root: str, background: bool, download: bool) -> None:
        part = "images_background" if background else "images_evaluation"
        calls.append((part, download))
        (Path(root) / "omniglot-py").mkdir(parents=True, exist_ok=True)
        shutil.copy2(release / "omniglot-py" / f"{part}.zip", Path(root) / "omniglot-py")

    monkeypatch.setattr("torchvision.datasets.Omniglot", fetch)
    assert sizes(omniglot(tmp_path / "new", download=True)) == [1100, 100, 423]
    assert calls == [("images_background", True), ("images_evaluation", True)]
    omniglot(tmp_path / "new", download=True)
    assert len(calls) == 2, "what is there is not fetched again"

    def fail(root: str, background: bool, download: bool) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.Omniglot", fail)
    with pytest.raises(
        ValueError, match=r"could not download the drawings into .*other \(no route to host\)"
    ):
        omniglot(tmp_path / "other", download=True)


def test_zip_cut_short(release: Path, tmp_path: Path) -> None:
    for part in SHAPES:
        shutil.copy2(release / "omniglot-py" / f"{part}.zip", tmp_path)
    path = tmp_path / "images_evaluation.zip"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"omniglot: .*images_evaluation\.zip must be a complete zip file"):
        omniglot(tmp_path)


def test_class_lists_that_do_not_fit(release: Path, tmp_path: Path) -> None:
    (tmp_path / "omniglot-py").symlink_to(release / "omniglot-py")
    with pytest.raises(
        ValueError, match=r"needs the class list .*vinyals_train\.txt.*jakesnell/prototypical"
    ):
        omniglot(tmp_path, split="vinyals")
    for kind in ("train", "val", "test"):
        shutil.copy2(release / f"vinyals_{kind}.txt", tmp_path)
    path = tmp_path / "vinyals_test.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "Gurmukhi/character42"]))
    with pytest.raises(
        ValueError, match=r"line 2 of .* must be alphabet/character/rotation, got 'Gurmukhi/char"
    ):
        omniglot(tmp_path, split="vinyals")
    path.write_text("\n".join([*lines, "images_background_00/character01/rot000"]))
    with pytest.raises(ValueError, match="puts images_background_00/character01 into a second split"):
        omniglot(tmp_path, split="vinyals")
    path.write_text("\n".join(lines[:-4]))
    with pytest.raises(ValueError, match="omniglot: split must name every class, but 1 of 1623 are missing"):
        omniglot(tmp_path, split="vinyals")


def test_split_must_be_a_published_one(release: Path) -> None:
    with pytest.raises(ValueError, match="split must be 'maml' or 'vinyals', got 'mixed'"):
        omniglot(release, split="mixed")  # type: ignore[arg-type]


@pytest.mark.data
def test_real_omniglot(data_root: Path) -> None:
    root = data_root / "omniglot"
    maml, vinyals = omniglot(root), omniglot(root, split="vinyals")
    assert sizes(maml) == [1100, 100, 423] and sizes(vinyals) == [1028, 172, 423]
    assert set(maml.train.names) != set(vinyals.train.names)
    listed = (root / "vinyals_test.txt").read_text().split()
    assert set(vinyals.test.names) == {re.sub(r"/rot\d+$", "", line) for line in listed}
    for pool in (maml.train, maml.val, maml.test):
        assert pool.counts.unique().tolist() == [20]
        ink = pool.x.float().mean() / 255
        assert 0.02 < ink < 0.15, "strokes are 255 on paper of 0"
        assert (pool.x.flatten(1).max(1).values > 100).all(), "no drawing is lost in shrinking"
