"""Comparisons that raise, and small shared tools of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative to the largest number of a leaf: what two orders of summation may differ by."""


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Every leaf with its path in the tree."""
    found, _ = pytree.tree_flatten_with_path(tree)
    return [(pytree.keystr(path), leaf) for path, leaf in found]


def assert_same_form(got: Any, want: Any) -> None:
    """Raise unless both trees have one structure, and leaves of one shape and dtype."""
    names, expected = [name for name, _ in named_leaves(got)], [name for name, _ in named_leaves(want)]
    assert names == expected, f"leaves {names}, expected {expected}"
    for (name, a), (_, b) in zip(named_leaves(got), named_leaves(want), strict=True):
        assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        assert a.dtype == b.dtype, f"{name}: dtype {a.dtype}, expected {b.dtype}"


def assert_trees_close(got: Any, want: Any, tolerance: float | None = None) -> None:
    """Raise unless every leaf differs by at most ``tolerance`` times the leaf's largest number.

    A leaf that is zero but for rounding (the bias before a BatchNorm) is measured against a thousandth of
    the largest number in the whole tree instead.
    """
    assert_same_form(got, want)
    sizes = [b.detach().double().abs().max() for _, b in named_leaves(want) if b.numel()]
    floor = 1e-3 * max(sizes, default=torch.zeros(()))
    for (name, a), (_, b) in zip(named_leaves(got), named_leaves(want), strict=True):
        if not b.numel():
            continue
        bound = TOLERANCES.get(b.dtype, 0.0) if tolerance is None else tolerance
        a, b = a.detach().double(), b.detach().double()
        assert torch.isfinite(a).all(), f"{name} is not finite: {a}"
        error = (a - b).abs().max() / torch.maximum(b.abs().max(), floor).clamp_min(1e-300)
        assert error <= bound, f"{name}: relative difference {error:.2e} > {bound:.0e}\ngot {a}\nwant {b}"


def assert_trees_equal(got: Any, want: Any) -> None:
    """Raise unless both trees are the same bit for bit (a NaN equals a NaN)."""
    assert_same_form(got, want)
    for (name, a), (_, b) in zip(named_leaves(got), named_leaves(want), strict=True):
        same = torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        assert same, f"{name}: not the same bit for bit\ngot {a}\nwant {b}"


def assert_trees_differ(got: Any, want: Any, least: float = 1e-4) -> None:
    """Raise if the trees agree to within ``least``: shows that an option does something at all."""
    assert_same_form(got, want)
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)
    gap = max(float((a - b).abs().max()) for a, b in pairs)
    assert gap > least, f"expected a difference above {least:.0e}, got {gap:.1e}"


def copied(tree: Any) -> Any:
    """Clones of all leaves."""
    return pytree.tree_map(torch.clone, tree)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """The floating-point leaves in another dtype."""
    return pytree.tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)


def unstacked(tasks: Any) -> list[Any]:
    """A batch of tasks as a list of single ones."""
    count = pytree.tree_leaves(tasks)[0].shape[0]
    return [pytree.tree_map(lambda leaf, i=i: leaf[i], tasks) for i in range(count)]


def reordered(tasks: Any, order: Sequence[int]) -> Any:
    """A batch of tasks in another order."""
    return pytree.tree_map(lambda leaf: leaf[torch.as_tensor(order)], tasks)


def flat(tree: Any) -> Tensor:
    """All numbers of a tree in one float64 vector."""
    return torch.cat([leaf.detach().double().flatten() for leaf in pytree.tree_leaves(tree)])


def inner_product(a: Any, b: Any) -> float:
    """Sum over all leaves of the products."""
    return float(flat(a) @ flat(b))


def relative_difference(got: float, want: float, scale: float = 0.0) -> float:
    """``|got - want|`` in units of ``want``, or of ``scale`` where that is larger."""
    return abs(got - want) / max(abs(want), scale, 1e-300)


def random_like(tree: Any, seed: int) -> Any:
    """Standard normal numbers in the form of ``tree``."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda leaf: torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.dtype)  # noqa: E731
    return pytree.tree_map(draw, tree)
