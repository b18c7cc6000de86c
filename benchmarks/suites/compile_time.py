"""Seconds from after the imports to the first meta-step done: with empty caches, and in a new process with full ones.

fmeta compiles the inner step and not the loop, so its time does not grow with the steps. Beside it the
unrolled loop through ``torch.compile`` and JAX, unrolled and by ``lax.scan``.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from typing import Any

import torch

import fmeta
from benchmarks.cells import Cell, named, sinusoid
from benchmarks.contenders import CONTENDERS, Setting
from benchmarks.one import in_own_process
from benchmarks.options import Options
from benchmarks.problems import Problem, build
from benchmarks.results import Results
from fmeta.types import Params, Task

WAYS = ("fmeta", "nested", "jax", "jax-scan")
LARGEST = {"nested": 10}
"""Inner steps beyond which it takes too long to be run."""
LIMIT = 1200.0


def cells(options: Options) -> list[Cell]:
    """The sinusoid problem with 1, 10 and 100 inner steps, and conv4."""
    if options.quick:
        return [sinusoid(5, 2)]
    return [*(sinusoid(25, steps) for steps in (1, 10, 100)), named("conv4-5w1s1q")]


def run(options: Options, results: Results) -> None:
    """Each cell, each way, cold and then warm."""
    wanted = [
        way for way in WAYS if way in (("fmeta",) if options.quick else ("fmeta", "nested", *options.peers))
    ]
    for cell in cells(options):
        if cell.name not in options.pick([cell.name]) or results.has("compile", cell.name):
            continue
        for way in wanted:
            if cell.steps <= LARGEST.get(way, cell.steps):
                measure(cell, way, options, results)


def measure(cell: Cell, way: str, options: Options, results: Results) -> None:
    """Cold, then warm, both in new processes that share a folder of caches."""
    status = "timed"
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            "FMETA_CACHE": folder,
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        setting = list(Setting(options.device, options.limit, LIMIT, options.jax_python))
        try:
            for state in ("cold", "warm"):
                spent = in_own_process("compile", LIMIT, caches, cell=cell.config(), way=way, setting=setting)
                found |= {f"{state}_{name}": value for name, value in spent.items()}
        except RuntimeError as error:
            status = (
                f"absent: {str(error).partition('Absent: ')[2]}"
                if "Absent: " in str(error)
                else f"refused: {error}"
            )
    results.add("compile", cell.name, way, cell.config(), found, status)


def cpu_seconds() -> float:
    """CPU time of this process and of the children that it has waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def job(cell: dict[str, Any], way: str, setting: list[Any]) -> dict[str, float]:
    """Seconds to the first result, by the clock and of the CPU (compilers included; not for JAX's process)."""
    known = Setting(*setting)
    problem = build(Cell(**cell), known.device)
    if way.startswith("jax"):
        contender = CONTENDERS[way].start(problem, known)
        try:
            return {"seconds": contender.first()[0]}
        finally:
            contender.close()
    begin, cpu = time.perf_counter(), cpu_seconds()
    (outer_step if way == "fmeta" else unrolled)(problem)
    spent = time.perf_counter() - begin
    with contextlib.suppress(
        Exception
    ):  # a part of torch that is not public: its workers' time counts once they end
        from torch._inductor.async_compile import shutdown_compile_workers

        shutdown_compile_workers()
    return {"seconds": spent, "cpu_seconds": cpu_seconds() - cpu}


def outer_step(problem: Problem) -> None:
    """A user's first outer step."""
    algorithm, params = problem.algorithm()
    outer = fmeta.adam(1e-3)
    state = fmeta.meta_init(algorithm, outer, params)
    state, _ = fmeta.meta_step(algorithm, outer)(state, problem.tasks)
    int(state.step)


def unrolled(problem: Problem) -> None:
    """The meta-gradient as one graph of all inner steps."""
    algorithm, params = problem.algorithm()

    @torch.compile(fullgraph=True)
    def gradient(params: Params, tasks: Task) -> Params:
        mean = lambda p: torch.func.vmap(lambda t: algorithm.loss(p, t)[0])(tasks).mean()  # noqa: E731
        return torch.func.grad(mean)(params)

    gradient(params, problem.tasks)
