"""Pictures with boxes whose features were computed once: what the heads of a detector are trained on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fmeta.data.boxes import BoxPool
from fmeta.data.cache import cached
from fmeta.data.features import tensor_digest
from fmeta.data.mapped import Recipe, in_memory

VERSION = 2  # raise it when what is stored changes
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
        found = in_memory(_recipe(pool, compute))
    else:
        named = [("images", pool.images), ("sizes", pool.sizes), *sorted(weights.items())]
        key = [VERSION, *([name, tensor_digest(tensor)] for name, tensor in named)]
        found = cached("detection", key, lambda: _recipe(pool, compute))
    features, start = {}, 0
    for name, shape in map(json.loads, found.names):
        end = start + math.prod(shape)
        features[name] = found.x[:, start:end].unflatten(1, shape)
        start = end
    return Featured(pool, features)


def _recipe(pool: BoxPool, compute: Compute) -> Recipe:
    """All maps of a picture in one row; the names say which maps they are and of what shape."""
    count = len(pool.files)

    def maps(begin: int) -> dict[str, Tensor]:
        found = compute(torch.arange(begin, min(begin + CHUNK, count)))
        return {name: level.detach().to("cpu", torch.float16) for name, level in found.items()}

    first = maps(0)
    rows = lambda levels: torch.cat([level.flatten(1) for level in levels.values()], 1)  # noqa: E731

    def chunks() -> Iterator[Tensor]:
        yield rows(first)
        for begin in range(CHUNK, count, CHUNK):
            yield rows(maps(begin))

    names = tuple(json.dumps([name, level.shape[1:]]) for name, level in first.items())
    return Recipe((rows(first).shape[1],), torch.zeros(count), names, chunks, torch.float16)
