"""Floating-point operations of a meta-gradient, for the share of the machine's matmul rate.

Counted by torch's flop counter on the plain loop over torch.autograd, one task, times the tasks: the
textbook computation, whatever a contender really executes. Products and convolutions only.
"""

from __future__ import annotations

import dataclasses

from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import loop
from benchmarks.problems import Problem


def meta_gradient_flops(problem: Problem) -> int:
    """Operations of the meta-gradient of all tasks; a multiplication and an addition are two."""
    one = dataclasses.replace(problem, tasks=tree_map(lambda x: x[:1], problem.tasks))
    call = loop.make(one)
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() * len(problem.tasks.query.y)
