"""One file of examples: written in one pass, mapped into memory to be read, never trusted unseen.

The file is a safetensors file with ``x``, ``y`` and a checksum of both and of the class names. Reading maps it:
no pixel is copied or even read before it is used. Size, header and stamp are checked every time, the checksum
once for each state of the file, which is then noted beside it.
"""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: two processes then both do the work, and the last file stays
    fcntl = None  # type: ignore[assignment]

FORMAT = 2  # raise it when files are laid out differently
DTYPES = {
    torch.uint8: "U8",
    torch.int64: "I64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}


class Examples(NamedTuple):
    """All examples of a dataset before it is split."""

    x: Tensor  # [n, *feature], uint8 or floating
    y: Tensor  # [n], an index into names
    names: tuple[str, ...]


class Recipe(NamedTuple):
    """Examples that are yet to be made, a chunk at a time, so that a dataset need not fit into memory."""

    shape: tuple[int, ...]  # of one example
    y: Tensor  # [n], an index into names
    names: tuple[str, ...]
    chunks: Callable[[], Iterator[Tensor]]
    """Makes ``[k, *shape]``, which follow each other to ``[n, *shape]``; may be called again."""
    dtype: torch.dtype = torch.uint8


def recipe_of(examples: Examples) -> Recipe:
    """The recipe of examples that are there already."""
    x = examples.x
    return Recipe(tuple(x.shape[1:]), examples.y, examples.names, lambda: iter([x]), x.dtype)


def in_memory(recipe: Recipe) -> Examples:
    """Make the examples without a file."""
    x = torch.empty((len(recipe.y), *recipe.shape), dtype=recipe.dtype)
    start = 0
    for chunk in recipe.chunks():
        x[start : start + len(chunk)] = chunk
        start += len(chunk)
    return Examples(x, recipe.y, recipe.names)


def write(path: Path, recipe: Recipe, stamp: str) -> None:
    """Write aside and rename: a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            _stream(file, recipe, stamp)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave a whole name with half a file behind it
        temporary.replace(path)
        _note(path, _state(path))
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, stamp: str) -> Examples | None:
    """The examples, mapped; None where there is no file, another version's or stamp's, or a damaged one."""
    try:
        state = _state(path)
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()["fmeta"]
            known = json.loads(facts)
            if known["format"] != FORMAT or known["stamp"] != stamp:
                return None
            x, y, total = (file.get_tensor(name) for name in ("x", "y", "crc32"))
            found = Examples(x, y, tuple(known["names"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    if not _noted(path, state):
        # The format has no checksum of its own: a flipped bit would pass as a pixel.
        crc = zlib.crc32(_bytes(x), zlib.crc32(_bytes(y), zlib.crc32(facts.encode())))
        if crc != int.from_bytes(total.numpy().tobytes(), "little"):
            return None
        _note(path, state)
    return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time make a file, and remove what a killed one left.

    Without locks (Windows, some network folders) nothing is held: writing is safe all the same.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            handle = stack.enter_context(path.with_suffix(".lock").open("a"))
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)  # the system lets go of it when the process ends
                for left in path.parent.glob(f".{path.stem}-*.tmp"):
                    left.unlink()
        yield


def _stream(file: BinaryIO, recipe: Recipe, stamp: str) -> None:
    facts = json.dumps({"format": FORMAT, "stamp": stamp, "names": recipe.names})
    y = _bytes(recipe.y.to(torch.int64))
    shape = [len(recipe.y), *recipe.shape]
    ends = [y.nbytes, y.nbytes + torch.Size(shape).numel() * recipe.dtype.itemsize]
    header = {
        "__metadata__": {"fmeta": facts},
        "y": {"dtype": "I64", "shape": [len(recipe.y)], "data_offsets": [0, ends[0]]},
        "x": {"dtype": DTYPES[recipe.dtype], "shape": shape, "data_offsets": ends},
        "crc32": {"dtype": "U8", "shape": [4], "data_offsets": [ends[1], ends[1] + 4]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    crc = zlib.crc32(y, zlib.crc32(facts.encode()))
    file.write(y)
    for chunk in recipe.chunks():
        pixels = _bytes(chunk)
        crc = zlib.crc32(pixels, crc)
        file.write(pixels)
    file.write(crc.to_bytes(4, "little"))


def _bytes(x: Tensor) -> memoryview:
    """The memory of a tensor, not a copy of it."""
    return x.contiguous().flatten().view(torch.uint8).numpy().data


def _state(path: Path) -> list[int]:
    """What changes whenever the content of a file does."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _noted(path: Path, state: list[int]) -> bool:
    try:
        return bool(json.loads(path.with_suffix(".checked").read_text()) == state)
    except (OSError, ValueError):
        return False


def _note(path: Path, state: list[int]) -> None:
    with suppress(OSError):  # a cache that may only be read is checked each time
        path.with_suffix(".checked").write_text(json.dumps(state))
