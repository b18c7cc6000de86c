"""The pieces of a meta-gradient as functions of a batch of tasks: what becomes a kernel each.

Step 0 starts from weights that all tasks share (unless the start reads the support set). They are kept
shared: convolutions fold tasks into the batch, and weight gradients are summed over tasks inside one
product. The Hessian-vector product is taken reverse-over-forward for the same reason: the gradient of
``sum_t <grad L_t(p), v_t>`` is ``sum_t H_t v_t`` by symmetry, and its derivative to meta comes with it.
This is the mixed-mode idea of MixFlow-MG (arXiv 2505.00793) with the two modes exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from fmeta import tree
from fmeta.adapt import batch_of_step, inner_step, support_gradient
from fmeta.losses import with_metrics
from fmeta.parallel.derivatives import along, gradient, pullback
from fmeta.parallel.precision import normalised, times
from fmeta.parallel.traits import Traits
from fmeta.types import Batch, InnerLoop, Metrics, Task, Tree
from fmeta.uphill import uphill


class Carry(NamedTuple):
    """What one inner step hands to the next, for a batch of tasks."""

    params: Tree
    state: Tree


KERNELS: dict[str, tuple[int | None, ...]] = {
    "first": (None, 0, None),
    "step": (0, None, 0, None),
    "query": (0, None, 0),
    "direct": (None, 0),
    "back": (0, 0, None, 0, None),
    "back_first": (0, None, 0, None),
    "back_cheap": (0, 0, None, 0, None),
    "back_first_cheap": (0, None, 0, None),
    "back_start": (0, None, 0),
    "measure": (0, None, 0),
    "measure_start": (None, 0),
}
"""The methods of ``Steps`` that an engine calls, each a kernel where compiled; and where arguments have the tasks."""


def count(data: Tree) -> int:
    """The number of tasks in a batch of them."""
    return tree.leaves(data)[0].shape[0]


@dataclass(frozen=True)
class Steps:
    """An inner loop batched over tasks. ``k`` is the step as a tensor, so that one kernel serves them all."""

    loop: InnerLoop
    traits: Traits
    randomness: str

    @property
    def shared(self) -> int | None:
        """Where the task axis of the carry is at step 0; None where all tasks share it."""
        return 0 if self.traits.start_reads_support else None

    def over_tasks(self, fn: Callable[..., Any], *dims: int | None) -> Callable[..., Any]:
        """``fn`` of one task as a function of a batch of them."""
        return vmap(fn, dims or 0, randomness=self.randomness)

    def start(self, meta: Tree, support: Batch) -> Carry:
        """The carry before any update."""

        def one(support: Batch) -> Carry:
            params = self.loop.start(meta, support)
            k = torch.zeros((), dtype=torch.int64, device=tree.device(params))
            return Carry(params, self.loop.inner(meta, k).init(params))

        if not self.traits.start_reads_support:
            return one(support)
        # what does not differ by task comes out of vmap expanded, on which jvp cannot write a tangent
        return tree.map(torch.Tensor.contiguous, self.over_tasks(one)(support))

    def update(
        self, dim: int | None, carry: Carry, meta: Tree, batch: Batch, k: Tensor
    ) -> tuple[Carry, Tensor]:
        """One update of a carry whose task axis is ``dim``."""

        def one(params: Tree, state: Tree, batch: Batch) -> tuple[Carry, Tensor]:
            grads, loss = support_gradient(self.loop, params, meta, batch, k)
            after = Carry(*inner_step(self.loop, k, grads, params, state, meta))
            return after, torch.isfinite(loss) & tree.all_finite(after.params)

        after, finite = self.over_tasks(one, dim, dim, 0)(carry.params, carry.state, batch)
        return tree.map(torch.Tensor.contiguous, after), finite

    def objective(self, dim: int | None, params: Tree, meta: Tree, tasks: Task) -> tuple[Tensor, Any]:
        """The mean query loss; beside it the metrics and whether they are finite, by task."""

        def one(params: Tree, task: Task) -> tuple[Tensor, Metrics]:
            value, metrics = with_metrics(self.loop.outer(params, meta, task))
            return value, {"loss": value, **metrics}

        values, metrics = self.over_tasks(one, dim, 0)(params, tasks)
        return values.mean(), (metrics, torch.isfinite(values))

    def first(self, meta: Tree, support: Batch, k: Tensor) -> tuple[Carry, Tensor]:
        """Start and the first update: the carry, and whether it is finite, ``[task]``."""
        batch = batch_of_step(self.loop, support, 0, dim=1)
        return self.update(self.shared, self.start(meta, support), meta, batch, k)

    def step(self, carry: Carry, meta: Tree, batch: Batch, k: Tensor) -> tuple[Carry, Tensor]:
        """One further update."""
        return self.update(0, carry, meta, batch, k)

    def query(self, carry: Carry, meta: Tree, tasks: Task) -> tuple[Carry, Tree, Metrics, Tensor]:
        """The query gradient: cotangents of the carry and of meta, metrics and whether finite, ``[task]``."""
        if self.traits.outer_reads_meta:
            value = lambda p, m: self.objective(0, p, m, tasks)  # noqa: E731
            (d_params, d_meta), (metrics, finite) = gradient(value, carry.params, meta, scale=self.loop.scale)
        else:
            value_at = lambda p: self.objective(0, p, meta, tasks)  # noqa: E731
            # each task has weights of its own here, so the mean's 1 / tasks is scaled away too
            scale = self.loop.scale if self.loop.scale == 1.0 else self.loop.scale * count(tasks)
            (d_params,), (metrics, finite) = gradient(value_at, carry.params, scale=scale)
            d_meta = ()
        return Carry(d_params, tree.zeros_like(carry.state)), d_meta, metrics, finite

    def direct(self, meta: Tree, tasks: Task) -> tuple[Tree, Metrics, Tensor]:
        """The query gradient at the start, without any update: cotangent of meta, metrics, finite."""

        def value(meta: Tree) -> tuple[Tensor, Any]:
            return self.objective(self.shared, self.start(meta, tasks.support).params, meta, tasks)

        (d_meta,), (metrics, finite) = gradient(value, meta, scale=self.loop.scale)
        return d_meta, metrics, finite

    def pull_update(
        self, dim: int | None, ct: Carry, carry: Carry, meta: Tree, batch: Batch, k: Tensor
    ) -> tuple[Tree, Carry, Tree]:
        """Cotangents of the gradient that an update takes, of the carry, and of meta."""
        one_gradient = lambda p, b: support_gradient(self.loop, p, meta, b, k)[0]  # noqa: E731
        grads = self.over_tasks(one_gradient, dim, 0)(carry.params, batch)

        def advance(grads: Tree, state: Tree, params: Tree, meta: Tree) -> Carry:
            one = lambda g, s, p: Carry(*inner_step(self.loop, k, g, p, s, meta))  # noqa: E731
            return self.over_tasks(one, 0, dim, dim)(grads, state, params)

        pull = pullback(advance, grads, carry.state, carry.params, meta)
        ct_grads, ct_state, ct_params, ct_meta = pull(ct)
        return ct_grads, Carry(ct_params, ct_state), ct_meta if self.traits.step_reads_meta else ()

    def pull_gradient(
        self, dim: int | None, ct_grads: Tree, params: Tree, meta: Tree, batch: Batch, k: Tensor
    ) -> tuple[Tree, Tree]:
        """Cotangent of a gradient pulled back: the Hessian-vector product, and the mixed one for meta."""
        if self.loop.inner_radius:
            return self.pull_uphill(dim, ct_grads, params, meta, batch, k)
        scale = self.loop.scale
        ct_grads, size = normalised(ct_grads, scale, count(batch) if dim is None else 1)

        def slope(params: Tree, meta: Tree) -> tuple[Tensor, tuple[()]]:
            def one(params: Tree, direction: Tree, batch: Batch) -> Tensor:
                loss = lambda p: with_metrics(self.loop.loss(p, meta, batch, k))[0]  # noqa: E731
                return along(loss, params, direction)

            return self.over_tasks(one, dim, 0, 0)(params, ct_grads, batch).sum(), ()

        if self.traits.loss_reads_meta:
            products, _ = gradient(slope, params, meta, scale=scale)
            return times(products, size)
        (hessian,), _ = gradient(lambda p: slope(p, meta), params, scale=scale)
        return times(hessian, size), ()

    def pull_uphill(
        self, dim: int | None, ct_grads: Tree, params: Tree, meta: Tree, batch: Batch, k: Tensor
    ) -> tuple[Tree, Tree]:
        """The same for a gradient taken uphill: products there, and here for the direction that led there."""
        plain, radius = replace(self, loop=self.loop._replace(inner_radius=0.0)), self.loop.inner_radius
        one_gradient = lambda p, b: support_gradient(plain.loop, p, meta, b, k)[0]  # noqa: E731
        grads = self.over_tasks(one_gradient, dim, 0)(params, batch)
        climb = self.over_tasks(lambda p, g: uphill(p, g, radius), dim, 0)
        ct_there, mixed_there = plain.pull_gradient(0, ct_grads, climb(params, grads), meta, batch, k)
        ct_params, ct_direction = pullback(climb, params, grads)(ct_there)
        hessian, mixed = plain.pull_gradient(dim, ct_direction, params, meta, batch, k)
        return tree.add(ct_params, hessian), tree.add(mixed_there, mixed)

    def back(self, ct: Carry, carry: Carry, meta: Tree, batch: Batch, k: Tensor) -> tuple[Carry, Tree]:
        """The cotangent of a carry pulled back through one update: those of the carry before, and of meta."""
        return self.pull(0, ct, carry, meta, batch, k)

    def pull(
        self, dim: int | None, ct: Carry, carry: Carry, meta: Tree, batch: Batch, k: Tensor
    ) -> tuple[Carry, Tree]:
        """Pull back through an update and the gradient it takes."""
        ct_grads, before, ct_meta = self.pull_update(dim, ct, carry, meta, batch, k)
        hessian, mixed = self.pull_gradient(dim, ct_grads, carry.params, meta, batch, k)
        if self.traits.loss_reads_meta:
            ct_meta = tree.add(ct_meta, mixed)
        return Carry(tree.add(before.params, hessian), before.state), ct_meta

    def back_first(self, ct: Carry, meta: Tree, support: Batch, k: Tensor) -> Tree:
        """``back`` through the first update and the start: the cotangent of meta."""
        batch = batch_of_step(self.loop, support, 0, dim=1)
        before, ct_meta = self.pull(self.shared, ct, self.start(meta, support), meta, batch, k)
        return self.into_meta(before, ct_meta, meta, support)

    def back_cheap(self, ct: Carry, carry: Carry, meta: Tree, batch: Batch, k: Tensor) -> tuple[Carry, Tree]:
        """``back`` with the gradient of the step as a constant."""
        _, before, ct_meta = self.pull_update(0, ct, carry, meta, batch, k)
        return before, ct_meta

    def back_first_cheap(self, ct: Carry, meta: Tree, support: Batch, k: Tensor) -> Tree:
        """``back_first`` with the gradient of the step as a constant."""
        batch = batch_of_step(self.loop, support, 0, dim=1)
        _, before, ct_meta = self.pull_update(self.shared, ct, self.start(meta, support), meta, batch, k)
        return self.into_meta(before, ct_meta, meta, support)

    def into_meta(self, ct_start: Carry, ct_meta: Tree, meta: Tree, support: Batch) -> Tree:
        """The cotangent of meta: through the start, and what the first step read of it."""
        (through_start,) = pullback(lambda m: self.start(m, support), meta)(ct_start)
        return tree.add(through_start, ct_meta) if self.traits.step_reads_meta else through_start

    def back_start(self, ct_params: Tree, meta: Tree, support: Batch) -> Tree:
        """The cotangent of the starting parameters, pulled back to meta."""
        if self.shared is None:
            ct_params = tree.map(lambda ct: ct.sum(0), ct_params)
        (d_meta,) = pullback(lambda m: self.start(m, support).params, meta)(ct_params)
        return d_meta

    def measure(self, carry: Carry, meta: Tree, tasks: Task) -> Metrics:
        """Metrics after some updates, ``[task]``."""
        return self.objective(0, carry.params, meta, tasks)[1][0]

    def measure_start(self, meta: Tree, tasks: Task) -> Metrics:
        """Metrics before any update, ``[task]``."""
        return self.objective(self.shared, self.start(meta, tasks.support).params, meta, tasks)[1][0]
