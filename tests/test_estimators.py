"""Estimators of gradients of a long process: bias and variance where the truth is known in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_trees_close, assert_trees_equal
from torch import Tensor

import fmeta
from fmeta.types import System

EAGER = fmeta.Plan(compile=False)
WIDTH, POSITIVE, STEPS = 23, 10, 40
MIX = 0.5 * torch.eye(WIDTH, dtype=torch.float64) + 0.5 * torch.diag(
    torch.ones(WIDTH - 1, dtype=torch.float64), 1
)
SIGNS = torch.cat([torch.ones(POSITIVE), -torch.ones(WIDTH - POSITIVE)]).double()


def balance(theta: Tensor, x: Tensor, task: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Influence balancing (Tallec and Ollivier, 2017): theta helps at once and harms later."""
    x = MIX @ x + theta * SIGNS
    return x, 0.5 * (x[0] - 1) ** 2


BALANCING = System(lambda theta, task: task, balance, STEPS)


def true_gradient(theta: Tensor) -> Tensor:
    theta = theta.clone().requires_grad_()
    x, total = torch.zeros(WIDTH, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t in range(STEPS):
        x, loss = balance(theta, x, x, torch.tensor(t))
        total = total + loss / STEPS
    return torch.autograd.grad(total, theta)[0]


def courses(estimator: fmeta.Estimator, theta: Tensor, tasks: int, seed: int = 0) -> Tensor:
    """The mean gradient over the windows of a whole course."""
    found = fmeta.estimate(BALANCING, estimator, EAGER)
    start = torch.zeros(tasks, WIDTH, dtype=torch.float64)
    carry, total = found.begin(theta, start), torch.zeros((), dtype=torch.float64)
    windows = STEPS // (estimator.truncation or STEPS)
    if estimator.truncation:
        carry = carry._replace(end=torch.full_like(carry.end, STEPS))
    for window in range(windows):
        grads, carry, metrics = found(theta, carry, start, 100 * seed + window)
        assert metrics["finite"]
        total = total + grads / windows
    return total


THETA = torch.tensor(0.5, dtype=torch.float64)


@pytest.mark.parametrize("estimator", [fmeta.bptt(), fmeta.forward_mode(), fmeta.forward_mode(5)])
def test_exact_estimators_give_the_gradient(estimator: fmeta.Estimator) -> None:
    assert_trees_close(courses(estimator, THETA, 2), true_gradient(THETA))


@pytest.mark.parametrize("truncation", [1, 5])
def test_truncation_is_biased(truncation: int) -> None:
    found, truth = courses(fmeta.bptt(truncation), THETA, 2), true_gradient(THETA)
    assert found < 0.5 * truth


@pytest.mark.parametrize("truncation", [1, 5, STEPS])
def test_pes_is_unbiased(truncation: int) -> None:
    found = torch.stack(
        [courses(fmeta.pes(0.01, truncation=truncation), THETA, 100, seed) for seed in range(12)]
    )
    error = 3.5 * found.std() / len(found) ** 0.5
    truth = true_gradient(THETA)
    assert (found.mean() - truth).abs() < error
    assert error < 0.25 * truth  # the truncated gradient is further off than this


def test_es_is_unbiased() -> None:
    found = torch.stack([courses(fmeta.es(0.01), THETA, 100, seed) for seed in range(12)])
    error = 3.5 * found.std() / 12**0.5
    assert (found.mean() - true_gradient(THETA)).abs() < error < 0.25 * true_gradient(THETA)


@pytest.mark.parametrize("kind", ["es", "pes"])
def test_variance_falls_as_one_over_the_pairs(kind: str) -> None:
    def spread(pairs: int) -> float:
        one = fmeta.es(0.01, pairs=pairs) if kind == "es" else fmeta.pes(0.01, truncation=10, pairs=pairs)
        return torch.stack([courses(one, THETA, 1, seed) for seed in range(250)]).var().item()

    few, many = (spread(pairs) for pairs in (2, 16))
    assert few / many == pytest.approx(8, rel=0.45)


def nonlinear(theta: Any, state: Any, task: Tensor, t: Tensor) -> tuple[Any, Tensor]:
    x = torch.tanh(theta["a"] @ state["x"] + task) * theta["b"] + 0.1 * t.to(task.dtype)
    return {"x": x, "count": state["count"] + 1}, (x**2).mean()


def make_nonlinear(steps: int = 6) -> System:
    start = lambda theta, task: {"x": theta["b"] * task, "count": torch.zeros((), dtype=torch.int64)}  # noqa: E731
    return System(start, nonlinear, steps)


def problem(tasks: int = 3) -> tuple[Any, Tensor]:
    theta = {
        "a": 0.5 * torch.randn(4, 4, dtype=torch.float64),
        "b": 1 + 0.1 * torch.randn(4, dtype=torch.float64),
    }
    return theta, torch.randn(tasks, 4, dtype=torch.float64)


def by_loop(system: System, theta: Any, tasks: Tensor) -> Any:
    theta = {name: value.clone().requires_grad_() for name, value in theta.items()}
    total: Any = 0.0
    for task in tasks:
        state = system.start(theta, task)
        for t in range(system.steps):
            state, loss = system.step(theta, state, task, torch.tensor(t))
            total = total + loss / (system.steps * len(tasks))
    return dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True))


@pytest.mark.parametrize("plan", [EAGER, pytest.param(fmeta.Plan(compile=True), marks=pytest.mark.compiles)])
@pytest.mark.parametrize("name", ["bptt", "forward_mode"])
def test_a_system_with_counters_and_a_start_of_its_own(name: str, plan: fmeta.Plan) -> None:
    theta, tasks = problem()
    system = make_nonlinear()
    found = fmeta.estimate(system, getattr(fmeta, name)(), plan)
    grads, _, metrics = found(theta, found.begin(theta, tasks), tasks)
    assert_trees_close(grads, by_loop(system, theta, tasks))
    assert metrics["over"] == 1


def test_tasks_of_different_lengths() -> None:
    theta, tasks = problem(4)
    lengths = torch.tensor([1, 2, 3, 6])
    system = make_nonlinear()._replace(
        start=lambda theta, task: make_nonlinear().start(theta, task[1]),
        step=lambda theta, state, task, t: nonlinear(theta, state, task[1], t),
        length=lambda task: task[0],
    )
    found = fmeta.estimate(system, fmeta.bptt(), EAGER)
    grads, _, _ = found(theta, (), (lengths, tasks))
    parts = [by_loop(make_nonlinear(int(n)), theta, tasks[i : i + 1]) for i, n in enumerate(lengths)]
    for name in theta:
        rows = [int(n) / 6 * part[name] for n, part in zip(lengths, parts, strict=True)]
        assert_trees_close(grads[name], torch.stack(rows).mean(0))


def test_courses_that_ended_make_room_for_new_tasks() -> None:
    theta, tasks = problem(4)
    found = fmeta.estimate(make_nonlinear(6), fmeta.bptt(3), EAGER)
    carry = found.begin(theta, tasks)._replace(end=torch.tensor([3, 6, 6, 2]))
    new = torch.zeros_like(tasks)
    _, after, metrics = found(theta, carry, new)
    assert after.t.tolist() == [0, 3, 3, 0]
    assert after.end.tolist() == [6, 6, 6, 6]
    assert_trees_equal(after.tasks, torch.stack([new[0], tasks[1], tasks[2], new[3]]))
    assert metrics["over"] == 0.5


@pytest.mark.parametrize("estimator", [fmeta.bptt(3), fmeta.pes(0.05, truncation=3), fmeta.es(0.05, pairs=2)])
def test_an_outer_step_learns_and_repeats(estimator: fmeta.Estimator) -> None:
    theta, tasks = problem(8)
    system, outer = make_nonlinear(), fmeta.adam(0.02)
    step = fmeta.estimate_step(system, estimator, outer, EAGER, each=fmeta.unit_norm)

    def trained(steps: int) -> Any:
        state = fmeta.estimate_init(system, estimator, outer, theta, tasks)
        losses = []
        for i in range(steps):
            state, metrics = step(state, tasks, i)
            losses.append(metrics["loss"])
        return state, torch.stack(losses)

    (state, losses), (again, _) = trained(60), trained(60)
    assert losses[-10:].mean() < 0.8 * losses[:10].mean()
    assert_trees_equal(state, again)


def test_a_step_that_is_not_finite_changes_no_weights() -> None:
    theta, tasks = problem(4)
    outer = fmeta.adam(0.1)
    step = fmeta.estimate_step(make_nonlinear(), fmeta.bptt(3), outer, EAGER)
    state, _ = step(fmeta.estimate_init(make_nonlinear(), fmeta.bptt(3), outer, theta, tasks), tasks, 0)
    broken = state._replace(carry=state.carry._replace(tasks=tasks * torch.nan))
    after, metrics = step(broken, tasks, 1)
    assert not metrics["finite"]
    assert_trees_equal(after.meta, state.meta)
    assert_trees_equal(after.opt_state, state.opt_state)
    assert_trees_equal(after.carry.tasks, tasks)


@pytest.mark.parametrize("name", ["bptt", "forward_mode"])
def test_what_comes_after_the_end_has_no_say(name: str) -> None:
    """The step has no derivative there."""
    root = lambda theta, x, task, t: (x + theta * (task - t).sqrt(), x**2)  # noqa: E731
    system = System(lambda theta, task: torch.zeros_like(task), root, 4, lambda task: task.long())
    tasks = torch.tensor([4.0, 2.0], dtype=torch.float64)
    grads, _, metrics = fmeta.estimate(system, getattr(fmeta, name)(), EAGER)(THETA, (), tasks)
    # x = theta * (0, 2, 2 + sqrt 3, 2 + sqrt 3 + sqrt 2) and theta * (0, sqrt 2)
    squares = 4 + (2 + 3**0.5) ** 2 + (2 + 3**0.5 + 2**0.5) ** 2 + 2
    assert metrics["finite"]
    assert_trees_close(grads, torch.tensor(2 * 0.5 * squares / 8, dtype=torch.float64))


def test_the_type_of_theta_is_kept() -> None:
    theta = {"a": torch.tensor(0.5), "b": torch.tensor(0.5, dtype=torch.float64)}
    step = lambda theta, x, task, t: (x + theta["a"] * theta["b"], (x + theta["a"] - 1) ** 2)  # noqa: E731
    system = System(lambda theta, task: task, step, 3)
    for estimator in (fmeta.bptt(), fmeta.forward_mode()):
        grads, _, _ = fmeta.estimate(system, estimator, EAGER)(theta, (), torch.zeros(2, dtype=torch.float64))
        assert {name: g.dtype for name, g in grads.items()} == {name: x.dtype for name, x in theta.items()}


def test_what_estimate_refuses() -> None:
    theta, tasks = problem()
    with pytest.raises(ValueError, match=r"^estimate: pes needs a seed, another one at every call"):
        found = fmeta.estimate(make_nonlinear(), fmeta.pes(truncation=3), EAGER)
        found(theta, found.begin(theta, tasks), tasks)
    with pytest.raises(TypeError, match=r"^estimate: theta must hold floating-point tensors"):
        fmeta.estimate(make_nonlinear(), fmeta.bptt(), EAGER)({**theta, "n": torch.tensor(3)}, (), tasks)
    wide = make_nonlinear()._replace(step=lambda *args: (nonlinear(*args)[0], args[1]["x"]))
    with pytest.raises(
        ValueError, match=r"^estimate: the loss of a step must be a floating-point scalar, got shape"
    ):
        fmeta.estimate(wide, fmeta.bptt(), EAGER)(theta, (), tasks)


def test_unit_norm() -> None:
    grads = {
        "a": torch.tensor([[3.0, 0.0], [0.0, 0.0], [torch.inf, 1.0]]),
        "b": torch.tensor([4.0, 0.0, 1.0]),
    }
    got = fmeta.unit_norm(grads)
    assert_trees_close(
        got, {"a": torch.tensor([[0.6, 0.0], [0.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([0.8, 0.0, 0.0])}
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fmeta.bptt(0), r"^bptt: truncation must be a positive int"),
        (lambda: fmeta.es(0.0), r"^es: std must be above 0"),
        (lambda: fmeta.es(0.1, pairs=0), r"^es: pairs must be a positive int"),
        (lambda: fmeta.pes(0.1, truncation=2.5), r"^pes: truncation must be a positive int"),  # type: ignore[arg-type]
    ],
)
def test_estimators_check_their_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_carry_comes_from_begin() -> None:
    theta, tasks = problem()
    with pytest.raises(TypeError, match=r"^estimate: carry must be what begin"):
        fmeta.estimate(make_nonlinear(), fmeta.bptt(2), EAGER)(theta, (), tasks)
