"""Random changes of a batch of images: what each does, to every image by itself, and from which randomness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from fmeta.data import (
    class_pool,
    random_affine,
    random_crop,
    random_flip,
    random_jitter,
    random_resized_crop,
    reproducible,
)
from fmeta.tasks import few_shot


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramp(count: int, height: int = 8, width: int = 8, channels: int = 3) -> Tensor:
    """The same image many times; no two pixels are alike."""
    size = channels * height * width
    return (torch.arange(size).view(channels, height, width) / size).expand(count, -1, -1, -1).clone()


CHANGES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "affine": random_affine,
    "crop": random_crop,
    "flip": random_flip,
    "jitter": random_jitter,
    "resized_crop": random_resized_crop,
    "v2": reproducible(v2.Compose([v2.RandomRotation(20), v2.ColorJitter(0.5, 0.5), v2.GaussianNoise()])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_images_of_a_batch_get_draws_of_their_own(name: str) -> None:
    x = ramp(64)
    before = x.clone()
    changed = CHANGES[name](x, seeded())
    assert changed.shape == x.shape and changed.dtype == x.dtype and torch.equal(x, before)
    kinds = len({image.numpy().tobytes() for image in changed})
    assert kinds == 2 if name == "flip" else kinds > (6 if name == "crop" else 60)


@pytest.mark.parametrize("name", CHANGES)
def test_changes_depend_on_the_generator_and_nothing_else(name: str) -> None:
    x = ramp(16)
    state = torch.get_rng_state()
    first = CHANGES[name](x, seeded(1))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is as before"
    torch.manual_seed(999)
    assert torch.equal(CHANGES[name](x, seeded(1)), first)
    assert not torch.equal(CHANGES[name](x, seeded(2)), first)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_advances_the_generator(name: str) -> None:
    generator, x = seeded(), ramp(16)
    assert not torch.equal(CHANGES[name](x, generator), CHANGES[name](x, generator))


def test_crops_are_windows_of_the_padded_image() -> None:
    x = ramp(400, 8, 12) + 1  # no pixel is 0
    cropped = random_crop(x, seeded(), padding=2)
    padded = torch.nn.functional.pad(x[0], (2, 2, 2, 2))
    windows = {
        padded[:, top : top + 8, left : left + 12].contiguous().numpy().tobytes(): (top, left)
        for top in range(5)
        for left in range(5)
    }
    places = [windows[image.numpy().tobytes()] for image in cropped]
    counts = torch.bincount(torch.tensor([5 * top + left for top, left in places]), minlength=25)
    assert counts.min() > 3 and counts.max() < 40, "all 25 places, 16 times each on average"
    assert torch.equal(random_crop(x, seeded(), padding=0), x)
    small = torch.ones(200, 1, 32, 32)
    moved = 32 - random_crop(small, seeded()).amax(-1)[:, 0].sum(-1)
    assert moved.max() == 4, "4 of 32 by default"
    assert random_crop((x * 100).to(torch.uint8), seeded()).dtype == torch.uint8


def test_flips_mirror_half_of_the_images() -> None:
    x = ramp(1000, 3, 5)
    flipped = random_flip(x, seeded())
    turned = (flipped != x).flatten(1).any(1)
    assert torch.equal(flipped[turned], x[turned].flip(-1)) and torch.equal(flipped[~turned], x[~turned])
    assert 420 < turned.sum() < 580
    assert torch.equal(random_flip(x, seeded(), probability=0), x)


def test_resized_crops_show_a_rectangle_of_the_image() -> None:
    height, width = 40, 60
    down = torch.linspace(0, 1, height)[:, None].expand(height, width)
    across = torch.linspace(0, 1, width).expand(height, width)
    x = torch.stack([down, across])[None].repeat(500, 1, 1, 1)
    cut = random_resized_crop(x, seeded(), scale=(0.2, 0.6), ratio=(0.5, 2.0))
    # The first channel changes downwards only and the second across only, both evenly: a straight rectangle.
    assert (cut[:, 0] - cut[:, 0, :, :1]).abs().max() < 1e-5
    assert (cut[:, 1] - cut[:, 1, :1]).abs().max() < 1e-5
    steps = cut[:, 0, 2:-2, 0].diff(dim=1)
    assert (steps - steps[:, :1]).abs().max() < 1e-5
    tall = (cut[:, 0, -5, 0] - cut[:, 0, 4, 0]) * (height - 1) / (height - 9)
    wide = (cut[:, 1, 0, -5] - cut[:, 1, 0, 4]) * (width - 1) / (width - 9)
    area, shape = tall * wide, wide / tall
    assert 0.2 < area.min() < 0.23 and 0.55 < area.max() < 0.61
    assert 0.48 < shape.min() < 0.55 and 1.8 < shape.max() < 2.02
    whole = random_resized_crop(x, seeded(), scale=(1, 1), ratio=(1, 1))
    assert torch.allclose(whole, x, atol=1e-5)


def test_jitter_changes_brightness_contrast_and_saturation() -> None:
    x = torch.rand(300, 3, 6, 6, generator=seeded()) * 0.4 + 0.2
    none: dict[str, Any] = dict(brightness=0, contrast=0, saturation=0)
    assert torch.allclose(random_jitter(x, seeded(), **none), x, atol=1e-6)
    grey = lambda x: (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)  # noqa: E731
    light = random_jitter(x, seeded(), **none | {"brightness": 0.3})
    factor = (light / x).flatten(1)
    assert factor.std(1).max() < 1e-5 and 0.7 <= factor.min() < 0.72 and 1.28 < factor.max() <= 1.3001
    spread = random_jitter(x, seeded(), **none | {"contrast": 0.3})
    mean = grey(x).mean((1, 2))[:, None, None, None]
    factor = ((spread - mean).flatten(1) * (x - mean).flatten(1)).sum(1) / (x - mean).flatten(1).square().sum(
        1
    )
    assert torch.allclose(spread - mean, factor[:, None, None, None] * (x - mean), atol=1e-5)
    assert 0.7 <= factor.min() < 0.72 and 1.28 < factor.max() <= 1.3001
    colour = random_jitter(x, seeded(), **none | {"saturation": 0.4})
    assert torch.allclose(grey(colour), grey(x), atol=1e-3), "as bright as before"
    assert (colour != x).flatten(1).any(1).all()
    colour = random_jitter(x, seeded(), **none | {"saturation": 1.0})
    assert (colour.std(1).flatten(1).mean(1) / x.std(1).flatten(1).mean(1)).min() < 0.05, "down to grey"
    assert random_jitter(ramp(9), seeded()).max() <= 1
    single = torch.rand(4, 1, 5, 5)
    assert torch.allclose(random_jitter(single, seeded(), **none | {"saturation": 1.0}), single, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda x, g: random_crop(x, g, padding=-1),
            "random_crop: padding must be a non-negative int, got -1",
        ),
        (
            lambda x, g: random_crop(x[0], g),
            r"random_crop: x must be images \[n, C, H, W\], got torch.float32",
        ),
        (
            lambda x, g: random_flip(x, g, probability=2),
            r"random_flip: probability must be in 0 \.\. 1, got 2",
        ),
        (lambda x, g: random_flip(x[0], g), r"random_flip: x must be images"),
        (
            lambda x, g: random_jitter(x.byte(), g),
            r"random_jitter: x must be floating images .*got torch\.uint8",
        ),
        (
            lambda x, g: random_jitter(x, g, contrast=-1),
            r"random_jitter: brightness, .* got 0\.4, -1 and 0\.4",
        ),
        (
            lambda x, g: random_resized_crop(x, g, scale=(0, 1)),
            r"random_resized_crop: scale .*got \(0, 1\) and",
        ),
        (lambda x, g: random_resized_crop(x, g, ratio=(2, 1)), r"random_resized_crop: scale .*and \(2, 1\)"),
        (lambda x, g: random_resized_crop(x.byte(), g), r"random_resized_crop: x must be floating images"),
    ],
)
def test_refuses(change: Callable[..., Tensor], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        change(ramp(2), seeded())


# Transforms of torchvision


def images(classes: int = 4, each: int = 5) -> Any:
    x = torch.randint(256, (classes * each, 3, 10, 10), dtype=torch.uint8, generator=seeded())
    return class_pool(x, torch.arange(classes).repeat_interleave(each), tuple("abcdefgh"[:classes]))


def test_samplers_take_transforms_as_they_are() -> None:
    numbers: dict[str, Any] = dict(ways=3, shots=1, queries=2, tasks=2)
    sampler = few_shot(images(), augment=["flip", v2.RandomAffine(30), v2.RandomErasing(p=1)], **numbers)
    wanted = sampler(4, 2)
    state = torch.get_rng_state()
    torch.manual_seed(77)
    again = sampler(4, 2)
    assert torch.equal(wanted.support.x, again.support.x) and torch.equal(wanted.query.x, again.query.x)
    assert not torch.equal(wanted.query.x, sampler(4, 3).query.x)
    torch.set_rng_state(state)
    plain = few_shot(images(), **numbers)(4, 2)
    assert torch.equal(plain.query.y, wanted.query.y), "tasks are drawn before they are changed"
    assert (plain.query.x != wanted.query.x).flatten(2).any(-1).all()


def test_transforms_may_change_size_and_scale() -> None:
    chain = v2.Compose([v2.RandomResizedCrop(6), v2.Normalize([0.5] * 3, [0.5] * 3)])
    task = few_shot(images(), ways=2, shots=1, queries=2, tasks=3, augment=chain)(0, 0)
    assert task.support.x.shape == (3, 2, 3, 6, 6) and task.support.x.min() < 0


def test_one_draw_for_all_on_request() -> None:
    x = torch.rand(32, 3, 6, 6, generator=seeded())
    together = reproducible(v2.RandomHorizontalFlip(), each=False)
    found = {bool((together(x, seeded(seed)) == x).all()) for seed in range(20)}
    assert found == {True, False}
    for seed in range(5):
        flipped = (together(x, seeded(seed)) != x).flatten(1).any(1)
        assert flipped.all() or not flipped.any()


def test_own_functions_that_draw_globally() -> None:
    noise = reproducible(lambda image: image + torch.rand(()))
    added = (noise(torch.zeros(50, 1, 2, 2), seeded(3)))[:, 0, 0, 0]
    assert len(added.unique()) == 50
    assert torch.equal(added, noise(torch.zeros(50, 1, 2, 2), seeded(3))[:, 0, 0, 0])


def test_refuses_transforms_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="reproducible: transform must be a callable image -> image, got str"):
        reproducible("flip")  # type: ignore[arg-type]
    sizes = iter(range(2, 40))
    with pytest.raises(
        ValueError, match=r"reproducible: the transform must give tensors of one shape, got \["
    ):
        reproducible(lambda image: image[:, : next(sizes)])(torch.rand(4, 3, 30, 30), seeded())
    with pytest.raises(ValueError, match=r"must give tensors of one shape, got \['NoneType'\]"):
        reproducible(lambda image: None)(torch.rand(4, 3, 8, 8), seeded())  # type: ignore[arg-type,return-value]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CHANGES if name != "v2"])
def test_changes_do_not_depend_on_the_device(name: str) -> None:
    here, there = CHANGES[name](ramp(16), seeded(5)), CHANGES[name](ramp(16).cuda(), seeded(5))
    assert torch.allclose(here, there.cpu(), atol=1e-5)
