"""Few-shot tasks of random numbers of classes and random, unequal numbers of examples, as Meta-Dataset has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fmeta import tree
from fmeta.data.pool import Pool
from fmeta.tasks.augment import Augments, check_images, gathered, parse
from fmeta.tasks.checks import check_counts
from fmeta.tasks.few_shot import check_pool
from fmeta.tasks.seeding import generator
from fmeta.types import Batch, Task

CALL = "variable_few_shot"


class Limits(NamedTuple):
    """What bounds the sizes of tasks."""

    ways: tuple[int, int]
    queries: int
    shots: int  # how much one class may add to the support set's size
    support: int


class Draw(NamedTuple):
    """One task as numbers: its classes, and how many examples of each are support and query."""

    classes: Tensor  # [ways], an index into the turned classes
    shots: Tensor  # [ways]
    queries: Tensor  # [ways]


def variable_few_shot(
    pool: Pool,
    *,
    tasks: int,
    ways: int | tuple[int, int] = (5, 50),
    queries: int | None = 10,
    max_shots: int = 100,
    max_support: int = 500,
    alike: bool = False,
    augment: Augments = None,
    device: torch.device | str | None = None,
) -> Callable[[int, int], list[Task] | Task]:
    """Sample tasks of Meta-Dataset's sizes: how many classes, and how many examples of each, is random.

    With ``size`` the number of examples of a class::

        n = uniform in ways, at most the pool's classes
        q = min(queries, min(size // 2))                              the same for each class
        support = min(max_support, sum(ceil(beta * min(max_shots, size - q)))),  beta uniform in (0, 1]
        share = exp(alpha) * size / sum(exp(alpha) * size),              alpha uniform in log(1/2) .. log(2)
        shots = min(floor(share * (support - n)) + 1, size - q)

    Shapes differ from task to task, so a step is a list for ``Plan(tasks="loop")``, and a loss must not depend on
    the number of ways: prototypes, say, or a head with outputs for the most ways. With ``alike`` the sizes are drawn
    once a step for all its tasks, which are stacked as those of ``few_shot`` are and run side by side; another step has
    another shape, which a compiled plan compiles anew, so set ``Plan(compile=False)``.

    Args:
        pool: the classes of one split; each needs 2 examples or more.
        tasks: tasks a step.
        ways: fewest and most classes a task, or one number for both.
        queries: most query examples a class; None for everything that is not support, at least what 10 would give.
        max_shots: how many examples of a class count at most for the support set's size.
        max_support: most support examples of a task.
        alike: one shape for all tasks of a step. The first is drawn as above; the classes of the others are drawn
            from those with enough examples, and their labels are in an order of their own.
        augment: as for ``few_shot``.
        device: where the pool is kept and tasks are made; by default where the pool is.

    Returns:
        ``(seed, step) -> list`` of tasks without a task axis, ``support.x`` ``[support, *feature]``; with ``alike``
        one ``Task`` whose leaves have the axis, ``support.x`` ``[task, support, *feature]``.

    Raises:
        ValueError: a class with fewer than 2 examples, more ways than classes or than ``max_support``, ``alike`` with
            ``queries=None``, or what ``few_shot`` refuses.

    Example:
        >>> from fmeta.data import from_tensors
        >>> pool = from_tensors(torch.rand(400, 3), torch.arange(400) % 10, split=(1, 0, 0)).train
        >>> drawn = variable_few_shot(pool, tasks=2)(seed=0, step=0)
        >>> [int(task.support.y.max()) + 1 for task in drawn]
        [10, 5]

    References:
        Triantafillou et al., Meta-Dataset: a dataset of datasets for learning to learn from few examples, 2020,
        arXiv 1903.03096, section 3.2 and its appendix on sampling. Their class hierarchies of ImageNet and Omniglot
        are not used; ``alike`` is not in the paper.
    """
    low, high = _parse_ways(ways)
    check_counts(CALL, tasks=tasks, max_shots=max_shots, max_support=max_support)
    if queries is not None:
        check_counts(CALL, queries=queries)
    rotations, changes = parse(CALL, augment)
    turns = 4 if rotations else 1
    check_pool(CALL, pool, low, turns)
    check_images(CALL, pool, rotations, bool(changes))
    limits = Limits((low, min(high, turns * len(pool.names))), queries or 10, max_shots, max_support)
    _check(pool, limits, alike, queries)
    pool = pool if device is None else pool.to(device)
    sizes = pool.counts.repeat_interleave(turns)

    def sample(seed: int, step: int) -> list[Task] | Task:
        random = generator(seed, step)
        first = _sizes(random, sizes, limits, everything=queries is None)
        others = tasks - 1
        draws = [first] + (
            [_like(random, sizes, first) for _ in range(others)]
            if alike
            else [_sizes(random, sizes, limits, everything=queries is None) for _ in range(others)]
        )
        drawn = [_pick(random, pool, draw, turns) for draw in draws]
        rows, turned = (torch.cat([one[part] for one in drawn]) for part in (0, 1))
        x = gathered(CALL, pool, rows, turned if rotations else None, changes, random)
        found, start = [], 0
        for draw, (chosen, _, label) in zip(draws, drawn, strict=True):
            rows_of = slice(start, start + len(chosen))
            one = Batch(tree.map(lambda leaf, r=rows_of: leaf[r], x), label.to(tree.device(x)))
            cut = int(draw.shots.sum())
            parts = (slice(None, cut), slice(cut, None))
            found.append(Task(*[tree.map(lambda leaf, p=part: leaf[p], one) for part in parts]))
            start += len(chosen)
        return tree.stack(found) if alike else found

    return sample


def _sizes(random: torch.Generator, sizes: Tensor, limits: Limits, everything: bool) -> Draw:
    """The formulas of the docstring."""
    ways = int(torch.randint(limits.ways[0], limits.ways[1] + 1, (), generator=random))
    classes = torch.randperm(len(sizes), generator=random)[:ways]
    size = sizes[classes]
    queries = min(limits.queries, int(size.min()) // 2)
    rest = size - queries
    beta = 1 - torch.rand((), generator=random, dtype=torch.float64)
    support = min(limits.support, int((beta * rest.clamp(max=limits.shots)).ceil().sum()))
    alpha = math.log(2) * (2 * torch.rand(ways, generator=random, dtype=torch.float64) - 1)
    weight = alpha.exp() * size
    shots = ((weight / weight.sum() * (support - ways)).floor().long() + 1).minimum(rest)
    return Draw(classes, shots, size - shots if everything else torch.full_like(shots, queries))


def _like(random: torch.Generator, sizes: Tensor, first: Draw) -> Draw:
    """Other classes with the same numbers of examples, and these numbers at other labels.

    The class with the most shots is chosen first, from those that are large enough. Each of the next has at least as
    many to choose from as it has predecessors, because the classes of ``first`` are large enough.
    """
    shots, order = first.shots.sort(descending=True)
    queries = first.queries[order]
    by_size = sizes.argsort(descending=True, stable=True).tolist()
    enough = (sizes >= (shots + queries)[:, None]).sum(1)
    draws = torch.rand(len(shots), generator=random, dtype=torch.float64)
    free = (draws * (enough - torch.arange(len(shots)))).long()
    classes = torch.tensor([by_size.pop(place) for place in free.tolist()])
    label = torch.randperm(len(shots), generator=random)
    return Draw(classes[label], shots[label], queries[label])


def _pick(random: torch.Generator, pool: Pool, draw: Draw, turns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the pool, their turns and labels, ``[examples]`` each: the support in random order, then the query."""
    kinds = draw.classes // turns
    size = pool.counts[kinds][:, None]
    place = torch.arange(int(size.max()))
    keys = torch.rand(len(kinds), len(place), generator=random).masked_fill_(place >= size, -1)
    rows = pool.rows[kinds[:, None], keys.argsort(1, descending=True)]
    shots, end = draw.shots[:, None], (draw.shots + draw.queries)[:, None]
    parts = []
    for mask in (place < shots, (place >= shots) & (place < end)):
        at = mask.nonzero()
        parts.append(at[torch.randperm(len(at), generator=random)])
    label, column = torch.cat(parts).unbind(1)
    return rows[label, column], (draw.classes % turns)[label], label


def _parse_ways(ways: object) -> tuple[int, int]:
    """The fewest and the most classes."""
    pair = (ways, ways) if isinstance(ways, int) else ways
    if isinstance(pair, tuple) and len(pair) == 2:
        low, high = pair
        if all(isinstance(one, int) and not isinstance(one, bool) for one in pair) and 1 <= low <= high:
            return low, high
    raise ValueError(
        f"{CALL}: ways must be a positive int or a pair (fewest, most), got {ways!r}. Put the smaller number first."
    )


def _check(pool: Pool, limits: Limits, alike: bool, queries: int | None) -> None:
    smallest = int(pool.counts.argmin())
    if int(pool.counts[smallest]) < 2:
        raise ValueError(
            f"{CALL}: every class needs 2 examples, one support and one query, but {pool.names[smallest]!r} has "
            f"{int(pool.counts[smallest])}. Leave the class out."
        )
    if limits.support < limits.ways[1]:
        raise ValueError(
            f"{CALL}: max_support must be at least the most ways = {limits.ways[1]}, got {limits.support}. Raise it, "
            "or lower ways."
        )
    if alike and queries is None:
        raise ValueError(
            f"{CALL}: alike=True needs one number of queries, got queries=None. Pass a number, or alike=False."
        )
