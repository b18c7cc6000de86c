"""Two processes, each with half of the tasks, against one process with all: ``Plan(mesh=...)`` under torchrun.

Both with one thread a process. On one core the same work is divided, so the ratio shows what sharding
costs; on two cores it may gain up to twice.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.cells import Cell, named, sinusoid
from benchmarks.one import answer
from benchmarks.options import Options
from benchmarks.results import Results

RANKS = 2


def cells(options: Options) -> list[Cell]:
    """Sinusoid, where communication shows, and conv4, where computing does."""
    return [sinusoid(8, 1)] if options.quick else [sinusoid(1000, 5), named("conv4-5w1s1q")]


def run(options: Options, results: Results) -> None:
    """Each cell with one process and with two, alternating, ratios by round."""
    for cell in cells(options):
        if cell.name not in options.pick([cell.name]) or results.has("ranks", cell.name):
            continue
        found: dict[int, list[dict[str, Any]]] = {1: [], RANKS: []}
        status = {1: "timed", RANKS: "timed"}
        for _ in range(1 if options.quick else 3):
            for ranks in [ranks for ranks in found if status[ranks] == "timed"]:
                try:
                    found[ranks].append(torchrun(ranks, cell, options))
                except RuntimeError as error:
                    status[ranks] = f"refused: {error}"
        for ranks, visits in found.items():
            result: dict[str, Any] = {"visits": visits}
            if visits:
                result["ms"] = min(visit["ms"]["median"] for visit in visits)
                result["ratio"] = [
                    visit["ms"]["median"] / one["ms"]["median"]
                    for visit, one in zip(visits, found[1], strict=False)
                ]
                result["error"] = abs(visits[0]["norm"] / found[1][0]["norm"] - 1) if found[1] else None
            config = {**cell.config(), "ranks": ranks, "threads_a_rank": 1, "compiled": not options.quick}
            results.add("ranks", cell.name, f"{ranks} ranks", config, result, status[ranks])


def torchrun(ranks: int, cell: Cell, options: Options) -> dict[str, Any]:
    """What rank 0 printed."""
    arguments = {
        "cell": cell.config(), "device": options.device,
        "seconds": options.seconds, "calls": options.calls, "eager": options.quick,
    }  # fmt: skip
    worker = ["-m", "benchmarks.ranks_worker", json.dumps(arguments)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return answer([sys.executable, *launch, *worker], 1800.0, {"OMP_NUM_THREADS": "1"})
