"""How meta-gradients are run: batching over tasks, engines, kernels, chunks, randomness.

The only place where vmap, compilation and distribution appear. Nothing below it can know how it is run.
"""

from fmeta.parallel.boundary import check_algorithm, check_plan
from fmeta.parallel.explain import Explanation, explain_loop
from fmeta.parallel.kernels import compiled, compiled_map
from fmeta.parallel.native.build import compiles_itself
from fmeta.parallel.native.ir import Unsupported
from fmeta.parallel.native.rows import Rows, by_rows
from fmeta.parallel.pages import keep_freed_memory
from fmeta.parallel.processes import ALONE, Elsewhere, Processes, Votes, launched, processes
from fmeta.parallel.run import Runner
from fmeta.parallel.unrolled import Unrolled

__all__ = [
    "ALONE",
    "Elsewhere",
    "Explanation",
    "Processes",
    "Rows",
    "Runner",
    "Unrolled",
    "Unsupported",
    "Votes",
    "by_rows",
    "check_algorithm",
    "check_plan",
    "compiled",
    "compiled_map",
    "compiles_itself",
    "explain_loop",
    "keep_freed_memory",
    "launched",
    "processes",
]
