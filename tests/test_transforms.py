"""fmeta inside the caller's own vmap, grad and compile: everything works, uncompiled."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import Case, case_named, each, named_with
from helpers import assert_trees_close, flat, inner_product, relative_difference, unstacked
from problems import EAGER, LOSS, network, regression_tasks
from reference.differences import directional_derivative, random_direction
from torch import Tensor
from torch.utils import _pytree as pytree

import fmeta
from fmeta import Plan

NETWORK, TASKS = network(), regression_tasks()
AUTO = Plan()
LR = torch.tensor(0.2, dtype=torch.float64)
SEVERAL = named_with("maml 3 steps", "maml momentum", "maml first order", "metasgd", "euclidean", "custom")
some_cases = each([case_named(name) for name in SEVERAL])


def stacked(trees: Sequence[Any]) -> Any:
    return pytree.tree_map(lambda *leaf: torch.stack(leaf), *trees)


def perturbed(meta: Any, count: int) -> Any:
    """Several metas on a leading axis: seeds."""
    moves = [random_direction(meta, seed) for seed in range(count)]
    return stacked([pytree.tree_map(lambda a, b: a + 0.1 * b, meta, move) for move in moves])


def maml_with(lr: Tensor, steps: int = 2) -> fmeta.Algorithm:
    return fmeta.maml(LOSS, fmeta.sgd(lr), steps=steps)


def loss_after_one_outer_step(lr: Tensor, plan: Plan = AUTO) -> Tensor:
    """The meta-loss after a meta-step whose inner rate is ``lr``: its derivative is of third order."""
    algorithm, outer = maml_with(lr), fmeta.sgd(0.1)
    state = fmeta.meta_init(algorithm, outer, NETWORK)
    state, _ = fmeta.meta_step(algorithm, outer, plan)(state, TASKS)
    return torch.stack([algorithm.loss(state.meta, task)[0] for task in unstacked(TASKS)]).mean()


def third_order() -> float:
    """The same derivative by finite differences."""
    return directional_derivative(lambda lr: loss_after_one_outer_step(lr, EAGER), LR, torch.ones_like(LR))


@some_cases
def test_vmap_over_seeds(case: Case) -> None:
    algorithm, meta, tasks = case.make()
    metas = perturbed(meta, 2)
    function = fmeta.meta_grad(algorithm)
    got, metrics = torch.func.vmap(lambda meta: function(meta, tasks))(metas)
    plain = fmeta.meta_grad(algorithm, EAGER)
    each = [plain(one, tasks) for one in unstacked(metas)]
    assert_trees_close(got, stacked([grads for grads, _ in each]), 1e-10)
    assert_trees_close(metrics["loss"], torch.stack([found["loss"] for _, found in each]), 1e-10)
    assert metrics["first_bad"].tolist() == [[-1, -1], [-1, -1]]


def test_vmap_over_an_inner_rate() -> None:
    rates = torch.tensor([0.05, 0.1, 0.4], dtype=torch.float64)
    got = torch.func.vmap(lambda lr: fmeta.meta_grad(maml_with(lr))(NETWORK, TASKS)[0])(rates)
    for index, rate in enumerate(rates):
        want, _ = fmeta.meta_grad(maml_with(rate), EAGER)(NETWORK, TASKS)
        assert_trees_close(unstacked(got)[index], want, 1e-10)


def test_vmap_over_outer_states() -> None:
    algorithm, outer = maml_with(LR), fmeta.adam(0.01)
    metas = perturbed(NETWORK, 2)
    states = torch.func.vmap(lambda meta: fmeta.meta_init(algorithm, outer, meta))(metas)
    step = fmeta.meta_step(algorithm, outer)
    after, _ = torch.func.vmap(lambda state: step(state, TASKS))(states)
    for index, meta in enumerate(unstacked(metas)):
        alone = fmeta.meta_init(algorithm, outer, meta)
        want, _ = fmeta.meta_step(algorithm, outer, EAGER)(alone, TASKS)
        assert_trees_close(unstacked(after)[index], want, 1e-10)


def test_vmap_over_evaluations() -> None:
    metas = perturbed(NETWORK, 2)
    evaluate = fmeta.meta_eval(maml_with(LR), steps=[0, 3])
    got = torch.func.vmap(lambda meta: evaluate(meta, TASKS)["loss"])(metas)
    plain = fmeta.meta_eval(maml_with(LR), EAGER, steps=[0, 3])
    assert_trees_close(got, torch.stack([plain(meta, TASKS)["loss"] for meta in unstacked(metas)]), 1e-10)


def test_third_order_by_torch_func() -> None:
    got = torch.func.grad(loss_after_one_outer_step)(LR)
    assert relative_difference(float(got), third_order()) <= 1e-6


def test_a_captured_tensor_that_requires_grad_is_never_ignored() -> None:
    """torch.autograd cannot be told about a captured tensor: its derivative is right, or it is refused."""
    lr = LR.clone().requires_grad_()
    try:
        (got,) = torch.autograd.grad(loss_after_one_outer_step(lr), lr)
    except ValueError as error:
        assert re.search("requires grad", str(error)), error
    else:
        assert relative_difference(float(got), third_order()) <= 1e-6


@some_cases
def test_the_derivative_of_a_meta_gradient(case: Case) -> None:
    """Forward and reverse mode over the engine, against differences of meta-gradients."""
    algorithm, meta, tasks = case.make()
    function = fmeta.meta_grad(algorithm)
    direction, weights = random_direction(meta, 1), random_direction(meta, 2)
    plain = fmeta.meta_grad(algorithm, EAGER)
    weighted: Callable[[Any], Tensor] = lambda m: flat(plain(m, tasks)[0]) @ flat(weights)  # noqa: E731
    want = directional_derivative(weighted, meta, direction)

    def product(meta: Any) -> Tensor:
        pairs = zip(pytree.tree_leaves(function(meta, tasks)[0]), pytree.tree_leaves(weights), strict=True)
        return torch.stack([(a * b).sum() for a, b in pairs]).sum()

    reverse = inner_product(torch.func.grad(product)(meta), direction)
    assert relative_difference(reverse, want) <= 1e-6
    _, forward = torch.func.jvp(product, (meta,), (direction,))
    assert relative_difference(float(forward), want) <= 1e-6


@pytest.mark.compiles
def test_inside_the_callers_compile() -> None:
    algorithm, outer = maml_with(LR), fmeta.adam(0.01)
    step = fmeta.meta_step(algorithm, outer)
    state = fmeta.meta_init(algorithm, outer, NETWORK)
    want, want_metrics = fmeta.meta_step(algorithm, outer, EAGER)(state, TASKS)
    got, metrics = torch.compile(step, backend="aot_eager", fullgraph=True)(state, TASKS)
    assert_trees_close(got, want, 1e-12)
    assert_trees_close(metrics, want_metrics, 1e-12)


INSIDE = {
    "vmap": lambda run: torch.func.vmap(run)(perturbed(NETWORK, 2)),
    "grad": lambda run: torch.func.grad(lambda meta: run(meta)["head.bias"].sum())(NETWORK),
    "autograd": lambda run: run({name: value.clone().requires_grad_() for name, value in NETWORK.items()}),
}


@pytest.mark.parametrize("transform", INSIDE.values(), ids=INSIDE)
def test_compile_true_inside_a_transform_is_refused(transform: Any) -> None:
    function = fmeta.meta_grad(maml_with(LR), Plan(compile=True))
    message = r"Plan\(compile=True\): kernels cannot be compiled here, because the caller's own grad, vmap or"
    with pytest.raises(ValueError, match=message):
        transform(lambda meta: function(meta, TASKS)[0])
