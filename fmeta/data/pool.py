"""Datasets as tensors: a pool of examples for each class split, ready to be sampled by index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fmeta import tree
from fmeta.data.identity import digest
from fmeta.types import Tree

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False, repr=False)
class Pool:
    """All examples of the classes of one split. Build it with ``class_pool``.

    Attributes:
        x: examples ``[n, *feature]``, uint8 or floating; images are uint8 ``[n, C, H, W]``. Or a dict of tensors
            with a row an example, token ids say.
        y: class of each example inside this split, ``[n]`` int64, ``0 .. classes - 1``.
        names: name of each class.
        rows: rows of ``x`` that belong to each class, ``[classes, largest]``, padded; always on the CPU,
            where tasks are drawn.
        counts: number of examples of each class, ``[classes]``; always on the CPU.
    """

    x: Tree
    y: Tensor
    names: tuple[str, ...]
    rows: Tensor
    counts: Tensor

    @property
    def device(self) -> torch.device:
        """Where the examples are."""
        return tree.device(self.x)

    def to(self, device: torch.device | str | None) -> Pool:
        """The same pool with its examples on ``device``."""
        return replace(self, x=tree.map(lambda leaf: leaf.to(device), self.x), y=self.y.to(device))

    def __repr__(self) -> str:
        """Sizes, not contents."""
        kind = lambda leaf: f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"  # noqa: E731
        shown = ", ".join(f"{name or 'x'}={kind(leaf)}" for name, leaf in tree.paths(self.x))
        return f"Pool({len(self.names)} classes, {shown}, device={self.device})"


@dataclass(frozen=True, eq=False)
class Pools:
    """The three class splits of a dataset; a class is in one of them only.

    Raises:
        ValueError: if two splits share a class.

    Example:
        >>> cats = class_pool(torch.zeros(2, 3), torch.tensor([0, 1]), ("lion", "lynx"))
        >>> birds = class_pool(torch.zeros(1, 3), torch.tensor([0]), ("emu",))
        >>> empty = class_pool(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), ())
        >>> Pools(train=cats, val=empty, test=birds).test
        Pool(1 classes, x=float32[1, 3], device=cpu)
    """

    train: Pool
    val: Pool
    test: Pool

    def __post_init__(self) -> None:
        """Refuse overlapping splits: accuracy on known classes is not few-shot accuracy."""
        for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
            shared = sorted(set(getattr(self, a).names) & set(getattr(self, b).names))
            if shared:
                raise ValueError(
                    f"Pools: splits must hold different classes, but {a} and {b} share {len(shared)}, "
                    f"{shared[0]!r} among them. Put each class into one split."
                )

    def to(self, device: torch.device | str | None) -> Pools:
        """The same pools with their examples on ``device``."""
        return Pools(self.train.to(device), self.val.to(device), self.test.to(device))

    def digest(self) -> str:
        """A checksum of the classes and of how many examples each has; their contents are not read."""
        return classes_digest((part.names, part.counts) for part in (self.train, self.val, self.test))


def classes_digest(parts: Iterable[tuple[Iterable[str], Iterable[Any]]]) -> str:
    """A checksum of the classes of all splits and of how many examples each has; their contents are not read."""
    said = [(list(names), [int(n) for n in counts]) for names, counts in parts]
    return digest(repr(said).encode())


def class_pool(x: Tree, y: Tensor, names: tuple[str, ...]) -> Pool:
    """Make the pool of one split and index its rows by class.

    Args:
        x: examples ``[n, *feature]``, uint8 or floating, or a dict of tensors ``[n, ...]``.
        y: class of each, ``[n]`` integers in ``0 .. len(names) - 1``.
        names: one name a class, all different. No class at all is an empty split.

    Example:
        >>> pool = class_pool(torch.zeros(5, 2), torch.tensor([1, 0, 1, 1, 0]), ("cat", "dog"))
        >>> pool.counts.tolist(), pool.rows.tolist()
        ([2, 3], [[1, 4, 4], [0, 2, 3]])
    """
    _check_examples(x, y, names, "class_pool")
    y = y.to(torch.int64)
    labels = y.cpu()
    counts = torch.bincount(labels, minlength=len(names))
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"class_pool: every class needs at least one example, but class {names[empty[0]]!r} has none. "
            "Leave the class out or add examples."
        )
    # A stable sort lists the rows class after class; short classes repeat their last row as padding.
    by_class = labels.argsort(stable=True)
    columns = torch.arange(int(counts.max()) if len(names) else 0)
    offsets = torch.minimum(columns, counts[:, None] - 1)
    rows = by_class[(counts.cumsum(0) - counts)[:, None] + offsets]
    return Pool(x, y, tuple(names), rows, counts)


def split_pools(
    x: Tree,
    y: Tensor,
    names: tuple[str, ...],
    split_of: Mapping[str, str],
    call: str,
    *,
    mapped: bool = False,
) -> Pools:
    """Divide examples of all classes into the three splits.

    Args:
        x: examples ``[n, *feature]``, or a dict of tensors ``[n, ...]``.
        y: class of each, ``[n]``, an index into ``names``.
        names: names of all classes.
        split_of: ``"train"``, ``"val"`` or ``"test"`` for every name.
        call: the public function that errors name.
        mapped: ``x`` is the caller's own to share: a split whose examples lie together, class after class, is
            a view of it and copies nothing. Examples are in this order in any case.
    """
    _check_examples(x, y, names, call)

    def one(split: str) -> Pool:
        classes = [index for index, name in enumerate(names) if split_of[name] == split]
        inside = torch.full((len(names),), -1, dtype=torch.int64)
        inside[classes] = torch.arange(len(classes))
        labels = inside[y.to("cpu", torch.int64)]
        rows = (labels >= 0).nonzero().flatten()
        if mapped:
            rows = rows[labels[rows].argsort(stable=True)]
        together = mapped and len(rows) > 0 and bool((rows.diff() == 1).all())
        span = slice(int(rows[0]), int(rows[-1]) + 1) if together else rows
        part = tree.map(lambda leaf: leaf[span if together else rows.to(leaf.device)], x)
        return class_pool(part, labels[rows].to(tree.device(x)), tuple(names[c] for c in classes))

    return Pools(*[one(split) for split in SPLITS])


def _check_examples(x: Tree, y: Tensor, names: tuple[str, ...], call: str) -> None:
    several = isinstance(x, dict) and x and all(isinstance(leaf, Tensor) for leaf in x.values())
    if not several and (not isinstance(x, Tensor) or not (x.dtype == torch.uint8 or x.is_floating_point())):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{call}: x must be a tensor of uint8 or floating numbers, got {got}. "
            "Convert it, with x.float() for example, or pass a dict of tensors."
        )
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"{call}: y must be a tensor of integer classes, got {got}. Pass y.long().")
    for leaf in tree.leaves(x):
        if leaf.ndim < 1 or y.shape != leaf.shape[:1]:
            raise ValueError(
                f"{call}: x and y must have one row an example, got x of shape {list(leaf.shape)} and y of "
                f"shape {list(y.shape)}. Pass one class for each row of x."
            )
    if len(set(names)) != len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"{call}: names must differ, but {twice!r} occurs twice. Rename one of the classes.")
    if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < len(names):
        raise ValueError(
            f"{call}: y must lie in 0 .. {len(names) - 1} for {len(names)} names, got values from "
            f"{int(y.min())} to {int(y.max())}. Number the classes from 0."
        )
