"""Small networks written as functions of a dict of weights: linear maps and a transformer without positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fmeta.functional.norms import layer_norm
from fmeta.types import Params


class Weights:
    """Draws the weights of such networks from a seed, by name."""

    def __init__(self, seed: int) -> None:
        """Nothing is drawn yet."""
        self.generator = torch.Generator().manual_seed(seed)
        self.found: Params = {}

    def linear(self, name: str, inputs: int, outputs: int, scale: float = 1.0) -> None:
        """A map ``[inputs] -> [outputs]`` with normal weights of variance ``scale^2 / inputs``; 0 for zeros."""
        weight = torch.randn(inputs, outputs, generator=self.generator) * (scale / math.sqrt(inputs))
        self.found |= {f"{name}.weight": weight, f"{name}.bias": torch.zeros(outputs)}

    def transformer(self, name: str, width: int, layers: int) -> None:
        """The weights that ``transformer`` reads."""
        for layer in range(layers):
            self.linear(f"{name}.{layer}.qkv", width, 3 * width)
            self.linear(f"{name}.{layer}.out", width, width)
            self.linear(f"{name}.{layer}.up", width, 2 * width)
            self.linear(f"{name}.{layer}.down", 2 * width, width)


def linear(theta: Params, name: str, x: Tensor) -> Tensor:
    """``x @ weight + bias`` over the last dimension."""
    return x @ theta[f"{name}.weight"] + theta[f"{name}.bias"]


def by_columns(theta: Params, name: str, x: Tensor) -> Tensor:
    """``linear`` of many columns, ``[inputs, n] -> [outputs, n]``: a long dimension is best the last one."""
    return theta[f"{name}.weight"].mT @ x + theta[f"{name}.bias"][:, None]


def by_numbers(theta: Params, name: str, x: Sequence[Tensor]) -> list[Tensor]:
    """``by_columns`` written out, a tensor for each input and output: a kernel then keeps them in registers."""
    weight, bias = theta[f"{name}.weight"], theta[f"{name}.bias"]
    return [
        sum((a * w for a, w in zip(x, ws.unbind(), strict=True)), b)
        for ws, b in zip(weight.T, bias, strict=True)
    ]


def attention(theta: Params, name: str, x: Tensor, heads: int) -> Tensor:
    """Every token looks at all tokens: ``[token, width] -> [token, width]``."""
    tokens, width = x.shape
    q, k, v = (
        part.reshape(tokens, heads, width // heads).transpose(0, 1)
        for part in linear(theta, f"{name}.qkv", x).split(width, dim=-1)
    )
    weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(width // heads), dim=-1)
    return linear(theta, f"{name}.out", (weights @ v).transpose(0, 1).reshape(tokens, width))


def transformer(theta: Params, name: str, x: Tensor, layers: int, heads: int) -> Tensor:
    """Pre-norm layers of attention and a network of one hidden layer: ``[token, width] -> [token, width]``.

    There are no positions: exchanging tokens exchanges outputs.
    """
    shape = (x.shape[-1],)
    for layer in range(layers):
        x = x + attention(theta, f"{name}.{layer}", layer_norm(x, shape), heads)
        hidden = torch.relu(linear(theta, f"{name}.{layer}.up", layer_norm(x, shape)))
        x = x + linear(theta, f"{name}.{layer}.down", hidden)
    return layer_norm(x, shape)
