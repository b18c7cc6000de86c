"""Solvers of ``(I + H) v = b`` by products with ``H`` alone, for gradients through a minimum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fmeta import tree
from fmeta.types import Tree

Product = Callable[[Tree], Tree]
"""``v -> (I + H) v``, symmetric."""


def dot(a: Tree, b: Tree) -> Tensor:
    """The inner product of two trees."""
    parts = [(x * y).sum() for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True)]
    return torch.stack(parts).sum()


def conjugate_gradient(product: Product, b: Tree, iterations: int) -> Tree:
    """Conjugate gradients from ``b``: exact after as many iterations as there are distinct eigenvalues.

    A residual of zero stays zero (its steps are 0 / 0 otherwise), so that iterations may be spent freely.

    References:
        Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems", 1952, section 3.
    """
    v = b
    r = tree.map(lambda x, y: x - y, b, product(v))
    p, size = r, dot(r, r)
    for _ in range(iterations):
        q = product(p)
        alpha = _ratio(size, dot(p, q))
        v = tree.map(lambda x, d, a=alpha: x + a * d, v, p)
        r = tree.map(lambda x, d, a=alpha: x - a * d, r, q)
        size, before = dot(r, r), size
        beta = _ratio(size, before)
        p = tree.map(lambda x, d, b=beta: x + b * d, r, p)
    return v


def neumann(product: Product, b: Tree, iterations: int) -> Tree:
    """``sum of (-H)^i b`` for ``i`` up to ``iterations``; converges where eigenvalues of ``H`` are below 1.

    References:
        Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation", 2020,
        arXiv 1911.02590, section 3.
    """
    total = term = b
    for _ in range(iterations):
        term = tree.map(lambda x, y: x - y, term, product(term))
        total = tree.add(total, term)
    return total


def identity(product: Product, b: Tree, iterations: int) -> Tree:
    """``b``: the first term alone, as if there were no curvature (Luketina et al. 2016, arXiv 1511.06727)."""
    return b


SOLVERS: dict[str, Callable[[Product, Tree, int], Tree]] = {
    "cg": conjugate_gradient,
    "neumann": neumann,
    "identity": identity,
}


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))
