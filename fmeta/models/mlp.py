"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """A fully connected network ``sizes[0] -> ... -> sizes[-1]``; images are flattened.

    Weights are drawn by Xavier's normal rule, biases are zero. Parameters are ``layers.<i>.weight`` and
    ``.bias`` for the hidden layers, ``head.weight`` and ``head.bias`` for the last.

    Args:
        sizes: widths, input first; ``[1, 40, 40, 1]`` is the network of the sinusoid experiment of MAML.
        activation: makes the module between layers.

    Raises:
        ValueError: if there are fewer than two sizes, or one is not positive.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", 2017, arXiv 1703.03400, section 5.1.
        Deviation: its code draws weights of standard deviation 0.01.
    """
    if len(sizes) < 2 or any(size < 1 for size in sizes):
        raise ValueError(f"mlp: sizes must be at least two positive widths, got {list(sizes)}.")
    return MLP(sizes, activation)


class MLP(nn.Module):
    """What `mlp` returns: ``[shots, *feature] -> [shots, sizes[-1]]``."""

    def __init__(self, sizes: Sequence[int], activation: Callable[[], nn.Module]) -> None:
        """Layers of these widths."""
        super().__init__()
        pairs = list(pairwise(sizes))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs[:-1])
        self.activation = activation()
        self.head = nn.Linear(*pairs[-1])
        for layer in (*self.layers, self.head):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = x.flatten(1)
        for layer in self.layers:
            x = self.activation(layer(x))
        return self.head(x)
