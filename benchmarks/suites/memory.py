"""Peak memory of one meta-gradient of conv4 against inner steps: nested transforms, fmeta, fmeta with remat.

Nested transforms keep the activations of every inner step. fmeta keeps one copy of the adapted weights a
step, or about the square root of that with ``remat``. Each in a process of its own, uncompiled, so that
what compilers take is not counted.
"""

from __future__ import annotations

import math

import fmeta
from benchmarks import harness
from benchmarks.cells import Cell
from benchmarks.one import in_own_process
from benchmarks.options import Options
from benchmarks.problems import build
from benchmarks.results import Results
from fmeta.types import Plan

STEPS = {
    "nested": (1, 5, 10, 20, 50),
    "fmeta": (1, 5, 10, 20, 50, 100),
    "remat": (1, 5, 10, 20, 50, 100, 500),
}
QUICK = {"nested": (1, 5), "fmeta": (1, 5), "remat": (5, 100)}
TASKS = 4


def cell_of(steps: int, quick: bool) -> Cell:
    """conv4 on 28x28, 5 ways, 1 shot, 1 query a class; a small one for ``--quick``."""
    return Cell(
        f"conv4-{steps}steps", "conv4", TASKS, steps, 5, 1, 1, 0.01,
        channels=16 if quick else 64, size=16 if quick else 28,
    )  # fmt: skip


def names(options: Options) -> list[str]:
    """The cells: numbers of inner steps."""
    found = {steps for many in (QUICK if options.quick else STEPS).values() for steps in many}
    return [cell_of(steps, options.quick).name for steps in sorted(found)]


def run(options: Options, results: Results) -> None:
    """Each number of inner steps, each way."""
    plan = QUICK if options.quick else STEPS
    for name in options.pick(names(options)):
        steps = int(name.removeprefix("conv4-").removesuffix("steps"))
        for who in [who for who in plan if steps in plan[who] and not results.has("memory", name)]:
            cell = cell_of(steps, options.quick)
            status, found = "timed", {}
            try:
                found = in_own_process("memory", cell=cell.config(), how=who, device=options.device)
            except RuntimeError as error:
                status = f"refused: {error}"
            results.add("memory", name, who, cell.config(), found, status)


def plan_of(how: str, steps: int) -> Plan:
    """The plan of each way."""
    if how == "nested":
        return Plan(engine="nested", compile=False)
    return Plan(compile=False, remat=max(1, round(math.sqrt(steps))) if how == "remat" else None)


def job(cell: dict, how: str, device: str) -> dict[str, float]:
    """MiB that one meta-gradient adds to this process, and its seconds."""
    known = Cell(**cell)
    short = build(known.smaller(steps=0), device)
    algorithm, params = short.algorithm()
    fmeta.meta_grad(algorithm, Plan(engine="nested", compile=False))(params, short.tasks)  # load what is lazy
    problem = build(known, device)
    algorithm, params = problem.algorithm()
    gradient = fmeta.meta_grad(algorithm, plan_of(how, known.steps))
    spent: list[float] = []
    call = lambda: spent.append(harness.seconds(lambda: gradient(params, problem.tasks), device)[0])  # noqa: E731
    mib = harness.added_mib(harness.memory_mib(device), call, device)
    return {"mib": mib, "seconds": spent[0]}
