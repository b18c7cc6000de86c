"""How one call runs: compiled or not, merged or not, and what surrounds it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fmeta.functional import differentiable
from fmeta.parallel.native.build import compiles_itself
from fmeta.parallel.precision import products
from fmeta.types import InnerLoop, Plan

LAUNCH_BOUND = 100e6
"""Flops of the losses of a chunk below which a single inner step is better one kernel than three."""


def is_small(plan: Plan, device: torch.device, flops: float) -> bool:
    """Whether a single inner step is better one kernel: it always is by our own compiler, which shares the forward
    pass between the parts; inductor takes minutes for one large graph.
    """
    own = compiles_itself(device) and plan.precision in (None, "tf32")
    return own or flops < LAUNCH_BOUND


class Mode:
    """How one call runs: inside the caller's transform or not, compiled or not, random or not."""

    def __init__(
        self, plan: Plan, inside: bool, random: bool, training: bool = True, small: bool = False
    ) -> None:
        """Decide, or raise where ``compile=True`` cannot be had."""
        self.inside, self.random, self.precision = inside, random, plan.precision
        why = ""
        if inside:
            why = "the caller's own grad, vmap or torch.compile is under way"
        elif random:
            why = "the loss is random"
        if plan.compile is True and why:
            raise ValueError(
                f"Plan(compile=True): kernels cannot be compiled here, because {why}. Use 'auto'."
            )
        # Compiled on demand only: tasks taken one at a time, which may each have other shapes, the nested engine,
        # which is a reference, and evaluation, which is seldom called often enough to win its compile time back.
        worth_it = training and plan.engine == "adjoint" and plan.tasks == "vmap"
        self.compiled = (plan.compile is True or (plan.compile == "auto" and worth_it)) and not why
        if not why and plan.compile is False:
            why = "the plan says compile=False"
        elif not why and not self.compiled:
            never = f"engine={plan.engine!r} never is"
            why = never if plan.engine == "autograd" else "this plan is with compile=True only"
        self.why = why  # it runs uncompiled
        self.small = self.compiled and worth_it and small

    def merges(self, loop: InnerLoop) -> bool:
        """Whether a whole meta-gradient is one kernel."""
        return self.small and loop.steps <= 1


@contextlib.contextmanager
def surroundings(mode: Mode) -> Iterator[None]:
    """No autograd graph unless the caller differentiates, right norm layers, and the caller's random state."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(products(mode.precision))
        if not mode.inside:
            stack.enter_context(torch.no_grad())
        if mode.random:
            stack.enter_context(torch.random.fork_rng())
        if not mode.compiled:
            stack.enter_context(differentiable())
        yield


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator, of a device or of the CPU, gave up."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def reseeded(loop: InnerLoop, seed: int) -> InnerLoop:
    """The same loop with the random numbers of every inner step fixed by the step.

    The backward loop evaluates a loss again and must meet the masks of the forward loop.
    """

    def seeded(fn: Callable[..., Any], offset: Callable[..., int]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            torch.manual_seed(seed + offset(*args))
            return fn(*args)

        return call

    return loop._replace(
        loss=seeded(loop.loss, lambda params, meta, batch, k: 1 + int(k)),
        outer=seeded(loop.outer, lambda *args: 0),
        start=seeded(loop.start, lambda *args: -1),
    )
