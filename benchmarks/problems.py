"""From a cell to a network with tasks: what every peer is given."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import fmeta
from benchmarks.cells import Cell
from fmeta.types import Algorithm, Batch, Params, Task

VOCABULARY = 1000


@dataclass(frozen=True)
class Problem:
    """A cell made concrete; ``net`` is never changed, whoever trains takes a copy."""

    cell: Cell
    net: nn.Module
    tasks: Task
    loss: Callable[[Tensor, Tensor], Tensor]

    @property
    def params(self) -> Params:
        """The weights that the meta-gradient is of, by name."""
        return {name: p.detach() for name, p in self.net.named_parameters()}

    def double(self, tasks: int) -> Problem:
        """The first tasks in float64."""
        cast = lambda x: x[:tasks].double() if x.is_floating_point() else x[:tasks]  # noqa: E731
        return dataclasses.replace(
            self, net=copy.deepcopy(self.net).double(), tasks=tree_map(cast, self.tasks)
        )

    def algorithm(self) -> tuple[Algorithm, Params]:
        """fmeta's MAML on it, and the initial weights."""
        apply, params = fmeta.functionalize(self.net)
        losses = {
            nn.functional.mse_loss: fmeta.losses.mse,
            nn.functional.cross_entropy: fmeta.losses.cross_entropy,
        }
        loss_fn = losses[self.loss](apply)
        return fmeta.maml(loss_fn, fmeta.sgd(self.cell.lr), steps=self.cell.steps), params


def build(cell: Cell, device: str = "cpu") -> Problem:
    """Network and tasks of a cell, float32, from a fixed seed."""
    torch.manual_seed(0)
    net = network(cell).to(device)
    if cell.net == "mlp":
        sampler = fmeta.tasks.sinusoid(
            tasks=cell.tasks, shots=cell.shots, queries=cell.queries, device=device
        )
        return Problem(cell, net, sampler(0, 0), nn.functional.mse_loss)
    return Problem(cell, net, classification(cell, device), nn.functional.cross_entropy)


def network(cell: Cell) -> nn.Module:
    """The untrained network of a cell."""
    if cell.net == "mlp":
        return fmeta.models.mlp([1, cell.channels, cell.channels, 1])
    if cell.net == "conv4":
        return fmeta.models.conv4(ways=cell.ways, channels=cell.channels)
    if cell.net == "resnet12":
        return fmeta.models.resnet12(ways=cell.ways)
    if cell.net == "transformer":
        return Encoder(cell.channels, cell.size, cell.ways)
    return torchbench(cell.channels, cell.ways)


def classification(cell: Cell, device: str) -> Task:
    """Random inputs with balanced labels; what the numbers are does not matter for speed and memory."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Batch:
        y = torch.arange(cell.ways).repeat(cell.tasks, count)
        if cell.net == "transformer":
            x = torch.randint(VOCABULARY, (*y.shape, cell.size), generator=generator)
        else:
            shape = (3 if cell.net == "resnet12" else 1, cell.size, cell.size)
            x = torch.randn(*y.shape, *shape, generator=generator)
        return Batch(x.to(device), y.to(device))

    return Task(draw(cell.shots), draw(cell.queries))


class Encoder(nn.Module):
    """Token and position embeddings, two pre-norm encoder layers, mean over tokens, linear head.

    Attention is written out, because torch's fused attention has no second derivative for the peers.
    """

    def __init__(self, width: int, tokens: int, ways: int, heads: int = 4) -> None:
        """Two layers of this width, four times as wide inside."""
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, ways)

    def forward(self, tokens: Tensor) -> Tensor:  # noqa: D102
        x = self.embedding(tokens) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(-2))


class EncoderLayer(nn.Module):
    """Self-attention and a two-layer network, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        """Attention of ``heads`` heads."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        n, tokens, width = x.shape
        split = lambda t: t.reshape(n, tokens, self.heads, width // self.heads).transpose(1, 2)  # noqa: E731
        q, k, v = map(split, self.qkv(self.norm1(x)).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def torchbench(channels: int, ways: int) -> nn.Module:
    """Three blocks of unpadded convolution, batch norm, ReLU and max-pool: 28x28 becomes one position."""
    block = lambda n: (  # noqa: E731
        nn.Conv2d(n, channels, 3),
        nn.BatchNorm2d(channels, track_running_stats=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    return nn.Sequential(
        *block(1), *block(channels), *block(channels), nn.Flatten(), nn.Linear(channels, ways)
    )
