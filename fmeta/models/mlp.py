"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(
    sizes: Sequence[int],
    activation: Callable[[], nn.Module] = nn.ReLU,
    *,
    context: int = 0,
    norm: bool = False,
) -> nn.Module:
    """A fully connected network ``sizes[0] -> ... -> sizes[-1]``; images are flattened.

    Weights are drawn by Xavier's normal rule, biases are zero. Parameters are ``layers.<i>.weight`` and
    ``.bias`` for the hidden layers, ``head.weight`` and ``head.bias`` for the last; ``norms.<i>.weight`` and
    ``.bias`` with ``norm``.

    Args:
        sizes: widths, input first; ``[1, 40, 40, 1]`` is the network of the sinusoid experiment of MAML.
        activation: makes the module between layers.
        context: further inputs, which are a parameter ``context`` (zeros at first) and the same for every
            example: what ``cavia`` adapts.
        norm: batch norm before every activation, by the statistics of the batch, as MAML's network for Omniglot
            without convolutions has, ``[784, 256, 128, 64, 64, 5]``.

    Raises:
        ValueError: if there are fewer than two sizes, or one is not positive, or ``context`` is negative.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", 2017, arXiv 1703.03400, sections 5.1, 5.2.
        Deviation: its code draws weights of standard deviation 0.01.
    """
    if len(sizes) < 2 or any(size < 1 for size in sizes):
        raise ValueError(f"mlp: sizes must be at least two positive widths, got {list(sizes)}.")
    if context < 0:
        raise ValueError(f"mlp: context must be at least 0, got {context}. It counts parameters.")
    return MLP(sizes, activation, context, norm)


class MLP(nn.Module):
    """What `mlp` returns: ``[shots, *feature] -> [shots, sizes[-1]]``."""

    def __init__(
        self, sizes: Sequence[int], activation: Callable[[], nn.Module], context: int = 0, norm: bool = False
    ) -> None:
        """Layers of these widths."""
        super().__init__()
        self.context = nn.Parameter(torch.zeros(context)) if context else None
        pairs = list(pairwise([sizes[0] + context, *sizes[1:]]))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs[:-1])
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(b, track_running_stats=False) if norm else nn.Identity() for _, b in pairs[:-1]
        )
        self.activation = activation()
        self.head = nn.Linear(*pairs[-1])
        for layer in (*self.layers, self.head):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = x.flatten(1)
        if self.context is not None:
            x = torch.cat([x, self.context.expand(len(x), -1)], 1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.activation(norm(layer(x)))
        return self.head(x)
