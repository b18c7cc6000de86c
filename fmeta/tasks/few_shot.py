"""Few-shot classification tasks from a pool of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fmeta import tree
from fmeta.data.pool import Pool
from fmeta.tasks.augment import Augment, Augments, changed, check_images, floats, gathered, parse
from fmeta.tasks.checks import check_counts
from fmeta.tasks.seeding import generator
from fmeta.tasks.shots import draw_shots, parse_shots
from fmeta.types import Batch, Sampler, Task

__all__ = ("Augment", "Augments", "changed", "few_shot", "floats", "parse")
CALL = "few_shot"


def few_shot(
    pool: Pool,
    *,
    ways: int,
    shots: int | range | Sequence[int],
    queries: int | None,
    tasks: int,
    augment: Augments = None,
    device: torch.device | str | None = None,
    query: Literal["per_class", "total"] = "per_class",
) -> Sampler:
    """Sample tasks of ``ways`` classes with ``shots`` support and ``queries`` query examples of each.

    Classes of a task differ, and so do its examples: none is both support and query. Which class has which
    label, and the order of the examples, are random. Tasks are drawn as indices on the CPU, then gathered
    from the pool at once, so they do not depend on the device.

    All tasks have one shape, at every step, whatever the shots are: unequal numbers of shots have a fixed sum.

    Args:
        pool: the classes of one split, such as ``glyphs().train``.
        ways: classes a task.
        shots: support examples a class. An int; or one number for each of the ``ways`` classes, dealt to the
            labels in random order; or a range such as ``range(1, 10)``: each task draws numbers in it whose mean is
            the range's (rounded down to a whole sum), all such draws being equally likely.
        queries: query examples a class; None for all that are not support, where all classes have equally many.
        tasks: tasks a step.
        augment: ``"rotations"``, by which each class turned by 90, 180 and 270 degrees is a class of its own
            and the pool has four times as many; ``"affine"``, ``"crop"``, ``"flip"``, ``"jitter"`` and
            ``"resized_crop"``, which change each image by amounts of its own (``fmeta.data.random_affine``,
            ``random_crop`` and so on say which); a transform of ``torchvision.transforms.v2``, called once an
            image; any ``(x, generator) -> x`` of all images; or a sequence of these, applied in order.
        device: where the pool is kept and tasks are made; by default where the pool is.
        query: ``"per_class"`` or ``"total"``: then the query set has ``queries`` examples altogether, drawn from
            all that is left of the task's classes, so that it may lack a class.

    Returns:
        ``(seed, step) -> Task``: ``support.x`` is ``[task, ways * shots, *feature]``, uint8 scaled to float32
        in 0 .. 1 (each leaf likewise where the pool has several), and ``support.y`` is ``[task, ways * shots]``
        int64 in ``0 .. ways - 1``; the query likewise with ``queries``.

    Raises:
        ValueError: a pool without classes, more ways than classes, a class with fewer than
            ``shots + queries`` examples, a count below 1, or an augmentation that does not fit.

    Example:
        >>> from fmeta.data import from_tensors
        >>> pools = from_tensors(torch.rand(40, 3), torch.arange(40) % 4, split=(1, 0, 0))
        >>> task = few_shot(pools.train, ways=2, shots=1, queries=5, tasks=8)(seed=0, step=0)
        >>> task.support.x.shape, task.query.y.shape
        (torch.Size([8, 2, 3]), torch.Size([8, 10]))
        >>> task = few_shot(pools.train, ways=2, shots=[1, 5], queries=None, tasks=1)(seed=0, step=0)
        >>> sorted(task.support.y[0].bincount().tolist()), len(task.query.y[0])
        ([1, 5], 14)

    References:
        Unequal shots: Ochal et al., Few-shot learning with class imbalance, 2021, arXiv 2101.02523, section 3,
        whose random imbalance has no fixed sum.

    Deviation: the MAML code draws different characters and then turns each, while here, as in the papers
    that count rotated classes, two rotations of one character may meet in a task.
    """
    check_counts(CALL, ways=ways, tasks=tasks)
    most, support = parse_shots(CALL, shots, ways)
    if query not in ("per_class", "total"):
        raise ValueError(f"{CALL}: query must be 'per_class' or 'total', got {query!r}. Choose one.")
    if queries is not None:
        check_counts(CALL, queries=queries)
    rotations, changes = parse(CALL, augment)
    turns = 4 if rotations else 1
    check_pool(CALL, pool, ways, turns)
    check_images(CALL, pool, rotations, bool(changes))
    _check_sizes(pool, ways, most, support, queries, query, turns)
    pool = pool if device is None else pool.to(device)
    per_class = queries if query == "per_class" else None
    # Of every class, the support comes first and the query after it; without a number a class, all is drawn.
    width = int(pool.counts.max()) if per_class is None else most + per_class

    def sample(seed: int, step: int) -> Task:
        random = generator(seed, step)
        classes = _choose(torch.rand(tasks, turns * len(pool.names), generator=random), ways)  # [task, ways]
        rows, sizes = _examples(random, pool, classes // turns, width)
        shares = draw_shots(random, shots, tasks, ways)[..., None]
        place = torch.arange(width)
        drawn = [_take(random, (place < shares)[..., :most], support, 0, width)]
        if per_class is not None:
            left, first, amount = torch.ones(tasks, ways, per_class, dtype=torch.bool), most, ways * per_class
        else:
            left, first = (place >= shares) & (place < sizes[..., None]), 0
            amount = queries or ways * width - support
        drawn += [_take(random, left, amount, first, width)]
        picks = torch.cat(drawn, 1)  # [task, support and query], into ways * width
        chosen = rows.flatten(1).gather(1, picks).flatten()
        labels = picks // width
        turned = (classes % turns).gather(1, labels).flatten() if rotations else None
        x = gathered(CALL, pool, chosen, turned, changes, random)
        found = Batch(tree.map(lambda leaf: leaf.unflatten(0, picks.shape), x), labels.to(tree.device(x)))
        part = lambda rows: tree.map(lambda leaf: leaf[:, rows], found)  # noqa: E731
        return Task(part(slice(None, support)), part(slice(support, None)))

    return sample


def _examples(random: torch.Generator, pool: Pool, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` rows of each class in random order ``[task, ways, count]``, and the sizes of the classes."""
    sizes = pool.counts[classes]
    keys = torch.rand(*classes.shape, pool.rows.shape[1], generator=random)
    padding = torch.arange(pool.rows.shape[1]) >= sizes[..., None]
    return pool.rows[classes[..., None], _choose(keys.masked_fill_(padding, -1), count)], sizes


def _choose(keys: Tensor, count: int) -> Tensor:
    """Positions of the largest random keys: a uniform choice without replacement, in random order."""
    return keys.topk(count).indices


def _take(random: torch.Generator, mask: Tensor, count: int, first: int, width: int) -> Tensor:
    """``count`` of the examples that a mask ``[task, ways, columns]`` allows, in random order.

    Returns:
        ``[task, count]`` positions in ``ways * width``; the mask's columns start at ``first``.
    """
    flat = mask.flatten(1)
    order = _choose(torch.rand(flat.shape, generator=random).masked_fill_(~flat, -1), count)
    columns = mask.shape[-1]
    return order // columns * width + first + order % columns


def check_pool(call: str, pool: Pool, ways: int, turns: int) -> None:
    """A pool of classes, and not fewer than the ways."""
    if not isinstance(pool, Pool):
        raise TypeError(
            f"{call}: pool must be the Pool of one split, got {type(pool).__name__}. "
            "Pass pools.train, for example."
        )
    if not pool.names:
        raise ValueError(f"{call}: the pool must have classes, but its split is empty. Use another split.")
    classes = len(pool.names) * turns
    if ways > classes:
        raise ValueError(
            f"{call}: ways must be at most the {classes} classes of the pool, got {ways}. Lower ways, or put more "
            "classes into this split."
        )


def _check_sizes(
    pool: Pool, ways: int, most: int, support: int, queries: int | None, query: str, turns: int
) -> None:
    """Every class must have enough examples, whichever classes meet in a task."""
    smallest, largest = int(pool.counts.argmin()), int(pool.counts.argmax())
    least = int(pool.counts[smallest])
    needed, said = (
        (most + queries, "shots + queries") if queries and query == "per_class" else (most, "shots")
    )
    if needed > least:
        raise ValueError(
            f"{CALL}: every class needs {said} = {needed} examples, but {pool.names[smallest]!r} "
            f"has {least}. Lower shots or queries, or leave the class out."
        )
    if queries is None and (query == "total" or least < int(pool.counts[largest])):
        raise ValueError(
            f"{CALL}: queries=None takes all examples of a class, so tasks have one shape only if classes have "
            f"equally many and query='per_class', got {pool.names[smallest]!r} with {least}, "
            f"{pool.names[largest]!r} with {int(pool.counts[largest])} and query={query!r}. Pass a number, or use "
            "variable_few_shot."
        )
    left = int(pool.counts.repeat_interleave(turns).sort().values[:ways].sum()) - support
    if left < (queries or 1):
        raise ValueError(
            f"{CALL}: the smallest {ways} classes leave {left} examples for the query, got queries={queries}. "
            "Lower shots or queries."
        )
