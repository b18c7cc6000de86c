"""Pools of datasets whose items are ``(PIL image, class number)``, which is torchvision's form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fmeta.data.folder import check_size
from fmeta.data.images import DAMAGE, THREADS, as_tensor, in_chunks, square
from fmeta.data.mapped import Recipe, in_memory
from fmeta.data.pool import SPLITS, Pools, split_pools
from fmeta.data.split import assign_splits

CALL = "from_dataset"
Divide = Callable[[tuple[str, ...]], dict[str, str]]
"""``(names of all classes in order) -> {name: split}``."""


def from_dataset(
    *datasets: Any,
    size: int = 84,
    grey: bool = False,
    split: Sequence[float] | Mapping[str, str] = (0.64, 0.16, 0.2),
    seed: int = 0,
) -> Pools:
    """Decode any dataset whose items are ``(PIL image, class number)`` into memory, and divide it by class.

    Args:
        datasets: the parts of one dataset, such as its training and test part, without ``transform``. Classes are
            named by the attribute ``classes`` of the first, else by their numbers.
        size: side in pixels; the middle square of each image is resized.
        grey: one channel in place of red, green and blue.
        split: fractions of the classes for train, validation and test (the default is miniImageNet's
            64/16/20), or ``{class: "train" | "val" | "test"}`` for every class.
        seed: which classes go where, for fractions.

    Raises:
        TypeError: what has no items or no length, or items that are no such pairs.
        ValueError: an unreadable image, or a split that does not fit the classes.

    Example:
        >>> from torchvision.datasets import FakeData
        >>> pools = from_dataset(FakeData(50, (3, 20, 30), num_classes=4), size=8, split=(0.5, 0.25, 0.25))
        >>> len(pools.train.names), pools.test.x.shape[1:]
        (2, torch.Size([3, 8, 8]))
    """
    check_size(CALL, size)
    listed = [hasattr(part, "__getitem__") and hasattr(part, "__len__") and len(part) for part in datasets]
    if not all(listed) or not datasets:
        raise TypeError(
            f"{CALL}: datasets must be one or more datasets with items and a length above 0, got {datasets!r}. "
            "Pass FakeData() of torchvision, for example."
        )
    divide = lambda names: assign_splits(names, split, seed, CALL)  # noqa: E731
    # One thread: a dataset of the caller's need not be safe in several.
    examples = in_memory(dataset_recipe(CALL, datasets, divide, size=size, grey=grey, threads=1))
    return split_pools(*examples, divide(examples.names), CALL, mapped=True)


def dataset_recipe(
    call: str, parts: Sequence[Any], divide: Divide, *, size: int, grey: bool, threads: int = THREADS
) -> Recipe:
    """How to make the examples of all parts, sorted by split and class, so that every split is one piece.

    Args:
        call: the public function that errors name.
        parts: datasets of ``(PIL image, class number)``.
        divide: the split of every class.
        size: side in pixels.
        grey: one channel in place of three.
        threads: how many read items at once.
    """
    numbers = [number for part in parts for number in _numbers(part)]
    items = [(part, row) for part in parts for row in range(len(part))]
    _check_numbers(call, numbers)
    present = sorted(set(numbers))
    names = _names(parts[0], present)
    split_of = divide(names)
    place = {number: index for index, number in enumerate(present)}
    labels = [place[number] for number in numbers]
    rank = [SPLITS.index(split_of[name]) for name in names]
    order = sorted(range(len(labels)), key=lambda row: (rank[labels[row]], labels[row]))

    def decode(position: int) -> Tensor:
        part, row = items[order[position]]
        try:
            image = part[row][0]
            if isinstance(image, Image.Image):
                return as_tensor(square(image, size, grey))
        except DAMAGE as error:
            raise ValueError(
                f"{call}: item {row} of {type(part).__name__} must be a readable image, but reading it failed "
                f"({error}). Replace or remove it."
            ) from error
        raise TypeError(
            f"{call}: items must be pairs of a PIL image and a class, got {type(image).__name__} from "
            f"{type(part).__name__}. Leave its transform out."
        )

    y = torch.tensor([labels[row] for row in order])
    chunks: Callable[[], Iterator[Tensor]] = lambda: in_chunks(decode, len(order), threads)  # noqa: E731
    return Recipe((1 if grey else 3, size, size), y, names, chunks)


def _numbers(part: Any) -> list[int]:
    """Class of every item: from what torchvision's datasets keep, else by reading all of them."""
    if getattr(part, "target_transform", None) is None:
        for attribute in ("targets", "labels", "_labels", "y"):
            kept = getattr(part, attribute, None)
            if kept is not None and len(kept) == len(part):
                return [int(number) for number in torch.as_tensor(kept).tolist()]
        if len(getattr(part, "_samples", ())) == len(part):
            return [int(number) for _, number in part._samples]
    return [int(part[row][1]) for row in range(len(part))]


def _names(part: Any, present: Sequence[int]) -> tuple[str, ...]:
    """Names of the classes that have items; several names of one class are listed."""
    known = getattr(part, "classes", None) or getattr(part, "categories", None) or []
    given = [name if isinstance(name, str) else ", ".join(name) for name in known]
    return tuple(given[number] if number < len(given) else str(number) for number in present)


def _check_numbers(call: str, numbers: Sequence[int]) -> None:
    if min(numbers) < 0:
        raise ValueError(
            f"{call}: classes must be numbered from 0, got {min(numbers)}. Leave out items without a class."
        )
