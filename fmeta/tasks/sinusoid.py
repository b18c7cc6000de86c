"""Regression on random sine waves, the first experiment of the MAML paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmeta.tasks.checks import check_counts
from fmeta.tasks.seeding import generator
from fmeta.types import Batch, Sampler, Task

AMPLITUDE, PHASE, INPUT = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)


def sinusoid(
    *,
    tasks: int = 25,
    shots: int = 10,
    queries: int = 10,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Sampler:
    """Sample sine waves ``y = amplitude * sin(x - phase)`` and points on them.

    Amplitudes are uniform in 0.1 .. 5, phases in 0 .. pi, inputs in -5 .. 5, without noise.

    Args:
        tasks: waves a step; the default is the paper's meta-batch.
        shots: support points of a wave; the default is the paper's for training.
        queries: query points of a wave.
        device: where the tasks go; they are drawn on the CPU and do not depend on it.
        dtype: floating; tasks are drawn in float64 and then rounded to it.

    Returns:
        ``(seed, step) -> Task`` whose leaves are ``[task, shots, 1]`` and ``[task, queries, 1]``.

    Example:
        >>> task = sinusoid(tasks=4, shots=5)(seed=0, step=0)
        >>> task.support.x.shape, task.query.y.shape
        (torch.Size([4, 5, 1]), torch.Size([4, 10, 1]))

    References:
        Finn, Abbeel, Levine, 2017, arXiv 1703.03400, section 5.1. The minus sign of the phase is their
        code's.
    """
    check_counts("sinusoid", tasks=tasks, shots=shots, queries=queries)
    if not dtype.is_floating_point:
        raise TypeError(f"sinusoid: dtype must be floating, got {dtype}. Pass torch.float32.")

    def sample(seed: int, step: int) -> Task:
        random = generator(seed, step)
        amplitude, phase = _draw_waves(random, tasks)
        x = _uniform(random, INPUT, tasks, shots + queries, 1)
        y = amplitude * torch.sin(x - phase)
        x, y = x.to(device, dtype), y.to(device, dtype)
        return Task(Batch(x[:, :shots], y[:, :shots]), Batch(x[:, shots:], y[:, shots:]))

    return sample


def sinusoid_waves(seed: int, step: int, *, tasks: int = 25) -> tuple[Tensor, Tensor]:
    """Amplitude and phase, ``[task, 1, 1]`` float64 each, of the waves that ``sinusoid`` samples.

    Example:
        >>> task = sinusoid(tasks=2, dtype=torch.float64)(seed=0, step=7)
        >>> amplitude, phase = sinusoid_waves(0, 7, tasks=2)
        >>> torch.equal(task.query.y, amplitude * torch.sin(task.query.x - phase))
        True
    """
    check_counts("sinusoid_waves", tasks=tasks)
    return _draw_waves(generator(seed, step), tasks)


def _draw_waves(random: torch.Generator, tasks: int) -> tuple[Tensor, Tensor]:
    return _uniform(random, AMPLITUDE, tasks, 1, 1), _uniform(random, PHASE, tasks, 1, 1)


def _uniform(random: torch.Generator, bounds: tuple[float, float], *shape: int) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=random, dtype=torch.float64)
