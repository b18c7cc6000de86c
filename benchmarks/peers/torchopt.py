"""TorchOpt, as its MAML example uses it: a module whose weights a MetaSGD replaces and its state restores."""

from __future__ import annotations

import copy
from collections.abc import Callable

from benchmarks.problems import Problem
from fmeta.types import Params


def make(problem: Problem) -> Callable[[], Params]:
    """The meta-gradient, accumulated in ``.grad`` task after task (the example keeps all tasks' graphs)."""
    import torchopt

    cell, tasks = problem.cell, problem.tasks
    net = copy.deepcopy(problem.net)
    leaves = dict(net.named_parameters())
    inner = torchopt.MetaSGD(net, lr=cell.lr)
    weights = torchopt.extract_state_dict(net, by="reference")
    state = torchopt.extract_state_dict(inner, by="reference")

    def gradient() -> Params:
        for p in leaves.values():
            p.grad = None
        count = len(tasks.query.y)
        for i in range(count):
            for _ in range(cell.steps):
                inner.step(problem.loss(net(tasks.support.x[i]), tasks.support.y[i]))
            (problem.loss(net(tasks.query.x[i]), tasks.query.y[i]) / count).backward()
            torchopt.recover_state_dict(net, weights)
            torchopt.recover_state_dict(inner, state)
        return {name: p.grad for name, p in leaves.items() if p.grad is not None}

    return gradient
