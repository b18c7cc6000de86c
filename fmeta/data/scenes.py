"""Generated scenes: characters on plates of many kinds, pasted on textures, with their boxes; needs no data."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta.data.boxes import STRIDE, BoxPool
from fmeta.data.pool import Pool

CALL = "scenes"
PLATES = ("none", "disc", "card", "ring", "blot")
OVERLAP = 0.15  # largest intersection over union of two objects
TRIES = 12


class Look(NamedTuple):
    """What the objects of a class have in common beside their character."""

    plate: str
    ink: Tensor  # [3]
    ground: Tensor  # [3], colour of the plate


def scenes(
    pool: Pool,
    *,
    count: int,
    classes: int | None = None,
    size: int = 256,
    kinds: int = 3,
    objects: tuple[int, int] = (2, 8),
    seed: int = 0,
) -> BoxPool:
    """Draw scenes whose objects are characters of a pool; a class is a character with a kind of plate.

    Every class has a character, a plate (none, disc, card, ring or blot) and two colours, around which its objects
    vary in size, form and brightness. A background is smooth noise of several scales, or stripes. Objects overlap
    little, and all are labelled.

    Args:
        pool: characters, uint8 ``[n, 1, H, W]``, such as ``glyphs().train``.
        count: scenes.
        classes: classes, the first of a random order of the pool's; all if not given.
        size: height and width, a multiple of 32.
        kinds: classes that meet in one scene.
        objects: fewest and most objects of a scene.
        seed: scenes are a function of it and the other arguments.

    Raises:
        ValueError: for more classes than the pool has, more kinds than classes, or a size that does not fit.

    Example:
        >>> from fmeta.data import glyphs
        >>> scenes(glyphs().val, count=2, classes=4, size=64, seed=1).images.shape
        torch.Size([2, 3, 64, 64])
    """
    classes = len(pool.names) if classes is None else classes
    _check(pool, count, classes, size, kinds, objects)
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(pool.names), generator=random)[:classes]
    looks = [_look(random) for _ in range(classes)]
    images = torch.zeros(count, 3, size, size, dtype=torch.uint8)
    boxes, labels = torch.zeros(count, objects[1], 4), torch.zeros(count, objects[1], dtype=torch.int64)
    for row in range(count):
        scene, placed = _texture(size, random), torch.zeros(0, 4)
        here = torch.randperm(classes, generator=random)[:kinds]
        for _ in range(_integer(objects[0], objects[1] + 1, random)):
            label = int(here[_integer(0, kinds, random)])
            mask, colours = _object(pool, int(chosen[label]), looks[label], size, random)
            box = _place(mask, placed, size, random)
            if box is not None:
                _paste(scene, mask, colours, box)
                labels[row, len(placed)] = label + 1
                placed = torch.cat([placed, box[None]])
        boxes[row, : len(placed)] = placed
        images[row] = (scene.clamp(0, 1) * 255).round().to(torch.uint8)
    names = tuple(pool.names[index] for index in chosen.tolist())
    files = tuple(f"scene-{seed}-{row}" for row in range(count))
    return BoxPool(images, torch.full((count, 2), size), boxes, labels, names, files, torch.ones(count))


def _look(random: torch.Generator) -> Look:
    """A plate and two colours that differ."""
    plate = PLATES[_integer(0, len(PLATES), random)]
    ground, ink = torch.rand(2, 3, generator=random)
    if (ink - ground).abs().max() < 0.4:
        ink = (ground + 0.5) % 1
    return Look(plate, ink, ground)


def _texture(size: int, random: torch.Generator) -> Tensor:
    """A background: noise of some scales around a colour, and stripes in every third scene."""
    scene = torch.rand(3, 1, 1, generator=random).expand(3, size, size).clone()
    for cells in (2, 5, 12, 40):
        strength = 0.35 * torch.rand((), generator=random) * (2 / cells) ** 0.3
        noise = torch.randn(1, 3, cells, cells, generator=random)
        scene += strength * F.interpolate(noise, (size, size), mode="bilinear")[0]
    if torch.rand((), generator=random) < 1 / 3:
        angle, waves, phase = (torch.rand(3, generator=random) * torch.tensor([math.pi, 24, 6.3])).tolist()
        along = torch.linspace(0, 1, size)
        slope = math.cos(angle) * along + math.sin(angle) * along[:, None]
        scene += 0.12 * torch.sin(2 * math.pi * waves * slope + phase)
    return scene.clamp_(0, 1)


def _object(
    pool: Pool, kind: int, look: Look, size: int, random: torch.Generator
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Opacity of plate and ink, ``[2, h, w]`` cut to what is visible, and the two colours of this object."""
    row = pool.rows[kind, _integer(0, int(pool.counts[kind]), random)]
    low, high = math.log(size / 12), math.log(size / 2.4)
    side = math.exp(low + (high - low) * float(torch.rand((), generator=random)))
    stretch = 0.8 + 0.4 * float(torch.rand((), generator=random))
    height, width = max(8, round(side * stretch)), max(8, round(side / stretch))
    plate = _plate(look.plate, height, width, random)
    inner = 1.0 if look.plate == "none" else 0.75
    ink = F.interpolate(
        pool.x[row][None] / 255, (round(inner * height), round(inner * width)), mode="bilinear"
    )[0]
    high, wide = height - ink.shape[1], width - ink.shape[2]
    ink = F.pad(ink, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
    mask = torch.cat([plate, ink])
    seen = (mask.amax(0) > 0.3).nonzero()
    (top, left), (bottom, right) = seen.amin(0).tolist(), (seen.amax(0) + 1).tolist()
    light = 0.25 * (torch.rand(2, 3, generator=random) - 0.5)
    return mask[:, top:bottom, left:right], (look.ground + light[0], look.ink + light[1])


def _plate(kind: str, height: int, width: int, random: torch.Generator) -> Tensor:
    """What the ink lies on: ``[1, h, w]``."""
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    radius = (x.square() + y.square()).sqrt()
    if kind == "disc":
        found = radius < 1
    elif kind == "ring":
        found = (radius < 1) & (radius > 0.75)
    elif kind == "card":
        found = (x.abs() < 0.95) & (y.abs() < 0.95) & (x.abs() + y.abs() < 1.8)
    elif kind == "blot":
        turn = torch.atan2(y, x)
        phases = 6.3 * torch.rand(2, generator=random)
        found = radius < 0.8 + 0.1 * torch.sin(3 * turn + phases[0]) + 0.1 * torch.sin(5 * turn + phases[1])
    else:
        found = torch.zeros(height, width, dtype=torch.bool)
    return 0.85 * found[None].float()


def _place(mask: Tensor, placed: Tensor, size: int, random: torch.Generator) -> Tensor | None:
    """A box for the object that covers little of the others; None if none is found."""
    height, width = mask.shape[-2:]
    for _ in range(TRIES):
        top, left = (_integer(0, size - side + 1, random) for side in (height, width))
        box = torch.tensor([left, top, left + width, top + height]).float()
        if not len(placed) or float(_overlaps(box, placed).max()) <= OVERLAP:
            return box
    return None


def _overlaps(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of one box and some, ``[n]``."""
    inner = torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])
    shared = inner.clamp_min(0).prod(1)
    return shared / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - shared)


def _paste(scene: Tensor, mask: Tensor, colours: tuple[Tensor, Tensor], box: Tensor) -> None:
    left, top, right, bottom = box.long().tolist()
    part = scene[:, top:bottom, left:right]
    for opacity, colour in zip(mask, colours, strict=True):
        part += opacity * (colour[:, None, None] - part)


def _integer(low: int, high: int, random: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=random))


def _check(pool: Pool, count: int, classes: int, size: int, kinds: int, objects: tuple[int, int]) -> None:
    if not 1 <= classes <= len(pool.names):
        raise ValueError(
            f"{CALL}: classes must be in 1 .. {len(pool.names)}, which the pool has, got {classes}. Lower it."
        )
    if not 1 <= kinds <= classes:
        raise ValueError(f"{CALL}: kinds must be in 1 .. {classes}, the classes, got {kinds}. Lower it.")
    if size < 2 * STRIDE or size % STRIDE:
        raise ValueError(f"{CALL}: size must be a multiple of {STRIDE} from {2 * STRIDE} on, got {size}.")
    if count < 1 or not 1 <= objects[0] <= objects[1]:
        raise ValueError(
            f"{CALL}: count must be at least 1 and objects two growing numbers from 1 on, got {count} and {objects}."
        )
