"""How meta-gradients are run: batching over tasks, engines, kernels, chunks, randomness.

The only place where vmap, compilation and distribution appear. Nothing below it can know how it is run.
"""

from fmeta.parallel.boundary import check_algorithm, check_plan
from fmeta.parallel.explain import Explanation, explain_loop
from fmeta.parallel.processes import ALONE, Elsewhere, Processes, Votes, launched, processes
from fmeta.parallel.run import Runner

__all__ = [
    "ALONE",
    "Elsewhere",
    "Explanation",
    "Processes",
    "Runner",
    "Votes",
    "check_algorithm",
    "check_plan",
    "explain_loop",
    "launched",
    "processes",
]
