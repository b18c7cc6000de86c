"""How meta-gradients are run: batching over tasks, engines, kernels, chunks, randomness.

The only place where vmap, compilation and distribution appear. Nothing below it can know how it is run.
"""

from fmeta.parallel.boundary import check_algorithm, check_plan
from fmeta.parallel.processes import ALONE, Elsewhere, Processes, Votes, launched, processes
from fmeta.parallel.run import Runner

__all__ = [
    "ALONE",
    "Elsewhere",
    "Processes",
    "Runner",
    "Votes",
    "check_algorithm",
    "check_plan",
    "launched",
    "processes",
]
