"""Small learned parts that are put into a large model: low-rank updates (LoRA) and bottleneck adapters.

Each returns a copy of a module that computes the same at first and keeps the names of its own parameters, so that
its weight files still load.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from fmeta.parts.select import Pattern, select
from fmeta.rates import positive
from fmeta.types import Params

PAST = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")
"""Modules (torchvision's Swin) that read the weights of their layers and never call them: nothing can be put there."""


def with_lora(
    module: nn.Module, targets: Pattern, *, rank: int = 8, alpha: float | None = None, seed: int = 0
) -> nn.Module:
    """A copy of a module whose chosen layers have a low-rank update: ``W + alpha / rank * B A``, ``B`` zero at first.

    Call it before ``functionalize``. The product ``B A`` is never formed, so that the weights ``W`` stay shared by
    all tasks. Names of the module's own parameters stay; each layer gains ``<layer>.lora_a`` ``[rank, in]`` and
    ``<layer>.lora_b`` ``[out, rank]``. To learn these alone: ``freeze(apply, params, "*.lora_*")``. A layer with
    several names gets one update, under all of them.

    Args:
        module: any module with layers.
        targets: names of ``nn.Linear`` and ungrouped ``nn.Conv2d`` layers in it; others that match are passed over, as
            are those of Swin's attention, which torchvision never calls.
        rank: of the updates.
        alpha: their scale; the default is ``rank``, so that ``alpha / rank`` is 1.
        seed: of ``A``, drawn by Kaiming's uniform rule.

    Raises:
        ValueError: for a rank below 1, targets without such a layer, or a module that is itself a layer.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022, arXiv 2106.09685, equation 3.
    """
    if rank < 1:
        raise ValueError(f"with_lora: rank must be at least 1, got {rank}.")
    alpha = float(rank) if alpha is None else alpha
    positive("with_lora", "alpha", alpha)
    random = torch.Generator().manual_seed(seed)

    def put(layer: nn.Module) -> nn.Module | None:
        if type(layer) is nn.Linear:
            return LoraLinear(layer, rank, alpha / rank, random)
        if type(layer) is nn.Conv2d and layer.groups == 1:
            return LoraConv2d(layer, rank, alpha / rank, random)
        return None

    return replaced("with_lora", module, targets, "Linear or ungrouped Conv2d", put)


def with_adapters(module: nn.Module, targets: Pattern, *, size: int = 16) -> nn.Module:
    """A copy of a module with a bottleneck behind chosen linear layers: ``y + up(relu(down(y)))``.

    Call it before ``functionalize``. ``up`` is zero at first, so the copy computes what the module does. Names of
    the module's own parameters stay; each adapter adds ``<layer>.adapter.down.*`` and ``<layer>.adapter.up.*``.

    Args:
        module: any module.
        targets: names of ``nn.Linear`` layers in it; other layers that match are passed over.
        size: width of the bottleneck.

    Raises:
        ValueError: for a size below 1, targets without a linear layer, or a module that is itself a layer.

    References:
        Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019, arXiv 1902.00751, section 2.1.
        Deviation: behind any linear layer, and without a bias in ``down``.
    """
    if size < 1:
        raise ValueError(f"with_adapters: size must be at least 1, got {size}.")
    put = lambda layer: AdaptedLinear(layer, size) if type(layer) is nn.Linear else None  # noqa: E731
    return replaced("with_adapters", module, targets, "Linear", put)


def replaced(
    call: str, module: nn.Module, targets: Pattern, fits: str, put: Callable[[nn.Module], nn.Module | None]
) -> nn.Module:
    """A copy of a module with what ``put`` makes of the chosen layers in their places; None leaves a layer."""
    module = copy.deepcopy(module)
    layers = {name: layer for name, layer in module.named_modules(remove_duplicate=False) if name}
    if not layers:
        raise ValueError(
            f"{call}: module must hold layers, got {type(module).__name__}, which is a layer itself. Pass it as "
            "nn.Sequential(layer)."
        )
    chosen = dict.fromkeys(select(layers, targets).values())
    unused = {layer for part in module.modules() if type(part).__name__ in PAST for layer in part.children()}
    made = {layer: new for layer in chosen if layer not in unused and (new := put(layer)) is not None}
    if not made:
        raise ValueError(f"{call}: targets must match layers of type {fits}, got {targets!r}.")
    for name, layer in layers.items():
        if layer in made:
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, made[layer].train(layer.training))
    for part in module.modules():
        keep_slow(part, set(made.values()))
    return module


def keep_slow(part: Any, layers: set[nn.Module]) -> None:
    """Keep a transformer of torch that has such layers from its fast path, which reads weights past them."""
    if not isinstance(part, nn.TransformerEncoder | nn.TransformerEncoderLayer):
        return
    if not layers.isdisjoint(part.modules()):
        part.use_nested_tensor = False  # of an encoder
        part.activation_relu_or_gelu = (
            0  # of a layer: one of the conditions of the fast path, read by nothing else
        )


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank update."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float, random: torch.Generator) -> None:
        """Take over a layer's weights."""
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias, self.scale = layer.weight, layer.bias, scale
        self.lora_a = drawn(random, layer.weight.new_empty(rank, layer.in_features))
        self.lora_b = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return super().forward(x) + self.scale * linear(linear(x, self.lora_a), self.lora_b)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, rank={len(self.lora_a)}, scale={self.scale:g}"


class LoraConv2d(nn.Conv2d):
    """A convolution with a low-rank update: ``rank`` filters, then one of size 1."""

    def __init__(self, layer: nn.Conv2d, rank: int, scale: float, random: torch.Generator) -> None:
        """Take over a layer's weights."""
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "padding_mode",
        )
        options = {name: getattr(layer, name) for name in names}
        super().__init__(**options, bias=layer.bias is not None, device="meta")
        self.weight, self.bias, self.scale = layer.weight, layer.bias, scale
        self.lora_a = drawn(random, layer.weight.new_empty(rank, *layer.weight.shape[1:]))
        self.lora_b = nn.Parameter(layer.weight.new_zeros(layer.out_channels, rank, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        inside = self._conv_forward(x, self.lora_a, None)
        return super().forward(x) + self.scale * conv2d(inside, self.lora_b)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, rank={len(self.lora_a)}, scale={self.scale:g}"


class AdaptedLinear(nn.Linear):
    """A linear layer with a bottleneck behind it."""

    def __init__(self, layer: nn.Linear, size: int) -> None:
        """Take over a layer's weights."""
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.adapter = Bottleneck(layer.out_features, size).to(layer.weight)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = super().forward(x)
        return y + self.adapter(y)


class Bottleneck(nn.Module):
    """``up(relu(down(y)))``, zero at first."""

    def __init__(self, width: int, size: int) -> None:
        """From ``width`` to ``size`` and back."""
        super().__init__()
        self.down, self.up = nn.Linear(width, size, bias=False), nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, y: Tensor) -> Tensor:  # noqa: D102
        return self.up(torch.relu(self.down(y)))


def drawn(random: torch.Generator, like: Tensor) -> nn.Parameter:
    """Uniform in +- 1 / sqrt(inputs of a filter), Kaiming's rule with the slope that LoRA's code has."""
    draw = 2 * torch.rand(like.shape, generator=random, dtype=torch.float64) - 1
    return nn.Parameter((draw / like[0].numel() ** 0.5).to(like))


def merged(params: Params, *, alpha: float | None = None) -> Params:
    """Weights with their low-rank updates added, under the names of the module without them.

    Args:
        params: all parameters of a model that ``with_lora`` made.
        alpha: what ``with_lora`` was given.

    Raises:
        ValueError: for an update whose weight is not there.
    """
    plain = {name: p for name, p in params.items() if not name.endswith((".lora_a", ".lora_b"))}
    for name, a in params.items():
        if not name.endswith(".lora_a"):
            continue
        layer = name.removesuffix(".lora_a")
        if f"{layer}.weight" not in plain:
            raise ValueError(
                f"merged: params must hold {layer}.weight, got {name} without it. Pass all of them."
            )
        scale = 1.0 if alpha is None else alpha / len(a)
        weight = plain[f"{layer}.weight"]
        change = params[f"{layer}.lora_b"].flatten(1) @ a.flatten(1)
        plain[f"{layer}.weight"] = weight + scale * change.reshape(weight.shape)
    return plain
