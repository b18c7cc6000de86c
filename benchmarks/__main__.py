"""Measure fmeta against its peers on this machine: speed, memory, compile time, scaling.

Results go to benchmarks/reports/<date>-<device>/: results.jsonl (a line a result: config, figures, versions,
commit, machine), report.md and plots.

`python -m benchmarks --quick` takes two tiny cells, to see it run.

`python -m benchmarks` runs fmeta against its peers in every cell; `--suite all --resume` runs everything and
goes on where an earlier run stopped.

`python -m benchmarks --only 'conv4*' --peers loop jax --jax-python ~/jax/bin/python` chooses.

`python -m benchmarks --suite report RUN` makes tables and plots of a run again and measures nothing.

higher and TorchOpt come with `pip install -e '.[bench]'`. JAX runs in an environment of its own: `python -m
venv jax && jax/bin/pip install jax numpy`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import tyro

from benchmarks import report
from benchmarks.options import Options
from benchmarks.results import Results, default_folder
from benchmarks.suites import compile_time, memory, norms, ranks, scaling, speed

SUITES: dict[str, Callable[[Options, Results], None]] = {
    "speed": speed.run,
    "memory": memory.run,
    "compile": compile_time.run,
    "scaling": scaling.run,
    "ranks": ranks.run,
    "norms": norms.run,
}
QUICK: dict[str, Any] = {"rounds": 2, "seconds": 0.2, "calls": 10, "limit": 20.0, "memory": False}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = tyro.cli(
        Options,
        args=arguments,
        prog="python -m benchmarks",
        description=__doc__,
    )
    if options.suite == "report":
        if options.run is None:
            raise SystemExit(
                "benchmarks: --suite report needs a run folder: python -m benchmarks --suite report RUN"
            )
        print(report.write(options.run))
        return 0
    if options.list:
        print("\n".join(listed(options)))
        return 0
    if options.quick:
        given = {name: getattr(options, name) for name in QUICK}
        plain = Options()
        options = replace(options, **{k: v for k, v in QUICK.items() if given[k] == getattr(plain, k)})
    prepare(options)
    folder = options.out or default_folder(options.device)
    if options.quick and options.out is None:
        folder = folder.with_name(f"{folder.name}-quick")
    results = Results(folder, options.device, options.resume)
    for name in SUITES if options.suite == "all" else (options.suite,):
        SUITES[name](options, results)
    if not (folder / "results.jsonl").exists():
        print("benchmarks: no cell was chosen; --list shows their names", file=sys.stderr)
        return 1
    print(report.write(folder))
    return 0


def prepare(options: Options) -> None:
    """Threads and float32 for this process and those that it starts."""
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("benchmarks: --device cuda needs a GPU, torch finds none. Use --device cpu.")
    if options.threads:
        torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    torch.backends.cudnn.allow_tf32 = False
    warnings.simplefilter("ignore")


def listed(options: Options) -> list[str]:
    """Suite and cell names."""
    cells = {
        "speed": [f"{cell.name:22} {cell.about}" for cell in options.cells()],
        "memory": options.pick(memory.names(options)),
        "compile": options.pick(cell.name for cell in compile_time.cells(options)),
        "scaling": options.pick(cell.name for cell in scaling.cells(options)),
        "ranks": options.pick(cell.name for cell in ranks.cells(options)),
        "norms": options.pick(norms.networks()),
    }
    return [
        f"{suite:8} {cell}" for suite in cells if options.suite in (suite, "all") for cell in cells[suite]
    ]


if __name__ == "__main__":
    sys.exit(main())
