"""``lstm``: a recurrent network for every parameter, the first learned optimiser of deep learning."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fmeta import tree
from fmeta.learned.networks import Weights, linear
from fmeta.learned.rule import LearnedOptimizer, learned_optimizer
from fmeta.rates import positive
from fmeta.tasks.checks import check_counts
from fmeta.types import Params, Transform, Tree

P = 10.0
"""Gradients are seen from ``exp(-P)`` on."""


class State(NamedTuple):
    """Of every cell: ``[numel, hidden]`` for each parameter tensor."""

    short: tuple[Tree, ...]
    long: tuple[Tree, ...]


def lstm(*, hidden: int = 20, layers: int = 2, scale: float = 0.1, lr: float = 1.0) -> LearnedOptimizer:
    """An LSTM that reads the gradient of one parameter and says by how much it moves; all share its weights.

    ``params += lr * scale * readout(lstm(log|g| / 10, sign g))``. Its state is ``2 * layers * hidden``
    numbers a parameter.

    Args:
        hidden: width of a cell.
        layers: cells one above another.
        scale: of the output, the paper's 0.1.
        lr: factor of that, for one who wants smaller steps.

    Returns:
        A ``LearnedOptimizer``. ``steps`` has no effect.

    References:
        Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", 2016, arXiv
        1606.04474, section 2.1 and appendix A (p = 10). The cell is written out: torch's own has no rule
        for weights that differ by task.
    """

    check_counts("lstm", hidden=hidden, layers=layers)
    positive("lstm", "scale", scale)
    positive("lstm", "lr", lr)

    def draw(seed: int) -> Params:
        weights = Weights(seed)
        for layer in range(layers):
            weights.linear(f"cell.{layer}", (2 if layer == 0 else hidden) + hidden, 4 * hidden)
        weights.linear("readout", hidden, 1, scale=0.1)
        return weights.found

    def start(params: Tree) -> State:
        zeros = lambda: tree.map(lambda p: p.new_zeros(p.numel(), hidden), params)  # noqa: E731
        return State(tuple(zeros() for _ in range(layers)), tuple(zeros() for _ in range(layers)))

    def cell(theta: Params, layer: int, x: Tensor, short: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
        gates = linear(theta, f"cell.{layer}", torch.cat([x, short], dim=-1)).split(hidden, dim=-1)
        enter, forget, leave = (torch.sigmoid(gate) for gate in gates[:3])
        long = forget * long + enter * torch.tanh(gates[3])
        return leave * torch.tanh(long), long

    def make(theta: Params, steps: Tensor | float | None, root: float) -> Transform:
        def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
            leaves, spec = tree.flatten(params)
            moves, rows = [], []
            for index, (p, g) in enumerate(zip(leaves, tree.leaves(grads), strict=True)):
                x, after = read(g.reshape(-1)), []
                for layer in range(layers):
                    at = [tree.leaves(part[layer])[index] for part in state]
                    after.append(cell(theta, layer, x, *at))
                    x = after[-1][0]
                moves.append((lr * scale * linear(theta, "readout", x)).reshape(p.shape).to(p.dtype))
                rows.append(after)
            gather = lambda which: tuple(  # noqa: E731
                tree.unflatten([row[layer][which] for row in rows], spec) for layer in range(layers)
            )
            return tree.unflatten(moves, spec), State(gather(0), gather(1))

        return Transform(start, update)

    settings = {"hidden": hidden, "layers": layers, "scale": scale, "lr": lr}
    return learned_optimizer("lstm", settings, draw, make)


def read(g: Tensor) -> Tensor:
    """``(log|g| / p, sign g)`` where ``|g| >= exp(-p)``, else ``(-1, exp(p) g)``: ``[numel] -> [numel, 2]``."""
    least = math.exp(-P)
    small = g.abs() < least
    size = torch.where(small, torch.ones_like(g), g.abs())
    first = torch.where(small, torch.full_like(g, -1.0), torch.log(size) / P)
    return torch.stack([first, torch.where(small, g / least, torch.sign(g))], dim=-1)
