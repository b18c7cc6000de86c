"""Fact 2: the memory of nested transforms grows with every inner step by that step's activations.

Peak resident memory of one meta-gradient beyond what the process held before it, each in a process of its
own, both uncompiled. fmeta keeps one copy of the adapted weights a step, or about the square root of that
with ``remat``.

    python -m benchmarks.memory
"""

from __future__ import annotations

import argparse
import json
import math

import fmeta
from benchmarks.harness import in_own_process, peak_mib, record, table
from benchmarks.problems import omniglot_shape

STEPS = (1, 5, 10, 20, 50)


def measure(how: str, steps: int, tasks: int) -> float:
    """MiB that one meta-gradient of conv4 adds to this process."""
    net, loss, batch = omniglot_shape(tasks)
    apply, params = fmeta.functionalize(net)
    plans = {
        "nested": fmeta.Plan(engine="nested", compile=False),
        "fmeta": fmeta.Plan(compile=False),
        "remat": fmeta.Plan(compile=False, remat=max(1, round(math.sqrt(steps)))),
    }
    algorithm = fmeta.maml(loss(apply), fmeta.sgd(0.01), steps=steps)
    short = fmeta.maml(loss(apply), fmeta.sgd(0.01), steps=0)
    fmeta.meta_grad(short, fmeta.Plan(engine="nested", compile=False))(params, batch)  # load what is lazy
    before = peak_mib()
    fmeta.meta_grad(algorithm, plans[how])(params, batch)
    return peak_mib() - before


def main() -> None:
    """Print the table; with ``--one`` measure one cell and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=4, help="tasks side by side")
    parser.add_argument("--one", nargs=2, metavar=("HOW", "STEPS"), help="one cell, in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps({"mib": measure(options.one[0], int(options.one[1]), options.tasks)}))
        return
    rows = []
    for steps in STEPS:
        cells = {}
        for how in ("nested", "fmeta", "remat"):
            found = in_own_process(
                "benchmarks.memory", "--tasks", str(options.tasks), "--one", how, str(steps)
            )
            cells[how] = found["mib"]
        record("memory", {"steps": steps, "tasks": options.tasks}, cells)
        rows.append([steps, *(f"{cells[how]:.0f}" for how in ("nested", "fmeta", "remat"))])
    print(f"MiB added by one meta-gradient of conv4, {options.tasks} tasks, 5-way 1-shot, uncompiled\n")
    print(table(["inner steps", "grad(vmap(grad)) nested", "fmeta", "fmeta, remat=sqrt(steps)"], rows))


if __name__ == "__main__":
    main()
