"""Small networks as functions of a dict of weights, out of plain torch operations."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def mlp_weights(sizes: list[int], generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Weights:
    """Weights of a fully connected network: ``body.*`` for the first layers, ``head.*`` for the last."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights: Weights = {}
    for index, (wide, high) in enumerate(pairwise(sizes)):
        name = "head" if index == len(sizes) - 2 else f"body{index}"
        weights[f"{name}.weight"] = (draw(high, wide) / wide**0.5).to(dtype)
        weights[f"{name}.bias"] = (0.1 * draw(high)).to(dtype)
    return weights


def mlp(weights: Weights, x: Tensor, masks: list[Tensor] | None = None) -> Tensor:
    """Hidden layers with tanh, then a linear head; ``masks`` multiply the hidden values, as dropout does."""
    layers = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    for index, layer in enumerate(layers):
        x = x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
        if layer != "head":
            x = torch.tanh(x) if masks is None else torch.tanh(x) * masks[index]
    return x


def groupnorm_cnn_weights(
    channels: int, ways: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> Weights:
    """Two 3x3 convolutions with GroupNorm and a linear head on 8x8 images."""

    def draw(*shape: int, fan_in: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype) / fan_in**0.5

    weights: Weights = {}
    for index, inputs in enumerate((1, channels)):
        weights[f"conv{index}.weight"] = draw(channels, inputs, 3, 3, fan_in=9 * inputs)
        weights[f"norm{index}.weight"] = 1 + draw(channels, fan_in=100)
        weights[f"norm{index}.bias"] = draw(channels, fan_in=100)
    weights["head.weight"] = draw(ways, channels * 4, fan_in=channels * 4)
    weights["head.bias"] = torch.zeros(ways, dtype=dtype)
    return weights


def groupnorm_cnn(weights: Weights, x: Tensor) -> Tensor:
    """Strided convolutions, GroupNorm of two groups, and ReLU, twice; then the linear head."""
    for index in range(2):
        x = F.conv2d(x, weights[f"conv{index}.weight"], stride=2, padding=1)
        x = F.group_norm(x, 2, weights[f"norm{index}.weight"], weights[f"norm{index}.bias"])
        x = F.relu(x)
    return x.flatten(-3) @ weights["head.weight"].T + weights["head.bias"]
