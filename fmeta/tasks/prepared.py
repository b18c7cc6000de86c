"""Samplers whose examples a frozen part of a model has seen already, and which are as short as their texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fmeta import tree
from fmeta.data.tokens import LENGTHS, trim
from fmeta.functional import calling_layers
from fmeta.types import Batch, Sampler, Task, Tree


def prepared(sampler: Sampler, prepare: Callable[[Tree], Tree]) -> Sampler:
    """The same tasks with what ``prepare`` makes of their examples: once a step, outside of the inner loop.

    All tasks and all shots are one batch for it, and it runs without gradient: for the frozen part of a model.

    Args:
        sampler: ``(seed, step) -> Task``.
        prepare: ``x -> x`` for examples ``[n, ...]``.

    Returns:
        A sampler whose ``x`` has the leaves of ``prepare(x)``, ``[task, shots, ...]``.

    Example:
        >>> from fmeta.data import from_tensors
        >>> from fmeta.tasks import few_shot
        >>> pools = from_tensors(torch.rand(40, 3), torch.arange(40) % 4, split=(1, 0, 0))
        >>> sampler = few_shot(pools.train, ways=2, shots=1, queries=5, tasks=8)
        >>> prepared(sampler, lambda x: x @ torch.ones(3, 7))(0, 0).query.x.shape
        torch.Size([8, 10, 7])
    """

    def part(batch: Batch) -> Batch:
        shape = batch.y.shape[:2]
        with torch.no_grad(), calling_layers():
            x = prepare(trim(tree.map(lambda leaf: leaf.flatten(0, 1), batch.x)))
        return Batch(tree.map(lambda leaf: leaf.unflatten(0, shape), x), batch.y)

    return lambda seed, step: Task(*map(part, sampler(seed, step)))


def trimmed(sampler: Sampler, lengths: Sequence[int] = LENGTHS) -> Sampler:
    """The same tasks of texts, cut to the smallest of a few lengths that holds them; other tasks stay.

    Support and query sets are cut each by itself.

    Args:
        sampler: ``(seed, step) -> Task``.
        lengths: to choose from. Few, so that few kernels are compiled.
    """

    def part(batch: Batch) -> Batch:
        return Batch(trim(batch.x, lengths), batch.y)

    return lambda seed, step: Task(*map(part, sampler(seed, step)))
