"""Pictures with boxes whose features were computed once: what the heads of a detector are trained on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmeta.data.boxes import BoxPool
from fmeta.data.cache import cache_dir

VERSION = 1  # raise it when what is stored changes
CHUNK = 8
Compute = Callable[[Tensor], Mapping[str, Tensor]]
"""``(rows) -> feature maps`` of these pictures of a pool."""


class Featured(NamedTuple):
    """A pool with feature maps of its pictures, ``[n, channels, h, w]`` each, in half precision, often on disk."""

    pool: BoxPool
    features: dict[str, Tensor]

    def maps(self, rows: Tensor) -> dict[str, Tensor]:
        """Feature maps of some pictures, float32."""
        return {name: level[rows].float() for name, level in self.features.items()}


def featured(
    pool: BoxPool,
    compute: Compute,
    weights: Mapping[str, Tensor],
    *,
    keep: bool = True,
) -> Featured:
    """Compute features of all pictures, or find them in the cache directory.

    Args:
        pool: the pictures.
        compute: ``(rows) -> {name: [n, channels, h, w]}`` of pictures of the pool.
        weights: all that ``compute`` depends on beside the pool: what features are found again by.
        keep: whether they go to the cache directory, mapped into memory, or stay in memory.
    """
    if not keep:
        return Featured(pool, _in_memory(pool, compute))
    folder = cache_dir() / f"features-{_digest(pool, weights)}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".features-"))
        try:
            names = _write(aside, pool, compute)
            (aside / "names.json").write_text(json.dumps(names), encoding="utf-8")
            with contextlib.suppress(OSError):  # another process was faster
                aside.rename(folder)  # a reader sees all of it or nothing
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
    # Copy on write: torch wants memory that may be written to, and the files stay as they are.
    mapped = [np.load(folder / f"{index}.npy", mmap_mode="c") for index in range(len(names))]
    return Featured(pool, {name: torch.from_numpy(array) for name, array in zip(names, mapped, strict=True)})


def _chunks(pool: BoxPool, compute: Compute) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    for begin in range(0, len(pool.files), CHUNK):
        rows = torch.arange(begin, min(begin + CHUNK, len(pool.files)))
        found = compute(rows)
        yield rows, {name: level.detach().to("cpu", torch.float16) for name, level in found.items()}


def _in_memory(pool: BoxPool, compute: Compute) -> dict[str, Tensor]:
    parts = [part for _, part in _chunks(pool, compute)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _write(folder: Path, pool: BoxPool, compute: Compute) -> list[str]:
    files: dict[str, np.memmap] = {}
    for rows, part in _chunks(pool, compute):
        for name, level in part.items():
            if name not in files:
                shape = (len(pool.files), *level.shape[1:])
                path = folder / f"{len(files)}.npy"
                files[name] = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
            files[name][rows.numpy()] = level.numpy()
    for file in files.values():
        file.flush()
    return list(files)


def _digest(pool: BoxPool, weights: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(str(VERSION).encode())
    for name, tensor in [("images", pool.images), ("sizes", pool.sizes), *sorted(weights.items())]:
        found.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
