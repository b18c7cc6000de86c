"""The problems that ``--problems`` names, and the pictures they are about."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fmeta import data, models
from fmeta.data.pool import Pool, Pools, class_pool
from fmeta.learned import problems
from fmeta.learned.problems import Problem
from fmeta.learned.text import text as learned_text
from fmeta.train.learning.config import LearningTask

SIZE = 8
"""Height and width of the pictures."""


class Convolutions(nn.Module):
    """Two strided convolutions and a map of all their places."""

    def __init__(self, classes: int, channels: int = 12) -> None:
        """For pictures of one channel."""
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.head = nn.Linear(channels * (SIZE // 4) ** 2, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).flatten(1))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda classes: models.mlp([SIZE**2, 32, classes]),
    "tanh": lambda classes: models.mlp([SIZE**2, 32, classes], nn.Tanh),
    "deep": lambda classes: models.mlp([SIZE**2, 24, 24, classes]),
    "wide": lambda classes: models.mlp([SIZE**2, 128, classes]),
    "deeper": lambda classes: models.mlp([SIZE**2, 24, 24, 24, 24, classes]),
    "gelu": lambda classes: models.mlp([SIZE**2, 32, classes], nn.GELU),
    "conv": Convolutions,
}


def pools_of(task: LearningTask) -> Pools:
    """Pictures whose classes are divided into those to learn from, to validate and to test on."""
    if task.data == "glyphs":
        return data.glyphs()
    if task.data == "omniglot":
        return data.omniglot(task.root)
    return digits()


def digits() -> Pools:
    """scikit-learn's 8 x 8 digits: 0 to 4 are trained on, 5 to 9 are for validation and test, other pictures each."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(found.images).float()[:, None] / 16
    y = torch.from_numpy(found.target)
    late = torch.arange(len(y)) % 2 == 1

    def pool(rows: torch.Tensor, classes: range, tag: str) -> Pool:
        kept = rows & (y >= classes.start) & (y < classes.stop)
        return class_pool(x[kept], y[kept] - classes.start, tuple(f"{digit}{tag}" for digit in classes))

    return Pools(
        train=pool(y >= 0, range(5), ""),
        val=pool(~late, range(5, 10), "a"),
        test=pool(late, range(5, 10), "b"),
    )


def make_problem(name: str, task: LearningTask, pool: Pool) -> Problem:
    """One problem by its name.

    Raises:
        ValueError: for a name that is none.
    """
    special: dict[str, Callable[[], Problem]] = {
        "quadratics": problems.quadratics,
        "rosenbrock": problems.rosenbrock,
        "text": learned_text,
    }
    if name in special:
        return special[name]()
    if name not in NETWORKS:
        known = [*NETWORKS, *special]
        raise ValueError(f"train: --problems must be among {', '.join(known)}, got {name!r}.")
    classes = min(task.classes, len(pool.names))
    module = NETWORKS[name](classes)
    return problems.images(pool, module, name=name, classes=classes, size=SIZE, batch=task.batch)


def make_problems(names: str, task: LearningTask, pool: Pool) -> list[Problem]:
    """Several of them, separated by commas."""
    return [make_problem(name.strip(), task, pool) for name in names.split(",")]
