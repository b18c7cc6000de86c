"""UMTRA: few-shot tasks without labels, each picture a class of its own."""

from __future__ import annotations

import torch

from fmeta.data.pool import Pool
from fmeta.tasks.augment import Augments, changed, floats, parse
from fmeta.tasks.checks import check_counts
from fmeta.tasks.seeding import generator
from fmeta.types import Batch, Sampler, Task

CALL = "umtra"


def umtra(
    pool: Pool,
    *,
    ways: int,
    tasks: int,
    augment: Augments,
    shots: int = 1,
    queries: int = 1,
    device: torch.device | str | None = None,
) -> Sampler:
    """Sample tasks of ``ways`` random pictures, each with its changed copies as its class. Labels are not read.

    The first support example of a class is the picture itself; the others, and all queries, are pictures changed
    by ``augment``, each anew. Two of the pictures may be of one class, which the sampler cannot know: with 1200
    classes of equal size this happens to 0.8 % of 5-way tasks and 15 % of 20-way ones.

    Args:
        pool: the unlabelled pictures, such as ``omniglot(root).train``.
        ways: pictures a task.
        tasks: tasks a step.
        augment: as ``few_shot`` takes it, without rotations as classes; it decides what is learned.
        shots: support examples a class.
        queries: query examples a class.
        device: where tasks are made; by default where the pool is.

    Returns:
        ``(seed, step) -> Task`` as of ``few_shot``.

    Example:
        >>> from fmeta.data import from_tensors
        >>> pool = from_tensors(torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64), split=(1, 0, 0)).train
        >>> umtra(pool, ways=5, tasks=2, augment=("crop", "jitter"))(seed=0, step=0).query.x.shape
        torch.Size([2, 5, 1, 8, 8])

    References:
        Khodadadeh, Bölöni, Shah, "Unsupervised meta-learning for few-shot image classification", 2019,
        arXiv 1811.11819, algorithm 1.
    """
    check_counts(CALL, ways=ways, tasks=tasks, shots=shots, queries=queries)
    rotations, changes = parse(CALL, augment)
    if rotations or not changes:
        raise ValueError(
            f"{CALL}: augment must change single pictures, got {augment!r}. Use 'affine', or a function "
            "(x, generator) -> x."
        )
    if not isinstance(pool, Pool) or getattr(pool.x, "ndim", 0) != 4:
        raise TypeError(
            f"{CALL}: pool must be a Pool of pictures [n, C, H, W]. Pass pools.train, for example."
        )
    if ways > len(pool.x):
        raise ValueError(f"{CALL}: ways must be at most the {len(pool.x)} pictures, got {ways}. Lower ways.")
    pool = pool.to(pool.x.device if device is None else device)
    copies = shots + queries

    def sample(seed: int, step: int) -> Task:
        random = generator(seed, step)
        # no picture twice in a task; with many more pictures than ways, drawing again is rare
        rows = torch.stack([torch.randperm(len(pool.x), generator=random)[:ways] for _ in range(tasks)])
        x = floats(pool.x[rows.repeat_interleave(copies, 1).flatten().to(pool.x.device)])
        new = x
        for change in changes:
            new = changed(CALL, change, new, random)
        if new.shape != x.shape:
            raise ValueError(
                f"{CALL}: augment must keep the size of pictures, which meet unchanged ones, got {list(new.shape[1:])} "
                f"from {list(x.shape[1:])}. Resize the pool."
            )
        new = new.unflatten(0, (tasks, ways, copies))
        plain = x.unflatten(0, (tasks, ways, copies))[:, :, :1]
        x = torch.cat([plain.to(new), new[:, :, 1:]], 2)
        y = torch.arange(ways, device=x.device)[None, :, None].expand(tasks, ways, copies)
        parts = [(part[:, :, :shots].flatten(1, 2), part[:, :, shots:].flatten(1, 2)) for part in (x, y)]
        return Task(*(Batch(a, b) for a, b in zip(*parts, strict=True)))

    return sample
