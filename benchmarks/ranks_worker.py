"""What each rank of the ranks suite runs; rank 0 prints a line of JSON.

torchrun --nproc-per-node 2 -m benchmarks.ranks_worker '{"cell": {...}, ...}'
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import torch
from torch import distributed
from torch.utils._pytree import tree_leaves

import fmeta
from benchmarks import harness
from benchmarks.cells import Cell
from benchmarks.problems import build
from fmeta.types import Plan


def job(cell: dict[str, Any], device: str, seconds: float, calls: int, eager: bool) -> dict[str, Any]:
    """Milliseconds of an outer step on all tasks, and the norm of the weights after the first."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    problem = build(Cell(**cell), device)
    algorithm, params = problem.algorithm()
    mesh = None
    if ranks > 1:
        kind = device.split(":")[0]
        mesh = distributed.device_mesh.init_device_mesh(kind, (ranks,), mesh_dim_names=("task",))
    outer = fmeta.sgd(0.1)  # proportional to the gradient, so that the norm below tells a difference
    state = fmeta.meta_init(algorithm, outer, params)
    step = fmeta.meta_step(algorithm, outer, Plan(mesh=mesh, compile=False if eager else "auto"))
    after, _ = step(state, problem.tasks)
    moved = [a - b for a, b in zip(tree_leaves(after.meta), tree_leaves(state.meta), strict=True)]
    norm = torch.stack([m.double().norm() for m in moved]).norm().item()
    # every rank must make the same number of calls: rank 0 times a few and says how many
    one = torch.tensor(harness.block(lambda: step(state, problem.tasks), 0.0, 1, device)[0], device=device)
    if ranks > 1:
        distributed.broadcast(one, 0)
    count = max(3, min(calls, int(1e3 * seconds / one.item())))
    times = [1e3 * harness.seconds(lambda: step(state, problem.tasks), device)[0] for _ in range(count)]
    return {"ms": harness.spread(times), "calls": count, "norm": norm}


def main() -> None:
    """Do the job that the only argument describes."""
    warnings.simplefilter("ignore")
    found = job(**json.loads(sys.argv[1]))
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(found), flush=True)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
