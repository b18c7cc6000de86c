"""Which form of a convolution is faster, that of the library or a product: timed once, then remembered.

It depends on sizes, caches and libraries. A third form, one convolution a task in a loop, was measured too: on a
CPU it is never better than the better of these two, since oneDNN runs groups in channels last just as fast.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta.parallel import store
from fmeta.parallel.convolutions import Geometry, Kind, Wanted
from fmeta.parallel.rewrite import is_small

aten = torch.ops.aten


def faster_as_product(device: torch.device) -> Wanted:
    """What is faster on a device, found by timing once for every geometry and remembered."""

    def wanted(kind: Kind, g: Geometry, dtype: torch.dtype) -> bool:
        if is_small(torch.Size([g.tasks, g.rows, g.taps]), torch.Size([g.tasks, g.taps, g.filters])):
            return True  # it fuses
        product, native = timed(kind, g, dtype, device, torch.get_num_threads())
        return product < native

    return wanted


@functools.cache
def timed(
    kind: Kind, g: Geometry, dtype: torch.dtype, device: torch.device, threads: int
) -> tuple[float, float]:
    """Milliseconds as a product and as a convolution; the first process that asks decides for later ones."""
    key = store.key_of(kind, g, dtype, device=device)
    found = store.read("convolutions", key)
    if not isinstance(found, list) or len(found) != 2:
        with torch.no_grad():
            calls = product_call(kind, g, dtype, device), native_call(kind, g, dtype, device)
            found = [median_ms(call, device) for call in calls]
        store.write("convolutions", key, found)
    return found[0], found[1]


def product_call(kind: Kind, g: Geometry, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    """One batched product, and one copy of the patches' size: what a product costs once its surroundings fuse."""
    make = functools.partial(torch.randn, dtype=dtype, device=device)
    rows, ct, w = (
        make(g.tasks, g.rows, g.taps),
        make(g.tasks, g.rows, g.filters),
        make(g.tasks, g.filters, g.taps),
    )
    padded = make(g.tasks, g.shots, *(n + 2 * p for n, p in zip(g.size, g.padding, strict=True)), g.channels)
    unfolded = padded.unfold(2, g.kernel[0], g.stride[0]).unfold(3, g.kernel[1], g.stride[1])
    laid = unfolded.permute(0, 1, 2, 3, 5, 6, 4)
    product = {
        "output": lambda: torch.bmm(rows, w.mT),
        "input": lambda: torch.bmm(ct, w),
        "weight": lambda: torch.bmm(ct.mT, rows),
    }[kind]
    return lambda: (product(), laid.clone(memory_format=torch.contiguous_format))


def native_call(kind: Kind, g: Geometry, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    """The convolution of the library, channels last as inductor calls it."""

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)

    x, ct = make(g.shots, g.tasks * g.channels, *g.size), make(g.shots, g.tasks * g.filters, *g.positions)
    w = make(g.tasks * g.filters, g.channels, *g.kernel)
    settings = list(g.stride), list(g.padding), [1, 1], False, [0, 0], g.tasks
    if kind == "output":
        return lambda: aten.convolution(x, w, None, *settings)
    return lambda: aten.convolution_backward(
        ct, x, w, None, *settings, [kind == "input", kind == "weight", False]
    )


def median_ms(call: Callable[[], Any], device: torch.device, times: int = 5, budget: float = 0.2) -> float:
    """Median time of a few calls, after one."""
    call()
    taken: list[float] = []
    while not taken or (len(taken) < times and sum(taken) < budget):
        begin = store.clock(device)
        call()
        taken.append(store.clock(device) - begin)
    return 1000 * statistics.median(taken)
