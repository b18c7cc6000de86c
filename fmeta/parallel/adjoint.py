"""The adjoint engine: the inner loop forward keeping only the carries, then the backward loop, written out.

Everything that runs is forward code, one kernel for each kind of step, so compile time does not grow with
the number of inner steps and memory is the carries plus one step's activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import tree
from fmeta.adapt import batch_of_step, last_trained, outer_weights
from fmeta.adjoint import differentiates
from fmeta.parallel.steps import Carry, Steps
from fmeta.parallel.traits import Traits
from fmeta.types import Batch, InnerLoop, Task, Tree

Report = tuple[dict[str, Tensor], Tensor]
"""Metrics ``[task]`` and whether each step of each task was finite, ``[steps + 1, task]``."""
MetaGradient = Callable[[Tree, Task], tuple[Tree, Report]]


class Support:
    """The support examples by inner step, laid out so that all steps share one kernel."""

    def __init__(self, loop: InnerLoop, support: Batch) -> None:
        """Per-step batches are made contiguous once, step first."""
        self.loop, self.whole = loop, support
        self.by_step = support
        if loop.batches == "per_step":
            self.by_step = tree.map(lambda leaf: leaf.movedim(1, 0).contiguous(), support)
        self.index = torch.arange(max(loop.steps, 1), device=tree.device(support)).unbind()

    def __getitem__(self, k: int) -> tuple[Batch, Tensor]:
        """The examples of step ``k`` and its index as a tensor."""
        return batch_of_step(self.loop, self.by_step, k), self.index[last_trained(self.loop, k)]


def forward(
    loop: InnerLoop, steps: Steps, meta: Tree, data: Support, last: int, keep: Callable[[int], bool]
) -> Any:
    """Run ``last`` updates; returns the carries that ``keep`` asks for by position, and finite flags."""
    carry, ok = steps.first(meta, data.whole, data[0][1])
    saved, finite = {1: carry}, [ok]
    for k in range(1, last):
        carry, ok = steps.step(carry, meta, *data[k])
        finite.append(ok)
        saved[k + 1] = carry
        if not keep(k):
            saved.pop(k)
    return saved, finite


def adjoint_engine(loop: InnerLoop, steps: Steps, traits: Traits, remat: int | None) -> MetaGradient:
    """The meta-gradient of a batch of tasks by explicit adjoints: ``(meta, tasks) -> (mean gradient, report)``."""
    weights, last = outer_weights(loop), loop.steps
    exact = [differentiates(loop.adjoint, k, last) for k in range(last)]
    # Where gradients are constants and the update only shifts, a cotangent passes a step unchanged.
    free = [traits.update_is_a_shift and not exact[k] for k in range(last)]
    bound = (
        free.index(False, 1) if False in free[1:] else last
    )  # the first position to be pulled back through

    def keep(position: int) -> bool:
        if position < bound:
            return bool(weights[position])
        return remat is None or (position - bound) % remat == 0

    def meta_grad(meta: Tree, tasks: Task) -> tuple[Tree, Report]:
        data = Support(loop, tasks.support)
        saved, finite = forward(loop, steps, meta, data, last, keep)
        total = Total()
        ct, report = None, None
        carry = saved.pop(last)
        for position in range(last, 0, -1):
            if weights[position]:
                d_carry, d_meta, metrics, ok = steps.query(carry, meta, tasks)
                ct = total.weigh(ct, d_carry, weights[position])
                total.add(d_meta, weights[position])
                report = report or (metrics, torch.stack([*finite, ok]))
            k = position - 1
            if k >= bound:
                carry = restore(steps, saved, k, meta, data)
                if ct is not None:
                    ct, d_meta = (steps.back if exact[k] else steps.back_cheap)(ct, carry, meta, *data[k])
                    total.add(d_meta)
            elif k and weights[k]:
                carry = saved.pop(k)
        if ct is not None:
            total.add(back_to_meta(steps, free[0], exact[0], ct, meta, data))
        if weights[0]:
            d_meta, metrics, ok = steps.direct(meta, tasks)
            total.add(d_meta, weights[0])
            report = report or (metrics, torch.stack([*finite, ok]))
        return total.value, report  # type: ignore[return-value]  # some weight is positive

    def without_steps(meta: Tree, tasks: Task) -> tuple[Tree, Report]:
        d_meta, metrics, ok = steps.direct(meta, tasks)
        return d_meta, (metrics, ok[None])

    return meta_grad if last else without_steps


def restore(steps: Steps, saved: dict[int, Carry], position: int, meta: Tree, data: Support) -> Carry:
    """Take out the carry at a position; where it was not kept, recompute the block that it lies in."""
    if position not in saved:
        start = max(p for p in saved if p < position)
        for k in range(start, position):
            saved[k + 1], _ = steps.step(saved[k], meta, *data[k])
    return saved.pop(position)


def back_to_meta(steps: Steps, free: bool, exact: bool, ct: Carry, meta: Tree, data: Support) -> Tree:
    """The cotangent after the first update, pulled back to meta."""
    if free:
        return steps.back_start(ct.params, meta, data.whole)
    back = steps.back_first if exact else steps.back_first_cheap
    return back(ct, meta, data.whole, data[0][1])


class Total:
    """A running sum of gradients to meta; an empty tree adds nothing."""

    def __init__(self) -> None:
        """Nothing so far."""
        self.value: Tree = ()

    def add(self, part: Tree, weight: float = 1.0) -> None:
        """Add a part, weighted."""
        self.value = self.weigh(self.value, part, weight)

    @staticmethod
    def weigh(total: Tree, part: Tree, weight: float) -> Tree:
        """``total + weight * part``, where either may be empty."""
        if not tree.leaves(part):
            return part if total is None else total
        part = part if weight == 1.0 else tree.map(lambda x: x * weight if x.is_floating_point() else x, part)
        return part if total is None or not tree.leaves(total) else tree.add(total, part)


def curve(loop: InnerLoop, steps: Steps, at: list[int]) -> Callable[[Tree, Task], dict[str, Tensor]]:
    """Metrics after each number of updates in ``at``: ``(meta, tasks) -> {name: [task, len(at)]}``."""

    def evaluate(meta: Tree, tasks: Task) -> dict[str, Tensor]:
        data = Support(loop, tasks.support)
        found: dict[int, dict[str, Tensor]] = {}
        if 0 in at:
            found[0] = steps.measure_start(meta, tasks)
        carry = None
        for k in range(max(at)):
            if carry is None:
                carry, _ = steps.first(meta, data.whole, data[0][1])
            else:
                carry, _ = steps.step(carry, meta, *data[k])
            if k + 1 in at:
                found[k + 1] = steps.measure(carry, meta, tasks)
        return {name: torch.stack([found[k][name] for k in at], dim=1) for name in found[at[0]]}

    return evaluate
