"""Pools of features: what a frozen trunk makes of every example, computed once and kept on disk."""

from __future__ import annotations

import copy
import hashlib
import inspect
from typing import TypeVar

import torch
from torch import Tensor, nn

from fmeta.data.cache import cached
from fmeta.data.mapped import Examples
from fmeta.data.pool import Pool, Pools

CALL = "embedded"
PoolT = TypeVar("PoolT", Pool, Pools)


def embedded(
    pool: PoolT, trunk: nn.Module, *, batch_size: int = 256, device: torch.device | str | None = None
) -> PoolT:
    """The pool with what ``trunk`` makes of each example in place of the example.

    The trunk runs once over the pool, without gradient; tasks are then sampled from its results as from any pool.
    They are kept in fmeta's cache under a key of the trunk (its code, weights and statistics) and of the examples,
    so that the next run reads them.

    **Cost:** one pass over the pool at the first time; then nothing but the memory of the features.

    Args:
        pool: examples, as they are in ``Pool.x`` (bytes are scaled to 0 .. 1 first, as the samplers do); or all
            three splits.
        trunk: ``x -> features [n, *feature]``, ``fmeta.split``'s first half say, in evaluation mode: each example's
            features must not depend on the others.
        batch_size: examples at a time.
        device: where the trunk runs; by default where the pool is. The result lies where the pool does.

    Raises:
        TypeError: if the trunk is no module, or gives other than one tensor.
        ValueError: if it is in training mode or normalises by the batch.

    >>> from fmeta.data import from_tensors
    >>> pools = from_tensors(torch.rand(6, 3), torch.arange(6) % 3)
    >>> embedded(pools.train, nn.Linear(3, 8).eval()).x.shape
    torch.Size([4, 8])
    """
    check_trunk(CALL, trunk)
    if batch_size < 1:
        raise ValueError(f"{CALL}: batch_size must be at least 1, got {batch_size}.")
    identity = digest_of(trunk)
    if isinstance(pool, Pools):
        parts = (pool.train, pool.val, pool.test)
        return Pools(*[_embedded(part, trunk, identity, batch_size, device) for part in parts])
    return _embedded(pool, trunk, identity, batch_size, device)


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
    with torch.no_grad():
        return torch.cat([_checked(trunk(_floats(part.to(where)))).cpu() for part in x.split(batch_size)])


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
        if norm or (
            part.training and (list(part.buffers(recurse=False)) or "drop" in type(part).__name__.lower())
        ):
            raise ValueError(
                f"{call}: features of an example must not depend on chance or on other examples, but "
                f"{type(part).__name__} at {name or 'the top'!r} "
                f"{'normalises by the batch' if norm else 'is in training mode'}. "
                f"{'Use a trunk with running statistics.' if norm else 'Call trunk.eval().'}"
            )


def tensor_digest(x: Tensor) -> str:
    """A checksum of a tensor's type, shape and content."""
    content = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    said = f"{x.dtype} {tuple(x.shape)}".encode()
    return hashlib.sha256(said + hashlib.sha256(content).digest()).hexdigest()


def weights_digest(module: nn.Module) -> str:
    """A checksum of a module's parameters and buffers."""
    whole = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        whole.update(f"{name} {tensor_digest(x)}".encode())
    return whole.hexdigest()


def digest_of(module: nn.Module) -> str:
    """A checksum of what a module computes: its code, options, parameters and buffers."""
    whole = hashlib.sha256(f"{torch.__version__} {module!r} {getattr(module, 'code', '')}".encode())
    for kind in sorted({type(part) for part in module.modules()}, key=lambda kind: kind.__qualname__):
        whole.update(_source(kind).encode())
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        whole.update(f"{name} {tensor_digest(x)}".encode())
    return whole.hexdigest()


def _source(kind: type) -> str:
    """The text of a class, so that a changed forward is another trunk; its name where there is none."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return f"{kind.__module__}.{kind.__qualname__}"
