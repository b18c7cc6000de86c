"""The record of a learned optimiser, ``theta -> Transform``, and what its rules share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import tree
from fmeta.rates import rooted
from fmeta.types import Params, Transform, Tree

TIMESCALES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
Make = Callable[[Params, "Tensor | float | None", float], Transform]
"""``(theta, steps, eps_root) -> Transform``."""


class LearnedOptimizer(NamedTuple):
    """An optimiser whose rule has weights of its own, ``theta``.

    Call it with them to get a ``Transform`` that any algorithm takes; ``steps``, the length of the training it is
    used for (a number, or a tensor that differs by task), is what a rule may plan by.
    """

    name: str
    settings: dict[str, Any]
    """What it was made with, so that a file of weights can make it again."""
    init: Callable[[int], Params]
    """``(seed) -> theta``."""
    make: Make
    shapes: dict[str, torch.Size]
    """Of the weights in theta."""
    blocks: Callable[[Sequence[torch.Size], float | None], Any] | None = None
    """``(shapes, steps) -> Blockwise``, the same update for large models, where there is one."""

    def __call__(self, theta: Params, steps: Tensor | float | None = None) -> Transform:
        """The optimiser with these weights."""
        if not isinstance(theta, dict) or {n: p.shape for n, p in theta.items()} != self.shapes:
            found = difference(theta, self.shapes)
            raise ValueError(
                f"{self.name}: theta must have the names and shapes that init returns, got {found}. Weights of another "
                "architecture do not fit; make the optimiser with the settings it was trained with."
            )
        check_steps(self.name, steps)
        make = lambda root: lambda weights: self.make(weights, steps, root)  # noqa: E731
        return rooted(lambda root: guarded(working(make(root), theta)), self.name, None)


def check_steps(call: str, steps: Any) -> None:
    """Refuse a length that no training has; a tensor's is not read."""
    known = isinstance(steps, Real) and not isinstance(steps, bool) and 1 <= float(steps) < math.inf
    if not (known or steps is None or isinstance(steps, Tensor)):
        raise ValueError(f"{call}: steps must be a number from 1, got {steps!r}. Leave it out if unknown.")


def difference(theta: Any, shapes: dict[str, torch.Size]) -> str:
    """The first thing in which weights are not what is expected."""
    if not isinstance(theta, dict):
        return type(theta).__name__
    for name in (*shapes, *theta):
        here, there = getattr(theta.get(name), "shape", "nothing"), shapes.get(name, "nothing")
        if here != there:
            return f"{here if here == 'nothing' else list(here)} for {name!r}"
    return "them in another form"


def learned_optimizer(
    name: str, settings: dict[str, Any], init: Callable[[int], Params], make: Make, blocks: Any = None
) -> LearnedOptimizer:
    """The record, with the shapes of what ``init`` draws."""
    return LearnedOptimizer(name, settings, init, make, {n: p.shape for n, p in init(0).items()}, blocks)


def working(make: Callable[[Params], Transform], theta: Params) -> Transform:
    """A rule that computes in the widest type of the parameters, at least float32, whatever theta's is."""

    def at(params: Tree) -> tuple[Transform, Callable[[Tree], Tree]]:
        dtype = torch.float32
        for leaf in tree.leaves(params):
            dtype = torch.promote_types(dtype, leaf.dtype)
        cast = lambda found: tree.map(lambda x: x.to(dtype), found)  # noqa: E731
        return make(cast(theta)), cast

    def init(params: Tree) -> Tree:
        rule, cast = at(params)
        return rule.init(cast(params))

    def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        rule, cast = at(params)
        grads = tree.map(lambda p, g: g, params, grads)  # by name, whatever their order
        updates, state = rule.update(cast(grads), state, cast(params))
        return tree.map(lambda u, p: u.to(p.dtype), updates, params), state

    return Transform(init, update)


def usable(grads: Tree) -> Tensor:
    """Whether gradients are finite, and the sum of their squares too."""
    wide = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in tree.leaves(grads)]
    return torch.stack([(g * g).sum().to(wide[0].dtype) for g in wide]).sum().isfinite()


def guarded(transform: Transform) -> Transform:
    """The same rule, which passes over a gradient that is not ``usable``: no update, and the state stays."""

    def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        fine = usable(grads)
        clean = tree.map(lambda g: torch.where(fine, g, torch.zeros_like(g)), grads)
        updates, after = transform.update(clean, state, params)
        still = tree.map(torch.zeros_like, updates)
        return tree.where(fine, updates, still), tree.where(fine, after, state)

    return Transform(transform.init, update)


def time_features(t: Tensor, steps: Tensor | float | None, longest: int | None = None) -> Tensor:
    """Where training stands, ``[len(TIMESCALES) + 3]``: ``tanh(t / scale - 1)``, and the part that is over.

    Without ``steps`` training is always at its beginning. The clock of a training above ``longest`` steps goes slower,
    so that it never shows a time above that.
    """
    scales = torch.tensor(TIMESCALES, dtype=t.dtype, device=t.device)
    part = torch.zeros_like(t) if steps is None else (t / steps).clamp(0, 1).to(t.dtype)
    known = torch.zeros_like(t) if steps is None else torch.ones_like(t)
    if longest is not None:
        rate = torch.ones_like(t) if steps is None else (longest * torch.ones_like(t) / steps).clamp(max=1)
        t = (t * rate).clamp(max=longest)
    return torch.cat([torch.tanh(t / scales - 1), torch.stack([part, part * part, known])])


def real(t: Tensor, params: Tree) -> Tensor:
    """A count of steps in the parameters' own dtype."""
    return t.to(tree.leaves(params)[0].dtype)


def mean_square(x: Tensor) -> Tensor:
    """The mean of squares over all of a tensor, without dimensions; 0 for an empty one."""
    return (x * x).sum() / max(x.numel(), 1)


def soft_unit(x: Tensor) -> Tensor:
    """``x`` where it is small, scaled so that its mean square stays below 1 where it is large."""
    return x * torch.rsqrt(1 + mean_square(x))


def squashed(x: Tensor) -> Tensor:
    """``x`` near zero, about ``3 sign(x)`` far from it."""
    return x * torch.rsqrt(1 + x * x * (1 / 9))
