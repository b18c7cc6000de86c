"""Samplers as functions of (seed, step), and the sinusoids."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from fmeta import tree
from fmeta.data import Pool, from_tensors
from fmeta.tasks import few_shot, fixed, sinusoid, sinusoid_waves, umtra, variable_few_shot
from fmeta.tasks.seeding import generator, splitmix64
from fmeta.types import Sampler


def pictures(classes: int = 7, each: int = 6) -> Pool:
    """Images that any process makes alike."""
    x = (torch.arange(classes * each * 192) * 31 % 251).to(torch.uint8).view(-1, 3, 8, 8)
    return from_tensors(x, torch.arange(classes * each) % classes, split=(1, 0, 0)).train


def images(**options: Any) -> Sampler:
    numbers: dict[str, Any] = dict(ways=4, shots=1, queries=2, tasks=3)
    return few_shot(pictures(), **numbers | options)


ALL = ("rotations", "affine", "crop", "flip", "jitter", "resized_crop")
SAMPLERS: dict[str, Callable[[], Any]] = {
    "sinusoid": lambda: sinusoid(tasks=3, shots=2, queries=4),
    "few_shot": lambda: images(augment=ALL),
    "few_shot dealt": lambda: images(shots=[1, 2, 1, 3], query="total"),
    "few_shot range": lambda: images(shots=range(1, 4), queries=None),
    "few_shot v2": lambda: images(augment=[v2.ColorJitter(0.4), v2.RandomAffine(30)]),
    "umtra": lambda: umtra(pictures(), ways=3, tasks=2, augment=("crop", "jitter")),
    "variable": lambda: variable_few_shot(pictures(), tasks=3, ways=(2, 6), augment=ALL),
    "variable alike": lambda: variable_few_shot(pictures(), tasks=3, ways=(2, 6), alike=True),
}


def digest(task: Any) -> str:
    return hashlib.sha256(b"".join(leaf.numpy().tobytes() for leaf in tree.leaves(task))).hexdigest()


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_pair_same_task_and_other_pairs_differ(name: str) -> None:
    sampler: Any = SAMPLERS[name]()
    wanted = digest(sampler(3, 17))
    torch.manual_seed(12345)
    for other in (5, 2, 17):
        sampler(3, other)
    assert digest(sampler(seed=3, step=17)) == wanted, "no state, and no global generator"
    assert digest(SAMPLERS[name]()(3, 17)) == wanted
    pairs = [(seed, step) for seed in range(5) for step in range(20)] + [(-1, 0), (2**40, 0), (2**32, 0)]
    assert len({digest(sampler(*pair)) for pair in pairs}) == len(pairs)


def test_same_task_in_another_process() -> None:
    names = ", ".join(f"digest(SAMPLERS[{name!r}]()(5, 11))" for name in SAMPLERS)
    code = f"import torch; torch.set_num_threads(2); from test_tasks import *; print({names})"
    folder = __file__.rpartition("/")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": f"{folder}:{folder}/..", "PYTHONHASHSEED": "77"},
    )  # fmt: skip
    assert done.stdout.split() == [digest(SAMPLERS[name]()(5, 11)) for name in SAMPLERS]


def test_sampling_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    for make in SAMPLERS.values():
        make()(0, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_umtra_needs_pictures_of_one_size() -> None:
    sampler = umtra(pictures(), ways=3, tasks=2, augment=v2.CenterCrop(4))
    with pytest.raises(
        ValueError, match=r"umtra: augment must keep the size .* got \[3, 4, 4\] from \[3, 8, 8\]"
    ):
        sampler(0, 0)


# Fixed tasks


def test_fixed_tasks_do_not_depend_on_the_seed_that_is_asked_for() -> None:
    sampler = images(augment="jitter")
    held = fixed(sampler, seed=5, count=3)
    for step in range(3):
        assert digest(held(seed=0, step=step)) == digest(sampler(5, step)) == digest(held(9, step + 3))
    assert len({digest(held(0, step)) for step in range(9)}) == 3
    with pytest.raises(ValueError, match="fixed: count must be a positive int, got 0"):
        fixed(sampler, seed=0, count=0)
    with pytest.raises(ValueError, match="sampler: step must be in 0"):
        held(0, -1)


# Seeding


def test_splitmix64_is_the_published_one() -> None:
    # The first outputs of the reference implementation seeded with 1234567 add its increment each time.
    increment, found = 0x9E3779B97F4A7C15, []
    for index in range(3):
        found.append(splitmix64(1234567 + index * increment))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_steps_of_a_seed_never_share_a_generator() -> None:
    for seed in (0, 1, -7):
        assert len({generator(seed, step).initial_seed() for step in range(20_000)}) == 20_000
    seeds = torch.tensor([generator(0, step).initial_seed() for step in range(4096)])
    assert seeds.max() < 2**32, "torch would drop higher bits"
    ones = torch.stack([(seeds >> bit) & 1 for bit in range(32)]).double().mean(1)
    assert (ones - 0.5).abs().max() < 5 * 0.5 / math.sqrt(4096), "every bit is a fair coin"


def test_step_may_be_a_tensor() -> None:
    assert generator(1, torch.tensor(5)).initial_seed() == generator(1, 5).initial_seed()  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [-1, 2**32])
def test_step_has_a_range(step: int) -> None:
    with pytest.raises(ValueError, match=rf"sampler: step must be in 0 \.\. 2\*\*32 - 1, got {step}"):
        sinusoid()(0, step)


def test_seed_and_step_are_ints() -> None:
    with pytest.raises(TypeError, match=r"sampler: seed must be an int, got 0\.5"):
        sinusoid()(0.5, 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sampler: step must be an int, got 'last'"):
        sinusoid()(0, "last")  # type: ignore[arg-type]


# Sinusoids


def test_sinusoid_shapes_and_dtypes() -> None:
    task = sinusoid(tasks=6, shots=5, queries=8)(0, 0)
    for batch, points in ((task.support, 5), (task.query, 8)):
        assert batch.x.shape == batch.y.shape == (6, points, 1)
        assert batch.x.dtype == batch.y.dtype == torch.float32
    assert sinusoid()(0, 0).support.x.shape == (25, 10, 1), "the paper's"
    double = sinusoid(tasks=6, shots=5, queries=8, dtype=torch.float64)(0, 0)
    assert torch.equal(double.query.y.float(), task.query.y), "dtype rounds, and draws nothing anew"
    assert sinusoid(device="meta")(0, 0).query.y.device.type == "meta"


def wave(x: Tensor, amplitude: Tensor, phase: Tensor) -> Tensor:
    return amplitude * torch.sin(x - phase)


def test_sinusoid_points_lie_on_the_waves() -> None:
    task = sinusoid(tasks=9, dtype=torch.float64)(4, 2)
    amplitude, phase = sinusoid_waves(4, 2, tasks=9)
    assert torch.equal(task.support.y, wave(task.support.x, amplitude, phase))
    assert torch.equal(task.query.y, wave(task.query.x, amplitude, phase))


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    """Kolmogorov's distance from the uniform distribution, below its bound for one error in a million."""
    ordered = values.flatten().sort().values
    assert low <= ordered[0] and ordered[-1] <= high
    expected = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    distance = ((ordered - low) / (high - low) - expected).abs().max()
    assert distance < math.sqrt(math.log(2e6) / 2 / len(ordered))


def test_sinusoid_distribution_is_the_papers() -> None:
    amplitude, phase = sinusoid_waves(0, 0, tasks=20_000)
    x = sinusoid(tasks=20_000, shots=1, queries=1)(0, 0).query.x
    assert_uniform(amplitude, 0.1, 5.0)
    assert_uniform(phase, 0.0, math.pi)
    assert_uniform(x, -5.0, 5.0)
    pairs = torch.stack([amplitude.flatten(), phase.flatten(), x.double().flatten()])
    assert (torch.corrcoef(pairs) - torch.eye(3)).abs().max() < 0.04


@pytest.mark.parametrize("name", ["tasks", "shots", "queries"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None])
def test_sinusoid_refuses_counts(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"sinusoid: {name} must be a positive int, got {value}"):
        sinusoid(**{name: value})  # type: ignore[arg-type]


def test_sinusoid_refuses_integer_numbers() -> None:
    with pytest.raises(TypeError, match=r"sinusoid: dtype must be floating, got torch\.int64"):
        sinusoid(dtype=torch.int64)
    with pytest.raises(ValueError, match="sinusoid_waves: tasks must be a positive int, got 0"):
        sinusoid_waves(0, 0, tasks=0)
