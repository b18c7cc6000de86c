"""Schedules against torch.optim.lr_scheduler, and against what their docstrings say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import assert_trees_close
from optim_cases import example_grads, example_params
from torch import Tensor
from torch.func import grad, vmap
from torch.optim import lr_scheduler

from fmeta import optim, schedules, tree
from fmeta.rates import Schedule

STEPS = 25


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """An integer count is computed with in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def values(schedule: Schedule, counts: range = range(STEPS)) -> list[float]:
    return [schedule(torch.tensor(count)).item() for count in counts]


Scheduler = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
SAME: dict[str, tuple[Schedule, Scheduler]] = {
    "constant": (schedules.constant(0.4), lambda o: lr_scheduler.LambdaLR(o, lambda count: 1.0)),
    "linear": (schedules.linear(0.1, 0.4, 7), lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, total_iters=7)),
    "linear-down": (
        schedules.linear(0.4, 0.0, 9),
        lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=9),
    ),
    "cosine": (
        schedules.cosine(0.4, STEPS, end=0.03),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS, eta_min=0.03),
    ),
    "exponential": (schedules.exponential(0.4, 0.9), lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
    "exponential-every": (
        schedules.exponential(0.4, 0.5, every=4),
        lambda o: lr_scheduler.ExponentialLR(o, 0.5 ** (1 / 4)),
    ),
    "step": (schedules.step(0.4, 0.3, every=6), lambda o: lr_scheduler.StepLR(o, 6, gamma=0.3)),
    "boundaries": (
        schedules.step(0.4, 0.3, boundaries=[3, 4, 11]),
        lambda o: lr_scheduler.MultiStepLR(o, [3, 4, 11], gamma=0.3),
    ),
    "warmup": (
        schedules.warmup(schedules.exponential(0.4, 0.9), 5),
        lambda o: lr_scheduler.LambdaLR(o, lambda count: count / 5 if count < 5 else 0.9 ** (count - 5)),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_optimisers_with_a_schedule_are_those_of_torch(name: str) -> None:
    schedule, make = SAME[name]
    params = example_params()
    leaves = [p.clone().requires_grad_() for p in params.values()]
    optimiser = torch.optim.SGD(leaves, lr=0.4, momentum=0.5, weight_decay=0.1)
    scheduler = make(optimiser)
    rule = optim.sgd(schedule, momentum=0.5, weight_decay=0.1)
    state = rule.init(params)
    for grads in example_grads(params, STEPS):
        updates, state = rule.update(grads, state, params)
        params = tree.add(params, updates)
        for leaf, g in zip(leaves, grads.values(), strict=True):
            leaf.grad = g.clone()
        optimiser.step()
        scheduler.step()
        assert_trees_close(list(params.values()), [leaf.detach() for leaf in leaves], tolerance=1e-12)


def test_cosine_with_warmup_climbs_then_falls_then_stays() -> None:
    got = values(schedules.cosine(2.0, 20, warmup=4, end=0.5), range(30))
    want = [2.0 * count / 4 for count in range(4)]
    want += [0.5 + 1.5 * (1 + math.cos(math.pi * (count - 4) / 16)) / 2 for count in range(4, 20)]
    assert got == pytest.approx(want + [0.5] * 10, rel=1e-14)


def test_warmup_of_a_constant_is_a_ramp() -> None:
    got = values(schedules.warmup(schedules.constant(0.5), 4), range(7))
    assert got == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


def test_rates_of_each_step_repeat_the_last() -> None:
    assert values(schedules.per_step(torch.tensor([0.3, 0.2, 0.1])), range(5)) == [0.3, 0.2, 0.1, 0.1, 0.1]
    rows = torch.arange(6.0).reshape(2, 3)
    assert schedules.per_step(rows)(torch.tensor(1)).tolist() == [3.0, 4.0, 5.0]


ALL: dict[str, Callable[[Any], Schedule]] = {
    "constant": lambda x: schedules.constant(x),
    "linear": lambda x: schedules.linear(x, 2 * x, 10),
    "cosine": lambda x: schedules.cosine(x, 10, warmup=2, end=x / 10),
    "warmup": lambda x: schedules.warmup(schedules.constant(x), 10),
    "exponential": lambda x: schedules.exponential(x, 0.9),
    "step": lambda x: schedules.step(x, 0.5, every=2),
    "boundaries": lambda x: schedules.step(x, 0.5, boundaries=[2, 5]),
    "per_step": lambda x: schedules.per_step(torch.stack([x, 2 * x, 3 * x])),
}
each_schedule = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in ALL.items()])


@each_schedule
def test_a_rate_of_a_schedule_may_be_differentiated(make: Callable[[Any], Schedule]) -> None:
    x, count = torch.tensor(0.3), torch.tensor(7)
    slope = grad(lambda x: make(x)(count))(x)
    # Each of these is linear in its rate, so the derivative is the schedule itself over the rate.
    assert slope.item() == pytest.approx(make(x)(count).item() / 0.3, rel=1e-13)
    assert slope > 0


@each_schedule
def test_a_schedule_gives_a_number_for_a_number_and_may_be_mapped(make: Callable[[Any], Schedule]) -> None:
    schedule, counts = make(torch.tensor(0.3)), torch.arange(12)
    one = [schedule(count) for count in counts]
    assert {value.shape for value in one} == {torch.Size()}
    assert_trees_close(vmap(schedule)(counts), torch.stack(one), tolerance=1e-14)


@pytest.mark.parametrize("name", [name for name in ALL if name != "per_step"])
def test_the_count_decides_the_dtype(name: str) -> None:
    schedule = ALL[name](0.3)
    assert schedule(torch.tensor(3, dtype=torch.float32)).dtype == torch.float32
    assert schedule(torch.tensor(3)).dtype == torch.float64  # the default of these tests
    assert schedule(torch.tensor(3.0)).item() == schedule(torch.tensor(3)).item()


@pytest.mark.compiles
@each_schedule
def test_one_graph_serves_every_step(make: Callable[[Any], Schedule]) -> None:
    torch.compiler.reset()
    schedule = make(torch.tensor(0.3))
    compiled = torch.compile(schedule, backend="aot_eager", fullgraph=True)
    for count in (0, 3, 11):
        with torch.compiler.set_stance("fail_on_recompile" if count else "default"):
            got: Tensor = compiled(torch.tensor(count))
        assert_trees_close(got, schedule(torch.tensor(count)), tolerance=1e-14)


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: schedules.constant(-1.0), ValueError, r"^constant: rate must be in \[0, inf\), got -1\.0\."),
    (lambda: schedules.constant("1"), TypeError, r"^constant: rate must be a number, got str\."),
    (lambda: schedules.linear(0.0, -1.0, 3), ValueError, r"^linear: end must be in \[0, inf\), got -1\.0\."),
    (lambda: schedules.linear(0.0, 1.0, 0), ValueError, r"^linear: steps must be at least 1, got 0\."),
    (lambda: schedules.linear(0.0, 1.0, 2.5), TypeError, r"^linear: steps must be an int, got float\."),
    (
        lambda: schedules.cosine(float("inf"), 3),
        ValueError,
        r"^cosine: peak must be in \[0, inf\), got inf\.",
    ),
    (lambda: schedules.cosine(1.0, 3, end=-1.0), ValueError, r"^cosine: end must be in"),
    (
        lambda: schedules.cosine(1.0, 3, warmup=-1),
        ValueError,
        r"^cosine: warmup must be at least 0, got -1\.",
    ),
    (
        lambda: schedules.cosine(1.0, 3, warmup=3),
        ValueError,
        r"^cosine: warmup must be below steps, got warmup=3",
    ),
    (lambda: schedules.warmup(0.1, 3), TypeError, r"^warmup: schedule must be a schedule, got float\. For a"),
    (
        lambda: schedules.warmup(schedules.constant(1.0), True),
        TypeError,
        r"^warmup: steps must be an int, got bool",
    ),
    (lambda: schedules.exponential(1.0, 0.0), ValueError, r"^exponential: decay must be positive, got 0\."),
    (
        lambda: schedules.exponential(1.0, 0.5, 0),
        ValueError,
        r"^exponential: every must be at least 1, got 0\.",
    ),
    (
        lambda: schedules.step(1.0, 0.5),
        ValueError,
        r"^step: expected either every or boundaries, got every=None",
    ),
    (
        lambda: schedules.step(1.0, 0.5, every=2, boundaries=[1]),
        ValueError,
        r"^step: expected either every or",
    ),
    (lambda: schedules.step(1.0, -0.5, every=2), ValueError, r"^step: factor must be in"),
    (
        lambda: schedules.step(1.0, 0.5, boundaries=[4, 2]),
        ValueError,
        r"^step: boundaries must rise, got \[4, 2\]",
    ),
    (
        lambda: schedules.step(1.0, 0.5, boundaries=[-1]),
        ValueError,
        r"^step: boundaries must be at least 0, got -1",
    ),
    (
        lambda: schedules.per_step([0.1]),
        TypeError,
        r"^per_step: rates must be a floating-point .* got list\.",
    ),
    (lambda: schedules.per_step(torch.tensor(0.1)), TypeError, r"^per_step: .* got torch.float64 \(\)\."),
    (
        lambda: schedules.per_step(torch.zeros(0)),
        TypeError,
        r"^per_step: .* with steps > 0, got torch.float64 \(0,\)",
    ),
]


@pytest.mark.parametrize("make, kind, text", WRONG)
def test_wrong_arguments_are_refused(make: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make()
