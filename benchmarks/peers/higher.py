"""facebookresearch/higher, as its Omniglot example uses it: a patched module and a differentiable optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from benchmarks.problems import Problem
from fmeta.types import Params


def make(problem: Problem) -> Callable[[], Params]:
    """The meta-gradient, accumulated in ``.grad`` task after task."""
    import higher

    cell, tasks = problem.cell, problem.tasks
    net = copy.deepcopy(problem.net)
    inner = torch.optim.SGD(net.parameters(), lr=cell.lr)

    def gradient() -> Params:
        net.zero_grad()
        count = len(tasks.query.y)
        for i in range(count):
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (patched, optimiser):
                for _ in range(cell.steps):
                    optimiser.step(problem.loss(patched(tasks.support.x[i]), tasks.support.y[i]))
                (problem.loss(patched(tasks.query.x[i]), tasks.query.y[i]) / count).backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    return gradient
