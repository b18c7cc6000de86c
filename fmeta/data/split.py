"""Which class goes into which split: by seeded fractions or as the caller says."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from fmeta.data.pool import SPLITS

ClassSplit = Sequence[float] | Mapping[str, str]
"""Fractions of the classes for train, validation and test, or the split of every class by name."""


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """Names in a seeded random order that no library version or order of ``names`` can change."""
    return sorted(
        names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest()
    )


def assign_splits(names: Sequence[str], split: ClassSplit, seed: int, call: str) -> dict[str, str]:
    """The split of every class.

    Args:
        names: all classes.
        split: three fractions that sum to 1, or ``{class: "train" | "val" | "test"}``.
        seed: which classes, for fractions; a mapping leaves nothing to chance.
        call: the public function that errors name.

    Example:
        >>> sorted(assign_splits("abcd", (0.5, 0.25, 0.25), seed=0, call="demo").values())
        ['test', 'train', 'train', 'val']
    """
    if isinstance(split, Mapping):
        return _check_mapping(names, split, call)
    fractions = _check_fractions(split, call)
    order = shuffled(names, seed)
    ends = [round(total * len(order)) for total in accumulate(fractions)]
    starts = [0, *ends[:-1]]
    return {
        name: kind
        for kind, start, end in zip(SPLITS, starts, ends, strict=True)
        for name in order[start:end]
    }  # fmt: skip


def _check_mapping(names: Sequence[str], split: Mapping[str, str], call: str) -> dict[str, str]:
    missing = [name for name in names if name not in split]
    unknown = [name for name in split if name not in set(names)]
    if missing:
        raise ValueError(
            f"{call}: split must name every class, but {len(missing)} of {len(names)} are missing, "
            f"{missing[0]!r} among them. Add them or leave their examples out."
        )
    if unknown:
        raise ValueError(
            f"{call}: split names class {unknown[0]!r}, but none of the {len(names)} found has this name. "
            "Check its spelling."
        )
    for name, kind in split.items():
        if kind not in SPLITS:
            raise ValueError(
                f"{call}: a split must be 'train', 'val' or 'test', got {kind!r} for class {name!r}. "
                "Rename it."
            )
    return dict(split)


def _check_fractions(split: Sequence[float], call: str) -> list[float]:
    numbers = not isinstance(split, str) and all(isinstance(part, int | float) for part in split)
    if not numbers or len(split) != 3 or min(split) < 0 or not math.isclose(sum(split), 1, abs_tol=1e-6):
        raise ValueError(
            f"{call}: split must be three fractions of the classes that sum to 1, such as (0.64, 0.16, 0.2), "
            f"or a mapping of class to split, got {split!r}. Correct it."
        )
    return [float(part) for part in split]
