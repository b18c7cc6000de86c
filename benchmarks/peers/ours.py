"""fmeta itself: the meta-gradient, a whole outer step, and eager vmap (torch.func nested, uncompiled).

Eager vmap goes through fmeta's nested engine and not plain torch.func, because the latter is silently wrong
through norm layers (the norms suite shows it).
"""

from __future__ import annotations

from collections.abc import Callable

import fmeta
from benchmarks.problems import Problem
from fmeta.types import Params, Plan


def with_plan(plan: Plan) -> Callable[[Problem], Callable[[], Params]]:
    """A maker of meta-gradients that are run by this plan."""

    def make(problem: Problem) -> Callable[[], Params]:
        algorithm, params = problem.algorithm()
        gradient = fmeta.meta_grad(algorithm, plan)
        return lambda: gradient(params, problem.tasks)[0]

    return make


make = with_plan(Plan())
eager = with_plan(Plan(compile=False))
nested = with_plan(Plan(engine="nested", compile=False))


def step(problem: Problem) -> Callable[[], Params]:
    """A whole outer step with Adam; returns the meta-parameters after it."""
    algorithm, params = problem.algorithm()
    outer = fmeta.adam(1e-3)
    state, advance = fmeta.meta_init(algorithm, outer, params), fmeta.meta_step(algorithm, outer)
    return lambda: advance(state, problem.tasks)[0].meta
