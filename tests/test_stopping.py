"""Tasks that stop adapting by their own support loss: against a loop with ``break``, on every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_trees_close, assert_trees_equal, unstacked
from problems import EAGER, LOSS, episodes, network, regression_tasks, squared_error
from reference import rules, stopping
from reference.loops import meta_gradient
from torch import Tensor

import fmeta
from fmeta import Plan, Task

STEPS = 6
RATE = 0.2
CONDITIONS: list[dict[str, Any]] = [
    {"below": 0.9},
    {"patience": 2, "min_delta": 0.08},
    {"below": 0.7, "patience": 1, "min_delta": 0.05},
]
PLANS = {
    "adjoint": EAGER,
    "nested": Plan(engine="nested", compile=False),
    "remat": Plan(compile=False, remat=2),
    "autograd": Plan(engine="autograd", tasks="loop"),
}


def tasks() -> Task:
    """Targets of different sizes, so that the support losses are far apart."""
    plain = regression_tasks()
    size = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)[:, None, None]
    return Task(*(part._replace(y=part.y * size) for part in plain))


def algorithm(inner: fmeta.Transform | None = None, **when: Any) -> fmeta.Algorithm:
    return fmeta.early_stopping(fmeta.maml(LOSS, inner or fmeta.sgd(RATE), steps=STEPS), **when)


def taken(rule: rules.Rule, **when: Any) -> list[int]:
    """Updates of each task by the reference."""
    start = {name: p.requires_grad_() for name, p in network().items()}
    return [
        len(stopping.stopped(squared_error, rule, start, e[0], STEPS, **when)) - 1 for e in episodes(tasks())
    ]


@pytest.mark.parametrize("when", CONDITIONS)
def test_each_task_stops_where_a_loop_breaks(when: dict[str, Any]) -> None:
    expected = taken(rules.sgd(RATE), **when)
    assert len(set(expected)) > 1 and min(expected) < STEPS, f"not a test: all take {expected}"
    measured = fmeta.meta_eval(algorithm(**when), EAGER)(network(), tasks())
    assert measured["steps"].tolist() == expected
    for task, episode in zip(unstacked(tasks()), episodes(tasks()), strict=True):
        adapted = algorithm(**when).adapt(network(), task.support)
        start = {name: p.requires_grad_() for name, p in network().items()}
        end = stopping.stopped(squared_error, rules.sgd(RATE), start, episode[0], STEPS, **when)[-1]
        assert_trees_close(adapted.params, {name: p.detach() for name, p in end.items()})
        assert adapted.losses.shape == (STEPS,)


@pytest.mark.parametrize("engine", PLANS)
@pytest.mark.parametrize("when", CONDITIONS)
def test_the_meta_gradient_is_that_of_the_updates_taken(when: dict[str, Any], engine: str) -> None:
    grads, metrics = fmeta.meta_grad(algorithm(**when), PLANS[engine])(network(), tasks())
    expected, value = meta_gradient(
        stopping.maml(squared_error, rules.sgd(RATE), STEPS, **when), network(), episodes(tasks())
    )
    assert_trees_close(grads, expected, tolerance=1e-9)
    torch.testing.assert_close(metrics["loss"], value)


def test_an_optimiser_with_momentum_stands_still_too() -> None:
    inner = fmeta.adam(0.1)
    loop = algorithm(inner, below=0.9)
    counts: list[int] = []
    for task in unstacked(tasks()):
        count = int(fmeta.meta_eval(loop, EAGER)(network(), stacked(task))["steps"])
        short = fmeta.maml(LOSS, inner, steps=count).adapt(network(), task.support)
        stopped = loop.adapt(network(), task.support)
        assert_trees_close(stopped.params, short.params, tolerance=1e-12)
        assert_trees_close(stopped.opt_state, short.opt_state, tolerance=1e-12)
        counts.append(count)
    assert min(counts) < STEPS, f"not a test: no task stopped, {counts}"


def stacked(task: Task) -> Task:
    return Task(*(fmeta.Batch(part.x[None], part.y[None]) for part in task))


def test_without_a_reason_to_stop_it_is_the_algorithm() -> None:
    plain = fmeta.maml(LOSS, fmeta.sgd(RATE), steps=STEPS)
    a, _ = fmeta.meta_grad(algorithm(below=0.0), EAGER)(network(), tasks())
    b, _ = fmeta.meta_grad(plain, EAGER)(network(), tasks())
    assert_trees_close(a, b, tolerance=1e-12)


def test_predictions_take_the_support_set_or_what_came_of_it() -> None:
    apply, params = fmeta.functionalize(fmeta.models.mlp([2, 4, 3]).double())
    stopping_maml = fmeta.early_stopping(
        fmeta.maml(fmeta.losses.mse(apply), fmeta.sgd(0.1), steps=3), below=0.5
    )
    task = unstacked(tasks())[0]
    adapted = stopping_maml.adapt(params, task.support)
    assert_trees_equal(
        stopping_maml.predict(params, adapted, task.query.x),
        stopping_maml.predict(params, task.support, task.query.x),
    )


def test_it_trains() -> None:
    apply, params = fmeta.functionalize(fmeta.models.mlp([1, 8, 1]))
    loop = fmeta.early_stopping(fmeta.maml(fmeta.losses.mse(apply), fmeta.sgd(0.05), steps=3), patience=1)
    outer, sampler = fmeta.adam(1e-2), fmeta.tasks.sinusoid(tasks=4, shots=5, queries=5)
    state, step = fmeta.meta_init(loop, outer, params), fmeta.meta_step(loop, outer, EAGER)
    for i in range(3):
        state, metrics = step(state, sampler(0, i))
    assert int(state.step) == 3 and bool(metrics["finite"]) and 0 < float(metrics["steps"]) <= 3


@pytest.mark.compiles
def test_compiled_it_is_the_same() -> None:
    apply, params = fmeta.functionalize(fmeta.models.mlp([1, 8, 1]))
    loop = fmeta.early_stopping(
        fmeta.maml(fmeta.losses.mse(apply), fmeta.sgd(0.05), steps=3), below=1.0, patience=2
    )
    batch = fmeta.tasks.sinusoid(tasks=4, shots=5, queries=5)(0, 0)
    plain, expected = fmeta.meta_grad(loop, EAGER)(params, batch)
    found, metrics = fmeta.meta_grad(loop, Plan(compile=True))(params, batch)
    assert_trees_close(found, plain, tolerance=1e-4)
    assert torch.equal(metrics["steps"], expected["steps"]) and 0 < float(metrics["steps"]) < 3


def nothing(params: Any, batch: Any) -> Tensor:
    return params["w"].sum()


@pytest.mark.parametrize(
    ("steps", "when", "said"),
    [
        (1, {}, "early_stopping: below or patience must say"),
        (1, {"below": -1.0}, "early_stopping: below must be in"),
        (1, {"patience": 0}, "early_stopping: patience must be a positive int or None, got 0"),
        (1, {"below": 1.0, "min_delta": -1.0}, "early_stopping: min_delta must be in"),
        (0, {"below": 1.0}, "early_stopping: algorithm must take inner steps, got one of 0"),
    ],
)
def test_what_cannot_be_is_refused(steps: int, when: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fmeta.early_stopping(fmeta.maml(nothing, fmeta.sgd(0.1), steps=steps), **when)  # type: ignore[arg-type]
