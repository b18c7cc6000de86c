"""The cache of decoded data: found again, repaired when damaged, never half written, never in memory twice."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fmeta.data import cache_dir, mapped
from fmeta.data.cache import cached
from fmeta.data.mapped import Examples, Recipe
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


def stored(cache: Path) -> Path:
    (path,) = cache.glob("*.safetensors")
    return path


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
    assert torch.equal(first.x, build().x) and torch.equal(first.x, again.x)
    assert torch.equal(first.y, again.y) and first.names == again.names == build().names
    with pytest.raises(AssertionError, match="built again"):
        cached("demo", [2], refuse)
    assert len(list(cache.glob("*.safetensors"))) == 1


def test_chunks_of_a_recipe_follow_each_other(cache: Path) -> None:
    def chunks() -> Iterator[Tensor]:
        yield from torch.arange(30, dtype=torch.uint8).view(10, 3).split(4)

    y = torch.arange(10) % 2
    found = cached("demo", [1], lambda: Recipe((3,), y, ("a", "b"), chunks))
    assert found.x.tolist() == torch.arange(30).view(10, 3).tolist()
    assert torch.equal(found.y, y) and found.names == ("a", "b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_features_are_kept_too(cache: Path, dtype: torch.dtype) -> None:
    x = torch.rand(7, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    cached("demo", [1], lambda: Examples(x, torch.zeros(7).long(), ("a",)))
    found = cached("demo", [1], refuse)
    assert found.x.dtype == dtype and torch.equal(found.x, x)


def damage_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-500] ^= 1  # a pixel
    path.write_bytes(bytes(data))


def damage_class(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(b'\\"j\\"')
    data[at + 2] = ord("k")  # the name of a class
    path.write_bytes(bytes(data))


def damage_all(path: Path) -> None:
    path.write_bytes(b"not a cache")


def damage_names(path: Path) -> None:
    save_file({"x": torch.zeros(1), "y": torch.zeros(1)}, path, metadata={"other": "file"})


def another_version(path: Path) -> None:
    """What the first version of the format wrote."""
    x, y, names = build()
    crc = zlib.crc32(y.numpy().tobytes(), zlib.crc32(x.numpy().tobytes()))
    facts = json.dumps({"names": names, "crc32": crc})
    save_file({"x": x + 1, "y": y}, path, metadata={"fmeta": facts})


DAMAGES = [
    damage_half, damage_end, damage_bit, damage_class, damage_all, damage_names, another_version, Path.unlink,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_made_again(cache: Path, damage: Callable[[Path], None]) -> None:
    cached("demo", [1], build)
    damage(stored(cache))
    with pytest.raises(AssertionError, match="built again"):
        cached("demo", [1], refuse)
    assert torch.equal(cached("demo", [1], build).x, build().x)
    assert torch.equal(cached("demo", [1], refuse).x, build().x), "the repaired file is read"


def test_files_of_a_newer_format_are_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mapped, "FORMAT", mapped.FORMAT + 1)
        cached("demo", [1], build)
    with pytest.raises(AssertionError, match="built again"):
        cached("demo", [1], refuse)


def test_another_stamp_replaces_the_file(cache: Path) -> None:
    cached("demo", [1], build, stamp=["file", 1])
    changed = Examples(build().x + 1, build().y, build().names)
    assert torch.equal(cached("demo", [1], lambda: changed, stamp=["file", 2]).x, changed.x)
    assert torch.equal(cached("demo", [1], refuse, stamp=["file", 2]).x, changed.x)
    assert stored(cache).exists(), "one file, not two"


def test_pixels_are_checked_once_for_each_state_of_the_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached("demo", [1], build)
    monkeypatch.setattr(mapped, "zlib", None)  # checking would fail
    assert torch.equal(cached("demo", [1], refuse).x, build().x)
    os.utime(stored(cache), ns=(0, 1))
    with pytest.raises(AttributeError, match="crc32"):
        cached("demo", [1], refuse)
    monkeypatch.undo()
    monkeypatch.setenv("FMETA_CACHE", str(cache))
    cached("demo", [1], refuse)
    monkeypatch.setattr(mapped, "zlib", None)
    cached("demo", [1], refuse)


def test_writing_to_examples_leaves_the_file_alone(cache: Path) -> None:
    cached("demo", [1], build).x.fill_(7)
    assert torch.equal(cached("demo", [1], refuse).x, build().x)


MEMORY = """
import torch
from fmeta.data.cache import cached
from fmeta.data.mapped import Recipe

def chunks():
    for value in range(64):
        yield torch.full((64, 3, 84, 84), value, dtype=torch.uint8)  # 1.3 MiB

def used():
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return int(lines["RssAnon"].split()[0]) / 1024

y = torch.zeros(4096, dtype=torch.int64)
cached("warm", [1], lambda: Recipe((2,), y[:1], ("a",), lambda: iter([torch.zeros(1, 2, dtype=torch.uint8)])))
before = used()
found = cached("big", [1], lambda: Recipe((3, 84, 84), y, ("a",), chunks))
assert found.x[2048, 0, 0, 0] == 32 and found.x[1000:3000].max() == 46
print(used() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_pixels_are_mapped_not_loaded(cache: Path) -> None:
    """The dataset has 83 MiB: neither writing nor mapping it may take a noticeable part of that."""
    for _ in ("written", "read back"):
        run = [sys.executable, "-c", MEMORY]
        done = subprocess.run(run, capture_output=True, text=True, check=True, env=child_environment(cache))
        assert float(done.stdout) < 12
    cached_file = next(cache.glob("big-*.safetensors"))
    assert cached_file.stat().st_size > 80 * 2**20


def child_environment(cache: Path) -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    return os.environ | {"FMETA_CACHE": str(cache), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


RACE = """
import sys, time, torch
from pathlib import Path
from fmeta.data import mapped
from fmeta.data.cache import cached

lock, folder, name = sys.argv[1] == "lock", Path(sys.argv[2]), sys.argv[3]
if not lock:
    mapped.fcntl = None

def chunks():
    (folder / f"built-{name}").touch()
    for value in range(20):
        time.sleep(0.05)
        yield torch.full((50, 3), value, dtype=torch.uint8)

(folder / f"ready-{name}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    time.sleep(0.01)
y = torch.arange(1000) % 4
found = cached("race", [1], lambda: mapped.Recipe((3,), y, tuple("abcd"), chunks))
assert torch.equal(found.x[:, 1], torch.arange(20, dtype=torch.uint8).repeat_interleave(50))
assert torch.equal(found.y, y) and found.names == tuple("abcd")
"""


@pytest.mark.parametrize("lock", ["lock", "no lock"])
def test_two_processes_build_the_same_cache(cache: Path, tmp_path: Path, lock: str) -> None:
    """With a lock one waits for the other; without, both build and the last file stays."""
    marks = tmp_path / "marks"
    marks.mkdir()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, lock, str(marks), str(index)],
            stderr=subprocess.PIPE, text=True, env=child_environment(cache),
        )
        for index in range(2)
    ]  # fmt: skip
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    if mapped.fcntl is not None:
        assert len(list(marks.glob("built-*"))) == (1 if lock == "lock" else 2)
    assert not list(cache.glob(".*.tmp"))
    assert cached("race", [1], refuse).x[-1].tolist() == [19, 19, 19]


def test_what_a_killed_process_left_is_removed(cache: Path) -> None:
    cached("demo", [1], build)
    left = cache / f".{stored(cache).stem}-0123.tmp"
    other = cache / ".another-0123.tmp"
    for path in (left, other):
        path.write_bytes(b"half")
    stored(cache).unlink()
    cached("demo", [1], build)
    if mapped.fcntl is not None:
        assert not left.exists()
    assert other.exists(), "of another file, which may be being written"


def test_failed_write_leaves_no_file_and_still_returns(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, *rest: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mapped, "_stream", full)
    with pytest.warns(MetaLearningWarning, match=r"demo: .* could not be kept .*No space left.* FMETA_CACHE"):
        found = cached("demo", [1], build)
    assert torch.equal(found.x, build().x)
    assert not list(cache.glob("*.safetensors")) and not list(cache.glob(".*.tmp"))


def test_failed_build_leaves_no_file(cache: Path) -> None:
    def chunks() -> Iterator[Tensor]:
        yield torch.zeros(5, 3, dtype=torch.uint8)
        raise ValueError("demo: the sixth is not an image")

    with pytest.raises(ValueError, match="the sixth"):
        cached("demo", [1], lambda: Recipe((3,), torch.zeros(10).long(), ("a",), chunks))
    assert not list(cache.glob("*.safetensors")) and not list(cache.glob(".*.tmp"))


def test_cache_directory_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(MetaLearningWarning, match="could not be kept"):
        assert cached("demo", [1], build).names == build().names


def test_cache_that_may_only_be_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached("demo", [1], build)
    next(cache.glob("*.checked")).unlink()
    next(cache.glob("*.lock")).unlink()

    def fail(*args: object, **kwargs: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_text", fail)
    for _ in range(2):
        assert torch.equal(cached("demo", [1], refuse).x, build().x), "checked each time, and used"
