"""Optimisation rules under test, and the small problem they are run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fmeta import optim, tree
from fmeta.types import Transform

Make = Callable[[Any], Transform]


def masked_adam(lr: Any) -> Transform:
    return optim.masked(optim.adam(lr), lambda name: name.endswith("w"))


OPTIMISERS: list[tuple[str, Make]] = [
    ("sgd", lambda lr: optim.sgd(lr)),
    ("sgd-decay", lambda lr: optim.sgd(lr, weight_decay=0.1)),
    ("sgd-momentum", lambda lr: optim.sgd(lr, momentum=0.9)),
    ("sgd-dampening", lambda lr: optim.sgd(lr, momentum=0.9, dampening=0.3, weight_decay=0.1)),
    ("sgd-nesterov", lambda lr: optim.sgd(lr, momentum=0.9, nesterov=True)),
    ("adam", lambda lr: optim.adam(lr)),
    ("adam-decay", lambda lr: optim.adam(lr, b1=0.8, b2=0.9, weight_decay=0.1)),
    ("amsgrad", lambda lr: optim.adam(lr, b2=0.5, amsgrad=True)),
    ("adamw", lambda lr: optim.adamw(lr, weight_decay=0.1)),
    ("rmsprop", lambda lr: optim.rmsprop(lr)),
    ("rmsprop-momentum", lambda lr: optim.rmsprop(lr, alpha=0.9, momentum=0.5, weight_decay=0.1)),
    ("rmsprop-centered", lambda lr: optim.rmsprop(lr, alpha=0.9, centered=True)),
    ("adagrad", lambda lr: optim.adagrad(lr)),
    ("adagrad-decay", lambda lr: optim.adagrad(lr, lr_decay=0.1, weight_decay=0.1)),
    ("lion", lambda lr: optim.lion(lr, weight_decay=0.1)),
    ("clipped-norm", lambda lr: optim.chain(optim.clip_by_norm(0.5), optim.sgd(lr))),
    ("clipped-value", lambda lr: optim.chain(optim.clip_by_value(0.3), optim.adam(lr))),
    ("masked", masked_adam),
]
"""Every rule as ``(name, make)``; ``make(lr)`` takes any form of a rate."""

each_optimiser = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in OPTIMISERS])


def normal(shape: Sequence[int], draw: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def example_params(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """A matrix, a vector, a single number and a four-dimensional kernel."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"layer.w": (3, 2), "layer.b": (2,), "gain": (), "kernel.w": (2, 1, 2, 2)}
    return {
        name: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def matching(make: Make, params: Any) -> Any:
    """The parameters that a row updates: those a per-parameter rate for it is given for."""
    return {n: p for n, p in params.items() if n.endswith("w")} if make is masked_adam else params


def example_grads(params: Any, steps: int, seed: int = 1) -> Iterator[Any]:
    """Gradients as they may come: of changing size, and independent of the parameters."""
    draw = torch.Generator().manual_seed(seed)
    for k in range(steps):
        yield tree.map(lambda p, k=k: normal(p.shape, draw).to(p.dtype) / (1 + k), params)


def follow(rule: Transform, params: Any, grads: Iterator[Any]) -> tuple[Any, Any]:
    """Parameters and state after one update per gradient."""
    state = rule.init(params)
    for grad in grads:
        updates, state = rule.update(grad, state, params)
        params = tree.add(params, updates)
    return params, state
