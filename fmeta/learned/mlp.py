"""``mlp``: one small network for every parameter, the learned optimiser of google/learned_optimization."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fmeta import rates, tree
from fmeta.learned.networks import Weights, linear
from fmeta.learned.rule import (
    TIMESCALES,
    LearnedOptimizer,
    learned_optimizer,
    mean_square,
    real,
    time_features,
)
from fmeta.tasks.checks import check_counts
from fmeta.types import Params, Transform, Tree

DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
SQUARES = 0.999
INPUTS = 2 + 2 * len(DECAYS) + 2 + len(TIMESCALES) + 3


class State(NamedTuple):
    """Means of gradients and of their squares."""

    t: Tensor  # [], int64
    mu: tuple[Tree, ...]  # like params, for each of DECAYS
    nu: Tree  # like params


def mlp(*, hidden: int = 32, layers: int = 2, lr: float = 1e-3) -> LearnedOptimizer:
    """A network for each parameter that sees its gradient, momenta, weight and the time: ``d, m = network(features)``.

    ``params -= lr * d * exp(1e-3 * m)``. It has to learn everything: at the start it moves at random.

    Args:
        hidden: width of its hidden layers.
        layers: their number.
        lr: scale of its steps.

    Returns:
        A ``LearnedOptimizer``.

    References:
        Metz et al., "Understanding and correcting pathologies in the training of learned optimizers", 2019, arXiv
        1810.10180, and ``small_fc_lopt`` of google/learned_optimization. Features: gradient, weight, six momenta, each
        momentum by the root of the mean square, that root's inverse and the gradient by it, each normalised by its
        mean square in the tensor; time by eleven hyperbolic tangents. The part of training that is over is ours.
    """

    check_counts("mlp", hidden=hidden, layers=layers)
    rates.positive("mlp", "lr", lr)

    def draw(seed: int) -> Params:
        weights = Weights(seed)
        sizes = [INPUTS, *[hidden] * layers, 2]
        for index, (inputs, outputs) in enumerate(pairwise(sizes)):
            weights.linear(f"policy.{index}", inputs, outputs)
        return weights.found

    def start(params: Tree) -> State:
        mu = tuple(tree.zeros_like(params) for _ in DECAYS)
        return State(rates.start_count(params), mu, tree.zeros_like(params))

    def make(theta: Params, steps: Tensor | float | None, root: float) -> Transform:
        def move(time: Tensor, p: Tensor, g: Tensor, v: Tensor, *ms: Tensor) -> Tensor:
            scale = torch.rsqrt(v + max(root, 1e-8))
            seen = [g, p, *ms, *(m * scale for m in ms), scale, g * scale]
            seen = [x * torch.rsqrt(1e-5 + mean_square(x)) for x in seen]
            x = torch.stack(seen, dim=-1).reshape(-1, len(seen))
            x = torch.cat([x, time.expand(len(x), -1)], dim=-1)
            for index in range(layers):
                x = torch.relu(linear(theta, f"policy.{index}", x))
            d, m = linear(theta, f"policy.{layers}", x).unbind(-1)
            return (-lr * d * torch.exp(1e-3 * m)).reshape(p.shape).to(p.dtype)

        def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
            t = state.t + 1
            mu = tuple(
                tree.map(lambda m, g, b=b: b * m + (1 - b) * g, old, grads)
                for b, old in zip(DECAYS, state.mu, strict=True)
            )
            nu = tree.map(lambda v, g: SQUARES * v + (1 - SQUARES) * g * g, state.nu, grads)
            time = time_features(real(t, params), steps)
            return tree.map(lambda *x: move(time, *x), params, grads, nu, *mu), State(t, mu, nu)

        return Transform(start, update)

    return learned_optimizer("mlp", {"hidden": hidden, "layers": layers, "lr": lr}, draw, make)
