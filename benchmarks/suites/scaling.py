"""Many tasks in chunks: the time is linear in the tasks, the memory that of one chunk."""

from __future__ import annotations

import statistics
from typing import Any

import fmeta
from benchmarks import harness
from benchmarks.cells import Cell, sinusoid
from benchmarks.one import in_own_process
from benchmarks.options import Options
from benchmarks.problems import build
from benchmarks.results import Results
from fmeta.types import Plan

TASKS, CHUNK, STEPS = (100, 1_000, 10_000), 100, 5


def cells(options: Options) -> list[Cell]:
    """Numbers of tasks."""
    return [sinusoid(tasks, STEPS) for tasks in ((20, 200) if options.quick else TASKS)]


def run(options: Options, results: Results) -> None:
    """Each number of tasks in a process of its own, in chunks and all at once."""
    chunk = 20 if options.quick else CHUNK
    for cell in cells(options):
        if cell.name not in options.pick([cell.name]) or results.has("scaling", cell.name):
            continue
        for who, size in (("chunks", chunk), ("whole", None)):
            status, found = "timed", {}
            arguments = {
                "cell": cell.config(), "chunk": size, "device": options.device,
                "seconds": options.seconds, "calls": options.calls, "eager": options.quick,
            }  # fmt: skip
            try:
                found = in_own_process("scaling", **arguments)
            except RuntimeError as error:
                status = f"refused: {error}"
            config = {**cell.config(), "chunk_size": size, "compiled": not options.quick}
            results.add("scaling", cell.name, who, config, found, status)


def job(
    cell: dict[str, Any], chunk: int | None, device: str, seconds: float, calls: int, eager: bool
) -> dict[str, Any]:
    """Milliseconds of a meta-gradient, and the memory it adds once its kernels are there."""
    problem = build(Cell(**cell), device)
    before = harness.memory_mib(device)
    algorithm, params = problem.algorithm()
    gradient = fmeta.meta_grad(algorithm, Plan(chunk_size=chunk, compile=False if eager else "auto"))
    call = lambda: gradient(params, problem.tasks)  # noqa: E731
    first, _ = harness.seconds(call, device)
    call()  # recorded, and slower than those to come
    warm = harness.memory_mib(device)
    times = harness.block(call, seconds, calls, device)
    mib = harness.added_mib(warm, call, device)
    per_task = statistics.median(times) / len(problem.tasks.query.y)
    return {
        "first_s": first, "ms": harness.spread(times), "calls": len(times), "ms_a_task": per_task,
        "mib": mib, "loaded_mib": warm - before,
    }  # fmt: skip
