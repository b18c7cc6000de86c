"""Two ranks are one process: gradients, metrics, states, evaluation, masks, and the messages of a wrong mesh."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mesh_ranks
import pytest
import torch
import torch.distributed as dist
from helpers import assert_trees_close, assert_trees_equal
from problems import LOSS, network, regression_tasks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils import _pytree as pytree

import fmeta
from fmeta import Plan

ROOT = Path(__file__).parents[1]
MAML = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two gloo ranks computed in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "tests" / "mesh_ranks.py"), str(folder)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture
def one_rank() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("task",))
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("part", mesh_ranks.PARTS, ids=lambda part: part.__name__)
def test_two_ranks_are_one_process(part: Any, ranks: list[dict[str, Any]]) -> None:
    want = part(None)
    for got in ranks:
        assert list(got[part.__name__]) == list(want)
        for name, value in want.items():
            assert_trees_close(strip(got[part.__name__][name]), strip(value), tolerance(name))


def strip(tree: Any) -> Any:
    """With numbers in place of NaN and infinity, so that these compare as equal."""
    return pytree.tree_map(lambda x: x.nan_to_num(nan=-7.0, posinf=-8.0, neginf=-9.0), tree)


def tolerance(name: str) -> float:
    """1e-12 in float64; the other dtypes round more coarsely."""
    return {"bfloat16": 2e-2, "mixed dtypes": 1e-6}.get(name, 1e-12)


def test_ranks_hold_the_same_numbers_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    """No drift: after five steps of Adam too."""
    first, second = ranks
    for part in mesh_ranks.PARTS:
        assert_trees_equal(second[part.__name__], first[part.__name__])


def test_a_step_that_is_not_finite_names_the_task_and_changes_nothing_anywhere(
    ranks: list[dict[str, Any]],
) -> None:
    for found in (rank["training"] for rank in ranks):
        for name in ("maml 3 steps", "reptile", "metasgd"):
            before, _ = found[name]
            for bad, task in ((f"{name}, task 5 is NaN", 5), (f"{name}, tasks 1 and 5", 5)):
                state, metrics = found[bad]
                assert_trees_equal(state, before)
                assert not metrics["finite"]
                assert metrics["first_bad"].tolist() == [task, 0]


def test_masks_do_not_depend_on_the_number_of_ranks_but_on_the_call(ranks: list[dict[str, Any]]) -> None:
    for name, calls in ranks[0]["randomness"].items():
        first, second = (grads["head.weight"] for grads, _ in calls)
        assert not torch.equal(first, second), f"{name}: both calls drew the same masks"


def test_shares_cover_all_tasks_in_order_and_whole_units(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["helpers"]["shares"] for rank in ranks)
    assert [tuple(share) for share in first] == [(0, 3, 7), (0, 0, 1), (0, 4, 7), (0, 0, 7)]
    assert [tuple(share) for share in second] == [(3, 7, 7), (0, 1, 1), (4, 7, 7), (0, 7, 7)]


def test_rank_0_decides(ranks: list[dict[str, Any]]) -> None:
    assert [rank["helpers"]["agreed"] for rank in ranks] == [{"rank": 0, "chunk": 4}] * 2


def test_only_the_task_axis_counts(ranks: list[dict[str, Any]]) -> None:
    want = fmeta.meta_grad(MAML, Plan(compile=False))(network(), regression_tasks())
    for rank in ranks:
        assert_trees_close(rank["helpers"]["two axes"], want, 1e-12)


REFUSALS = {
    "inside grad": r"meta_grad: Plan(mesh=...) sums over processes, got a call inside of the caller's own grad",
    "another device": "meta_grad: meta must be on the device of the mesh, cpu, got meta. Move meta and tasks",
    "other axes": "Plan: mesh must have an axis named 'task' or only one axis, got the axes ('a', 'b').",
    "not in it": "Plan: mesh must hold the rank that uses it, got [",
    "labels": "cross_entropy: labels must be in 0..2 for 3 outputs, got 99.",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_rank_refuses_with_the_same_message(name: str, ranks: list[dict[str, Any]]) -> None:
    """A rank that raised alone would leave the other waiting for it."""
    for rank in ranks:
        assert REFUSALS[name] in rank["refusals"][name]


# In one process


def test_a_mesh_of_one_rank_is_no_mesh(one_rank: DeviceMesh) -> None:
    want = fmeta.meta_grad(MAML, Plan(compile=False))(network(), regression_tasks())
    assert_trees_equal(
        fmeta.meta_grad(MAML, Plan(mesh=one_rank, compile=False))(network(), regression_tasks()), want
    )


def test_a_mesh_is_a_device_mesh() -> None:
    with pytest.raises(TypeError, match=r"Plan: mesh must be a torch DeviceMesh, got int. Make one with"):
        fmeta.meta_grad(MAML, Plan(mesh=2))


def test_a_mesh_outlives_its_processes_in_vain(one_rank: DeviceMesh) -> None:
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"Plan: mesh needs the process group .* got one that is destroyed"):
        fmeta.meta_grad(MAML, Plan(mesh=one_rank))


@pytest.mark.parametrize("chunk_size", [None, "auto"])
def test_masks_that_would_depend_on_the_number_of_ranks_are_refused(
    one_rank: DeviceMesh, chunk_size: Any
) -> None:
    plan = Plan(mesh=one_rank, randomness="different", chunk_size=chunk_size)
    with pytest.raises(ValueError, match=rf'randomness="different" .* got chunk_size={chunk_size!r}. Set'):
        fmeta.meta_grad(MAML, plan)
