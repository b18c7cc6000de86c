"""A replayed call on a GPU as one CUDA graph: a launch for the whole meta-step in place of one for each kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import tree
from fmeta.parallel.program import Program
from fmeta.parallel.replay import Replayed
from fmeta.parallel.store import LOG

LARGEST = 2**30
"""Bytes of inputs above which a program is not captured: a graph keeps a copy of them, and launches are no matter."""


class Graphed:
    """A program captured on tensors of its own, which hold its inputs."""

    def __init__(self, program: Program, flat: list[Tensor]) -> None:
        """Run it twice on a stream of its own, as capturing demands, then capture it."""
        self.inputs = [x.clone() for x in flat]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                program(list(self.inputs))
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = program(list(self.inputs))

    def __call__(self, flat: list[Tensor]) -> Any:
        """Replay; what is returned is the caller's own. Nothing waits for the GPU."""
        for own, x in zip(self.inputs, flat, strict=True):
            own.copy_(x, non_blocking=True)
        self.graph.replay()
        return tree.map(torch.clone, self.result)


def graphed(program: Program, flat: list[Tensor]) -> Replayed:
    """The program as a CUDA graph where that can be had, else as it is."""
    if not flat or any(x.device.type != "cuda" for x in flat) or sum(x.nbytes for x in flat) > LARGEST:
        return program
    try:
        with torch.no_grad():
            return Graphed(program, flat)
    except RuntimeError as error:  # an operation that waits for the GPU, or a sum over ranks
        LOG.info("no CUDA graph: %s", str(error).partition("\n")[0])
        return program
