"""Small trainings on which optimisers are learned and compared: each a loss, and a sampler of tasks for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fmeta.data.pool import Pool
from fmeta.functional import functionalize
from fmeta.losses import cross_entropy
from fmeta.tasks.seeding import generator
from fmeta.types import Batch, LossFn, Params, Tree


class Training(NamedTuple):
    """One training: where it starts, on what, and for how long."""

    params: Params
    data: Batch  # [examples, ...], shuffled; a step takes the next ones, and begins anew at the end
    length: Tensor  # [], int64: steps


class Problem(NamedTuple):
    """A family of trainings of one shape."""

    name: str
    loss: LossFn
    sample: Callable[..., Training]
    """``(seed, step, tasks, length) -> Training`` with a leading axis; ``length`` a number or ``(least, most)``."""
    batch: int
    """Examples a step."""


def draw_lengths(length: int | tuple[int, int], tasks: int, source: torch.Generator) -> Tensor:
    """Lengths of tasks: all the same, or log-uniform in a range."""
    if isinstance(length, int):
        return torch.full((tasks,), length)
    least, most = map(math.log, length)
    return torch.exp(least + (most - least) * torch.rand(tasks, generator=source)).round().long()


def draw_params(like: Params, scale: Tensor, source: torch.Generator) -> Params:
    """Initial weights ``[task, ...]``: matrices of variance ``2 scale^2 / (fan in + fan out)``, others as given."""
    found = {}
    for name, p in like.items():
        if p.ndim < 2:
            found[name] = p.detach().expand(len(scale), *p.shape).clone()
            continue
        inner = p[0, 0].numel() if p.ndim > 2 else 1
        deviation = math.sqrt(2 / ((p.shape[0] + p.shape[1]) * inner))
        noise = torch.randn(len(scale), *p.shape, generator=source)
        found[name] = noise * deviation * scale.reshape(-1, *[1] * p.ndim)
    return found


def spread(tasks: int, factor: float, source: torch.Generator) -> Tensor:
    """Log-uniform numbers between ``1 / factor`` and ``factor``."""
    return torch.exp(math.log(factor) * (2 * torch.rand(tasks, generator=source) - 1))


def images(
    pool: Pool,
    module: nn.Module,
    *,
    name: str = "images",
    classes: int = 20,
    size: int = 8,
    batch: int = 32,
    varied: bool = True,
) -> Problem:
    """Classification of some classes of a pool by a module of ``[n, C, size, size] -> [n, classes]``.

    Args:
        pool: pictures, uint8 or floating; they are shrunk to ``size``.
        module: the network; its matrices are drawn anew for each task.
        name: of the family.
        classes: classes of a task, drawn for each.
        size: of the pictures, in pixels.
        batch: examples a step.
        varied: draw the scales of initial weights and of pictures as well, within a factor of 2.

    Raises:
        ValueError: for a pool with fewer classes.
    """
    if len(pool.names) < classes:
        raise ValueError(f"images: the pool must have {classes} classes or more, got {len(pool.names)}.")
    apply, params = functionalize(module)
    x = pool.x.float() / (255 if pool.x.dtype == torch.uint8 else 1)
    x = nn.functional.adaptive_avg_pool2d(x, size)
    x = (x - x.mean()) / x.std()
    each = int(pool.counts.min())

    def sample(seed: int, step: int, tasks: int, length: int | tuple[int, int]) -> Training:
        source = generator(seed, step)
        factor = 2.0 if varied else 1.0
        chosen = torch.stack(
            [torch.randperm(len(pool.names), generator=source)[:classes] for _ in range(tasks)]
        )
        rows = pool.rows[chosen][:, :, :each].reshape(tasks, -1)
        order = torch.stack([torch.randperm(rows.shape[1], generator=source) for _ in range(tasks)])
        labels = torch.arange(classes).repeat_interleave(each)[order]
        pictures = x[rows.gather(1, order)] * spread(tasks, factor, source).reshape(-1, 1, 1, 1, 1)
        start = draw_params(params, spread(tasks, factor, source), source)
        return Training(start, Batch(pictures, labels), draw_lengths(length, tasks, source))

    return Problem(name, cross_entropy(apply), sample, batch)


def quadratics(dim: int = 20, *, conditioning: float = 100.0) -> Problem:
    """``1/2 |A x - b|^2`` with singular values of ``A`` log-uniform between 1 and ``1 / sqrt(conditioning)``.

    Args:
        dim: numbers in x.
        conditioning: largest ratio of curvatures.
    """

    def loss(params: Params, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return 0.5 * ((batch.x[0] @ params["x"] - batch.y[0]) ** 2).mean(), {}

    def sample(seed: int, step: int, tasks: int, length: int | tuple[int, int]) -> Training:
        source = generator(seed, step)
        u, _, v = torch.linalg.svd(torch.randn(tasks, dim, dim, generator=source))
        values = torch.exp(-0.5 * math.log(conditioning) * torch.rand(tasks, 1, dim, generator=source))
        start = {"x": torch.randn(tasks, dim, generator=source)}
        target = torch.randn(tasks, 1, dim, generator=source)
        return Training(
            start, Batch(((u * values) @ v)[:, None], target), draw_lengths(length, tasks, source)
        )

    return Problem("quadratics", loss, sample, 1)


def rosenbrock(dim: int = 10) -> Problem:
    """Curved valleys: ``mean of s (x[i+1] - x[i]^2)^2 + (1 - x[i])^2``, with a steepness ``s`` for each task.

    Args:
        dim: numbers in x, at least 2.
    """

    def loss(params: Params, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = params["x"]
        return (batch.x[0] * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).mean(), {}

    def sample(seed: int, step: int, tasks: int, length: int | tuple[int, int]) -> Training:
        source = generator(seed, step)
        steep = 10 * spread(tasks, 10.0, source).reshape(tasks, 1)
        start = {"x": 0.5 * torch.randn(tasks, dim, generator=source)}
        return Training(start, Batch(steep, torch.zeros(tasks, 1)), draw_lengths(length, tasks, source))

    return Problem("rosenbrock", loss, sample, 1)


def rows_of(data: Batch, t: Tensor, batch: int) -> Batch:
    """The examples of step ``t``: the next ``batch`` of them, from the beginning again at the end."""
    total = len(data.y)
    at = (t * batch + torch.arange(batch, device=t.device)) % total
    take: Callable[[Tree], Tree] = lambda leaf: leaf.index_select(0, at)  # noqa: E731
    return Batch(take(data.x), take(data.y))
