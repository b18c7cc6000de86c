"""What a learned optimiser sees: numbers of each parameter and of each parameter tensor, free of their scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmeta import rates, tree
from fmeta.learned.rule import squashed
from fmeta.types import Tree

DECAYS = (0.9, 0.99, 0.999)
SQUARES = 0.999
EPS = 1e-8
TINY = 1e-12
"""Added to mean squares before a logarithm: sizes below a millionth count as that."""
LARGE = 1e20
"""Products of mean squares from here on, or their derivatives, may be beyond float32."""
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


def averaged(grad: Tensor, mu: Sequence[Tensor], nu: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """The moments of one tensor with one more gradient."""
    mu = tuple(b * m + (1 - b) * grad for b, m in zip(DECAYS, mu, strict=True))
    return mu, SQUARES * nu + (1 - SQUARES) * grad * grad


def corrections(t: Tensor) -> Tensor:
    """``1 / (1 - decay^t)`` for each of ``DECAYS`` and for the squares, ``[4]``: factors, since divisions are slow."""
    return 1 / torch.stack([-torch.expm1(t * math.log(decay)) for decay in (*DECAYS, SQUARES)])


def seen(param: Tensor, grad: Tensor, mu: Sequence[Tensor], nu: Tensor, over: Tensor, root: float) -> Seen:
    """One tensor in one update, with its moments after it and what ``corrections`` gives."""
    *firsts, second = over.unbind()
    size = torch.sqrt(nu * second + root) + EPS
    momenta = tuple(m * c for m, c in zip(mu, firsts, strict=True))
    return Seen(param, grad, momenta, size, momenta[0] / size)


def sums(one: Seen) -> Tensor:
    """What is known of a whole tensor, ``[10]``: sums of squares (gradient, momenta, root, weight, Adam), products."""
    squares = [(x * x).sum() for x in (one.grad, *one.momenta, one.root, one.param, one.adam)]
    pairs = [(one.grad, one.momenta[0]), *zip(one.momenta, one.momenta[1:], strict=False)]
    return torch.stack([*squares, *((a * b).sum() for a, b in pairs)])


def scales(mean: Tensor) -> Tensor:
    """What ``of_parameters`` reads of the means of tensors, ``[tensors, 10] -> [tensors, 4]``: single numbers, computed
    outside of its loops.
    """
    inverse = torch.rsqrt(mean[:, [5, 1, 0]] + TINY)
    return torch.cat([inverse, 1 / (mean[:, 4:5] + TINY)], 1)


def progressed(state: Moments, squares: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """``progress`` and ``first`` after gradients with this sum of squares over ``numel`` parameters."""
    log_size = 0.5 * torch.log(squares / numel + TINY)
    first = torch.where(state.t == 0, log_size, state.first)
    keep = log_size.new_tensor([0.9, 0.99])
    return torch.where(state.t == 0, 0.0, keep * state.progress + (1 - keep) * (log_size - first) / 4), first


def of_parameters(one: Seen, scale: Tensor) -> list[Tensor]:
    """``FEATURES`` numbers of each parameter: gradient and momenta by the root of the mean square, weight, momentum and
    gradient by their size in the tensor, and how large gradients are here within the tensor.
    """
    param, quick, grad, root = scale.unbind()
    inverse = 1 / one.root
    by_root = [squashed(x * inverse) for x in (one.grad, *one.momenta)]
    by_size = [squashed(x) for x in (one.param * param, one.momenta[0] * quick, one.grad * grad)]
    level = 0.5 * torch.log((one.root * one.root + TINY) * root)
    return [*by_root, *by_size, level / 4]


def of_tensors(mean: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
    """Numbers of each tensor, ``[tensors, TOKEN]``: log-sizes, cosines between gradient and momenta, and its shape.

    All tensors at once, so that a kernel for a hundred of them is no longer than one for two.
    """
    grad, quick, slow, slower, root, weight, step = (0.5 * torch.log(mean[:, :7] + TINY)).unbind(1)
    relative = [grad - root, quick - root, slow - root, slower - root, step - weight, weight]
    a, b = mean[:, :3], mean[:, 1:4]
    near, far = torch.rsqrt(a * b + TINY**2), torch.rsqrt(a + TINY) * torch.rsqrt(b + TINY)
    cosines = mean[:, 7:] * torch.where(a * b < LARGE, near, far)
    return torch.cat([torch.stack(relative, 1) / 4, cosines, mean.new_tensor(list(map(sizes, shapes)))], 1)


def sizes(shape: torch.Size) -> tuple[float, float, float]:
    """What a token tells of a shape: dimensions, outputs and inputs."""
    fan_out = shape[0] if shape else 1
    fan_in = shape.numel() // max(fan_out, 1)
    return len(shape) / 4, math.log(max(fan_out, 1)) / 4, math.log(max(fan_in, 1)) / 4
