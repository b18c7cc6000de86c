"""Compile a function with kernels of our own, and compare it with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fmeta.parallel.native.axis import axes_of
from fmeta.parallel.native.build import native


def build(fn: Callable[..., Any], *args: Any, axes: tuple[int | None, ...]) -> Any:
    """A compiled form of a function of pytrees."""
    flat, spec = pytree.tree_flatten(args)
    with torch.no_grad():
        made = native(fn, flat, spec, axes_of(args, axes))

    def call(*args: Any) -> Any:
        return pytree.tree_unflatten(made.run(pytree.tree_leaves(args)), made.out_spec)

    return call


def check(fn: Callable[..., Any], *args: Any, axes: tuple[int | None, ...], within: float = 1e-11) -> None:
    """Equal to torch for the tasks of the example, and for another number of them."""
    call = build(fn, *args, axes=axes)
    rows = torch.tensor([2, 0, 1, 1, 0])
    other = [
        a if axis is None else pytree.tree_map(lambda x, d=axis: x.index_select(d, rows), a)
        for a, axis in zip(args, axes, strict=True)
    ]
    for given in (args, other):
        want = pytree.tree_map(lambda x: x.detach(), fn(*given))
        got = call(*given)
        for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            torch.testing.assert_close(a, b, rtol=within, atol=within, equal_nan=True)


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
