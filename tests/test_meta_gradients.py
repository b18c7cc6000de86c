"""Every meta-gradient of the case table against its definition, finite differences and the other engines."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import CASES, NAMES, Case, each
from helpers import (
    assert_trees_close,
    assert_trees_differ,
    inner_product,
    relative_difference,
    unstacked,
)
from problems import (
    LOSS,
    Problem,
    episodes,
    log_cosh_error,
    network,
    regression_tasks,
    squared_error,
    with_metrics,
)
from reference.differences import directional_derivative, random_direction
from torch import Tensor
from torch.utils import _pytree as pytree

import fmeta
from fmeta import Batch, Plan, Task

exact_cases = each([case for case in CASES if case.exact])
every_case = each(CASES)


def meta_gradient(problem: Problem, **plan: Any) -> tuple[Any, dict[str, Tensor]]:
    """Uncompiled, as most tests need it."""
    return fmeta.meta_grad(problem.algorithm, Plan(compile=False, **plan))(problem.meta, problem.tasks)


def of_network(algorithm: fmeta.Algorithm, tasks: Task | None = None, meta: Any = None) -> Any:
    problem = Problem(algorithm, network() if meta is None else meta, tasks or regression_tasks())
    return meta_gradient(problem)[0]


def mean_objective(problem: Problem, meta: Any) -> Tensor:
    """The mean of ``Algorithm.loss``, with one call a task."""
    losses = [problem.algorithm.loss(meta, task)[0] for task in unstacked(problem.tasks)]
    return torch.stack(losses).mean()


def test_every_algorithm_has_a_row() -> None:
    covered = {name.split()[0] for name in NAMES} | {"few_shot_detection"}  # tests/test_detection.py
    assert set(fmeta.algorithms.__all__) <= covered, "add a row to tests/cases.py"
    assert len(set(NAMES)) == len(NAMES)


@every_case
def test_meta_gradient_is_its_written_definition(case: Case) -> None:
    problem = case.make()
    want, value = case.reference(problem.meta, episodes(problem.tasks))
    got, metrics = meta_gradient(problem)
    assert_trees_close(got, want, case.tolerance)
    assert_trees_close(metrics["loss"], value, case.tolerance)


@every_case
def test_nested_and_adjoint_agree(case: Case) -> None:
    problem = case.make()
    want, metrics = meta_gradient(problem, engine="nested")
    got, other = meta_gradient(problem, engine="adjoint")
    assert_trees_close(got, want, 1e-10)
    assert_trees_close(other["loss"], metrics["loss"], 1e-12)


@every_case
def test_autograd_and_nested_agree(case: Case) -> None:
    problem = case.make()
    want, _ = meta_gradient(problem, engine="nested")
    got, _ = meta_gradient(problem, engine="autograd", tasks="loop")
    assert_trees_close(got, want, 1e-10)


@exact_cases
def test_exact_rules_match_finite_differences(case: Case) -> None:
    problem = case.make()
    direction = random_direction(problem.meta, seed=1)
    want = directional_derivative(lambda meta: mean_objective(problem, meta), problem.meta, direction)
    got = inner_product(meta_gradient(problem)[0], direction)
    assert relative_difference(got, want) <= 1e-6


# Identities


def test_anil_that_adapts_everything_is_maml() -> None:
    anil = fmeta.anil(LOSS, fmeta.sgd(0.2), steps=3, adapts="*")
    assert_trees_close(of_network(anil), of_network(fmeta.maml(LOSS, fmeta.sgd(0.2), steps=3)), 1e-12)


@pytest.mark.parametrize("last", [3, 5])
def test_truncation_beyond_the_loop_is_the_exact_gradient(last: int) -> None:
    inner = fmeta.sgd(0.2, momentum=0.5)
    truncated = fmeta.maml(LOSS, inner, steps=3, adjoint=fmeta.truncated(last))
    assert_trees_close(of_network(truncated), of_network(fmeta.maml(LOSS, inner, steps=3)), 1e-12)


def test_truncation_to_nothing_is_first_order() -> None:
    inner = fmeta.adam(0.1)
    truncated = fmeta.maml(LOSS, inner, steps=3, adjoint=fmeta.truncated(0))
    first_order = fmeta.maml(LOSS, inner, steps=3, adjoint=fmeta.first_order())
    assert_trees_close(of_network(truncated), of_network(first_order), 1e-12)


def test_the_gradient_rules_differ() -> None:
    rules = [fmeta.first_order(), fmeta.truncated(1), fmeta.truncated(2), fmeta.unroll()]
    grads = [of_network(fmeta.maml(LOSS, fmeta.sgd(0.2), steps=3, adjoint=rule)) for rule in rules]
    for one, other in pairwise(grads):
        assert_trees_differ(one, other, 1e-4)


def test_first_order_is_the_mean_query_gradient_at_the_adapted_parameters() -> None:
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=3, adjoint=fmeta.first_order())
    grads = []
    for task in unstacked(regression_tasks()):
        adapted = algorithm.adapt(network(), task.support).params
        grads.append(torch.func.grad(lambda p, query=task.query: squared_error(p, tuple(query)))(adapted))
    mean = pytree.tree_map(lambda *leaves: torch.stack(leaves).mean(0), *grads)
    assert_trees_close(of_network(algorithm), mean, 1e-12)


def test_metasgd_at_a_constant_rate_has_the_gradient_of_maml() -> None:
    metasgd = fmeta.metasgd(LOSS, steps=3, lr=0.2)
    grads = of_network(metasgd, meta=metasgd.init(network()))
    assert_trees_close(grads["params"], of_network(fmeta.maml(LOSS, fmeta.sgd(0.2), steps=3)), 1e-12)


def test_metasgd_keeps_the_gradient_of_its_rates_under_first_order() -> None:
    algorithm = fmeta.metasgd(LOSS, steps=1, lr=0.2, adjoint=fmeta.first_order())
    meta = algorithm.init(network())
    grads = of_network(algorithm, meta=meta)
    exact = of_network(fmeta.metasgd(LOSS, steps=1, lr=0.2), meta=meta)
    assert_trees_close(grads["lr"], exact["lr"], 1e-12)  # with one step no Hessian is on the way to a rate
    assert_trees_differ(grads["params"], exact["params"])


def test_reptile_is_meta_minus_mean_adapted() -> None:
    algorithm = fmeta.reptile(LOSS, fmeta.adam(0.05), steps=4)
    ends = [algorithm.adapt(network(), task.support).params for task in unstacked(regression_tasks())]
    want = pytree.tree_map(lambda start, *end: start - torch.stack(end).mean(0), network(), *ends)
    assert_trees_close(of_network(algorithm), want, 1e-12)


def test_maml_is_first_order_where_the_inner_loss_is_linear() -> None:
    """A linear loss has no Hessian, so dropping it changes nothing."""

    def linear(params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        total = torch.stack([value.sum() for value in params.values()]).sum()
        return batch.y.mean() * total, {}

    def gradient(adjoint: fmeta.Adjoint) -> Any:
        return of_network(fmeta.maml(linear, fmeta.sgd(0.3), steps=3, adjoint=adjoint, query_loss=LOSS))

    assert_trees_close(gradient(fmeta.unroll()), gradient(fmeta.first_order()), 1e-12)


def test_without_steps_it_is_the_plain_gradient_of_the_query_loss() -> None:
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=0, query_loss=with_metrics(log_cosh_error))
    query = regression_tasks().query
    want = torch.func.grad(
        lambda p: torch.stack([log_cosh_error(p, pair) for pair in zip(*query, strict=True)]).mean()
    )(network())
    assert_trees_close(of_network(algorithm), want, 1e-12)


def test_one_batch_at_every_step_is_the_whole_support_set() -> None:
    tasks = regression_tasks()
    repeated = pytree.tree_map(lambda leaf: torch.stack([leaf] * 3, dim=1), tasks.support)
    per_step = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=3, batches="per_step")
    whole = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=3)
    assert_trees_close(of_network(per_step, Task(repeated, tasks.query)), of_network(whole, tasks), 1e-12)


def test_multi_step_weights_on_the_last_step_only_change_nothing() -> None:
    weighted = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=2, weights=(0.0, 0.0, 1.0))
    assert_trees_close(of_network(weighted), of_network(fmeta.maml(LOSS, fmeta.sgd(0.2), steps=2)), 1e-12)


def test_unused_parameters_have_zero_gradients() -> None:
    def first_only(params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return ((batch.x.sum(-1) * params["used"] - batch.y.sum(-1)) ** 2).mean(), {}

    meta = {"used": torch.ones((), dtype=torch.float64), "unused": torch.ones(2, dtype=torch.float64)}
    for plan in (Plan(compile=False), Plan(engine="nested", compile=False)):
        algorithm = fmeta.maml(first_only, fmeta.sgd(0.01), steps=2)
        grads, _ = fmeta.meta_grad(algorithm, plan)(meta, regression_tasks())
        assert torch.equal(grads["unused"], torch.zeros(2, dtype=torch.float64))
        assert grads["used"].abs() > 1e-3


def test_inner_adam_survives_a_zero_gradient() -> None:
    """Without a term inside the root, one weight that does not matter makes the whole meta-gradient NaN."""
    tasks = regression_tasks()
    tasks = tasks._replace(support=tasks.support._replace(x=torch.zeros_like(tasks.support.x)))
    for steps in (1, 3):
        grads = of_network(fmeta.maml(LOSS, fmeta.adam(0.01), steps=steps), tasks)
        assert all(torch.isfinite(leaf).all() for leaf in grads.values())


@pytest.mark.parametrize("plan", [Plan(compile=False), Plan(compile=False, remat=2)])
def test_an_expanded_parameter_is_one_like_others(plan: Plan) -> None:
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=3)
    name, leaf = next((n, p) for n, p in network().items() if p.dim() == 1)
    expanded, whole = (
        {**network(), name: x} for x in (leaf[:1].expand(len(leaf)), leaf[:1].repeat(len(leaf)))
    )
    got, _ = fmeta.meta_grad(algorithm, plan)(expanded, regression_tasks())
    want, _ = fmeta.meta_grad(algorithm, plan)(whole, regression_tasks())
    assert_trees_close(got, want, 1e-12)
