"""Few-shot classification tasks from a pool of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fmeta import tree
from fmeta.data.pool import Pool
from fmeta.data.warp import quarter_turns, random_affine
from fmeta.tasks.checks import check_counts
from fmeta.tasks.seeding import generator
from fmeta.types import Batch, Sampler, Task, Tree

CALL = "few_shot"
Augment = Callable[[Tensor, torch.Generator], Tensor]
"""``(x, generator) -> x`` on all images of a step, ``[n, C, H, W]``; the generator is on the CPU."""


def few_shot(
    pool: Pool,
    *,
    ways: int,
    shots: int,
    queries: int,
    tasks: int,
    augment: str | Augment | Sequence[str | Augment] | None = None,
    device: torch.device | str | None = None,
) -> Sampler:
    """Sample tasks of ``ways`` classes with ``shots`` support and ``queries`` query examples of each.

    Classes of a task differ, and so do its examples: none is both support and query. Which class has which
    label, and the order of the examples, are random. Tasks are drawn as indices on the CPU, then gathered
    from the pool at once, so they do not depend on the device.

    Args:
        pool: the classes of one split, such as ``glyphs().train``.
        ways: classes a task.
        shots: support examples a class.
        queries: query examples a class.
        tasks: tasks a step.
        augment: ``"rotations"``, by which each class turned by 90, 180 and 270 degrees is a class of its own
            and the pool has four times as many; ``"affine"``, a small ``random_affine`` for each image; any
            ``(x, generator) -> x``; or a sequence of these, applied in order.
        device: where the pool is kept and tasks are made; by default where the pool is.

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

    Deviation: the MAML code draws different characters and then turns each, while here, as in the papers
    that count rotated classes, two rotations of one character may meet in a task.
    """
    check_counts(CALL, ways=ways, shots=shots, queries=queries, tasks=tasks)
    rotations, changes = parse(CALL, augment)
    _check_pool(pool, ways, shots + queries, rotations, bool(changes))
    pool = pool.to(pool.device if device is None else device)

    def sample(seed: int, step: int) -> Task:
        random = generator(seed, step)
        rows, turns = _draw(random, pool, tasks, ways, shots + queries, 4 if rotations else 1)
        labels = torch.arange(ways)[:, None].expand_as(rows)
        parts = [_shuffle(random, *[part[..., :shots] for part in (rows, turns, labels)])]
        parts += [_shuffle(random, *[part[..., shots:] for part in (rows, turns, labels)])]
        rows, turns, labels = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        x = _gather(pool.x, rows.flatten(), turns.flatten() if rotations else None)
        for change in changes:
            x = changed(CALL, change, x, random)
        found = (tree.map(lambda leaf: leaf.unflatten(0, rows.shape), x), labels.to(pool.device))
        cut = ways * shots
        part = lambda rows: Batch(*tree.map(lambda leaf: leaf[:, rows], found))  # noqa: E731
        return Task(part(slice(None, cut)), part(slice(cut, None)))

    return sample


def _draw(
    random: torch.Generator, pool: Pool, tasks: int, ways: int, examples: int, turns: int
) -> tuple[Tensor, Tensor]:
    """Rows of the pool and quarter turns, ``[task, ways, examples]`` each, without replacement."""
    classes = _choose(torch.rand(tasks, turns * len(pool.names), generator=random), ways)  # [task, ways]
    kinds = classes // turns
    keys = torch.rand(tasks, ways, pool.rows.shape[1], generator=random)
    padding = torch.arange(pool.rows.shape[1]) >= pool.counts[kinds][..., None]
    picks = _choose(keys.masked_fill_(padding, -1), examples)
    rows = pool.rows[kinds[..., None], picks]
    return rows, (classes % turns)[..., None].expand_as(rows)


def _choose(keys: Tensor, count: int) -> Tensor:
    """Positions of the largest random keys: a uniform choice without replacement, in random order."""
    return keys.topk(count).indices


def _shuffle(random: torch.Generator, *parts: Tensor) -> list[Tensor]:
    """Flatten ``[task, ways, examples]`` to ``[task, ways * examples]``, all parts in one random order."""
    flat = [part.flatten(1) for part in parts]
    order = _choose(torch.rand(flat[0].shape, generator=random), flat[0].shape[1])
    return [part.gather(1, order) for part in flat]


def _gather(x: Tree, rows: Tensor, turns: Tensor | None) -> Tree:
    examples = tree.map(lambda leaf: leaf[rows.to(leaf.device)], x)
    if turns is not None:
        examples = quarter_turns(examples, turns)
    return tree.map(floats, examples)


def floats(x: Tensor) -> Tensor:
    """Bytes as float32 in 0 .. 1."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def changed(call: str, change: Augment, x: Tensor, random: torch.Generator) -> Tensor:
    """Pictures after an augmentation."""
    found = change(x, random)
    if not isinstance(found, Tensor) or found.shape[:1] != x.shape[:1]:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{call}: augment must return one image for each of the {len(x)} it gets, got {got}. "
            "Map [n, C, H, W] to [n, ...]."
        )
    return found


def parse(call: str, augment: str | Augment | Sequence[str | Augment] | None) -> tuple[bool, list[Augment]]:
    """Whether rotations make classes, and what changes single images."""
    if augment is None:
        return False, []
    wanted = [augment] if isinstance(augment, str) or callable(augment) else list(augment)
    changes: list[Augment] = []
    for one in wanted:
        if callable(one):
            changes.append(one)
        elif one == "affine":
            changes.append(partial(random_affine))
        elif one != "rotations":
            raise ValueError(
                f"{call}: augment must be 'rotations', 'affine', a function (x, generator) -> x or a "
                f"sequence of these, got {one!r}. Choose one of them."
            )
    return "rotations" in wanted, changes


def _check_pool(pool: Pool, ways: int, examples: int, rotations: bool, changes: bool) -> None:
    if not isinstance(pool, Pool):
        raise TypeError(
            f"{CALL}: pool must be the Pool of one split, got {type(pool).__name__}. "
            "Pass pools.train, for example."
        )
    if not pool.names:
        raise ValueError(f"{CALL}: the pool must have classes, but its split is empty. Use another split.")
    classes = len(pool.names) * (4 if rotations else 1)
    if ways > classes:
        raise ValueError(
            f"{CALL}: ways must be at most the {classes} classes of the pool, got {ways}. Lower ways."
        )
    smallest = int(pool.counts.argmin())
    if examples > int(pool.counts[smallest]):
        raise ValueError(
            f"{CALL}: every class needs shots + queries = {examples} examples, but {pool.names[smallest]!r} "
            f"has {int(pool.counts[smallest])}. Lower shots or queries, or leave the class out."
        )
    if (rotations or changes) and not (isinstance(pool.x, Tensor) and pool.x.ndim == 4):
        got = f"x of shape {list(pool.x.shape)}" if isinstance(pool.x, Tensor) else f"x of {list(pool.x)}"
        raise ValueError(f"{CALL}: augment needs images [n, C, H, W], got {got}. Drop augment.")
    if rotations and pool.x.shape[-1] != pool.x.shape[-2]:
        raise ValueError(
            f"{CALL}: rotations need square images, got {list(pool.x.shape[-2:])}. "
            "Crop them, or drop 'rotations'."
        )
