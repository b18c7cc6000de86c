"""Programs that run as several processes: who they are, what only the first does, what they decide together.

``torchrun --nproc-per-node 4 -m -- fmeta ...`` starts the same program four times and says in the environment which
is which. A program asks ``launched`` who it is, joins the others with ``processes``, and has what must happen
once (a file, a folder's name) done by ``once``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fmeta.parallel.mesh import AXIS

Value = TypeVar("Value")
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Elsewhere(Exception):
    """Another rank failed and says why; this one ends without a word."""


class Launched(NamedTuple):
    """What a launcher told this process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


ONLY = Launched()


def launched() -> Launched:
    """Which process this is, by the environment that torchrun sets; the only one where it is not all there."""
    if not all(name in os.environ for name in NEEDED):
        return ONLY
    return Launched(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


class Processes:
    """The processes of a run; by default this one alone."""

    def __init__(self, place: Launched = ONLY) -> None:
        """Nothing is sent before the first call; see ``processes``."""
        self.rank, self.size, self.local_rank = place

    def mesh(self, device: torch.device) -> DeviceMesh | None:
        """A mesh over all processes for ``Plan(mesh=...)``; None for one."""
        return init_device_mesh(device.type, (self.size,), mesh_dim_names=(AXIS,)) if self.size > 1 else None

    def once(self, fn: Callable[[], Value]) -> Value:
        """What ``fn()`` returns on the first process, on all of them, after it is done.

        Args:
            fn: does something that must happen once; what it returns can be pickled.

        Raises:
            Elsewhere: on every other process, if it failed on the first, which raises the error itself.
        """
        if self.size == 1:
            return fn()
        held: list[Any] = [False, None]
        try:
            if self.rank == 0:
                held = [True, fn()]
        finally:
            dist.broadcast_object_list(held, src=0)
        if not held[0]:
            raise Elsewhere
        return held[1]

    def first(self, fn: Callable[[], Value]) -> Value:
        """``fn()`` on the first process, then on the others, each its own: for what the first one prepares."""
        mine: list[Value] = []
        self.once(lambda: mine.append(fn()))
        return mine[0] if mine else fn()

    def same(self, error: Exception) -> Exception:
        """An error that every process meets, to be raised: the first says it, the others end without a word."""
        return error if self.rank == 0 else Elsewhere()


ALONE = Processes()


class Votes:
    """The largest number that any process gives, asked once a step.

    The answer is that of the question before, so that no step waits for another process: the sum for it is
    under way while the step computes. Only the first question is answered at once.
    """

    def __init__(self) -> None:
        """Nothing asked so far."""
        self.pending: tuple[Any, Tensor] | None = None

    def __call__(self, number: int) -> int:
        """Give a number, get the largest of last time."""
        largest = torch.tensor(number)  # on the CPU, over gloo: a GPU is never waited for
        work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, async_op=True), largest
        before, self.pending = self.pending or work, work
        before[0].wait()
        return int(before[1])


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the other processes, if a launcher started several.

    What fails on one of them alone ends it; the launcher then ends the others.
    """
    place = launched()
    if place.size == 1:
        yield ALONE
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield Processes(place)
    dist.destroy_process_group()  # not after an error, since it may wait for a process that is gone
