"""The two engines that differentiate the loop as it stands: by torch.func, and by torch.autograd.

``nested`` is the definition that every other engine is tested against. ``autograd`` needs no function
transform, so it also takes losses whose operations refuse vmap or torch.func (detection models).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.func import vmap

from fmeta import tree
from fmeta.adapt import objective, trajectory, with_metrics
from fmeta.parallel.adjoint import MetaGradient, Report
from fmeta.parallel.derivatives import gradient, split
from fmeta.types import Batch, InnerLoop, Task, Tree


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


def autograd_engine(loop: InnerLoop) -> MetaGradient:
    """``torch.autograd.grad`` of the loop, one task at a time; a batch holds one task."""

    def meta_grad(meta: Tree, tasks: Task) -> tuple[Tree, Report]:
        task = tree.select(tasks, 0)
        floats, join = split(meta)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in floats]
            value, metrics, finite = objective(loop, join(leaves), task, autograd_gradient)
            grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        _, into_zeros = split(tree.zeros_like(meta))
        metrics = {name: metric.detach()[None] for name, metric in metrics.items()}
        return into_zeros(grads), (metrics, finite[:, None])

    return meta_grad


def autograd_gradient(
    loop: InnerLoop, params: Tree, meta: Tree, batch: Batch, k: Tensor
) -> tuple[Tree, Tensor]:
    """Gradient of the support loss that torch.autograd can differentiate again."""
    floats, join = split(params)
    with torch.enable_grad():
        leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in floats]
        loss, _ = with_metrics(loop.loss(join(leaves), meta, batch, k))
        grads = torch.autograd.grad(
            loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
    _, into_zeros = split(tree.zeros_like(params))
    return into_zeros(grads), loss


def autograd_curve(loop: InnerLoop, meta: Tree, tasks: Task, at: list[int]) -> dict[str, Tensor]:
    """Metrics of one task after each number of updates in ``at``, by torch.autograd: ``{name: [1, len(at)]}``."""
    task = tree.select(tasks, 0)
    found = {}
    points = trajectory(loop, meta, task.support, max(at), autograd_gradient)
    for k, point in enumerate(points):
        if k in at:
            value, metrics = with_metrics(loop.outer(tree.detach(point.params), meta, task))
            found[k] = tree.detach({"loss": value, **metrics})
    return {name: torch.stack([found[k][name] for k in at])[None] for name in found[at[0]]}
