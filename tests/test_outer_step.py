"""The outer step, what it reports, and evaluation: meta_init, meta_step, meta_eval."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, case_named, each
from helpers import (
    assert_trees_close,
    assert_trees_differ,
    assert_trees_equal,
    copied,
    reordered,
    unstacked,
)
from problems import EAGER, LOSS, episodes, network, regression_tasks, squared_error
from reference import rules
from reference.loops import trajectory
from torch import Tensor

import fmeta
from fmeta import Batch, Plan, Task
from fmeta.adapt import from_loop

DESCENDING = [case for case in CASES if not case.name.startswith("reptile")]  # it does not see the query loss
ENGINES = (
    EAGER,
    Plan(engine="nested", compile=False),
    Plan(engine="autograd", tasks="loop", compile=False),
)
every_engine = pytest.mark.parametrize("plan", ENGINES, ids=[plan.engine for plan in ENGINES])


def test_the_outer_step_is_the_outer_update_of_the_meta_gradient() -> None:
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=2)
    outer = fmeta.adam(1e-2)
    state = fmeta.meta_init(algorithm, outer, network())
    want, opt_state = network(), outer.init(network())
    for index in range(3):
        tasks = reordered(regression_tasks(), [index, 0])
        grads, _ = fmeta.meta_grad(algorithm, EAGER)(want, tasks)
        updates, opt_state = outer.update(grads, opt_state, want)
        want = {name: value + updates[name] for name, value in want.items()}
        before = copied(state)
        after, metrics = fmeta.meta_step(algorithm, outer, EAGER)(state, tasks)
        assert_trees_equal(state, before)
        assert bool(metrics["finite"])
        assert metrics["first_bad"].tolist() == [-1, -1]
        state = after
    assert_trees_close(state.meta, want, 1e-12)
    assert_trees_close(state.opt_state, opt_state, 1e-12)
    assert int(state.step) == 3


@each(DESCENDING)
def test_outer_steps_lower_the_loss(case: Case) -> None:
    algorithm, meta, tasks = case.make()
    outer = fmeta.sgd(0.05)
    step = fmeta.meta_step(algorithm, outer, EAGER)
    state = fmeta.MetaState(meta, outer.init(meta), torch.zeros((), dtype=torch.int64))
    losses = []
    for _ in range(6):
        state, metrics = step(state, tasks)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0], losses


def test_meta_init_counts_from_zero_and_carries_nothing() -> None:
    params = network()
    state = fmeta.meta_init(fmeta.maml(LOSS, fmeta.sgd(0.2), steps=1), fmeta.sgd(0.1), params)
    assert_trees_equal(state.meta, params)
    assert state.carry == ()
    assert (state.step.dtype, state.step.shape, int(state.step)) == (torch.int64, (), 0)


# Divergence is data


def poisoned(tasks: Task, part: str, index: tuple[int, ...], value: float = torch.nan) -> Task:
    tasks = copied(tasks)
    getattr(tasks, part).x[index] = value
    return tasks


BAD = {
    "support": (False, "support", (1, 0, 0), [1, 0]),
    "second step's batch": (True, "support", (2, 1, 0, 0), [2, 1]),
    "query": (False, "query", (1, 0, 0), [1, 3]),
}
"""Where a NaN is put into three tasks with three inner steps, and what `first_bad` must say."""


@every_engine
@pytest.mark.parametrize(("per_step", "part", "index", "first_bad"), BAD.values(), ids=BAD)
def test_a_nan_leaves_the_state_unchanged_and_is_located(
    plan: Plan, per_step: bool, part: str, index: tuple[int, ...], first_bad: list[int]
) -> None:
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=3, batches="per_step" if per_step else "whole")
    outer = fmeta.adam(1e-2)
    state = fmeta.meta_init(algorithm, outer, network())
    tasks = poisoned(regression_tasks(3 if per_step else None), part, index)
    after, metrics = fmeta.meta_step(algorithm, outer, plan)(state, tasks)
    assert_trees_equal(after, state)
    assert not bool(metrics["finite"])
    assert (metrics["finite"].dtype, metrics["finite"].shape) == (torch.bool, ())
    assert (metrics["first_bad"].dtype, metrics["first_bad"].tolist()) == (torch.int64, first_bad)


@pytest.mark.parametrize("plan", [Plan(chunk_size=2, compile=False), Plan(remat=2, compile=False)])
def test_chunks_count_tasks_from_the_first(plan: Plan) -> None:
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=3)
    tasks = poisoned(regression_tasks(), "support", (2, 0, 0))
    _, metrics = fmeta.meta_grad(algorithm, plan)(network(), tasks)
    assert metrics["first_bad"].tolist() == [2, 0]


def test_an_inner_loop_that_explodes_says_where() -> None:
    """``w <- w - 1e200 w`` passes float64 at the second update."""

    def square(params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return 0.5 * batch.x.mean() * params["w"].square().sum(), {}

    ones = torch.ones(2, 1, dtype=torch.float64)
    tasks = Task(Batch(torch.stack([0 * ones[0], ones[0]]), ones), Batch(0 * ones, ones))
    algorithm = fmeta.maml(square, fmeta.sgd(1e200), steps=4)
    _, metrics = fmeta.meta_grad(algorithm, EAGER)({"w": torch.ones(1, dtype=torch.float64)}, tasks)
    assert metrics["first_bad"].tolist() == [1, 1]


@every_engine
def test_a_gradient_can_be_bad_where_every_loss_is_finite(plan: Plan) -> None:
    """The slope of a square root at zero is infinite, its value is 0."""

    def root(params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.sqrt(params["w"].square().sum()) * batch.x.mean(), {}

    meta, outer = {"w": torch.zeros(2, dtype=torch.float64)}, fmeta.sgd(0.1)
    algorithm = fmeta.maml(root, fmeta.sgd(0.1), steps=0)
    state = fmeta.meta_init(algorithm, outer, meta)
    after, metrics = fmeta.meta_step(algorithm, outer, plan)(state, regression_tasks())
    assert_trees_equal(after, state)
    assert not bool(metrics["finite"])
    assert metrics["first_bad"].tolist() == [-1, -1]


def test_the_state_survives_a_bad_step() -> None:
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=2)
    outer = fmeta.adam(1e-2)
    step = fmeta.meta_step(algorithm, outer, EAGER)
    good, start = regression_tasks(), fmeta.meta_init(algorithm, outer, network())
    skipped, _ = step(start, poisoned(good, "support", (0, 0, 0)))
    assert_trees_equal(step(skipped, good), step(start, good))


# Metrics


def test_classification_reports_accuracy() -> None:
    algorithm, meta, tasks = case_named("maml convolution").make()
    _, metrics = fmeta.meta_grad(algorithm, EAGER)(meta, tasks)
    right = []
    for task in unstacked(tasks):
        scores = algorithm.predict(meta, task.support, task.query.x)
        right.append((scores.argmax(1) == task.query.y).double().mean())
    assert_trees_close(metrics["accuracy"].double(), torch.stack(right).mean(), 1e-6)
    per_task = fmeta.meta_eval(algorithm, EAGER)(meta, tasks)
    assert_trees_close(per_task["accuracy"].double(), torch.stack(right), 1e-6)


def test_predictions_take_an_adapted_in_place_of_the_support_set() -> None:
    algorithm, meta, tasks = case_named("maml convolution").make()
    task = unstacked(tasks)[0]
    adapted = algorithm.adapt(meta, task.support)
    want = algorithm.predict(meta, task.support, task.query.x)
    assert_trees_equal(algorithm.predict(meta, adapted, task.query.x), want)


def test_metrics_of_the_loss_are_averaged_over_tasks() -> None:
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=2)
    _, metrics = fmeta.meta_grad(algorithm, EAGER)(network(), regression_tasks())
    assert_trees_close(metrics["double"], 2 * metrics["loss"], 1e-12)
    assert metrics["double"].shape == ()


@every_engine
def test_evaluation_after_chosen_numbers_of_steps(plan: Plan) -> None:
    """Beyond the trained steps too; the reference is the plain loop."""
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2, momentum=0.5), steps=2)
    got = fmeta.meta_eval(algorithm, plan, steps=[0, 1, 3, 5])(network(), regression_tasks())["loss"]
    want = []
    for support, query in episodes(regression_tasks()):
        start = {name: value.requires_grad_() for name, value in network().items()}
        path = trajectory(squared_error, start, support, rules.sgd(0.2, 0.5), 5)
        want.append(torch.stack([squared_error(path[k], query) for k in (0, 1, 3, 5)]).detach())
    assert_trees_close(got, torch.stack(want), 1e-12)


def test_the_last_learned_rate_repeats_beyond_the_trained_steps() -> None:
    algorithm, meta, tasks = case_named("custom learned rates and decay").make()
    got = fmeta.meta_eval(algorithm, EAGER, steps=[4])(meta, tasks)["loss"][:, 0]
    longer = algorithm.inner_loop._replace(steps=4)
    repeated = {**meta, "rates": {n: torch.cat([r, r[-1:]]) for n, r in meta["rates"].items()}}
    again = from_loop(algorithm.init, longer, algorithm.predict)
    want = torch.stack([again.loss(repeated, task)[0] for task in unstacked(tasks)])
    assert_trees_close(got, want, 1e-12)


def test_default_evaluation_is_at_the_trained_steps() -> None:
    algorithm, meta, tasks = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=2), network(), regression_tasks()
    at_end = fmeta.meta_eval(algorithm, EAGER)(meta, tasks)["loss"]
    listed = fmeta.meta_eval(algorithm, EAGER, steps=[0, 2])(meta, tasks)["loss"]
    assert_trees_equal(at_end, listed[:, 1])
    assert_trees_equal(fmeta.meta_eval(algorithm, EAGER, steps=0)(meta, tasks)["loss"], listed[:, 0])
    assert_trees_differ(listed[:, 0], listed[:, 1])
    assert_trees_close(at_end.mean(), fmeta.meta_grad(algorithm, EAGER)(meta, tasks)[1]["loss"], 1e-12)
