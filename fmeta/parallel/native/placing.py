"""Gradients that put numbers back where they came from, and copies in which some numbers are others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    """``index_add`` by ``scatter_add``, which kernels know; torch makes an ``index_put`` of it."""
    shape = [1] * source.ndim
    shape[dim] = -1
    places = index.reshape(shape).expand(source.shape)
    return x.scatter_add(dim, places, source if alpha == 1 else alpha * source)


def slice_backward(ct: Tensor, input_sizes: list[int], dim: int, start: int, end: int, step: int) -> Tensor:
    """Zeros but for some rows; torch reads them by index."""
    return placed(ct, dim, range(input_sizes[dim])[start:end:step], input_sizes[dim])


def slice_scatter(
    x: Tensor, src: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """A copy in which some rows are others; torch reads them by index."""
    size = x.shape[dim]
    at = range(size)[start:end:step]
    if step == 1:
        kept = x.narrow(dim, 0, at.start), x.narrow(dim, at.stop, size - at.stop)
        return beside([kept[0], src.to(x.dtype).expand_as(x.narrow(dim, at.start, len(at))), kept[1]], dim)
    rows = torch.arange(size, device=x.device)
    here = (rows >= at.start) & (rows < at.stop) & ((rows - at.start) % step == 0)
    shape = [size if d == dim % x.ndim else 1 for d in range(x.ndim)]
    return torch.where(here.view(shape), placed(src.to(x.dtype), dim, at, size), x)


def placed(x: Tensor, dim: int, at: range, size: int) -> Tensor:
    """Zeros, of ``size`` rows, with those of ``x`` in some places."""
    dim %= x.ndim
    zeros = lambda *sizes: x.new_zeros((*x.shape[:dim], *sizes, *x.shape[dim + 1 :]))  # noqa: E731
    if at.step > 1:
        wide = torch.cat([x.unsqueeze(dim + 1), zeros(len(at), at.step - 1)], dim + 1).flatten(dim, dim + 1)
        x = wide.narrow(dim, 0, len(at) * at.step - at.step + 1)
    before = at.start if at else 0
    return beside([zeros(before), x, zeros(size - before - x.shape[dim])], dim)


def beside(parts: list[Tensor], dim: int) -> Tensor:
    """Those that are not empty, joined."""
    filled = [part for part in parts if part.shape[dim]]
    return torch.cat(filled, dim) if len(filled) > 1 else filled[0].clone()


def diagonal_backward(ct: Tensor, input_sizes: list[int], offset: int, dim1: int, dim2: int) -> Tensor:
    """Zeros but for a diagonal."""
    rows, columns, first = input_sizes[dim1], input_sizes[dim2], max(offset, 0)
    wide = placed(ct, -1, range(first, first + ct.shape[-1]), columns).unsqueeze(
        -2
    )  # of a column, in every row
    to = torch.arange(rows, device=ct.device).unsqueeze(-1) + offset
    here = to == torch.arange(columns, device=ct.device)
    return torch.where(here, wide, torch.zeros((), dtype=ct.dtype, device=ct.device)).movedim(
        (-2, -1), (dim1, dim2)
    )


def diag_embed(x: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
    """Matrices with these diagonals."""
    sizes = [x.shape[-1] + abs(offset)] * (x.ndim + 1)
    return diagonal_backward(x, sizes, offset, dim1, dim2)


def new_empty_strided(x: Tensor, size: list[int], stride: list[int], **kwargs: Any) -> Tensor:
    """Memory in order, if it is wanted so."""
    kept = {name: value for name, value in kwargs.items() if name in ("dtype", "device")}
    empty = x.new_empty(size, **kept)
    return empty if list(empty.stride()) == list(stride) else NotImplemented
