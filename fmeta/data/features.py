"""Pools of features: what a frozen part of a model makes of every example, computed once; on disk, or in memory."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmeta import tree
from fmeta.data.cache import cached
from fmeta.data.identity import digest_of, tensor_digest
from fmeta.data.mapped import Examples
from fmeta.data.pool import Pool, Pools
from fmeta.data.tokens import LENGTHS, trim
from fmeta.functional import calling_layers
from fmeta.types import Tree

CALL = "embedded"
MODELESS = (
    "activation", "channelshuffle", "container", "conv", "distance", "flatten", "fold", "linear", "normalization",
    "padding", "pixelshuffle", "pooling", "sparse", "upsampling",
)  # fmt: skip
"""Parts of torch.nn.modules whose layers compute the same in training and in evaluation mode."""
PoolT = TypeVar("PoolT", Pool, Pools)
Prepare = Callable[[Tree], Tree]
"""``x -> x`` for a batch of examples ``[n, ...]``: features of a frozen part."""


def embedded(
    pool: PoolT, trunk: nn.Module, *, batch_size: int = 256, device: torch.device | str | None = None
) -> PoolT:
    """The pool with what ``trunk`` makes of each example in place of the example.

    The trunk runs once over the pool, without gradient; tasks are then sampled from its results as from any pool.
    They are kept in fmeta's cache under a key of the trunk (its code, options, weights and statistics) and of the
    examples, so that the next run reads them. What the code reads from elsewhere, a global say, is not in the key.

    **Cost:** one pass over the pool at the first time; then nothing but the memory of the features.

    Args:
        pool: examples, as they are in ``Pool.x`` (bytes are scaled to 0 .. 1 first, as the samplers do); or all
            three splits.
        trunk: ``x -> features [n, *feature]``, ``fmeta.split``'s first half say, in evaluation mode: each example's
            features must not depend on the others.
        batch_size: examples at a time.
        device: where the trunk runs; by default where the pool is. The result lies where the pool does.

    Raises:
        TypeError: if the trunk is no module, or gives other than one tensor; if examples are several tensors.
        ValueError: if it is in training mode or normalises by the batch.

    >>> from fmeta.data import from_tensors
    >>> pools = from_tensors(torch.rand(6, 3), torch.arange(6) % 3)
    >>> embedded(pools.train, nn.Linear(3, 8).eval()).x.shape
    torch.Size([4, 8])
    """
    check_trunk(CALL, trunk)
    if batch_size < 1:
        raise ValueError(f"{CALL}: batch_size must be at least 1, got {batch_size}.")
    parts = (pool,) if isinstance(pool, Pool) else (pool.train, pool.val, pool.test)
    for part in parts:
        if not isinstance(part.x, Tensor):
            raise TypeError(
                f"{CALL}: pool.x must be one tensor, got {type(part.x).__name__}. For texts and other trees of "
                "tensors use fmeta.data.prepared_pool(pool, lambda x: trunk(**x)), which keeps them in memory."
            )
    identity = digest_of(trunk)
    found = [_embedded(part, trunk, identity, batch_size, device) for part in parts]
    return Pools(*found) if isinstance(pool, Pools) else found[0]


def _embedded(
    pool: Pool, trunk: nn.Module, identity: str, batch_size: int, device: torch.device | str | None
) -> Pool:
    if not len(pool.x):
        return pool
    where = pool.x.device if device is None else torch.device(device)

    def build() -> Examples:
        return Examples(
            computed(copy.deepcopy(trunk).to(where), pool.x, batch_size, where), pool.y.cpu(), pool.names
        )

    # The device is in the key: another one rounds differently.
    key = [identity, tensor_digest(pool.x), tensor_digest(pool.y), list(pool.names), where.type]
    x = cached("features", key, build).x
    return Pool(x.to(pool.x.device), pool.y, pool.names, pool.rows, pool.counts)


def computed(trunk: nn.Module, x: Tensor, batch_size: int, where: torch.device) -> Tensor:
    """Features of all examples, on the CPU."""
    one = lambda part: _checked(trunk(_floats(part.to(where)))).cpu()  # noqa: E731
    return torch.cat(passed(one, x, torch.arange(len(x)), batch_size))


def passed(prepare: Callable[[Any], Any], x: Tree, order: Tensor, batch: int) -> list[Any]:
    """What ``prepare`` makes of the examples, in this order, some at a time and without gradient."""
    with torch.no_grad(), calling_layers():
        return [
            prepare(tree.map(lambda leaf, r=rows: leaf[r.to(leaf.device)], x)) for rows in order.split(batch)
        ]


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
    parts = passed(lambda chosen: prepare(trim(chosen, lengths)), pool.x, order, batch)
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


def _floats(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x


def _checked(features: object) -> Tensor:
    if not isinstance(features, Tensor):
        raise TypeError(
            f"{CALL}: trunk must return one tensor of features, got {type(features).__name__}. Where several tensors "
            "cross a cut, cut elsewhere (at a whole block)."
        )
    return features


def check_trunk(call: str, trunk: nn.Module) -> None:
    """Refuse a trunk whose features of an example depend on more than the example."""
    if not isinstance(trunk, nn.Module):
        raise TypeError(f"{call}: trunk must be an nn.Module, got {type(trunk).__name__}. See fmeta.split.")
    for name, part in trunk.named_modules():
        norm = isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None
        if norm or (part.training and not _same_in_both_modes(part)):
            raise ValueError(
                f"{call}: features of an example must not depend on chance or on other examples, but "
                f"{type(part).__name__} at {name or 'the top'!r} "
                f"{'normalises by the batch' if norm else 'is in training mode'}. "
                f"{'Use a trunk with running statistics.' if norm else 'Call trunk.eval().'}"
            )


def _same_in_both_modes(part: nn.Module) -> bool:
    """Whether a module is one of torch's that is known not to look at its mode."""
    package, _, home = type(part).__module__.rpartition(".")
    if package != "torch.nn.modules":
        return False
    if home == "instancenorm":
        return not getattr(part, "track_running_stats", True)
    return home in MODELESS and not isinstance(part, nn.RReLU | nn.MultiheadAttention)


def weights_digest(module: nn.Module) -> str:
    """A checksum of a module's parameters and buffers."""
    whole = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        whole.update(f"{name} {tensor_digest(x)}".encode())
    return whole.hexdigest()
