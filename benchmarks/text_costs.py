"""What frozen parts and low-rank updates of a text encoder cost: a meta-step with cached features against one that runs
the encoder again, and the memory of a second-order meta-step.

`python -m benchmarks.text_costs --out benchmarks/reports/text_costs.json`
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro

import fmeta
from fmeta.train.config import MaybePath
from fmeta.types import Batch, Task


@dataclass(frozen=True)
class Options:
    """Measure all, or one thing in this process."""

    out: MaybePath = None
    only: Literal["all", "cached", "again", "lora"] = "all"
    model: str = "minilm"
    tasks: int = 4
    steps: int = 5
    length: int = 16
    """Tokens of a sentence."""
    calls: int = 1


def main(options: Options) -> None:
    """Each in a process of its own, so that memory is its own."""
    if options.only != "all":
        print(json.dumps(measured(options)))
        return
    found: dict[str, Any] = {"command": " ".join(sys.argv), "threads": torch.get_num_threads()}
    for name in ("cached", "again", "lora"):
        command = [sys.executable, "-m", "benchmarks.text_costs", "--only", name, "--model", options.model]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(run.stdout.splitlines()[-1])
        print(name, found[name], flush=True)
    found["ratio"] = found["again"]["cpu_ms"] / found["cached"]["cpu_ms"]
    print(
        f"cached features: {found['ratio']:.0f} times the speed; LoRA: {found['lora']['added_mib']:.0f} MiB added"
    )
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def measured(options: Options) -> dict[str, float]:
    """Time and memory of one meta-step, 5-way 5-shot with 5 queries."""
    whole = fmeta.models.encoder(options.model, ways=5)
    whole.model.requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20_000, (2, options.tasks, 25, options.length), generator=random)
    y = torch.arange(5).repeat_interleave(5).expand(options.tasks, -1)
    x = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]
    adapts: Any = ("head",)
    module: Any = whole
    if options.only == "cached":
        embed = fmeta.models.encoder(options.model)
        with torch.no_grad():
            x = [embed(**{n: leaf.flatten(0, 1) for n, leaf in b.items()}).unflatten(0, y.shape) for b in x]  # type: ignore[misc]
        module = fmeta.models.Projection(embed.dim, ways=5)
    if options.only == "lora":
        module, adapts = fmeta.with_lora(whole, "model.encoder.layer.*", rank=8), ("*.lora_*", "head")
    tasks = Task(*(Batch(b, y) for b in x))
    apply, params = fmeta.functionalize(module)
    algorithm = fmeta.mamlpp(fmeta.losses.cross_entropy(apply), steps=options.steps, lr=0.05, adapts=adapts)
    outer = fmeta.adam(1e-3)
    step = fmeta.meta_step(algorithm, outer, fmeta.Plan(compile=False))
    state = fmeta.meta_init(algorithm, outer, params)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(state, tasks)
    cpu, wall = [], []
    for _ in range(options.calls):
        begin, clock = time.process_time(), time.perf_counter()
        step(state, tasks)
        cpu.append(time.process_time() - begin)
        wall.append(time.perf_counter() - clock)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "cpu_ms": 1e3 * statistics.median(cpu),
        "wall_ms": 1e3 * statistics.median(wall),
        "peak_mib": after / 1024,
        "added_mib": (after - before) / 1024,
        "learned": float(sum(p.numel() for p in params.values())),
    }


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
