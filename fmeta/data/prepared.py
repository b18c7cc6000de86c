"""What a frozen part of a model makes of examples: once for a whole pool, or once for each batch of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmeta import tree
from fmeta.data.pool import Pool
from fmeta.data.tokens import LENGTHS, trim
from fmeta.types import Tree

Prepare = Callable[[Tree], Tree]
"""``x -> x`` for a batch of examples ``[n, ...]``: features of a frozen part."""


def prepared_pool(
    pool: Pool, prepare: Prepare, *, batch: int = 128, lengths: Sequence[int] = LENGTHS
) -> Pool:
    """The same pool with what ``prepare`` makes of its examples, computed once and without gradient.

    Texts go by their length, so that each batch is as short as its texts; where that leaves results of different
    lengths, shorter ones are padded with zeros.

    Args:
        pool: examples.
        prepare: ``x -> x`` of ``batch`` examples, such as the lower layers of an encoder.
        batch: examples at once.
        lengths: what token ids are cut to.
    """
    count = len(pool.y)
    if not count:
        return pool
    order = torch.arange(count)
    if isinstance(pool.x, dict) and "attention_mask" in pool.x:
        order = pool.x["attention_mask"].sum(-1).cpu().argsort(stable=True)
    parts = []
    with torch.no_grad():
        for rows in order.split(batch):
            chosen = tree.map(lambda leaf, r=rows: leaf[r.to(leaf.device)], pool.x)
            parts.append(prepare(trim(chosen, lengths)))
    back = order.argsort()
    joined = tree.map(lambda *leaf: joined_rows(leaf)[back.to(leaf[0].device)], *parts)
    return replace(pool, x=joined)


def joined_rows(parts: Sequence[Tensor]) -> Tensor:
    """``[n, length, ...]`` tensors one behind the other, shorter ones padded with zeros."""
    if parts[0].ndim < 2:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)

    def pad(part: Tensor) -> Tensor:
        behind = [0, 0] * (part.ndim - 2) + [0, longest - part.shape[1]]
        return F.pad(part, behind)

    return torch.cat([pad(part) for part in parts])


def bytes_of(pool: Pool, prepare: Prepare) -> int:
    """What ``prepared_pool`` would hold, judged by its longest example."""
    if not len(pool.y):
        return 0
    first: Any = tree.map(lambda leaf: leaf[:1], pool.x)
    with torch.no_grad():
        one = prepare(first)
    return len(pool.y) * sum(leaf.nbytes for leaf in tree.leaves(one))
