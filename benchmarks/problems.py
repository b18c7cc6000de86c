"""The models and tasks that several benchmarks run on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fmeta
from fmeta.types import Batch, Task


def classification(
    tasks: int, ways: int, shots: int, *shape: int, dtype: torch.dtype = torch.float32
) -> Task:
    """Random inputs with balanced labels; what the numbers are does not matter for speed and memory."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Batch:
        x = torch.randn(tasks, ways * shots, *shape, generator=generator, dtype=dtype)
        return Batch(x, torch.arange(ways).repeat(tasks, shots))

    return Task(draw(), draw())


def sinusoid(tasks: int) -> tuple[nn.Module, Any, Task]:
    """The MAML paper's regression problem: network, loss factory, tasks."""
    torch.manual_seed(0)
    return fmeta.models.mlp([1, 40, 40, 1]), fmeta.losses.mse, fmeta.tasks.sinusoid(tasks=tasks)(0, 0)


def omniglot_shape(tasks: int, channels: int = 64) -> tuple[nn.Module, Any, Task]:
    """conv4 on 28x28, 5 ways, 1 shot, 1 query a class."""
    torch.manual_seed(0)
    net = fmeta.models.conv4(ways=5, channels=channels)
    return net, fmeta.losses.cross_entropy, classification(tasks, 5, 1, 1, 28, 28)
