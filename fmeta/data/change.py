"""Random crops, flips and colours of a batch of images, each image by amounts of its own, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta.data.warp import centres

LUMA = (0.299, 0.587, 0.114)
"""Brightness of red, green and blue (ITU-R BT.601)."""


def random_crop(x: Tensor, generator: torch.Generator, *, padding: int | None = None) -> Tensor:
    """Move every image by up to ``padding`` pixels each way; what comes in from outside is 0.

    This is a crop of the size of the image from the image with a black margin.

    Args:
        x: images ``[n, C, H, W]``.
        generator: a CPU generator, so that the draws do not depend on the device of ``x``.
        padding: width of the margin; by default an eighth of the shorter side, 4 of 32 as is usual for CIFAR.

    Example:
        >>> x = torch.ones(2, 1, 8, 8)
        >>> random_crop(x, torch.Generator().manual_seed(0), padding=2).shape
        torch.Size([2, 1, 8, 8])
    """
    _check("random_crop", x)
    height, width = x.shape[-2:]
    margin = min(height, width) // 8 if padding is None else padding
    if isinstance(margin, bool) or not isinstance(margin, int) or margin < 0:
        raise ValueError(f"random_crop: padding must be a non-negative int, got {padding!r}. Pass pixels.")
    top, left = torch.randint(2 * margin + 1, (2, len(x)), generator=generator).to(x.device)
    windows = (
        F.pad(x, (margin,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    )  # [n, C, top, left, H, W], a view
    image = torch.arange(len(x), device=x.device)
    return windows.permute(0, 2, 3, 1, 4, 5)[image, top, left]


def random_resized_crop(
    x: Tensor,
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (0.75, 4 / 3),
) -> Tensor:
    """Cut a random rectangle out of every image and stretch it to the image's size, linearly interpolated.

    Args:
        x: floating images ``[n, C, H, W]``.
        generator: a CPU generator.
        scale: the part of the area that is kept, uniform in this range, at most 1.
        ratio: width over height of the rectangle, relative to the image's; its logarithm is uniform. A side is
            never longer than the image's.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> random_resized_crop(x, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 8, 8])

    References:
        Szegedy et al., Going deeper with convolutions, 2015, arXiv 1409.4842, section 6. Deviation: a rectangle
        that does not fit is shortened; torchvision draws again.
    """
    _check("random_resized_crop", x, floating=True)
    if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
        raise ValueError(
            "random_resized_crop: scale must be a range in 0 .. 1 and ratio one above 0, got "
            f"{scale} and {ratio}. Put the smaller number first."
        )
    draws = torch.rand(4, len(x), generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * draws[0]
    shape = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draws[1])
    sides = torch.stack([(area * shape).sqrt(), (area / shape).sqrt()]).clamp(max=1)  # width, height: of 1
    middles = (1 - sides) * (2 * draws[2:] - 1)  # sides run from -1 to 1
    width, height, across, down = torch.cat([sides, middles]).to(x)[..., None, None]
    row = (across + width * centres(x.shape[-1], x)).expand(-1, x.shape[-2], -1)
    column = (down + height * centres(x.shape[-2], x)[:, None]).expand(-1, -1, x.shape[-1])
    return F.grid_sample(x, torch.stack([row, column], -1), padding_mode="border", align_corners=False)


def random_flip(x: Tensor, generator: torch.Generator, *, probability: float = 0.5) -> Tensor:
    """Mirror each image from left to right with this probability.

    Args:
        x: images ``[n, C, H, W]``.
        generator: a CPU generator.
        probability: from 0 to 1.

    Example:
        >>> x = torch.tensor([[[[0.0, 1.0]]]])
        >>> random_flip(x, torch.Generator(), probability=1.0).flatten().tolist()
        [1.0, 0.0]
    """
    _check("random_flip", x)
    if not 0 <= probability <= 1:
        raise ValueError(f"random_flip: probability must be in 0 .. 1, got {probability!r}. Pass 0.5.")
    turned = torch.rand(len(x), generator=generator) < probability
    return torch.where(turned.to(x.device)[:, None, None, None], x.flip(-1), x)


def random_jitter(
    x: Tensor,
    generator: torch.Generator,
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
) -> Tensor:
    """Change brightness, contrast and saturation of every image by factors of its own.

    Each factor is uniform in ``1 - amount .. 1 + amount``: of the pixels, of their distance from the image's mean
    grey, of their distance from their own grey. Results are cut to 0 .. 1.

    Args:
        x: floating images ``[n, C, H, W]`` in 0 .. 1. Saturation is of images with 3 channels.
        generator: a CPU generator.
        brightness: amount, from 0 to 1; the three defaults are usual for miniImageNet.
        contrast: likewise.
        saturation: likewise.

    Example:
        >>> x = torch.full((2, 3, 4, 4), 0.5)
        >>> len(random_jitter(x, torch.Generator().manual_seed(0)).unique())
        2

    Deviation: the three follow each other in this order; torchvision's ColorJitter shuffles them.
    """
    _check("random_jitter", x, floating=True)
    amounts = torch.tensor([brightness, contrast, saturation])
    if not bool(((amounts >= 0) & (amounts <= 1)).all()):
        raise ValueError(
            "random_jitter: brightness, contrast and saturation must be in 0 .. 1, got "
            f"{brightness}, {contrast} and {saturation}. Pass 0 for no change."
        )
    draws = 2 * torch.rand(3, len(x), generator=generator) - 1
    light, spread, colour = (1 + amounts[:, None] * draws).to(x)[..., None, None, None]
    x = (light * x).clamp_(0, 1)
    mean = _grey(x.mean((-2, -1), keepdim=True))
    x.mul_(spread).add_(mean * (1 - spread)).clamp_(0, 1)
    if x.shape[1] == 3:
        grey = _grey(x) * (1 - colour)
        x.mul_(colour).add_(grey).clamp_(0, 1)
    return x


def _grey(x: Tensor) -> Tensor:
    """``[n, 1, H, W]``."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    red, green, blue = x.split(1, 1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _check(call: str, x: Tensor, floating: bool = False) -> None:
    if x.ndim != 4 or (floating and not x.is_floating_point()):
        raise ValueError(
            f"{call}: x must be {'floating ' if floating else ''}images [n, C, H, W], got {x.dtype} of shape "
            f"{list(x.shape)}. Add the missing dimensions or convert with x.float() / 255."
        )
