"""Regression tasks from measurements of many individuals: one child, patient or school is one task."""

from __future__ import annotations

import torch

from fmeta.data.families import Families
from fmeta.tasks.checks import check_counts
from fmeta.tasks.seeding import generator
from fmeta.types import Batch, Sampler, Task

CALL = "regression"


def regression(
    family: Families, *, shots: int, queries: int, tasks: int, device: torch.device | str | None = None
) -> Sampler:
    """Sample individuals, and of each ``shots`` support and ``queries`` query points, none of them both.

    Args:
        family: the tasks of one split, such as ``csv_families(path).train``.
        shots: support points of a task.
        queries: query points of a task; individuals with fewer points than ``shots + queries`` are left out.
        tasks: tasks a step, with replacement.
        device: where the tasks go; they are drawn on the CPU and do not depend on it.

    Returns:
        ``(seed, step) -> Task`` whose leaves are ``[task, shots, inputs]`` and ``[task, shots, 1]``, the query
        likewise.

    Raises:
        ValueError: where no individual has enough points.

    Example:
        >>> rows = torch.arange(12).view(3, 4)  # three individuals of four points
        >>> family = Families(torch.rand(12, 2), torch.rand(12, 1), rows, torch.tensor([4, 4, 4]), list("abc"))
        >>> regression(family, shots=3, queries=1, tasks=5)(seed=0, step=0).support.x.shape
        torch.Size([5, 3, 2])
    """
    check_counts(CALL, shots=shots, queries=queries, tasks=tasks)
    enough = (family.counts >= shots + queries).nonzero()[:, 0]
    if not len(enough):
        raise ValueError(
            f"{CALL}: a task needs shots + queries = {shots + queries} points, but the longest of "
            f"{len(family.counts)} has {int(family.counts.max())}. Lower shots or queries."
        )

    def sample(seed: int, step: int) -> Task:
        random = generator(seed, step)
        chosen = enough[torch.randint(len(enough), (tasks,), generator=random)]
        keys = torch.rand(tasks, family.rows.shape[1], generator=random)
        missing = torch.arange(family.rows.shape[1]) >= family.counts[chosen][:, None]
        order = keys.masked_fill_(missing, -1).topk(shots + queries).indices
        rows = family.rows[chosen[:, None], order]
        x, y = family.x[rows].to(device), family.y[rows].to(device)
        return Task(Batch(x[:, :shots], y[:, :shots]), Batch(x[:, shots:], y[:, shots:]))

    return sample
