"""Functions of whole matrices and of rows in order, by those that ``solvers`` knows."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def lu_unpack(
    LU: Tensor, pivots: Tensor, unpack_data: bool = True, unpack_pivots: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Permutation and factors of square matrices; pivots alone solve for the permutation."""
    one = torch.ones_like(LU).tril(0).triu(0)
    P = aten.linalg_lu_solve(one, pivots, one, adjoint=True) if unpack_pivots else LU
    return P, LU.tril(-1) + one, LU.triu(0)


def linalg_inv_ex(A: Tensor, *, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """The inverse, and 0 for what LAPACK tells besides."""
    LU, pivots, info = aten.linalg_lu_factor_ex(A)
    one = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    return aten.linalg_lu_solve(LU, pivots, one), info


def linalg_det(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The determinant, and the factors that its gradient takes."""
    LU, pivots, _ = aten.linalg_lu_factor_ex(A)
    unmoved = torch.arange(1, A.shape[-1] + 1, device=A.device, dtype=pivots.dtype)
    swaps = (pivots != unmoved).sum(-1)
    return LU.diagonal(0, -2, -1).prod(-1) * (1 - 2 * (swaps % 2)), LU, pivots


def topk(
    x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    """The first of all in order."""
    values, at = x.sort(dim, largest)
    return values.narrow(dim, 0, k), at.narrow(dim, 0, k)


def kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """One of all in order."""
    values, at = (found.narrow(dim, k - 1, 1) for found in x.sort(dim))
    return (values, at) if keepdim else (values.squeeze(dim), at.squeeze(dim))
