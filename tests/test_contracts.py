"""What holds for every algorithm however it is run: mapping, purity, dtypes, and the outer step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case, case_named, each
from helpers import (
    assert_same_form,
    assert_trees_close,
    assert_trees_equal,
    cast,
    copied,
    flat,
    reordered,
    unstacked,
)
from problems import EAGER, LOSS, TASKS, Problem, network, regression_tasks
from torch import Tensor
from torch.utils import _pytree as pytree

import fmeta
from fmeta import Batch, Plan, Task

every_case = each(CASES)
LONG = [case for case in CASES if case.make().algorithm.inner_loop.steps > 2]


def run(problem: Problem, **plan: Any) -> tuple[Any, dict[str, Tensor]]:
    return fmeta.meta_grad(problem.algorithm, Plan(compile=False, **plan))(problem.meta, problem.tasks)


# The record


@every_case
def test_it_is_the_record(case: Case) -> None:
    algorithm = case.make().algorithm
    assert isinstance(algorithm, fmeta.Algorithm)
    assert isinstance(algorithm.inner_loop, fmeta.InnerLoop)
    assert all(
        callable(part) for part in (algorithm.init, algorithm.adapt, algorithm.loss, algorithm.predict)
    )


@every_case
def test_adaptation_returns_one_loss_a_step(case: Case) -> None:
    algorithm, meta, tasks = case.make()
    task = unstacked(tasks)[0]
    adapted = algorithm.adapt(meta, task.support)
    assert adapted.losses.shape == (algorithm.inner_loop.steps,)
    value, metrics = algorithm.loss(meta, task)
    assert value.shape == ()
    assert all(metric.shape == () for metric in metrics.values())


# The same numbers, however the tasks are taken


@every_case
def test_a_loop_over_tasks_is_the_mapped_run(case: Case) -> None:
    problem = case.make()
    want, metrics = run(problem)
    for engine in ("adjoint", "nested"):
        got, other = run(problem, tasks="loop", engine=engine)
        assert_trees_close(got, want, 1e-10)
        assert_trees_close(other, metrics, 1e-10)


@pytest.mark.parametrize("chunk_size", [1, 2])
@every_case
def test_chunks_are_the_whole(case: Case, chunk_size: int | str) -> None:
    """Three tasks: chunks of 2 leave an incomplete one."""
    problem = case.make()
    want, metrics = run(problem)
    got, other = run(problem, chunk_size=chunk_size)
    assert_trees_close(got, want, 1e-10)
    assert_trees_close(other, metrics, 1e-10)


@pytest.mark.parametrize("chunk_size", [3, 5, "auto"])
def test_one_chunk_is_the_whole_bit_for_bit(chunk_size: int | str) -> None:
    problem = case_named("maml 3 steps").make()
    assert_trees_equal(run(problem, chunk_size=chunk_size), run(problem))


@pytest.mark.parametrize("remat", [1, 2, 3])
@each(LONG)
def test_recomputed_blocks_are_the_kept_carries(case: Case, remat: int) -> None:
    problem = case.make()
    want, metrics = run(problem)
    got, other = run(problem, remat=remat)
    assert_trees_close(got, want, 1e-12)
    assert_trees_close(other, metrics, 1e-12)


@every_case
def test_the_order_of_tasks_does_not_matter(case: Case) -> None:
    algorithm, meta, tasks = case.make()
    want, _ = run(Problem(algorithm, meta, tasks))
    got, _ = run(Problem(algorithm, meta, reordered(tasks, [2, 0, 1])))
    assert_trees_close(got, want, 1e-10)


@every_case
def test_evaluation_permutes_with_the_tasks(case: Case) -> None:
    algorithm, meta, tasks = case.make()
    evaluate = fmeta.meta_eval(algorithm, EAGER)
    want, got = evaluate(meta, tasks), evaluate(meta, reordered(tasks, [2, 0, 1]))
    assert {value.shape for value in want.values()} == {(TASKS,)}
    for name, value in want.items():
        assert_trees_close(got[name], value[[2, 0, 1]], 1e-12)


@every_case
def test_evaluation_is_the_same_in_chunks_and_loops(case: Case) -> None:
    algorithm, meta, tasks = case.make()
    want = fmeta.meta_eval(algorithm, EAGER)(meta, tasks)
    for plan in (
        Plan(chunk_size=2, compile=False),
        Plan(tasks="loop", compile=False),
        Plan(engine="nested", compile=False),
        Plan(engine="autograd", tasks="loop", compile=False),
    ):
        assert_trees_close(fmeta.meta_eval(algorithm, plan)(meta, tasks), want, 1e-10)


def test_tasks_of_different_shapes_run_one_by_one() -> None:
    task = unstacked(regression_tasks())[0]
    small = Task(Batch(task.support.x[:2], task.support.y[:2]), Batch(task.query.x[:3], task.query.y[:3]))
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=2)
    for engine in ("adjoint", "nested", "autograd"):
        step = fmeta.meta_grad(algorithm, Plan(engine=engine, tasks="loop", compile=False))
        grads, metrics = step(network(), [task, small])
        alone = [step(network(), [one]) for one in (task, small)]
        assert_trees_close(grads, pytree.tree_map(lambda a, b: (a + b) / 2, alone[0][0], alone[1][0]), 1e-12)
        assert_trees_close(metrics["loss"], (alone[0][1]["loss"] + alone[1][1]["loss"]) / 2, 1e-12)


# Purity


@pytest.mark.parametrize("engine", ["adjoint", "nested"])
@every_case
def test_inputs_are_not_changed_and_runs_repeat_exactly(case: Case, engine: str) -> None:
    algorithm, meta, tasks = case.make()
    before = copied((meta, tasks))
    function = fmeta.meta_grad(algorithm, Plan(engine=engine, compile=False))
    first, second = function(meta, tasks), function(meta, tasks)
    assert_trees_equal((meta, tasks), before)
    assert_trees_equal(first, second)
    leaves = pytree.tree_leaves(first)
    assert not any(leaf.requires_grad for leaf in leaves)
    given = {leaf.data_ptr() for leaf in pytree.tree_leaves((meta, tasks)) if leaf.numel()}
    assert not any(leaf.data_ptr() in given for leaf in leaves), "an output shares memory with an input"


def test_parameters_that_require_grad_collect_none() -> None:
    meta = {name: value.requires_grad_() for name, value in network().items()}
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=2)
    with_flags, _ = fmeta.meta_grad(algorithm, EAGER)(meta, regression_tasks())
    without, _ = fmeta.meta_grad(algorithm, EAGER)(network(), regression_tasks())
    assert_trees_equal(pytree.tree_map(torch.Tensor.detach, with_flags), without)
    assert all(value.grad is None for value in meta.values())


# dtypes


ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.2}
"""How far a meta-gradient may be from that in float64, relative to its largest number."""


@pytest.mark.parametrize("dtype", ROUNDING)
@every_case
def test_dtypes_are_kept(case: Case, dtype: torch.dtype) -> None:
    algorithm, meta, tasks = case.make()
    exact, _ = run(Problem(algorithm, meta, tasks))
    meta, tasks = cast((meta, tasks), dtype)
    grads, metrics = run(Problem(algorithm, meta, tasks))
    assert_same_form(grads, meta)
    assert metrics["loss"].is_floating_point()
    assert_trees_close(flat(grads), flat(exact), ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING)
def test_two_outer_steps_keep_the_form_of_the_state(dtype: torch.dtype) -> None:
    algorithm = fmeta.metasgd(LOSS, steps=2, lr=0.1)
    outer = fmeta.adam(1e-2)
    start = fmeta.meta_init(algorithm, outer, cast(network(), dtype))
    step = fmeta.meta_step(algorithm, outer, EAGER)
    first, _ = step(start, cast(regression_tasks(), dtype))
    second, _ = step(first, cast(regression_tasks(), dtype))
    for state in (first, second):
        assert_same_form(state, start)
    assert (int(start.step), int(first.step), int(second.step)) == (0, 1, 2)
