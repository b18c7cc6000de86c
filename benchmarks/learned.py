"""What learning an optimiser costs: `python -m benchmarks.learned --out FILE`.

Throughput of meta-training beside a Python loop over tasks on torch.autograd (the same estimates, checked
first); memory of forward mode from 10 to 1,000 steps, each in a process of its own; an update of a model of a
million parameters beside torch.optim.Adam.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fmeta
from benchmarks.harness import added_mib, forget_peak, resident_mib
from fmeta import learned, tree
from fmeta.learned.problems import Training, images
from fmeta.types import System


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, float, float]:
    """Median, least and most seconds, after one call that is not counted."""
    call()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return statistics.median(found), min(found), max(found)


def by_loop(system: System, theta: Any, tasks: Training, count: int) -> Any:
    """The same gradient, task after task, by torch.autograd through the whole training."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in theta.items()}
    total: Any = {name: torch.zeros_like(leaf) for name, leaf in theta.items()}
    for index in range(count):
        task = tree.select(tasks, index)
        state, loss = system.start(leaves, task), torch.zeros(())
        for t in range(system.steps):
            state, now = system.step(leaves, state, task, torch.tensor(t))
            loss = loss + now / system.steps
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        total = {name: total[name] + g / count for name, g in zip(total, grads, strict=True)}
    return total


def throughput(tasks: int, steps: int, looped: int) -> dict[str, Any]:
    """Inner steps a second, differentiated: fmeta on all tasks, the loop on some of them."""
    problem = images(fmeta.data.glyphs().train, fmeta.models.mlp([64, 32, 20]))
    rule = learned.meta_transformer(lr=3e-3)
    theta, drawn = rule.init(0), problem.sample(0, 0, tasks, steps)
    system = learned.training(problem, rule, steps=steps)
    fast = fmeta.estimate(system, fmeta.bptt())
    few = tree.map(lambda x: x[:looped].contiguous(), drawn)
    got, want = fast(theta, (), few)[0], by_loop(system, theta, few, looped)
    error = max((got[n] - want[n]).abs().max().item() for n in got) / max(
        w.abs().max().item() for w in want.values()
    )
    if error > 1e-2:
        raise SystemExit(f"the two gradients differ by {error:.1e} of the largest number")
    own = timed(lambda: fast(theta, (), drawn), 5)
    loop = timed(lambda: by_loop(system, theta, few, looped), 2)
    per = lambda seconds, count: [count * steps / s for s in seconds]  # noqa: E731
    return {
        "difference": error,
        "fmeta": per(own, tasks),
        "loop": per(loop, looped),
        "tasks": tasks,
        "steps": steps,
    }


def added_memory(steps: int, method: Any) -> float:
    """MiB that a hypergradient adds to this process, peak."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2_000, 100, generator=generator)
    task = fmeta.Batch(x, x[:, :1])
    params = {"w": torch.zeros(100, 50), "v": torch.randn(50, 1, generator=generator) / 7}
    inner_loss = lambda p, h, b: ((torch.tanh(b.x @ p["w"]) @ p["v"] - b.y) ** 2).mean() * h["scale"]  # noqa: E731
    call = lambda steps: fmeta.hypergrad(  # noqa: E731
        inner_loss, inner_loss, lambda h: fmeta.sgd(h["lr"]), steps=steps, method=method,
    )(params, {"lr": torch.tensor(0.01), "scale": torch.tensor(1.0)}, fmeta.Task(task, task))  # fmt: skip
    call(2)
    if not forget_peak():
        raise SystemExit("this system does not let a process reset its peak memory")
    return added_mib(resident_mib(), lambda: call(steps))


def memory_of(method: str) -> dict[int, float]:
    """What hypergradients of 10, 100 and 1,000 steps add, each in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.learned", "--method", method, "--memory-of"]
    run = lambda steps: subprocess.run([*words, str(steps)], capture_output=True, text=True, check=True)  # noqa: E731
    return {steps: round(float(run(steps).stdout), 1) for steps in (10, 100, 1_000)}


def update_of_a_million() -> dict[str, Any]:
    """Milliseconds of an optimiser's step on 980,000 parameters."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(784, 900), nn.ReLU(), nn.Linear(900, 300), nn.ReLU(), nn.Linear(300, 10))
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    rule = learned.meta_transformer(lr=1e-6)
    made = {
        "torch.optim.Adam, foreach": torch.optim.Adam(module.parameters(), lr=1e-6, foreach=True),
        "meta_transformer": learned.Optimizer(module.parameters(), rule, rule.init(0), steps=1_000),
        "schedule": learned.Optimizer(
            module.parameters(), learned.schedule(lr=1e-6), learned.schedule().init(0), steps=1_000
        ),
    }
    return {name: [1e3 * s for s in timed(optimizer.step, 30)] for name, optimizer in made.items()}


PARTS = ("throughput", "memory", "update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what is measured")
    parser.add_argument("--memory-of", type=int, help="print what so many steps add, and leave")
    parser.add_argument("--method", default="forward", choices=["forward", "unroll"], help="of --memory-of")
    options = parser.parse_args()
    if options.memory_of:
        print(added_memory(options.memory_of, options.method))
        return
    record: dict[str, Any] = {"threads": torch.get_num_threads()}
    if "throughput" in options.parts:
        record["throughput"] = throughput(options.tasks, options.steps, 2)
        fast, loop = record["throughput"]["fmeta"][0], record["throughput"]["loop"][0]
        print(
            f"meta-training: {fast:,.0f} inner steps/s, loop over tasks {loop:,.1f}: {fast / loop:.0f} times"
        )
        print(f"  (gradients differ by {record['throughput']['difference']:.0e} of the largest number)")
    if "memory" in options.parts:
        record["added_MiB"] = {method: memory_of(method) for method in ("forward", "unroll")}
        for method, found in record["added_MiB"].items():
            print(f"hypergradient by {method}, MiB added by steps:", found)
    if "update" in options.parts:
        record["update_ms"] = update_of_a_million()
        for name, (median, least, most) in record["update_ms"].items():
            print(f"update of 980,000 parameters, {name}: {median:.1f} ms ({least:.1f} to {most:.1f})")
    if options.out:
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
