"""What every benchmark shares: timing, peak memory in a process of its own, and a line of JSON a result."""

from __future__ import annotations

import json
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

REPORTS = pathlib.Path(__file__).parent / "reports"


def timed(fn: Callable[[], Any], calls: int, burn_in: int = 2) -> dict[str, float]:
    """Milliseconds a call after a burn-in: median, smallest and largest."""
    for _ in range(burn_in):
        fn()
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - begin))
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def peak_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def in_own_process(module: str, *args: str) -> dict[str, Any]:
    """Run ``python -m module args`` and read the JSON of its last line."""
    command = [sys.executable, "-W", "ignore", "-m", module, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def record(name: str, config: dict[str, Any], result: dict[str, Any]) -> None:
    """Append one result, with versions and machine, to ``reports/<name>.jsonl``."""
    line = {
        "benchmark": name,
        "config": config,
        "result": result,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    REPORTS.mkdir(exist_ok=True)
    with (REPORTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def commit() -> str:
    """The commit of this checkout, or an empty string outside of one."""
    here = pathlib.Path(__file__).parent
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    cells = [head, ["---"] * len(head), *[[str(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)
