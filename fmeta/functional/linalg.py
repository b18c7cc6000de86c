"""Solvers, distances and scatters that torch differentiates wrongly in some nesting, out of ones it does not.

In torch 2.14, reverse over forward mode is silently wrong through ``linalg.solve`` and ``slogdet``, forward over
reverse mode through ``cholesky_inverse`` and, where tasks share a right side with as many rows and columns as
there are tasks, ``cholesky_solve``; ``select_scatter`` and, with a shared input, ``index_fill`` are wrong under
``grad(vmap(grad))``; and ``cdist`` has no forward mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    """``A^-1 B``, or ``B A^-1`` for ``left=False``; ``B`` may be one vector for each matrix."""
    vector = B.dim() == 1 or B.shape == A.shape[:-1]
    factors, pivots = torch.linalg.lu_factor(A)
    if vector:
        return torch.linalg.lu_solve(factors, pivots, B.unsqueeze(-1)).squeeze(-1)
    return torch.linalg.lu_solve(factors, pivots, B, left=left)


def slogdet(A: Tensor) -> Any:
    """Sign and logarithm of the absolute value of the determinant."""
    factors, pivots = torch.linalg.lu_factor(A)
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    unmoved = torch.arange(1, A.shape[-1] + 1, device=A.device, dtype=pivots.dtype)
    swaps = (pivots != unmoved).sum(-1)
    sign = (1 - 2 * (swaps % 2)) * diagonal.detach().sign().prod(-1)
    return torch.return_types.linalg_slogdet((sign, diagonal.abs().log().sum(-1)))  # type: ignore[attr-defined]


def logdet(A: Tensor) -> Tensor:
    """Logarithm of the determinant, NaN where it is negative."""
    sign, value = slogdet(A)
    return torch.where(sign < 0, torch.nan, value)


def cholesky_solve(input: Tensor, L: Tensor, upper: bool = False) -> Tensor:
    """``(L L^T)^-1 input``, or ``(L^T L)^-1 input`` for ``upper=True``."""
    lower = L.mT if upper else L
    half = torch.linalg.solve_triangular(lower, input, upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)


def cholesky_inverse(L: Tensor, upper: bool = False) -> Tensor:
    """``(L L^T)^-1``, or ``(L^T L)^-1`` for ``upper=True``."""
    return cholesky_solve(torch.eye(L.shape[-1], dtype=L.dtype, device=L.device), L, upper)


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """The p-norm of every difference, ``[..., n, dim], [..., m, dim] -> [..., n, m]``."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """``input`` with one slice along ``dim`` replaced by ``src``."""
    here = torch.arange(input.shape[dim], device=input.device) == index % input.shape[dim]
    return torch.where(_along(here, input, dim), src.unsqueeze(dim), input)


def index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """``input`` with slices along ``dim`` replaced by one number."""
    positions = torch.arange(input.shape[dim], device=input.device)
    here = (positions == index.reshape(-1, 1) % input.shape[dim]).any(0)
    return torch.where(_along(here, input, dim), value, input)


def _along(mask: Tensor, input: Tensor, dim: int) -> Tensor:
    return mask.view([-1 if d == dim % input.dim() else 1 for d in range(input.dim())])


WRONG_REVERSE_OVER_FORWARD = ("_linalg_det", "_linalg_solve_ex", "linalg_householder_product")
"""ATen operators (of ``det``, ``tensorsolve``, ``solve_ex``, ``householder_product``) that are wrong in that nesting
only and are not rewritten: an engine that takes it must refuse them."""

REWRITES: dict[Any, Callable[..., Any]] = {
    torch.linalg.solve: solve,
    torch.linalg.slogdet: slogdet,
    torch.cdist: cdist,
    **{
        owner: function
        for function in (slogdet, logdet, cholesky_solve, cholesky_inverse, select_scatter, index_fill)
        for owner in (getattr(torch, function.__name__), getattr(Tensor, function.__name__))
    },
}
"""What `fmeta.functional.differentiable` calls in place of a function of torch."""
