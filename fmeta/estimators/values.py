"""Gradients of what a long process costs, to the parameters that steer it: estimators as values.

The gradient of the mean loss of all steps is exact by ``bptt()`` and ``forward_mode()``; ``es()`` and ``pes()`` need no
derivatives and smooth what they measure; ``bptt(truncation)`` and ``pes(truncation)`` work on a window of steps at a
time and go on where they stopped, the first with a bias, the second without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import tree
from fmeta.parallel import Unrolled
from fmeta.rates import positive
from fmeta.types import Tree


class Course(NamedTuple):
    """Where every task stands between two windows of steps."""

    tasks: Tree
    state: Tree  # of the tasks, or of an antithetic pair of each
    t: Tensor  # [task], int64
    end: Tensor  # [task], int64
    memory: Tree  # what the estimator keeps: perturbations so far, or slopes of the state


class Window(NamedTuple):
    """A window of steps of all tasks."""

    course: Course
    grads: Tree  # [task, ...]
    loss: Tensor  # [task], the mean over the steps of the window


class Estimator(NamedTuple):
    """How a gradient is found: ``begin(unrolled, theta, tasks) -> (state, memory)`` and ``run``, of one window."""

    name: str
    begin: Callable[[Unrolled, Tree, Tree], tuple[Tree, Tree]]
    run: Callable[[Unrolled, Tree, Course, int, torch.Generator], Window]
    truncation: int | None
    copies: int = 1
    """How many times a task is taken."""
    random: bool = False
    """Whether it draws perturbations, and so needs a seed."""


def bptt(truncation: int | None = None) -> Estimator:
    """Backpropagation through all steps, or through windows of ``truncation`` steps.

    **Gradient:** exact over a whole course; with ``truncation`` the influence of earlier windows is left out, which may
    even turn its sign. **Cost:** about five times the steps, and the memory of a state for every step of a window.

    Args:
        truncation: steps of a window, at least 1; None for the whole course at every call.

    References:
        Werbos, "Backpropagation through time", 1990. The state is kept, and each step is run again when its turn comes.
    """
    check_truncation("bptt", truncation)

    def run(
        unrolled: Unrolled, theta: Tree, course: Course, steps: int, generator: torch.Generator
    ) -> Window:
        states, losses = [course.state], []
        for k in range(steps):
            state, loss = unrolled.advance(theta, states[-1], course.tasks, course.t + k, course.end)
            states.append(state)
            losses.append(loss)
        ct, total = tree.zeros_like(states.pop()), None
        for k in reversed(range(steps)):
            share = torch.full_like(losses[k], 1 / steps)
            d_theta, ct = unrolled.pull(
                theta, states.pop(), course.tasks, course.t + k, course.end, ct, share
            )
            total = d_theta if total is None else tree.add(total, d_theta)
        total = tree.add(total, unrolled.pull_start(theta, course.tasks, course.t, ct))
        after = course._replace(state=state, t=course.t + steps)
        return Window(after, total, torch.stack(losses).mean(0))

    return Estimator(
        "bptt", lambda unrolled, theta, tasks: (unrolled.start(theta, tasks), ()), run, truncation
    )


def forward_mode(truncation: int | None = None) -> Estimator:
    """Derivatives carried along with the steps: memory does not depend on their number.

    **Gradient:** exact; with ``truncation`` as well, but for what changed in theta since a course began. **Cost:** a
    step and its derivative for every single number in theta: for a few of them.

    Args:
        truncation: as for ``bptt``.

    References:
        Williams and Zipser, "A learning algorithm for continually running fully recurrent neural networks", 1989;
        Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", 2017, arXiv 1703.01785,
        section 3.2.
    """
    check_truncation("forward_mode", truncation)

    def begin(unrolled: Unrolled, theta: Tree, tasks: Tree) -> tuple[Tree, Tree]:
        state = unrolled.start(theta, tasks)
        return state, unrolled.start_slopes(theta, basis(theta), tasks)

    def run(
        unrolled: Unrolled, theta: Tree, course: Course, steps: int, generator: torch.Generator
    ) -> Window:
        state, slopes, directions = course.state, course.memory, basis(theta)
        total, losses = torch.zeros((), device=course.t.device), []
        for k in range(steps):
            state, loss, slopes, slope = unrolled.push(
                theta, directions, state, slopes, course.tasks, course.t + k, course.end
            )
            total = total + slope / steps
            losses.append(loss)
        after = course._replace(state=state, t=course.t + steps, memory=slopes)
        return Window(after, unflat(total, theta), torch.stack(losses).mean(0))

    return Estimator("forward_mode", begin, run, truncation)


def es(std: float = 0.01, *, pairs: int = 1) -> Estimator:
    """Evolution strategies with antithetic pairs: ``eps * (loss(theta + eps) - loss(theta - eps)) / (2 std^2)``.

    **Gradient:** unbiased, of the mean loss smoothed by noise of this size. Its variance falls as one over tasks times
    ``pairs``, and grows with the number of parameters. **Cost:** ``2 pairs`` courses a task, no derivatives of theta.

    Args:
        std: size of the noise, above 0.
        pairs: antithetic pairs a task, at least 1.

    References:
        Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning", 2017, arXiv
        1703.03864, section 2.
    """
    return perturbed("es", std, pairs, None)


def pes(std: float = 0.01, *, truncation: int, pairs: int = 1) -> Estimator:
    """Persistent evolution strategies: windows of steps, without the bias of truncation.

    Every particle sums its perturbations since its course began, ``xi``; the gradient of a window is
    ``xi * (loss_plus - loss_minus) / (2 std^2)``. Averaged over the windows of a course it is what ``es`` estimates,
    where ``truncation`` divides the length; in a window that a task does not fill, steps after its end count as 0.

    Args:
        std: as for ``es``.
        truncation: steps of a window, at least 1.
        pairs: as for ``es``.

    References:
        Vicol, Metz, Sohl-Dickstein, "Unbiased gradient estimation in unrolled computation graphs with persistent
        evolution strategies", 2021, arXiv 2112.13835, algorithm 2, with antithetic pairs (section 4).
    """
    return perturbed("pes", std, pairs, truncation)


def perturbed(name: str, std: float, pairs: int, truncation: int | None) -> Estimator:
    """What ``es`` and ``pes`` have in common: one is the other with a window as long as the course."""
    positive(name, "std", std)
    check_truncation(name, truncation)
    if not isinstance(pairs, int) or pairs < 1:
        raise ValueError(f"{name}: pairs must be a positive int, got {pairs!r}. One a task is usual.")

    def begin(unrolled: Unrolled, theta: Tree, tasks: Tree) -> tuple[Tree, Tree]:
        state = unrolled.start(theta, tasks)
        count = len(tree.leaves(tasks)[0])
        zeros = tree.map(lambda leaf: leaf.new_zeros(count, *leaf.shape), theta)
        return (state, tree.map(torch.clone, state)), zeros

    def run(
        unrolled: Unrolled, theta: Tree, course: Course, steps: int, generator: torch.Generator
    ) -> Window:
        noise = tree.map(
            lambda sums: std * torch.randn(sums.shape, generator=generator, dtype=sums.dtype).to(sums.device),
            course.memory,
        )
        states, losses = [], []
        for sign, state in zip((1.0, -1.0), course.state, strict=True):
            own = tree.map(lambda x, e, sign=sign: x + sign * e, theta, noise)
            loss = torch.zeros((), device=course.t.device)
            for k in range(steps):
                state, now = unrolled.advance_each(own, state, course.tasks, course.t + k, course.end)
                loss = loss + now / steps
            states.append(state)
            losses.append(loss)
        sums = tree.add(course.memory, noise)
        slope = (losses[0] - losses[1]) / (2 * std * std)
        grads = tree.map(lambda s: s * slope.reshape(-1, *[1] * (s.ndim - 1)), sums)
        after = course._replace(state=tuple(states), t=course.t + steps, memory=sums)
        return Window(after, grads, (losses[0] + losses[1]) / 2)

    return Estimator(name, begin, run, truncation, pairs, random=True)


def check_truncation(call: str, truncation: Any) -> None:
    """Refuse what is no number of steps."""
    if truncation is not None and (type(truncation) is not int or truncation < 1):
        raise ValueError(
            f"{call}: truncation must be a positive int, got {truncation!r}. Leave it out for none."
        )


def check_floating(call: str, name: str, found: Tree) -> None:
    """Refuse parameters that have no derivative, and none at all."""
    if not tree.leaves(found):
        raise ValueError(f"{call}: {name} must hold tensors, got none. Nothing could be learned.")
    for path, leaf in tree.paths(found):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(
                f"{call}: {name} must hold floating-point tensors, got {kind} at {path or 'the root'!r}. Write "
                "torch.tensor(0.1), and keep integers in a closure."
            )


def basis(theta: Tree) -> Tree:
    """A direction for every number in theta: leaves ``[count, *shape]``."""
    leaves, spec = tree.flatten(theta)
    whole = torch.eye(sum(leaf.numel() for leaf in leaves), dtype=leaves[0].dtype, device=leaves[0].device)
    parts = whole.split([leaf.numel() for leaf in leaves], dim=1)
    rows = [p.reshape(len(whole), *leaf.shape).to(leaf.dtype) for p, leaf in zip(parts, leaves, strict=True)]
    return tree.unflatten(rows, spec)


def unflat(numbers: Tensor, theta: Tree) -> Tree:
    """``[task, count]`` as a tree like theta with a leading axis."""
    leaves, spec = tree.flatten(theta)
    parts = numbers.split([leaf.numel() for leaf in leaves], dim=1)
    rows = [part.reshape(len(part), *x.shape).to(x.dtype) for part, x in zip(parts, leaves, strict=True)]
    return tree.unflatten(rows, spec)
