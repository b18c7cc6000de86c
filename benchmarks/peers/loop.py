"""MAML as it is usually written: one task after another on torch.autograd, ``create_graph=True``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.problems import Problem
from fmeta.types import Params


def make(problem: Problem) -> Callable[[], Params]:
    """The meta-gradient, gradients of each task added as they come."""
    cell, tasks = problem.cell, problem.tasks
    names = list(problem.params)
    start = [p.clone().requires_grad_() for p in problem.params.values()]

    def loss(weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return problem.loss(functional_call(problem.net, dict(zip(names, weights, strict=True)), (x,)), y)

    def gradient() -> Params:
        total = [torch.zeros_like(p) for p in start]
        count = len(tasks.query.y)
        for i in range(count):
            weights = start
            for _ in range(cell.steps):
                value = loss(weights, tasks.support.x[i], tasks.support.y[i])
                grads = torch.autograd.grad(value, weights, create_graph=True)
                weights = [w - cell.lr * g for w, g in zip(weights, grads, strict=True)]
            value = loss(weights, tasks.query.x[i], tasks.query.y[i])
            for t, g in zip(total, torch.autograd.grad(value, start), strict=True):
                t += g / count
        return dict(zip(names, total, strict=True))

    return gradient
