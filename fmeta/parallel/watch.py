"""One call watched: its kernels timed, its chunks counted, the bytes that its tensors hold followed."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fmeta import tree
from fmeta.functional import differentiable
from fmeta.parallel.cost import Cost
from fmeta.parallel.mode import Mode, surroundings
from fmeta.parallel.program import FlatKernel, Recorder
from fmeta.parallel.run import Runner
from fmeta.parallel.store import clock
from fmeta.types import InnerLoop, Plan, Task, Tree

TIMES = 5
"""How often a kernel is timed at least."""


class Watch(Recorder):
    """A recorder that times kernels and follows how many bytes its tensors hold."""

    def __init__(self, inputs: list[Tensor]) -> None:
        """The inputs count for nothing."""
        super().__init__(inputs)
        self.device = tree.device(inputs)
        self.seconds: dict[FlatKernel, list[float]] = {}
        self.now = self.peak = 0
        self.storages: Any = WeakIdKeyDictionary()
        for tensor in inputs:
            self.storages[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, note it and what it takes."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree.leaves(out):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        return out

    def hold(self, tensor: Tensor) -> None:
        """Count the memory of a tensor as long as somebody holds it."""
        storage = tensor.untyped_storage()
        if storage not in self.storages:
            self.storages[storage] = True
            count = storage.nbytes()
            self.now += count
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.release, count)

    def release(self, count: int) -> None:
        """Memory was given back."""
        self.now -= count

    def kernel(self, kernel: FlatKernel, flat: list[Tensor]) -> list[Tensor]:
        """Run a kernel, time it, and note it; a kernel is a pure function, so further calls do no harm."""
        taken = self.seconds.setdefault(kernel, [])
        out: list[Tensor] = []
        while not out or len(taken) < TIMES:
            begin = clock(self.device)
            out = super().kernel(kernel, flat) if not out else self.again(kernel, flat, out)
            taken.append(clock(self.device) - begin)
        return out

    def again(self, kernel: FlatKernel, flat: list[Tensor], out: list[Tensor]) -> list[Tensor]:
        """A call for its time alone."""
        self.quiet = True
        kernel(list(flat))
        self.quiet = False
        return out


class Observed(Runner):
    """A runner that notes the chunks it runs, and how."""

    def __init__(self, loop: InnerLoop, plan: Plan) -> None:
        """No chunk yet."""
        super().__init__(loop, plan)
        self.sizes: list[int] = []
        self.last: tuple[InnerLoop, Mode, Task] | None = None

    def attempt(self, make: Any, loop: InnerLoop, mode: Mode, meta: Tree, chunk: Task) -> Any:
        """Run one chunk."""
        self.sizes.append(tree.leaves(chunk)[0].shape[0])
        self.last = loop, mode, chunk
        return super().attempt(make, loop, mode, meta, chunk)

    def built_kernels(self) -> dict[FlatKernel, tuple[str, Cost]]:
        """Name and cost of all that was compiled."""
        every = [
            (kernel.name, built) for kernel in self.kernels.values() for built in kernel.compiled.values()
        ]
        return {built.run: (name, built.cost) for name, built in every if built}

    def carry_bytes(self, meta: Tree) -> int:
        """Size of what one inner step hands to the next, for the chunk that ran last."""
        if self.last is None or self.plan.engine != "adjoint":
            return 0
        loop, mode, chunk = self.last
        steps = self.steps(loop, compiled=False)
        with surroundings(mode), differentiable():
            start = steps.start(meta, chunk.support)
        return sum(x.nbytes for x in tree.leaves(start)) * (self.sizes[-1] if steps.shared is None else 1)
