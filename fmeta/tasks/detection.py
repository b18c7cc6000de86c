"""Few-shot detection tasks: some classes, and a few pictures of each, with all that is seen of these classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fmeta import tree
from fmeta.data.featured import Featured
from fmeta.tasks.checks import check_counts
from fmeta.tasks.seeding import generator
from fmeta.types import Batch, Task

CALL = "detection"
DetectionSampler = Callable[[int, int], list[Task]]
"""``(seed, step) -> tasks``, which may differ in shape; pure."""


def detection(
    sources: Featured | Sequence[Featured],
    *,
    ways: int | tuple[int, int],
    shots: int,
    queries: int,
    tasks: int,
    steps: int | None = None,
    batch: int = 4,
) -> DetectionSampler:
    """Sample tasks of ``ways`` classes, with ``shots`` support and ``queries`` query pictures of each.

    A picture of a class shows at least one object of it; all of a task are different. Every object of the task's
    classes in them counts, also beyond ``shots``. Objects of other classes are not labelled, so they are
    background: as for a user who draws boxes around what is asked for and nothing else.

    Args:
        sources: pools with features; task ``i`` of a step is from source ``i`` modulo their number.
        ways: classes of a task, or fewest and most; a source with fewer classes gives all it has.
        shots: support pictures of a class.
        queries: query pictures of a class.
        tasks: tasks a step.
        steps: inner steps that see ``batch`` support pictures each, drawn anew when all were seen; None for all
            pictures in every step.
        batch: see ``steps``.

    Returns:
        ``(seed, step) -> [Task, ...]``. ``x`` is ``{"features", "sizes"}``, of the support also ``"order"``; ``y`` is
        ``{"boxes", "labels"}``, as ``fmeta.models.detection`` takes them; labels are in 1 .. ways.

    Raises:
        ValueError: for a count below 1, or classes with too few pictures.
    """
    sources = [sources] if isinstance(sources, Featured) else list(sources)
    low, high = (ways, ways) if isinstance(ways, int) else ways
    check_counts(CALL, ways=low, shots=shots, queries=queries, tasks=tasks, batch=batch)
    if not sources or high < low:
        raise ValueError(
            f"{CALL}: sources must hold a pool and ways must grow, got {len(sources)} pools and {ways}."
        )
    holds = [source.pool.holds() for source in sources]
    for source, held in zip(sources, holds, strict=True):
        _check_enough(source, held, low, shots + queries)

    def sample(seed: int, step: int) -> list[Task]:
        random, found = generator(seed, step), []
        for task in range(tasks):
            source, held = sources[task % len(sources)], holds[task % len(sources)]
            most = min(high, held.shape[1])
            count = int(torch.randint(min(low, most), most + 1, (), generator=random))
            classes = torch.randperm(held.shape[1], generator=random)[:count] + 1
            support, query = draw(held, classes, shots, queries, random)
            order = None if steps is None else rounds(len(support), steps, batch, random)
            found.append(make_task(source, classes, support, query, order))
        return found

    return sample


def draw(
    holds: Tensor, classes: Tensor, shots: int, queries: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Pictures of a task, ``shots`` and ``queries`` of each class, all different.

    Args:
        holds: what ``BoxPool.holds`` says, ``[n, classes]``.
        classes: labels in the pool, from 1 on.
        shots: support pictures of a class; fewer where pictures of other classes took the last ones.
        queries: query pictures of a class.
        random: what they are drawn from.
    """
    free, parts = holds.clone(), ([], [])  # type: tuple[Tensor, tuple[list[Tensor], list[Tensor]]]
    # The rarest class first, or pictures of the others use up those that show it.
    for label in sorted(classes.tolist(), key=lambda label: int(holds[:, label - 1].sum())):
        rows = free[:, label - 1].nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=random)][: shots + queries]
        if len(rows) <= min(queries, 1):
            raise ValueError(
                f"{CALL}: every class of a task needs pictures of its own, got {len(rows)} of class {label} beside "
                "those of the others. Lower ways, shots or queries."
            )
        free[rows] = False
        cut = min(shots, len(rows) - 1) if queries else shots
        parts[0].append(rows[:cut])
        parts[1].append(rows[cut:])
    return torch.cat(parts[0]), torch.cat(parts[1])


def rounds(count: int, steps: int, batch: int, random: torch.Generator) -> Tensor:
    """Which of ``count`` pictures each step sees, ``[steps, min(batch, count)]``: in rounds, all once in each."""
    batch = min(batch, count)
    needed = -(-steps * batch // count)
    order = torch.cat([torch.randperm(count, generator=random) for _ in range(needed)])
    return order[: steps * batch].view(steps, batch)


def pictures_of_step(batch: Batch, k: Tensor) -> Batch:
    """The pictures that inner step ``k`` sees: row ``k`` of ``x["order"]``, ``[steps, n]``, or all."""
    if "order" not in batch.x:
        return batch
    order = batch.x["order"]
    rows = order.index_select(0, (k % len(order))[None])[0]
    x = {name: part for name, part in batch.x.items() if name != "order"}
    return Batch(*tree.map(lambda leaf: leaf.index_select(0, rows), (x, batch.y)))


def make_task(
    source: Featured, classes: Tensor, support: Tensor, query: Tensor, order: Tensor | None = None
) -> Task:
    """The task of these pictures; class ``classes[i]`` of the pool has label ``i + 1`` in it."""
    first, second = (batch_of(source, classes, rows) for rows in (support, query))
    return Task(first if order is None else Batch({**first.x, "order": order}, first.y), second)


def batch_of(source: Featured, classes: Tensor, rows: Tensor) -> Batch:
    """Pictures with the objects of these classes; what else they show is not labelled."""
    pool = source.pool
    labels = torch.zeros(len(pool.names) + 1, dtype=torch.int64)
    labels[classes] = torch.arange(1, len(classes) + 1)
    x = {"features": source.maps(rows), "sizes": pool.sizes[rows]}
    return Batch(x, {"boxes": pool.boxes[rows], "labels": labels[pool.labels[rows]]})


def pictures(sources: Sequence[Featured], *, count: int) -> DetectionSampler:
    """Sample ``count`` pictures of every source as the query set of a task, with the classes of all sources.

    Labels of a source follow those of the sources before it. What a detector is trained on without episodes;
    the support set is the query set.
    """
    offsets = [sum(len(source.pool.names) for source in sources[:index]) for index in range(len(sources))]

    def sample(seed: int, step: int) -> list[Task]:
        random, found = generator(seed, step), []
        for source, offset in zip(sources, offsets, strict=True):
            rows = torch.randint(len(source.pool.files), (count,), generator=random)
            x, y = batch_of(source, torch.arange(1, len(source.pool.names) + 1), rows)
            labels = torch.where(y["labels"] > 0, y["labels"] + offset, 0)
            batch = Batch(x, {"boxes": y["boxes"], "labels": labels})
            found.append(Task(batch, batch))
        return found

    return sample


def _check_enough(source: Featured, held: Tensor, ways: int, pictures: int) -> None:
    counts, names = held.sum(0), source.pool.names
    if ways > len(names):
        raise ValueError(
            f"{CALL}: ways must be at most the {len(names)} classes of the pool, got {ways}. Lower ways."
        )
    rarest = int(counts.argmin())
    if int(counts[rarest]) < pictures:
        raise ValueError(
            f"{CALL}: every class needs shots + queries = {pictures} pictures, but {names[rarest]!r} is on "
            f"{int(counts[rarest])}. Lower shots or queries, or leave the class out."
        )
