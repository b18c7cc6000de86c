"""One measurement in a process of its own: started by the suites, prints a line of JSON.

python -m benchmarks.one '{"do": "peak", ...}'
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

JOBS = {
    "peak": "benchmarks.suites.speed",
    "memory": "benchmarks.suites.memory",
    "compile": "benchmarks.suites.compile_time",
    "scaling": "benchmarks.suites.scaling",
}
"""Each module has a function ``job(**arguments)`` that returns what is printed."""


def in_own_process(
    do: str, limit: float = 1800.0, environment: dict[str, str] | None = None, **arguments: Any
) -> dict[str, Any]:
    """Run a job in a new Python; raises ``RuntimeError`` with its last line of complaint."""
    command = [sys.executable, "-m", "benchmarks.one", json.dumps({"do": do, **arguments})]
    return answer(command, limit, environment or {})


def answer(command: list[str], limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """The JSON in the last line of a command's output."""
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"over the limit of {limit:g} s") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = [
            line for line in done.stderr.splitlines() if re.search(r"Error: \S", line)
        ]  # torchrun's own say nothing
        said = said or done.stderr.splitlines()[-1:] or [f"ended with code {done.returncode}"]
        raise RuntimeError(re.sub(r"^\[rank\d+\]: ?", "", said[-1])[:400])
    return json.loads(lines[-1])


def main() -> None:
    """Do the job that the only argument describes."""
    arguments = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    job = importlib.import_module(JOBS[arguments.pop("do")]).job
    print(json.dumps(job(**arguments)))


if __name__ == "__main__":
    main()
