"""Decoded datasets on disk: written aside and renamed, checked when read, rebuilt when damaged."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fmeta.types import MetaLearningWarning


class Examples(NamedTuple):
    """All examples of a dataset before it is split."""

    x: Tensor  # [n, *feature]
    y: Tensor  # [n], an index into names
    names: tuple[str, ...]


def cache_dir() -> Path:
    """Where fmeta keeps what it can make again: ``$FMETA_CACHE``, else the user's cache directory."""
    if os.environ.get("FMETA_CACHE"):
        return Path(os.environ["FMETA_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fmeta"


def cached(name: str, key: object, build: Callable[[], Examples]) -> Examples:
    """Read the examples that ``build`` made before under this key, or build and store them.

    Args:
        name: start of the file's name, for people who look into the directory.
        key: everything the result depends on, as JSON values; another key is another file.
        build: makes the examples. It must depend on nothing but ``key``.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = cache_dir() / f"{name}-{digest}.safetensors"
    found = _read(path)
    if found is not None:
        return found
    examples = build()
    try:
        _write(path, examples)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"{name}: the data could not be kept in {path.parent} ({error}), so it will be made again "
            "next time. Set FMETA_CACHE to a writable directory.",
            MetaLearningWarning,
            stacklevel=3,
        )
    return examples


def _read(path: Path) -> Examples | None:
    """The stored examples, or None where there are none or they are damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["fmeta"])
            found = Examples(file.get_tensor("x"), file.get_tensor("y"), tuple(facts["names"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    # The format has no checksum of its own: a flipped bit would pass as a pixel.
    return found if _checksum(found) == facts["crc32"] else None


def _write(path: Path, examples: Examples) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    os.close(handle)
    facts = {"names": examples.names, "crc32": _checksum(examples)}
    try:
        save_file({"x": examples.x, "y": examples.y}, temporary, metadata={"fmeta": json.dumps(facts)})
        Path(temporary).replace(path)  # atomic: a reader sees the old file or the whole new one
    finally:
        Path(temporary).unlink(missing_ok=True)


def _checksum(examples: Examples) -> int:
    return zlib.crc32(examples.y.numpy().tobytes(), zlib.crc32(examples.x.numpy().tobytes()))
