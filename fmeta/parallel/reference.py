"""The two engines that differentiate the loop as it stands: by torch.func, and by torch.autograd.

``nested`` is the definition that every other engine is tested against. ``autograd`` needs no function
transform, so it also takes losses whose operations refuse vmap or torch.func (detection models).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fmeta import tree
from fmeta.adapt import objective, trajectory
from fmeta.losses import with_metrics
from fmeta.parallel.adjoint import MetaGradient, Report
from fmeta.parallel.derivatives import gradient, split
from fmeta.types import Batch, InnerLoop, Task, Tree
from fmeta.uphill import from_uphill


def nested_engine(loop: InnerLoop, randomness: str) -> MetaGradient:
    """``grad(mean(vmap(objective)))``."""

    def meta_grad(meta: Tree, tasks: Task) -> tuple[Tree, Report]:
        def mean(meta: Tree) -> tuple[Tensor, Report]:
            one = partial(objective, loop, meta)
            values, metrics, finite = vmap(one, randomness=randomness)(tasks)
            return values.mean(), (metrics, finite.mT)

        (d_meta,), report = gradient(mean, meta, scale=loop.scale)
        return d_meta, report

    return meta_grad


def autograd_engine(loop: InnerLoop, differentiated: bool) -> MetaGradient:
    """``torch.autograd.grad`` of the loop, one task at a time; a batch holds one task.

    ``differentiated`` keeps the graph of the result, for the caller's own torch.autograd.
    """

    def meta_grad(meta: Tree, tasks: Task) -> tuple[Tree, Report]:
        task = tree.select(tasks, 0)
        floats, join = split(meta)
        with torch.enable_grad():
            leaves = as_inputs(floats)
            value, metrics, finite = objective(loop, join(leaves), task, autograd_gradient)
            grads = torch.autograd.grad(
                value, leaves, create_graph=differentiated, allow_unused=True, materialize_grads=True
            )
        _, into_zeros = split(tree.zeros_like(meta))
        metrics = {name: metric[None] for name, metric in metrics.items()}
        found = into_zeros(grads), (metrics, finite[:, None])
        return found if differentiated else tree.detach(found)

    return outside_inference_mode(meta_grad)


def outside_inference_mode(fn: Callable[[Tree, Task], Any]) -> Callable[[Tree, Task], Any]:
    """The same function where torch.autograd works on its arguments."""
    own = lambda x: x.clone() if x.is_inference() else x  # noqa: E731

    def call(meta: Tree, tasks: Task) -> Any:
        if not torch.is_inference_mode_enabled():
            return fn(tree.map(own, meta), tree.map(own, tasks))
        with torch.inference_mode(False), torch.no_grad():
            return fn(tree.map(own, meta), tree.map(own, tasks))

    return call


def as_inputs(floats: list[Tensor]) -> list[Tensor]:
    """The same values as inputs of a gradient: each of its own, whatever they were computed from."""
    return [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in floats]


@from_uphill
def autograd_gradient(
    loop: InnerLoop, params: Tree, meta: Tree, batch: Batch, k: Tensor
) -> tuple[Tree, Tensor]:
    """Gradient of the support loss that torch.autograd can differentiate again."""
    floats, join = split(params)
    with torch.enable_grad():
        leaves = as_inputs(floats)
        loss, _ = with_metrics(loop.loss(join(leaves), meta, batch, k))
        grads = torch.autograd.grad(
            loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
    _, into_zeros = split(tree.zeros_like(params))
    return into_zeros(grads), loss


def autograd_curve(
    loop: InnerLoop, at: list[int], differentiated: bool
) -> Callable[[Tree, Task], dict[str, Tensor]]:
    """Metrics of one task after each number of updates in ``at``: ``(meta, tasks) -> {name: [1, len(at)]}``."""

    def evaluate(meta: Tree, tasks: Task) -> dict[str, Tensor]:
        task = tree.select(tasks, 0)
        found: dict[int, dict[str, Tensor]] = {}
        points = trajectory(loop, meta, task.support, max(at), autograd_gradient)
        for k, point in enumerate(points):
            if k in at:
                value, metrics = with_metrics(loop.outer(point.params, meta, task))
                found[k] = {"loss": value, **metrics}
        curves = {name: torch.stack([found[k][name] for k in at])[None] for name in found[at[0]]}
        return curves if differentiated else tree.detach(curves)

    return outside_inference_mode(evaluate)
