"""``jit(vmap(grad))`` in JAX, in a process and an environment of its own; needs jax and numpy only.

Commands come as lines of JSON on standard input, each is answered by one on standard output:
``load`` (the problem's file), ``exact`` (float64, first tasks), ``first`` (compile, one call), ``time``, ``peak``.

    python -m benchmarks.peers.jax_worker    # started by benchmarks.contenders
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

THREADS = int(os.environ.get("FMETA_BENCH_THREADS", "0"))
if THREADS and hasattr(os, "sched_setaffinity"):  # JAX has no option for it and reads this before it starts
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.peers import jax_models  # noqa: E402


def meta_gradient(cell: dict[str, Any], form: str) -> Any:
    """``(params, data) -> gradient``, compiled at its first call."""
    net = jax_models.NETS[cell["net"]]
    measure = jax_models.mse if cell["net"] == "mlp" else jax_models.cross_entropy
    lr, steps = cell["lr"], cell["steps"]

    def loss(params: Any, x: Any, y: Any) -> Any:
        return measure(net(params, x), y)

    def one(params: Any, task: Any) -> Any:
        def update(params: Any, _: Any = None) -> tuple[Any, None]:
            grads = jax.grad(loss)(params, task["support_x"], task["support_y"])
            return jax.tree.map(lambda p, g: p - lr * g, params, grads), None

        if form == "scan":
            params, _ = jax.lax.scan(update, params, None, length=steps)
        else:
            for _ in range(steps):
                params, _ = update(params)
        return loss(params, task["query_x"], task["query_y"])

    return jax.jit(jax.grad(lambda params, tasks: jax.vmap(one, (None, 0))(params, tasks).mean()))


class Worker:
    """The state between commands."""

    def load(self, file: str, cell: dict[str, Any], form: str) -> dict[str, Any]:
        """Read weights and tasks; nothing is compiled."""
        arrays = dict(np.load(file))
        data = {
            k: v.astype(np.int32) if v.dtype == np.int64 else v for k, v in arrays.items() if "/" not in k
        }
        params = {k.removeprefix("params/"): v for k, v in arrays.items() if k.startswith("params/")}
        self.params, self.data = jax_models.from_torch(params, data)
        self.on_device = jax.tree.map(jnp.asarray, (self.params, self.data))
        self.gradient = meta_gradient(cell, form)
        self.cell, self.form = cell, form
        self.before = resident("VmRSS:")
        return {"jax": jax.__version__, "device": str(jax.devices()[0]), "threads": THREADS}

    def save(self, grads: Any, file: str) -> None:
        """Write a gradient under torch's names and layout."""
        np.savez(file, **{k: np.asarray(v) for k, v in jax_models.to_torch(jax.device_get(grads)).items()})

    def exact(self, tasks: int, out: str) -> dict[str, Any]:
        """The gradient of the first tasks in float64."""
        double = lambda x: x.astype(np.float64) if x.dtype == np.float32 else x  # noqa: E731
        with jax.enable_x64(True):
            params = {k: jnp.asarray(double(v)) for k, v in self.params.items()}
            data = {k: jnp.asarray(double(v[:tasks])) for k, v in self.data.items()}
            self.save(meta_gradient(self.cell, self.form)(params, data), out)
        return {}

    def call(self) -> Any:
        """One meta-gradient, waited for."""
        return jax.block_until_ready(self.gradient(*self.on_device))

    def first(self, out: str) -> dict[str, Any]:
        """Compile and call once."""
        begin = time.perf_counter()
        grads = self.call()
        spent = time.perf_counter() - begin
        self.save(grads, out)
        return {"seconds": spent}

    def time(self, budget: float, most: int) -> dict[str, Any]:
        """Milliseconds of some calls; the same rule as ``benchmarks.harness.block``."""

        def seconds() -> float:
            begin = time.perf_counter()
            self.call()
            return time.perf_counter() - begin

        first = seconds()
        times = [first] if first > budget / 4 else []
        budget -= sum(times)
        begin = time.perf_counter()
        while len(times) < most and (not times or time.perf_counter() - begin + times[-1] < budget):
            times.append(seconds())
        return {"ms": [1e3 * t for t in times]}

    def peak(self) -> dict[str, Any]:
        """Peak memory of one warm call, beyond what was there before it and beyond the loaded problem, in MiB."""
        device = jax.devices()[0]
        if device.platform != "cpu":
            held = device.memory_stats()
            most, warm = held["peak_bytes_in_use"] / 2**20, held["bytes_in_use"] / 2**20
            return {"call_mib": most - warm, "peak_mib": most}
        warm = resident("VmRSS:")
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.call()
        most = resident("VmHWM:")
        return {"call_mib": most - warm, "peak_mib": most - self.before}


def resident(key: str) -> float:
    """A figure of the process's memory in MiB; not a number where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 2**10
    return float("nan")


def main() -> None:
    """Answer commands until the input ends."""
    if jax.devices()[0].platform != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")  # float32, as torch is told
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:
            answer = {
                "error": f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"[:300]
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
