"""Transforms of torchvision as augmentations: their randomness comes from the sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_transform(found: Any) -> bool:
    """Whether torchvision made it; asked by name, because importing torchvision takes seconds."""
    return any(kind.__module__.startswith("torchvision.transforms") for kind in type(found).__mro__)


def reproducible(
    transform: Callable[[Tensor], Tensor], *, each: bool = True
) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Make a transform that draws from torch's global generators an augmentation for ``few_shot``.

    Transforms of ``torchvision.transforms.v2`` are such. While one runs, the global generators are seeded by the
    sampler's and afterwards they are as before: the same ``(seed, step)`` gives the same images. ``few_shot`` does
    this by itself with torchvision's transforms; call it for functions of your own that draw globally.

    Args:
        transform: maps an image ``[C, H, W]`` to one of any size, all of the same; it may work on images
            ``[n, C, H, W]`` just as well. What it draws on a GPU differs from what it draws on a CPU.
        each: call it once an image, so that each gets draws of its own; False calls it once for all of them, with
            the same draw for every image, which is fast and right for what draws nothing (``Normalize``).

    Example:
        >>> from torchvision.transforms import v2
        >>> flip = reproducible(v2.RandomHorizontalFlip())
        >>> flip(torch.rand(4, 3, 8, 8), torch.Generator().manual_seed(0)).shape
        torch.Size([4, 3, 8, 8])
    """
    if not callable(transform):
        raise TypeError(
            f"reproducible: transform must be a callable image -> image, got {type(transform).__name__}. Pass "
            "one of torchvision.transforms.v2, for example."
        )

    def change(x: Tensor, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**31, (), generator=generator))
        cuda = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices=cuda):
            torch.random.default_generator.manual_seed(seed)
            for device in cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            return _stacked([transform(image) for image in x]) if each else transform(x)

    return change


def _stacked(images: list[Tensor]) -> Tensor:
    shapes = {tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__ for image in images}
    if len(shapes) != 1 or not isinstance(images[0], Tensor):
        raise ValueError(
            f"reproducible: the transform must give tensors of one shape, got {sorted(map(str, shapes))}. End it "
            "with a Resize or a crop of fixed size."
        )
    return torch.stack(images)
