"""What a sampler may do to its images: names, functions and torchvision's transforms, in one order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import tree
from fmeta.data.change import random_crop, random_flip, random_jitter, random_resized_crop
from fmeta.data.pool import Pool
from fmeta.data.transforms import is_transform, reproducible
from fmeta.data.warp import quarter_turns, random_affine
from fmeta.types import Tree

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""``(x, generator) -> x`` on all images of a step, ``[n, C, H, W]``; the generator is on the CPU."""
Augments = str | Augment | Callable[[Tensor], Tensor] | Sequence[Any] | None
"""What the argument ``augment`` of a sampler may be; a transform of torchvision takes no generator."""

NAMED: dict[str, Augment] = {
    "affine": random_affine,
    "crop": random_crop,
    "flip": random_flip,
    "jitter": random_jitter,
    "resized_crop": random_resized_crop,
}


def parse(call: str, augment: Augments) -> tuple[bool, list[Augment]]:
    """Whether rotations make classes, and what changes single images."""
    if augment is None:
        return False, []
    wanted: list[Any] = [augment] if isinstance(augment, str) or callable(augment) else list(augment)
    changes: list[Augment] = []
    for one in wanted:
        if is_transform(one):
            changes.append(reproducible(one))
        elif callable(one):
            changes.append(one)
        elif isinstance(one, str) and one in NAMED:
            changes.append(NAMED[one])
        elif one != "rotations":
            raise ValueError(
                f"{call}: augment must be 'rotations', {', '.join(map(repr, NAMED))}, a function "
                f"(x, generator) -> x, a transform of torchvision or a sequence of these, got {one!r}. Choose "
                "one of them."
            )
    return "rotations" in wanted, changes


def floats(x: Tensor) -> Tensor:
    """Bytes as float32 in 0 .. 1."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def changed(call: str, change: Augment, x: Tensor, random: torch.Generator) -> Tensor:
    """Pictures after an augmentation."""
    found = change(x, random)
    if not isinstance(found, Tensor) or found.shape[:1] != x.shape[:1]:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{call}: augment must return one image for each of the {len(x)} it gets, got {got}. "
            "Map [n, C, H, W] to [n, ...]."
        )
    return found


def gathered(
    call: str,
    pool: Pool,
    rows: Tensor,
    turns: Tensor | None,
    changes: Sequence[Augment],
    random: torch.Generator,
) -> Tree:
    """Examples ``[n, *feature]`` of a pool: turned, as floats, changed.

    Args:
        call: the sampler that errors name.
        pool: where they are.
        rows: which ones, ``[n]``, on the CPU; only these numbers move to the pool's device.
        turns: right angles by which each is turned, ``[n]``; None for no turns.
        changes: what is done to all of them, in order.
        random: what the changes draw from.
    """
    x = tree.map(lambda leaf: leaf[rows.to(leaf.device)], pool.x)
    x = tree.map(floats, x if turns is None else quarter_turns(x, turns))
    for change in changes:
        x = changed(call, change, x, random)
    return x


def check_images(call: str, pool: Pool, rotations: bool, changes: bool) -> None:
    """Augmentations need images, rotations square ones."""
    if (rotations or changes) and not (isinstance(pool.x, Tensor) and pool.x.ndim == 4):
        got = f"x of shape {list(pool.x.shape)}" if isinstance(pool.x, Tensor) else f"x of {list(pool.x)}"
        raise ValueError(f"{call}: augment needs images [n, C, H, W], got {got}. Drop augment.")
    if rotations and pool.x.shape[-1] != pool.x.shape[-2]:
        raise ValueError(
            f"{call}: rotations need square images, got {list(pool.x.shape[-2:])}. "
            "Crop them, or drop 'rotations'."
        )
