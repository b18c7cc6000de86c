"""What a learned optimiser sees: numbers of each parameter and of each parameter tensor, free of their scale."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fmeta import rates, tree
from fmeta.learned.rule import mean_square, real, squashed
from fmeta.types import Tree

DECAYS = (0.9, 0.99, 0.999)
SQUARES = 0.999
EPS = 1e-8
TINY = 1e-12
"""Added to mean squares before a logarithm: sizes below a millionth count as that."""
FEATURES = 8
TOKEN = 12


class Moments(NamedTuple):
    """The state of ``meta_transformer``; the moments are those before bias correction."""

    t: Tensor  # [], int64: updates made so far
    mu: tuple[Tree, ...]  # like params, for each of DECAYS: mean of the gradients
    nu: Tree  # like params: mean of their squares
    progress: Tensor  # [2]: how far the size of gradients fell since the first one, quick and slow mean
    first: Tensor  # []: the logarithm of that first size


class Seen(NamedTuple):
    """One parameter tensor in one update; momenta are corrected for their start from zero."""

    param: Tensor
    grad: Tensor
    momenta: tuple[Tensor, ...]
    root: Tensor  # of the mean of squares, with eps
    adam: Tensor  # Adam's direction


def start(params: Tree) -> Moments:
    """Zeros."""
    zeros = tree.zeros_like(params)
    some = tree.leaves(params)[0]
    mu = tuple(tree.zeros_like(params) for _ in DECAYS)
    return Moments(rates.start_count(params), mu, zeros, some.new_zeros(2), some.new_zeros(()))


def correction(decay: float, t: Tensor) -> Tensor:
    """``1 - decay^t``."""
    return -torch.expm1(t * math.log(decay))


def corrected(grads: Tree, state: Moments, params: Tree, root: float) -> tuple[Moments, list[Seen]]:
    """The moments with one more gradient, and each tensor with its own."""
    t = state.t + 1
    mu = tuple(
        tree.map(lambda m, g, b=b: b * m + (1 - b) * g, old, grads)
        for b, old in zip(DECAYS, state.mu, strict=True)
    )
    nu = tree.map(lambda v, g: SQUARES * v + (1 - SQUARES) * g * g, state.nu, grads)
    now = real(t, params)
    over = [correction(b, now) for b in DECAYS]
    seen = []
    parts = zip(tree.leaves(params), tree.leaves(grads), tree.leaves(nu), *map(tree.leaves, mu), strict=True)
    for p, g, v, *ms in parts:
        size = torch.sqrt(v / correction(SQUARES, now) + root) + EPS
        momenta = tuple(m / c for m, c in zip(ms, over, strict=True))
        seen.append(Seen(p, g, momenta, size, momenta[0] / size))
    total = sum(one.grad.numel() for one in seen)
    log_size = 0.5 * torch.log(tree.squared_norm(grads) / total + TINY)
    first = torch.where(state.t == 0, log_size.detach(), state.first)
    keep = log_size.new_tensor([0.9, 0.99])
    progress = torch.where(state.t == 0, 0.0, keep * state.progress + (1 - keep) * (log_size - first) / 4)
    return Moments(t, mu, nu, progress, first), seen


def of_parameters(one: Seen) -> Tensor:
    """Numbers of each parameter, ``[FEATURES, numel]``: gradient and momenta by the root of the mean square, weight,
    momentum and gradient by their size in the tensor, and how large gradients are here within the tensor.
    """
    by_root = [squashed(x / one.root) for x in (one.grad, *one.momenta)]
    by_size = [
        squashed(x * torch.rsqrt(mean_square(x) + TINY)) for x in (one.param, one.momenta[0], one.grad)
    ]
    level = 0.5 * torch.log((one.root * one.root + TINY) / (mean_square(one.root) + TINY))
    return torch.stack([*by_root, *by_size, level / 4]).reshape(FEATURES, -1)


def of_tensor(one: Seen) -> Tensor:
    """Numbers of one tensor, ``[TOKEN]``: log-sizes, cosines between gradient and momenta, and its shape."""
    squares = torch.stack([mean_square(x) for x in (one.grad, *one.momenta, one.root, one.param, one.adam)])
    logs = 0.5 * torch.log(squares + TINY)
    grad, quick, slow, slower, root, weight, step = logs.unbind()
    relative = [grad - root, quick - root, slow - root, slower - root, step - weight, weight]
    pairs = [(one.grad, one.momenta[0]), *zip(one.momenta, one.momenta[1:], strict=False)]
    cosines = [
        (a * b).sum() / max(a.numel(), 1) * torch.rsqrt(mean_square(a) * mean_square(b) + TINY**2)
        for a, b in pairs
    ]
    shape = one.param.shape
    fan_out = shape[0] if shape else 1
    sizes = (
        one.param.ndim,
        math.log(max(fan_out, 1)),
        math.log(max(one.param.numel() // max(fan_out, 1), 1)),
    )
    shapes = [torch.full_like(grad, size / 4) for size in sizes]
    return torch.stack([*(x / 4 for x in relative), *cosines, *shapes])
