"""Changes of images: quarter turns and small affine ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta.data import random_affine
from fmeta.data.warp import quarter_turns


def test_quarter_turns_turn_each_image_by_its_own_angle() -> None:
    x = torch.rand(12, 2, 5, 5)
    turns = torch.arange(12) % 4
    before = x.clone()
    turned = quarter_turns(x, turns)
    for image, turn, original in zip(turned, turns.tolist(), x, strict=True):
        assert np.array_equal(image.numpy(), np.rot90(original.numpy(), turn, (1, 2)))
    assert torch.equal(x, before)


def test_random_affine_without_change_is_the_identity() -> None:
    x = torch.rand(3, 2, 7, 9)
    still = random_affine(x, torch.Generator(), degrees=0, shear=0, scale=(1, 1), shift=0)
    assert torch.allclose(still, x, atol=1e-6)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Centre ``[n, 2]`` and covariance ``[n, 2, 2]`` of the ink, in pixels, as (across, down)."""
    down, across = torch.meshgrid(
        *[torch.arange(side, dtype=x.dtype) for side in x.shape[-2:]], indexing="ij"
    )
    position = torch.stack([across, down], -1).flatten(0, 1)
    weight = x.flatten(1) / x.flatten(1).sum(1, keepdim=True)
    centre = weight @ position
    offset = position - centre[:, None]
    return centre, torch.einsum("np,npi,npj->nij", weight, offset, offset)


def test_random_affine_stays_in_its_ranges() -> None:
    x = torch.zeros(400, 1, 61, 81, dtype=torch.float64)
    x[:, :, 28:33, 20:61] = 1  # a bar of 41 by 5, in the middle
    centre, still = moments(x)
    drawn = torch.Generator().manual_seed(0)
    moved, _ = moments(random_affine(x, drawn, degrees=0, shear=0, scale=(1, 1), shift=0.1))
    shift = (moved - centre) / torch.tensor([81, 61])
    assert 0.09 < shift.abs().max() <= 0.101 and shift.mean().abs() < 0.02
    _, turned = moments(random_affine(x, drawn, degrees=30, shear=0, scale=(1, 1), shift=0))
    angle = 0.5 * torch.atan2(2 * turned[:, 0, 1], turned[:, 0, 0] - turned[:, 1, 1]).rad2deg()
    assert 28 < angle.abs().max() <= 30.5, "a rotation turns pixels, also where sides differ"
    assert torch.allclose(
        turned.diagonal(dim1=1, dim2=2).sum(1), still.diagonal(dim1=1, dim2=2).sum(1), rtol=0.03
    )
    _, scaled = moments(random_affine(x, drawn, degrees=0, shear=0, scale=(0.5, 0.9), shift=0))
    width = (scaled[:, 0, 0] / still[:, 0, 0]).sqrt()
    assert 0.49 < width.min() < 0.55 and 0.85 < width.max() < 0.91
    _, slanted = moments(random_affine(x.mT.contiguous(), drawn, degrees=0, shear=0.3, scale=(1, 1), shift=0))
    slant = slanted[:, 0, 1] / slanted[:, 1, 1]
    assert 0.27 < slant.abs().max() <= 0.305


def test_random_affine_gives_each_image_its_own_change() -> None:
    x = torch.zeros(8, 1, 28, 28)
    x[:, :, 8:20, 10:14] = 1
    moved = random_affine(x, torch.Generator().manual_seed(1))
    assert len({image.numpy().tobytes() for image in moved}) == 8
    assert F.mse_loss(moved, x) < 0.1, "small changes"
    assert torch.equal(moved, random_affine(x, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("x", [torch.zeros(3, 5, 5), torch.zeros(1, 1, 5, 5, dtype=torch.uint8)])
def test_random_affine_refuses(x: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"random_affine: x must be floating images \[n, C, H, W\], got torch\."
    ):
        random_affine(x, torch.Generator())
