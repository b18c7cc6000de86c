"""Tasks over processes: which tasks a rank takes, and the one sum that puts the parts together again.

Every rank is given the same state and the same batch of tasks (samplers are pure, so each can draw it), works
on its own tasks, and ends with the same numbers. Nothing outside this file knows that there are other ranks.

The sum is one all-reduce of a flat buffer, after the last kernel and outside every transform. Nothing could
overlap with it: all leaves of the meta-gradient leave that kernel at once, and reducing chunk by chunk would
send the whole gradient once a chunk to hide a sum that the next chunk does not wait for.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fmeta import tree
from fmeta.parallel.program import Recorder
from fmeta.types import Plan, Tree

AXIS = "task"
Value = TypeVar("Value")


class Share(NamedTuple):
    """The tasks ``begin .. end - 1`` of ``total``."""

    begin: int
    end: int
    total: int

    @property
    def rows(self) -> slice:
        """What to compute: the share, or where it is empty the first task, for the form of its results."""
        return slice(self.begin, self.end) if self.end > self.begin else slice(0, 1)

    def mean(self, parts: list[tuple[int, Tree]]) -> Tree:
        """This rank's part of a mean over all tasks, from ``[(tasks, mean over these), ...]``."""
        total: Tree = None
        for count, part in parts:
            if count != self.total:
                weight = count / self.total
                part = tree.map(lambda x, w=weight: x * w if x.is_floating_point() else x, part)
            total = part if total is None else tree.add(total, part)
        return total


class Alone:
    """One process: its share is everything, and there is nobody to agree with."""

    size = 1

    def share(self, total: int, unit: int = 1) -> Share:
        """The tasks of this rank; ``unit`` of them are never parted."""
        return Share(0, total, total)

    def join(self, share: Share, summed: Tree, by_task: Tree) -> tuple[Tree, Tree]:
        """``summed`` over all ranks, and the rows of ``by_task`` of all tasks in their order."""
        return summed, by_task

    def agree(self, value: Value) -> Value:
        """The value that rank 0 has: for what is measured or drawn."""
        return value

    def check_device(self, call: str, meta: Tree) -> None:
        """Refuse meta-parameters that the ranks cannot sum."""

    def check_outside(self, call: str, inside: bool) -> None:
        """Refuse a transform of the caller's around a sum over ranks."""


class Ranks(Alone):
    """The processes along the task axis of a mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        """Other axes of the mesh take no part: each line of ranks along ``task`` works for itself."""
        axis = mesh if mesh.ndim == 1 else mesh[AXIS]
        self.group, self.rank, self.size = axis.get_group(), axis.get_local_rank(), axis.size()
        self.device_type = mesh.device_type

    def share(self, total: int, unit: int = 1) -> Share:
        """Whole units, as evenly as they go; the ranks behind the last unit take none."""
        units = -(-total // unit)
        begin, end = (min(units * r // self.size * unit, total) for r in (self.rank, self.rank + 1))
        return Share(begin, end, total) if end > begin else Share(0, 0, total)

    def join(self, share: Share, summed: Tree, by_task: Tree) -> tuple[Tree, Tree]:
        """One all-reduce for both: rows of other ranks are zero here, so their sum is every row in its place."""
        if share.end == share.begin:
            summed, by_task = tree.zeros_like(summed), tree.map(lambda rows: rows[:0], by_task)

        def placed(rows: Tensor) -> Tensor:
            whole = rows.new_zeros(share.total, *rows.shape[1:])
            whole[share.begin : share.end] = rows
            return whole

        leaves, spec = tree.flatten((summed, tree.map(placed, by_task)))
        recorder = Recorder.active
        return tree.unflatten(recorder.kernel(self.total, leaves) if recorder else self.total(leaves), spec)

    def total(self, leaves: list[Tensor]) -> list[Tensor]:
        """Every leaf summed over the ranks; leaves of one dtype travel together."""
        given = [carrier(leaf.dtype) for leaf in leaves]
        flags = next((dtype for dtype in given if dtype is not None), torch.float32)
        carriers = [dtype or flags for dtype in given]
        found = list(leaves)
        for dtype in dict.fromkeys(carriers):
            places = [i for i, other in enumerate(carriers) if other == dtype]
            flat = torch.cat([leaves[i].to(dtype).flatten() for i in places])
            dist.all_reduce(flat, group=self.group)
            parts = flat.split([leaves[i].numel() for i in places])
            for i, part in zip(places, parts, strict=True):
                found[i] = part.view(leaves[i].shape).to(leaves[i].dtype)
        return found

    def agree(self, value: Value) -> Value:
        """Rank 0 decides for all: any value that can be pickled."""
        held = [value]
        dist.broadcast_object_list(held, group=self.group, group_src=0)
        return held[0]

    def check_device(self, call: str, meta: Tree) -> None:
        """Each device has its own way to sum."""
        device = tree.device(meta).type
        if device != self.device_type:
            raise ValueError(
                f"{call}: meta must be on the device of the mesh, {self.device_type}, got {device}. Move meta "
                f'and tasks there, or build the mesh with init_device_mesh("{device}", ...).'
            )

    def check_outside(self, call: str, inside: bool) -> None:
        """A sum over processes has no derivative, no batching rule and no trace here."""
        if inside:
            raise ValueError(
                f"{call}: Plan(mesh=...) sums over processes, got a call inside of the caller's own grad, vmap "
                "or torch.compile, which cannot see through that. Call it outside, or leave the mesh out."
            )


def carrier(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which leaves of another are summed; None for flags, which go with any."""
    if dtype == torch.bool:
        return None
    # Rounding to 8 or 11 bits at each of several ranks would make the result depend on their number.
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def ranks_of(mesh: DeviceMesh | None) -> Alone:
    """The processes that share the work under a checked plan."""
    return Alone() if mesh is None else Ranks(mesh)


def check_mesh(plan: Plan) -> None:
    """Refuse a mesh that tasks cannot be sharded over, and random masks that would depend on it."""
    mesh: Any = plan.mesh
    if mesh is None:
        return
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"Plan: mesh must be a torch DeviceMesh, got {type(mesh).__name__}. Make one with "
            'torch.distributed.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("task",)).'
        )
    names = mesh.mesh_dim_names
    if mesh.ndim != 1 and AXIS not in (names or ()):
        raise ValueError(
            f"Plan: mesh must have an axis named {AXIS!r} or only one axis, got the axes {names}. Name one with "
            "init_device_mesh(..., mesh_dim_names=...)."
        )
    if not dist.is_initialized():
        raise ValueError(
            "Plan: mesh needs the process group it was made with, got one that is destroyed. Call "
            "torch.distributed.init_process_group, then make the mesh again."
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"Plan: mesh must hold the rank that uses it, got {mesh.mesh.flatten().tolist()} on rank "
            f"{dist.get_rank()}. Build it over all ranks that call."
        )
    if plan.randomness == "different" and plan.tasks == "vmap" and not isinstance(plan.chunk_size, int):
        raise ValueError(
            'Plan: with a mesh, randomness="different" draws the masks of a chunk of tasks together, so that they '
            f"do not depend on the number of ranks, got chunk_size={plan.chunk_size!r}. Set chunk_size to at "
            'most tasks / ranks, or tasks="loop".'
        )
