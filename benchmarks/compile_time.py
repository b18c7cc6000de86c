"""Fact 3: compiling a nested meta-gradient takes longer with every inner step; fmeta's kernels are compiled once.

CPU seconds until the first meta-gradient of the sinusoid problem is there (those of the C++ compiler
included, so that other work on the machine does not count), in a process of its own with an empty cache on
disk: the unrolled loop through ``torch.compile``, and ``fmeta.meta_grad``.

    python -m benchmarks.compile_time
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile

import torch

import fmeta
from benchmarks.harness import in_own_process, record, table
from benchmarks.problems import sinusoid
from fmeta.types import Params, Plan, Task

STEPS = (1, 5, 10)


def cpu_seconds() -> float:
    """CPU time of this process and of the children that it has waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def measure(how: str, steps: int) -> float:
    """CPU seconds of the first call."""
    net, loss, tasks = sinusoid(tasks=25)
    apply, params = fmeta.functionalize(net)
    algorithm = fmeta.maml(loss(apply), fmeta.sgd(0.01), steps=steps)
    if how == "fmeta":
        run = fmeta.meta_grad(algorithm, Plan(compile=True))
    else:

        @torch.compile(fullgraph=True)
        def run(params: Params, tasks: Task) -> Params:
            mean = lambda p: torch.func.vmap(lambda t: algorithm.loss(p, t)[0])(tasks).mean()  # noqa: E731
            return torch.func.grad(mean)(params)

    begin = cpu_seconds()
    run(params, tasks)
    return cpu_seconds() - begin


def main() -> None:
    """Print the table; with ``--one`` measure one cell and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("HOW", "STEPS"), help="one cell, in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps({"seconds": measure(options.one[0], int(options.one[1]))}))
        return
    rows = []
    for steps in STEPS:
        cells = {}
        for how in ("nested", "fmeta"):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["FMETA_CACHE"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
                os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # its worker processes outlive the count
                cells[how] = in_own_process("benchmarks.compile_time", "--one", how, str(steps))["seconds"]
        record("compile_time", {"steps": steps, "tasks": 25}, cells)
        rows.append([steps, f"{cells['nested']:.1f}", f"{cells['fmeta']:.1f}"])
    print("CPU seconds to the first meta-gradient, sinusoid MLP, 25 tasks, cold cache\n")
    print(table(["inner steps", "torch.compile of the nested loop", "fmeta"], rows))


if __name__ == "__main__":
    main()
