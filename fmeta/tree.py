"""Arithmetic on pytrees of tensors.

The one place that knows torch's pytree module, which is not public in torch 2.14 (pytorch PR 175082). It
differs from JAX in one way that matters: None is a leaf there, so empty state in fmeta is ``()``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fmeta.types import Tree

map = pytree.tree_map
leaves = pytree.tree_leaves
flatten = pytree.tree_flatten
unflatten = pytree.tree_unflatten


def paths(tree: Tree) -> list[tuple[str, Any]]:
    """Leaves with a readable name for each: ``[("support.x", tensor), ...]``."""
    found, _ = pytree.tree_flatten_with_path(tree)
    return [
        (pytree.keystr(path).replace("['", ".").replace("']", "").lstrip("."), leaf) for path, leaf in found
    ]


def add(a: Tree, b: Tree) -> Tree:
    """``a + b``, leaf by leaf."""
    return map(torch.add, a, b)


def scale(a: Tree, factor: float | Tensor) -> Tree:
    """``factor * a``, leaf by leaf."""
    return map(lambda leaf: factor * leaf, a)


def zeros_like(a: Tree) -> Tree:
    """Zeros of the same structure, shapes and dtypes."""
    return map(torch.zeros_like, a)


def detach(a: Tree) -> Tree:
    """The same values as constants: no derivative passes."""
    return map(lambda leaf: leaf.detach(), a)


def dot(a: Tree, b: Tree) -> Tensor:
    """Inner product over all leaves, a scalar."""
    products = [(x * y).sum() for x, y in zip(leaves(a), leaves(b), strict=True)]
    return sum(products[1:], products[0])


def squared_norm(a: Tree) -> Tensor:
    """Sum of squares over all leaves, a scalar."""
    return dot(a, a)


def where(condition: Tensor, a: Tree, b: Tree) -> Tree:
    """``a`` where the scalar condition holds, else ``b``; neither NaN leaks into the other."""
    return map(lambda x, y: torch.where(condition, x, y), a, b)


def all_finite(a: Tree) -> Tensor:
    """Whether every number in the tree is finite: a boolean scalar."""
    checks = [torch.isfinite(leaf).all() for leaf in leaves(a) if leaf.is_floating_point()]
    if not checks:
        return torch.ones((), dtype=torch.bool, device=device(a))
    return torch.stack(checks).all()


def device(*trees: Tree) -> torch.device:
    """Where the first tensor of some trees lies; the CPU if there is none."""
    found = leaves(trees)
    return found[0].device if found else torch.device("cpu")


def select(a: Tree, index: int, dim: int = 0) -> Tree:
    """Entry ``index`` along a dimension of every leaf."""
    return map(lambda leaf: leaf.select(dim, index), a)


def stack(trees: list[Tree]) -> Tree:
    """Stack trees of one structure along a new leading dimension."""
    first: Callable[..., Tensor] = lambda *leaf: torch.stack(leaf)  # noqa: E731
    return map(first, *trees)
