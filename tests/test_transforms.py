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


LOOP = Plan(engine="autograd", tasks="loop")
ENGINES = (EAGER, Plan(engine="nested", compile=False), LOOP)
any_engine = pytest.mark.parametrize("plan", ENGINES, ids=[plan.engine for plan in ENGINES])


@any_engine
def test_the_callers_autograd_passes_through_every_engine(plan: Plan) -> None:
    """Through the inner rate and the outer rate, alone and together, over two outer steps and an evaluation."""

    def loss_of(inner: Tensor, outer: Tensor, plan: Plan = plan) -> Tensor:
        algorithm, transform = maml_with(inner), fmeta.sgd(outer)
        state, step = (
            fmeta.meta_init(algorithm, transform, NETWORK),
            fmeta.meta_step(algorithm, transform, plan),
        )
        for _ in range(2):
            state, _ = step(state, TASKS)
        return fmeta.meta_eval(algorithm, plan, steps=3)(state.meta, TASKS)["loss"].mean()

    ones = torch.ones_like(LR)
    want = [
        directional_derivative(lambda lr: loss_of(lr, LR, EAGER), LR, ones),
        directional_derivative(lambda lr: loss_of(LR, lr, EAGER), LR, ones),
    ]
    for which in ((0,), (1,), (0, 1)):
        rates = [LR.clone().requires_grad_(i in which) for i in range(2)]
        got = torch.autograd.grad(loss_of(*rates), [rates[i] for i in which])
        for i, slope in zip(which, got, strict=True):
            assert relative_difference(float(slope), want[i]) <= 1e-6


@any_engine
def test_the_callers_autograd_of_a_meta_gradient(plan: Plan) -> None:
    """Also to weights of which one is computed from the other, each of them an input of its own."""
    leaves = {name: value.clone().requires_grad_() for name, value in NETWORK.items()}
    meta = {**leaves, "head.bias": 2 * leaves["body0.bias"][:3]}
    grads, _ = fmeta.meta_grad(maml_with(LR), plan)(meta, TASKS)
    plain = {name: value.detach() for name, value in meta.items()}
    assert_trees_close(grads, fmeta.meta_grad(maml_with(LR), EAGER)(plain, TASKS)[0], 1e-10)
    inputs = [leaf for name, leaf in leaves.items() if name != "head.bias"]
    got = torch.autograd.grad(flat_with_graph(grads), inputs, retain_graph=True)
    again, _ = fmeta.meta_grad(maml_with(LR), EAGER)(meta, TASKS)
    assert_trees_close(got, torch.autograd.grad(flat_with_graph(again), inputs), 1e-9)


def flat_with_graph(tree: Any) -> Tensor:
    return torch.stack([leaf.square().sum() for leaf in pytree.tree_leaves(tree)]).sum()


@pytest.mark.parametrize("make", [fmeta.meta_grad, fmeta.meta_eval], ids=["meta_grad", "meta_eval"])
def test_torch_autograd_inside_of_torch_func_is_refused(make: Any) -> None:
    """Its derivative would silently be zero."""
    message = (
        f'{make.__name__}: engine="autograd" cannot run inside of the caller\'s own torch.func transform'
    )
    run = make(maml_with(LR), LOOP)
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(lambda meta: run(meta, TASKS))(perturbed(NETWORK, 2))
    with pytest.raises(ValueError, match=message):
        torch.func.grad(lambda lr: make(maml_with(lr), LOOP)(NETWORK, TASKS)[1]["loss"])(LR)


@any_engine
def test_inference_mode(plan: Plan) -> None:
    """With tensors made outside and inside of it, and with those made inside after it."""
    grads, _ = fmeta.meta_grad(maml_with(LR), EAGER)(NETWORK, TASKS)
    curve = fmeta.meta_eval(maml_with(LR), EAGER, steps=[0, 3])(NETWORK, TASKS)["loss"]
    with torch.inference_mode():
        inside = pytree.tree_map(torch.clone, (NETWORK, TASKS))
        for meta, tasks in ((NETWORK, TASKS), inside):
            assert_trees_close(fmeta.meta_grad(maml_with(LR), plan)(meta, tasks)[0], grads, 1e-10)
            found = fmeta.meta_eval(maml_with(LR), plan, steps=[0, 3])(meta, tasks)
            assert_trees_close(found["loss"], curve, 1e-10)
    assert_trees_close(fmeta.meta_grad(maml_with(LR), plan)(*inside)[0], grads, 1e-10)


def test_a_model_in_inference_mode() -> None:
    layer, x = torch.nn.Linear(2, 1), torch.ones(3, 2)
    apply, params = fmeta.functionalize(layer)
    with torch.inference_mode():
        assert apply(params, x).equal(layer(x))
        apply, params = fmeta.functionalize(layer)
        assert apply(params, x).equal(layer(x))


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
