"""Random affine changes of a batch of images, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def random_affine(
    x: Tensor,
    generator: torch.Generator,
    *,
    degrees: float = 10.0,
    shear: float = 0.1,
    scale: tuple[float, float] = (0.9, 1.1),
    shift: float = 0.07,
) -> Tensor:
    """Rotate, shear, stretch and move every image by amounts of its own; what comes in from outside is 0.

    Args:
        x: floating images ``[n, C, H, W]``.
        generator: a CPU generator, so that the draws do not depend on the device of ``x``.
        degrees: rotation is uniform in ``-degrees .. degrees``.
        shear: slant is uniform in ``-shear .. shear``, as horizontal over vertical.
        scale: width and height are stretched by two independent uniform factors from this range.
        shift: movement along each side is uniform in ``-shift .. shift``, as a part of the side.

    Example:
        >>> random_affine(torch.rand(2, 1, 8, 8), torch.Generator().manual_seed(0), degrees=45).shape
        torch.Size([2, 1, 8, 8])
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"random_affine: x must be floating images [n, C, H, W], got {x.dtype} of shape {list(x.shape)}. "
            "Add the missing dimensions or convert with x.float() / 255."
        )
    draws = torch.rand(6, len(x), generator=generator)  # always six, so one setting does not move the others
    angle = math.radians(degrees) * (2 * draws[0] - 1)
    slant = angle.sin() + shear * (2 * draws[1] - 1)
    # The grid says where each output pixel comes from, hence the inverse stretch; sides run from -1 to 1.
    across, down = 1 / (scale[0] + (scale[1] - scale[0]) * draws[2:4])
    move = 2 * shift * (2 * draws[4:6] - 1)
    height, width = x.shape[-2:]
    factors = [across * angle.cos(), -across * slant * height / width, move[0]]
    factors += [down * angle.sin() * width / height, down * angle.cos(), move[1]]
    a, b, c, d, e, f = torch.stack(factors).to(x)[..., None, None]  # [n, 1, 1] each
    row, column = centres(width, x), centres(height, x)[:, None]
    # Written out: affine_grid does the same by a batched matmul, which takes twice as long on a CPU.
    grid = torch.stack([a * row + (b * column + c), d * row + (e * column + f)], dim=-1)
    return F.grid_sample(x, grid, align_corners=False)


def centres(count: int, like: Tensor) -> Tensor:
    """Centres of ``count`` pixels that fill -1 .. 1."""
    return (2 * torch.arange(count, dtype=like.dtype, device=like.device) + 1) / count - 1


def quarter_turns(x: Tensor, turns: Tensor) -> Tensor:
    """Turn each image counter-clockwise by its own number of right angles.

    Args:
        x: square images ``[n, C, H, H]``.
        turns: ``[n]`` integers 0 .. 3, on the CPU.
    """
    x = x.clone()
    for turn in (1, 2, 3):
        rows = (turns == turn).nonzero().flatten().to(x.device)
        x[rows] = x[rows].rot90(turn, (-2, -1))
    return x
