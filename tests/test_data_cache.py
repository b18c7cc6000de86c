"""The cache of decoded data: found again, repaired when damaged, never half written."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fmeta.data import cache as cache_module
from fmeta.data import cache_dir
from fmeta.data.cache import Examples, cached
from fmeta.types import MetaLearningWarning


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build() -> Examples:
    return Examples(
        torch.arange(1000, dtype=torch.uint8).view(10, 1, 10, 10), torch.arange(10), tuple("abcdefghij")
    )


def refuse() -> Examples:
    raise AssertionError("built again")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("FMETA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "fmeta"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "fmeta"


def test_cache_builds_once_for_a_key(cache: Path) -> None:
    first = cached("demo", [1], build)
    again = cached("demo", [1], refuse)
    assert torch.equal(first.x, again.x) and torch.equal(first.y, again.y) and first.names == again.names
    with pytest.raises(AssertionError, match="built again"):
        cached("demo", [2], refuse)
    assert len(list(cache.iterdir())) == 1


def damage_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-500] ^= 1  # a pixel
    path.write_bytes(bytes(data))


def damage_all(path: Path) -> None:
    path.write_bytes(b"not a cache")


def damage_names(path: Path) -> None:
    save_file({"x": torch.zeros(1), "y": torch.zeros(1)}, path, metadata={"other": "file"})


@pytest.mark.parametrize("damage", [damage_half, damage_bit, damage_all, damage_names, Path.unlink])
def test_damaged_cache_is_made_again(cache: Path, damage: Callable[[Path], None]) -> None:
    cached("demo", [1], build)
    (path,) = cache.iterdir()
    damage(path)
    assert torch.equal(cached("demo", [1], build).x, build().x)
    assert torch.equal(cached("demo", [1], refuse).x, build().x), "the repaired file is read"


def test_failed_write_leaves_no_file_and_still_returns(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "save_file", full)
    with pytest.warns(MetaLearningWarning, match=r"demo: .* could not be kept .*No space left.* FMETA_CACHE"):
        found = cached("demo", [1], build)
    assert torch.equal(found.x, build().x)
    assert list(cache.iterdir()) == []


def test_cache_directory_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(MetaLearningWarning, match="could not be kept"):
        assert cached("demo", [1], build).names == build().names
