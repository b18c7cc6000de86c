"""What every rank of ``test_mesh.py`` computes: one launch for many cases, since starting torch takes seconds.

``python -m torch.distributed.run --nproc-per-node 2 tests/mesh_ranks.py FOLDER`` writes ``FOLDER/rank.pt``.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import CASES, Case, case_named
from helpers import cast, reordered, unstacked
from problems import LOSS, classification_tasks, network, regression_tasks
from reference import networks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils import _pytree as pytree

import fmeta
from fmeta import Batch, Plan, Task
from fmeta.parallel.mesh import Ranks

EVERY = [case.name for case in CASES]
COUNTS = {"seven on two": [0, 1, 2, 2, 1, 0, 1], "fewer than ranks": [1], "as many as ranks": [2, 0]}
STEPS = 5
Result = dict[str, Any]


def meta_grad(case: Case, order: list[int], **plan: Any) -> Any:
    algorithm, meta, tasks = case.make()
    return fmeta.meta_grad(algorithm, Plan(compile=False, **plan))(meta, reordered(tasks, order))


def gradients(mesh: DeviceMesh | None) -> Result:
    """The table of cases: three tasks on two ranks."""
    return {name: meta_grad(case_named(name), [0, 1, 2], mesh=mesh) for name in EVERY}


def counts(mesh: DeviceMesh | None) -> Result:
    """Other numbers of tasks, taken in every way."""
    plans: dict[str, dict[str, Any]] = {
        "whole": {},
        "in chunks": {"chunk_size": 2},
        "as memory allows": {"chunk_size": "auto"},
        "one by one": {"tasks": "loop"},
        "autograd": {"tasks": "loop", "engine": "autograd"},
        "nested": {"engine": "nested"},
    }
    return {
        f"{name}, {count}, {how}": meta_grad(case_named(name), order, mesh=mesh, **plan)
        for name in ("maml 3 steps", "reptile", "maml multi-step loss")
        for count, order in COUNTS.items()
        for how, plan in plans.items()
    }


def shapes(mesh: DeviceMesh | None) -> Result:
    """Tasks of different shapes, and a meta of two dtypes."""
    task = unstacked(regression_tasks())[0]
    small = Task(Batch(task.support.x[:2], task.support.y[:2]), Batch(task.query.x[:3], task.query.y[:3]))
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=2)
    plan = Plan(mesh=mesh, tasks="loop", compile=False)
    found = {"sequence": fmeta.meta_grad(algorithm, plan)(network(), [task, small, task])}
    half = fmeta.meta_grad(algorithm, Plan(mesh=mesh, compile=False))
    found["bfloat16"] = half(*cast((network(), regression_tasks()), torch.bfloat16))

    def mixed(params: dict[str, Any], batch: Batch) -> Any:
        return ((networks.mlp(params["net"], batch.x) * params["scale"].double() - batch.y) ** 2).mean(), {
            "right": torch.isfinite(params["scale"]).all(),
            "count": torch.tensor(batch.x.shape[0]),
        }

    meta = {"net": network(), "scale": torch.ones(3, dtype=torch.float32)}
    step = fmeta.meta_grad(fmeta.maml(mixed, fmeta.sgd(0.2), steps=2), Plan(mesh=mesh, compile=False))
    found["mixed dtypes"] = step(meta, regression_tasks())
    return found


def training(mesh: DeviceMesh | None) -> Result:
    """States after some outer steps, one of which is not finite."""
    found = {}
    for name in ("maml 3 steps", "reptile", "metasgd"):
        algorithm, meta, tasks = case_named(name).make()
        tasks = reordered(tasks, COUNTS["seven on two"])
        outer = fmeta.adam(0.05)
        state = fmeta.MetaState(meta, outer.init(meta), torch.tensor(0))
        step = fmeta.meta_step(algorithm, outer, Plan(mesh=mesh, compile=False))
        for _ in range(STEPS):
            state, metrics = step(state, tasks)
        found[name] = state, metrics
        bad = pytree.tree_map(torch.clone, tasks)
        bad.support.x[5, 0] = torch.nan
        found[f"{name}, task 5 is NaN"] = step(state, bad)
        bad.query.x[1, 0] = torch.inf
        found[f"{name}, tasks 1 and 5"] = step(state, bad)
    return found


def evaluation(mesh: DeviceMesh | None) -> Result:
    """Metrics by task, along the way and at the end."""
    found = {}
    for count, order in COUNTS.items():
        algorithm, meta, tasks = case_named("maml BatchNorm").make()
        for how, plan in {
            "whole": {},
            "in chunks": {"chunk_size": 2},
            "one by one": {"tasks": "loop"},
        }.items():
            plan = Plan(mesh=mesh, compile=False, **plan)  # type: ignore[arg-type]
            evaluate = fmeta.meta_eval(algorithm, plan, steps=[0, 1, 4])
            found[f"{count}, {how}"] = evaluate(meta, reordered(tasks, order))
    found["at the end"] = fmeta.meta_eval(algorithm, Plan(mesh=mesh))(meta, tasks)
    found["outputs"] = fmeta.meta_predict(algorithm, Plan(mesh=mesh, compile=False), [0, 2])(meta, tasks)
    return found


def dropout(params: dict[str, Any], batch: Batch) -> Any:
    mask = F.dropout(torch.ones(4, dtype=torch.float64), 0.5)
    return ((networks.mlp(params, batch.x, [mask]) - batch.y) ** 2).mean(), {}


def randomness(mesh: DeviceMesh | None) -> Result:
    """Masks; rank 1 has another random state, which must not matter."""
    tasks = reordered(regression_tasks(), COUNTS["seven on two"])
    algorithm = fmeta.maml(dropout, fmeta.sgd(0.2), steps=2)
    plans: dict[str, dict[str, Any]] = {
        "same": {"randomness": "same"},
        "different by task": {"randomness": "different", "tasks": "loop"},
        "different by chunk": {"randomness": "different", "chunk_size": 2},
        "different, one chunk": {"randomness": "different", "chunk_size": 10},
    }
    found = {}
    for name, plan in plans.items():
        torch.manual_seed(3 if mesh is None or mesh.get_rank() == 0 else 77)
        step = fmeta.meta_grad(algorithm, Plan(mesh=mesh, **plan))
        found[name] = [step(network(), tasks) for _ in range(2)]
    return found


PARTS: tuple[Callable[[DeviceMesh | None], Result], ...] = (
    gradients,
    counts,
    shapes,
    training,
    evaluation,
    randomness,
)


def refusals(mesh: DeviceMesh) -> Result:
    """Messages that only several processes can show."""
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=1)
    step = fmeta.meta_grad(algorithm, Plan(mesh=mesh))
    tasks = regression_tasks()
    loss = lambda meta: step(meta, tasks)[1]["loss"]  # noqa: E731
    labels = classification_tasks(2)
    labels.query.y[2] = 99  # on the last rank only
    apply, params = fmeta.functionalize(fmeta.models.mlp([2, 4, 3]).double())
    classes = fmeta.maml(fmeta.losses.cross_entropy(apply), fmeta.sgd(0.2), steps=1)
    calls: dict[str, Callable[[], Any]] = {
        "inside grad": lambda: torch.func.grad(loss)(network()),
        "another device": lambda: step(pytree.tree_map(lambda x: x.to("meta"), network()), tasks),
        "other axes": lambda: Plan(mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))),
        "not in it": lambda: Plan(mesh=DeviceMesh("cpu", [1 - dist.get_rank()])),
        "labels": lambda: fmeta.meta_grad(classes, Plan(mesh=mesh))(params, labels),
    }
    found = {}
    for name, call in calls.items():
        try:
            result = call()
            fmeta.meta_grad(algorithm, result) if isinstance(result, Plan) else None
            found[name] = "nothing was raised"
        except (ValueError, TypeError) as error:
            found[name] = str(error)
    return found


def helpers(mesh: DeviceMesh) -> Result:
    """What the mesh is asked for by others."""
    two = init_device_mesh("cpu", (1, 2), mesh_dim_names=("model", "task"))
    ranks = Ranks(two)
    return {
        "agreed": ranks.agree({"rank": dist.get_rank(), "chunk": 4}),
        "two axes": fmeta.meta_grad(fmeta.maml(LOSS, fmeta.sgd(0.2), steps=1), Plan(mesh=two, compile=False))(
            network(), regression_tasks()
        ),
        "shares": [ranks.share(total, unit) for total, unit in ((7, 1), (1, 1), (7, 2), (7, 10))],
    }


def main(folder: Path) -> None:
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("task",))
    try:
        found = {part.__name__: part(mesh) for part in PARTS}
        found |= {"refusals": refusals(mesh), "helpers": helpers(mesh)}
    except BaseException:
        found = {"error": traceback.format_exc()}
        raise
    finally:
        torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
