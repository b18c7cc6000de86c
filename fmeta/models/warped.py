"""Warp layers: meta-learned layers between those that adapt, which shape every inner gradient."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fmeta.parts.select import Pattern, matches


def warped(module: nn.Module, at: Pattern = ("*", "!head")) -> nn.Module:
    """A copy of a network with a linear warp layer after each linear or convolutional layer.

    ``x -> warp(layer(x))`` with ``warp`` a square ``nn.Linear``, or a ``nn.Conv2d`` of kernel 1 over channels. It
    starts as the identity, so that the network computes what it did. Parameters of a layer ``name`` become
    ``name.layer.*``, and those of its warp are ``name.warp.*``.

    Meta-learn it with ``fmeta.boil(loss_fn, inner, steps=..., keeps="*.warp")``: warps stay fixed while a task is
    learned, and a step of the layer before moves the output along ``warp warp^T grad`` instead of ``grad``.

    Args:
        module: a network of ``fmeta.models``, or another whose layers are called as modules.
        at: names of the layers to warp, as ``fmeta.select`` takes them; the default is all but the head. Other kinds
            of layers are left alone.

    Raises:
        ValueError: if no linear or two-dimensional convolutional layer matches.

    References:
        Lee, Choi, "Gradient-based meta-learning with learned layerwise metric and subspace", 2018,
        arXiv 1801.05558, section 3.1 (T-nets). Flennerhag et al., "Meta-learning with warped gradient descent", 2020,
        arXiv 1909.00025, section 2.2; there warps may be of any kind, written into a model by hand, and are trained
        on parameters that adaptation passes through instead of through adaptation as here.

    >>> sorted(name for name, _ in warped(nn.Sequential(nn.Linear(2, 3)), at="*").named_parameters())
    ['0.layer.bias', '0.layer.weight', '0.warp.bias', '0.warp.weight']
    """
    module = copy.deepcopy(module)
    kinds = {
        name: layer
        for name, layer in module.named_modules()
        if name and type(layer) in (nn.Linear, nn.Conv2d)
    }
    chosen = matches(at, [name for name, _ in module.named_modules() if name])
    found = [name for name in chosen if name in kinds]
    if not found:
        raise ValueError(
            f"warped: at must name linear or Conv2d layers, got {at!r} for a network with {sorted(kinds) or 'none'}."
        )
    for name in found:
        place, _, last = name.rpartition(".")
        setattr(module.get_submodule(place), last, Warped(kinds[name]))
    return module


class Warped(nn.Module):
    """A layer and its warp; what `warped` puts in its place."""

    def __init__(self, layer: Any) -> None:
        """The warp starts as the identity."""
        super().__init__()
        self.layer = layer
        size = layer.weight.shape[0]
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        convolution = isinstance(layer, nn.Conv2d)
        self.warp = nn.Conv2d(size, size, 1, **like) if convolution else nn.Linear(size, size, **like)
        (nn.init.dirac_ if convolution else nn.init.eye_)(self.warp.weight)
        self.warp.bias = nn.Parameter(torch.zeros(size, **like))

    def forward(self, x: Any) -> Any:  # noqa: D102
        return self.warp(self.layer(x))
