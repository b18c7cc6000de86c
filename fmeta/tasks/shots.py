"""How many support examples each class of a task has: alike, dealt, or random with a fixed sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Shots = int | range | Sequence[int]


def parse_shots(call: str, shots: Shots, ways: int) -> tuple[int, int]:
    """The largest number of support examples of a class, and the number of all of a task."""
    if isinstance(shots, int) and not isinstance(shots, bool) and shots > 0:
        return shots, ways * shots
    if isinstance(shots, range) and shots.step == 1 and len(shots) and shots[0] > 0:
        return shots[-1], ways * (shots[0] + shots[-1]) // 2
    if isinstance(shots, Sequence) and not isinstance(shots, str | range):
        numbers = all(isinstance(one, int) and not isinstance(one, bool) and one > 0 for one in shots)
        if numbers and len(shots) == ways:
            return max(shots), sum(shots)
    raise ValueError(
        f"{call}: shots must be a positive int, got {shots!r}. Pass 1 or more, a range such as range(1, 10) or "
        f"{ways} numbers, one a class."
    )


def draw_shots(random: torch.Generator, shots: Shots, tasks: int, ways: int) -> Tensor:
    """Support examples of every class, ``[task, ways]``; each row has the same sum.

    An int is the same for all and draws nothing. Numbers, one a class, are dealt to the labels in random order, so
    that no label tells a class's size. A range gives each task one of all ways to share out its mean, each as
    likely as any other.
    """
    if isinstance(shots, int):
        return torch.full((tasks, ways), shots)
    if isinstance(shots, range):
        extra = ways * (shots[0] + shots[-1]) // 2 - ways * shots[0]
        return shots[0] + _shares(random, tasks, ways, shots[-1] - shots[0], extra)
    order = torch.rand(tasks, ways, generator=random).argsort(1)
    return torch.tensor(list(shots))[order]


def _shares(random: torch.Generator, tasks: int, parts: int, most: int, total: int) -> Tensor:
    """``[task, parts]`` integers in ``0 .. most`` with the sum ``total``, uniform among all such rows."""
    # ways[j][r] is the number of ways in which j parts have the sum r, up to a factor for each j.
    ways = [torch.zeros(total + 1, dtype=torch.float64)]
    ways[0][0] = 1
    for _ in range(parts - 1):
        sums = F.pad(ways[-1], (most, 0)).unfold(0, most + 1, 1).sum(1)
        ways.append(sums / sums.max())
    left = torch.full((tasks,), total)
    amounts = torch.arange(most + 1)
    columns = []
    for others in reversed(ways):
        rest = left[:, None] - amounts
        weights = torch.where(rest >= 0, others[rest.clamp(min=0)], 0.0)
        columns.append(torch.multinomial(weights, 1, generator=random)[:, 0])
        left = left - columns[-1]
    return torch.stack(columns, 1)
