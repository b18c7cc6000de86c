"""JAX as a contender: a worker process (``jax_worker``) in an environment of its own, told what to do by lines."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.peers.base import Absent, Setting
from benchmarks.problems import Problem
from fmeta.types import Params

ROOT = Path(__file__).parents[2]


class Remote:
    """A JAX contender: a worker process that is told what to do line by line."""

    def __init__(self, form: str, problem: Problem, setting: Setting) -> None:
        """Start the worker and hand it the problem in a file."""
        self.setting, self.device = setting, setting.device
        python = setting.jax_python or os.environ.get("FMETA_BENCH_JAX") or sys.executable
        if python == sys.executable and importlib.util.find_spec("jax") is None:
            raise Absent(
                "jax is not installed here; name a Python that has it by --jax-python or FMETA_BENCH_JAX"
            )
        self.folder = tempfile.TemporaryDirectory()
        environment = {
            **os.environ,
            "FMETA_BENCH_THREADS": str(torch.get_num_threads()),
            "PYTHONPATH": str(ROOT),
        }
        if self.device == "cpu":
            environment["JAX_PLATFORMS"] = "cpu"
        self.errors = (Path(self.folder.name) / "stderr").open("w+")
        try:
            self.process = subprocess.Popen(
                [python, "-m", "benchmarks.peers.jax_worker"],
                cwd=ROOT, env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            )  # fmt: skip
        except OSError as error:
            raise Absent(f"{python}: {error}") from error
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self.listen, daemon=True).start()
        file = Path(self.folder.name) / "problem.npz"
        np.savez(file, **arrays(problem))
        self.facts = self.ask(120, do="load", file=str(file), cell=problem.cell.config(), form=form)

    def listen(self) -> None:
        """Pass on the worker's lines; an empty one when it has ended."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def ask(self, wait: float, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.answers.get(timeout=wait)
        except queue.Empty:
            self.close()
            raise harness.OverTime(f"over the limit of {wait:g} s a call") from None
        except BrokenPipeError:
            line = ""
        if not line:
            said = Path(self.errors.name).read_text().strip().splitlines() or ["no message"]
            raise (Absent if "No module named 'jax'" in said[-1] else RuntimeError)(
                f"JAX worker: {said[-1][:300]}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def gradient(self, wait: float, **command: Any) -> tuple[dict[str, Any], Params]:
        """An answer that comes with a file of gradients."""
        file = Path(self.folder.name) / "gradient.npz"
        answer = self.ask(wait, out=str(file), **command)
        with np.load(file) as found:
            return answer, {name: torch.from_numpy(found[name]) for name in found}

    def exact(self, tasks: int) -> Params:  # noqa: D102
        return self.gradient(self.setting.compile_limit, do="exact", tasks=tasks)[1]

    def first(self) -> tuple[float, Params]:  # noqa: D102
        answer, grads = self.gradient(self.setting.compile_limit, do="first")
        return answer["seconds"], grads

    def times(self, budget: float, most: int) -> list[float]:  # noqa: D102
        return self.ask(budget + 2 * self.setting.limit, do="time", budget=budget, most=most)["ms"]

    def peak(self) -> dict[str, float]:  # noqa: D102
        self.first()
        return self.ask(2 * self.setting.limit, do="peak")

    def close(self) -> None:
        """End the worker."""
        self.process.kill()
        self.process.wait()
        self.errors.close()
        self.folder.cleanup()


def arrays(problem: Problem) -> dict[str, np.ndarray]:
    """Weights and tasks under flat names, for a file."""
    tasks = problem.tasks
    data = {
        f"{part}_{leaf}": getattr(getattr(tasks, part), leaf)
        for part in ("support", "query")
        for leaf in "xy"
    }
    return {
        **{name: x.cpu().numpy() for name, x in data.items()},
        **{f"params/{name}": p.cpu().numpy() for name, p in problem.params.items()},
    }
