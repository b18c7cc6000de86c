"""Optimisers against torch.optim and against their written definitions, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_form, assert_trees_close, assert_trees_equal, copied
from optim_cases import Make, each_optimiser, example_grads, example_params, follow, matching
from torch import Tensor

from fmeta import optim, schedules, tree
from fmeta.types import Transform

STEPS = 12


def grid(**choices: list[Any]) -> list[dict[str, Any]]:
    """All combinations of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def theirs(make: Callable[[list[Tensor]], torch.optim.Optimizer], params: Any, steps: int) -> Any:
    """Parameters after ``steps`` updates of a torch optimiser on the same gradients."""
    params = tree.map(lambda p: p.clone().requires_grad_(), params)
    optimiser = make(tree.leaves(params))
    for grads in example_grads(params, steps):
        for p, g in zip(tree.leaves(params), tree.leaves(grads), strict=True):
            p.grad = g.clone()
        optimiser.step()
    return tree.detach(params)


def assert_as_torch(rule: Transform, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
    params = example_params()
    got, _ = follow(rule, params, example_grads(params, STEPS))
    assert_trees_close(got, theirs(make, params, STEPS), tolerance=1e-12)


SGD = grid(lr=[0.1, 0.7], momentum=[0.0, 0.5, 0.9], dampening=[0.0, 0.4], weight_decay=[0.0, 0.2])
SGD += grid(lr=[0.1], momentum=[0.5, 0.9], nesterov=[True], weight_decay=[0.0, 0.2])


@pytest.mark.parametrize("options", SGD, ids=str)
def test_sgd_is_that_of_torch(options: dict[str, Any]) -> None:
    assert_as_torch(optim.sgd(**options), lambda ps: torch.optim.SGD(ps, **options))


ADAM = grid(
    lr=[1e-3, 0.1], betas=[(0.9, 0.999), (0.5, 0.8), (0.0, 0.9), (0.9, 0.0)],
    eps=[1e-8, 1e-2], weight_decay=[0.0, 0.2], amsgrad=[False, True],
)  # fmt: skip


@pytest.mark.parametrize("options", ADAM, ids=str)
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_is_that_of_torch(name: str, options: dict[str, Any]) -> None:
    ours = {key: value for key, value in options.items() if key != "betas"}
    b1, b2 = options["betas"]
    make, reference = {"adam": (optim.adam, torch.optim.Adam), "adamw": (optim.adamw, torch.optim.AdamW)}[
        name
    ]
    assert_as_torch(make(**ours, b1=b1, b2=b2), lambda ps: reference(ps, **options))


RMSPROP = grid(
    lr=[1e-2, 0.1], alpha=[0.99, 0.5], eps=[1e-8, 1e-2],
    momentum=[0.0, 0.9], centered=[False, True], weight_decay=[0.0, 0.2],
)  # fmt: skip


@pytest.mark.parametrize("options", RMSPROP, ids=str)
def test_rmsprop_is_that_of_torch(options: dict[str, Any]) -> None:
    assert_as_torch(optim.rmsprop(**options), lambda ps: torch.optim.RMSprop(ps, **options))


ADAGRAD = grid(
    lr=[1e-2, 0.5],
    lr_decay=[0.0, 0.3],
    initial_accumulator=[0.0, 0.1],
    eps=[1e-10, 1e-2],
    weight_decay=[0.0, 0.2],
)


@pytest.mark.parametrize("options", ADAGRAD, ids=str)
def test_adagrad_is_that_of_torch(options: dict[str, Any]) -> None:
    renamed = {key.replace("accumulator", "accumulator_value"): value for key, value in options.items()}
    assert_as_torch(optim.adagrad(**options), lambda ps: torch.optim.Adagrad(ps, **renamed))


@pytest.mark.parametrize(
    "name, reference",
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("rmsprop", torch.optim.RMSprop),
     ("adagrad", torch.optim.Adagrad)],
)  # fmt: skip
def test_defaults_are_those_of_torch(name: str, reference: type[torch.optim.Optimizer]) -> None:
    assert_as_torch(getattr(optim, name)(), reference)


@pytest.mark.parametrize(
    "options", grid(lr=[0.1], b1=[0.9, 0.0], b2=[0.99, 0.5], weight_decay=[0.0, 0.2]), ids=str
)
def test_lion_is_its_definition(options: dict[str, Any]) -> None:
    params = example_params()
    got, _ = follow(optim.lion(**options), params, example_grads(params, STEPS))
    lr, b1, b2, decay = options.values()
    want, momentum = copied(params), {name: torch.zeros_like(p) for name, p in params.items()}
    for grads in example_grads(params, STEPS):
        for name, g in grads.items():
            direction = torch.sign(b1 * momentum[name] + (1 - b1) * g)
            want[name] = want[name] * (1 - lr * decay) - lr * direction
            momentum[name] = b2 * momentum[name] + (1 - b2) * g
    assert_trees_close(got, want, tolerance=1e-12)


@each_optimiser
def test_nothing_given_is_changed_and_the_same_call_gives_the_same(make: Make) -> None:
    rule, params = make(0.1), example_params()
    state = rule.init(params)
    for grads in example_grads(params, 2):
        given = (grads, state, params)
        before = copied(given)
        first = rule.update(*given)
        assert_trees_equal(given, before)
        assert_trees_equal(rule.update(*given), first)
        state = first[1]


RATES = {
    "number": lambda params: 0.1,
    "tensor": lambda params: torch.tensor(0.1),
    "schedule": lambda params: schedules.cosine(0.1, 5, warmup=2),
    # A float32 rate of the parameter's own shape would widen a bfloat16 parameter.
    "tree": lambda params: {name: torch.full(p.shape, 0.1) for name, p in params.items()},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", RATES)
@each_optimiser
def test_forms_and_dtypes_stay(make: Make, kind: str, dtype: torch.dtype) -> None:
    params = example_params(dtype)
    rule = make(RATES[kind](matching(make, params)))
    state = start = rule.init(params)
    for grads in example_grads(params, 3):
        updates, state = rule.update(grads, state, params)
        assert_same_form(updates, params)
        assert_same_form(state, start)
        params = tree.add(params, updates)
    assert tree.all_finite(params)


@pytest.mark.parametrize(
    "make", [optim.sgd, optim.adam, optim.adamw, optim.rmsprop, optim.adagrad, optim.lion]
)
def test_a_wide_weight_decay_does_not_widen_a_narrow_parameter(make: Callable[..., Transform]) -> None:
    params = example_params(torch.bfloat16)
    rule = make(0.1, weight_decay={name: torch.full(p.shape, 0.1) for name, p in params.items()})
    start = rule.init(params)
    updates, state = rule.update(next(example_grads(params, 1)), start, params)
    assert_same_form(updates, params)
    assert_same_form(state, start)


def test_bias_correction_keeps_its_digits_in_float32() -> None:
    params = {"w": torch.ones(3)}
    rule, grads = optim.adam(1.0, eps=0.0), {"w": torch.tensor([0.5, -2.0, 7.0])}
    updates, _ = rule.update(grads, rule.init(params), params)
    # At t = 1 the corrections cancel exactly: the update is -lr * sign(g). Written as 1 - 0.999 in float32,
    # the second one is off by 1.3e-5.
    assert (updates["w"] + grads["w"].sign()).abs().max() < 1e-6


def test_centered_rmsprop_stays_finite_where_rounding_makes_the_variance_negative() -> None:
    params = {"w": torch.linspace(1.0, 2.0, 100)}
    rule = optim.rmsprop(1e-3, alpha=0.5, centered=True)
    got, state = follow(rule, params, iter([params] * 60))
    assert (state.nu["w"] - state.mu["w"] ** 2 < 0).any(), "the case no longer shows what it is for"
    assert tree.all_finite(got)
