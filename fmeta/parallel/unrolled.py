"""One step of a system of many tasks, its pullback and its pushforward, each a kernel that serves every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from fmeta import tree
from fmeta.functional import differentiable
from fmeta.parallel.derivatives import load_forward_mode, pullback, split
from fmeta.parallel.kernels import Kernel
from fmeta.types import Plan, System, Tree


class Unrolled:
    """The kernels of a system; ``end`` is the step at which a task is over: then it stays as it is, at no loss."""

    def __init__(self, system: System, plan: Plan) -> None:
        """Nothing is compiled before its first call."""
        load_forward_mode()
        self.system = system
        self.advance = self.kernel("advance", self._advance, (None, 0, 0, 0, 0), plan)
        self.advance_each = self.kernel("advance_each", self._advance, (0, 0, 0, 0, 0), plan)
        self.pull = self.kernel("pull", self._pull, (None, 0, 0, 0, 0, 0, 0), plan)
        self.pull_start = self.kernel("pull_start", self._pull_start, (None, 0, 0, 0), plan)
        self.push = self.kernel("push", self._push, (None, None, 0, 0, 0, 0, 0), plan)

    @staticmethod
    def kernel(name: str, fn: Callable[..., Any], axes: tuple[int | None, ...], plan: Plan) -> Any:
        """``fn`` of one task for a batch of them, compiled unless the plan says no."""
        batched = vmap(fn, axes)
        compiled = Kernel(name, batched, plan, axes)

        def call(*args: Any) -> Any:
            with torch.no_grad(), differentiable():
                return (batched if plan.compile is False else compiled)(*args)

        return call

    def start(self, theta: Tree, tasks: Tree, each: bool = False) -> Tree:
        """The states before any step, ``[task, ...]``; ``each``: every task has weights of its own."""
        with torch.no_grad():
            states = vmap(self.system.start, (0 if each else None, 0))(theta, tasks)
            return tree.map(torch.Tensor.contiguous, states)

    def start_slopes(self, theta: Tree, directions: Tree, tasks: Tree) -> Tree:
        """Derivatives of the states before any step along directions of theta, ``[task, direction, ...]``."""
        floats, join = split(theta)

        def one(task: Tree) -> Tree:
            start = lambda theta: self.system.start(join(theta), task)  # noqa: E731
            spread = lambda x, count: x.expand(count, *x.shape)  # noqa: E731
            moved = vmap(lambda d: tuple(split(jvp(lambda x: start(x), (floats,), (d,))[1])[0]))
            rows = iter(moved(split(directions)[0]))
            leaves, spec = tree.flatten(start(floats))
            count = len(tree.leaves(directions)[0])
            kept = [next(rows) if x.is_floating_point() else spread(x, count) for x in leaves]
            return tree.unflatten(kept, spec)

        with torch.no_grad(), differentiable():
            return tree.map(torch.Tensor.contiguous, vmap(one)(tasks))

    def lengths(self, tasks: Tree) -> Tensor:
        """How many steps each task has, ``[task]``."""
        some = tree.leaves(tasks)[0]
        if self.system.length is None:
            return torch.full((len(some),), self.system.steps, device=some.device)
        return vmap(self.system.length)(tasks).to(torch.int64)

    def _advance(self, theta: Tree, state: Tree, task: Tree, t: Tensor, end: Tensor) -> tuple[Tree, Tensor]:
        after, loss = self.system.step(theta, state, task, t)
        if loss.ndim or not loss.is_floating_point():
            raise ValueError(
                f"estimate: the loss of a step must be a floating-point scalar, got shape {list(loss.shape)} of "
                f"{loss.dtype}. Return its mean."
            )
        goes_on = t < end
        return tree.where(goes_on, after, state), torch.where(goes_on, loss, torch.zeros_like(loss))

    def _pull(
        self, theta: Tree, state: Tree, task: Tree, t: Tensor, end: Tensor, ct_state: Tree, ct_loss: Tensor
    ) -> tuple[Tree, Tree]:
        """Cotangents of theta and of the state before a step, from those of what it returns."""
        step = lambda theta, state: self.system.step(theta, state, task, t)  # noqa: E731
        d_theta, d_state = pullback(step, theta, state)((ct_state, ct_loss))
        goes_on = t < end  # after the end the step has no say, whatever its derivative is there
        return tree.where(goes_on, d_theta, tree.zeros_like(d_theta)), tree.where(goes_on, d_state, ct_state)

    def _pull_start(self, theta: Tree, task: Tree, t: Tensor, ct_state: Tree) -> Tree:
        """The cotangent of theta through the start, of a task that is at its start."""
        (d_theta,) = pullback(lambda theta: self.system.start(theta, task), theta)(ct_state)
        return tree.where(t == 0, d_theta, tree.zeros_like(d_theta))

    def _push(
        self, theta: Tree, directions: Tree, state: Tree, slopes: Tree, task: Tree, t: Tensor, end: Tensor
    ) -> tuple[Tree, Tensor, Tree, Tensor]:
        """A step, and the derivatives of what it returns along many directions of theta, ``[direction, ...]``."""
        theta_floats, theta_join = split(theta)
        floats, join = split(state)

        def step(theta: list[Tensor], state: list[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
            after, loss = self._advance(theta_join(theta), join(state), task, t, end)
            return tuple(split(after)[0]), loss

        def along(direction: list[Tensor], slope: list[Tensor]) -> Any:
            return jvp(step, (theta_floats, floats), (direction, slope))[1]

        after, loss = self._advance(theta, state, task, t, end)
        sloped, loss_slope = vmap(along)(split(directions)[0], split(slopes)[0])
        leaves, spec = tree.flatten(slopes)
        moved = iter(sloped)
        kept = [next(moved) if x.is_floating_point() else x for x in leaves]
        return after, loss, tree.unflatten(kept, spec), loss_slope
