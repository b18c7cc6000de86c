"""What a rate may be, and what is said of anything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_trees_close, assert_trees_equal
from optim_cases import example_grads, example_params, follow
from torch import Tensor

from fmeta import optim, rates, schedules, tree


def moved(rule: Any, params: Any) -> Any:
    """What one update with gradients of 1 adds."""
    return rule.update(tree.map(torch.ones_like, params), rule.init(params), params)[0]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=str)
def test_a_tree_of_rates_is_each_rate_on_its_own(options: dict[str, Any]) -> None:
    params = example_params()
    given = {
        "layer.w": 0.1,
        "layer.b": torch.tensor(0.2),
        "gain": 0.3,
        "kernel.w": schedules.linear(0.4, 0.0, 3),
    }
    got, _ = follow(optim.sgd(given, **options), params, example_grads(params, 4))
    for name, one in given.items():
        want, _ = follow(optim.sgd(one, **options), params, example_grads(params, 4))
        assert_trees_equal(got[name], want[name])


def test_rates_broadcast_to_their_parameter() -> None:
    params = {"w": torch.zeros(3, 2), "b": torch.zeros(2)}
    per_row = torch.tensor([[1.0], [2.0], [3.0]])
    updates = moved(optim.sgd({"b": 0.5, "w": per_row}), params)
    assert_trees_equal(updates, {"w": -per_row.expand(3, 2), "b": torch.full((2,), -0.5)})


def test_a_rate_may_be_a_prefix_of_nested_parameters() -> None:
    params = {"net": {"w": torch.zeros(2), "b": torch.zeros(())}, "pair": (torch.zeros(1), torch.zeros(1))}
    updates = moved(optim.sgd({"pair": (0.1, 0.2), "net": 0.5}), params)
    net = {"w": torch.full((2,), -0.5), "b": torch.tensor(-0.5)}
    assert_trees_equal(updates, {"net": net, "pair": (torch.tensor([-0.1]), torch.tensor([-0.2]))})


def test_weight_decay_may_differ_by_parameter() -> None:
    params = {"w": torch.full((2,), 2.0), "b": torch.full((2,), 2.0)}
    updates = moved(optim.sgd(1.0, weight_decay={"w": torch.tensor(0.5), "b": 0.0}), params)
    assert_trees_equal(updates, {"w": torch.full((2,), -2.0), "b": torch.full((2,), -1.0)})


def test_a_scheduled_weight_decay_is_counted() -> None:
    params = {"w": torch.ones(1)}
    rule = optim.sgd(1.0, weight_decay=schedules.linear(0.0, 1.0, steps=2))
    state, seen = rule.init(params), []
    for _ in range(4):
        updates, state = rule.update({"w": torch.zeros(1)}, state, params)
        seen.append(updates["w"].item())
    assert seen == pytest.approx([0.0, -0.5, -1.0, -1.0])


@pytest.mark.parametrize(
    "rule, counts",
    [
        (optim.sgd(0.1), False),
        (optim.sgd(0.1, momentum=0.9), False),
        (optim.sgd(0.1, momentum=0.9, dampening=0.1), True),
        (optim.sgd(schedules.constant(0.1)), True),
        (optim.sgd(0.1, weight_decay=schedules.constant(0.1)), True),
        (optim.sgd({"w": schedules.constant(0.1)}), True),
        (optim.adam(), True),
        (optim.rmsprop(), False),
        (optim.adagrad(), False),
        (optim.adagrad(lr_decay=0.1), True),
        (optim.lion(), False),
        (optim.clip_by_norm(1.0), False),
    ],
)
def test_steps_are_counted_where_something_needs_it(rule: Any, counts: bool) -> None:
    state = rule.init({"w": torch.zeros(2)})
    counters = [leaf for leaf in tree.leaves(state) if leaf.dtype == torch.int64]
    assert [tuple(leaf.shape) for leaf in counters] == [()] * counts
    assert all(isinstance(leaf, Tensor) for leaf in tree.leaves(state))


@pytest.mark.gpu
def test_counters_live_with_the_parameters() -> None:
    params = {"w": torch.zeros(2, device="cuda")}
    state = optim.adam(schedules.cosine(0.1, 10, warmup=2)).init(params)
    assert {leaf.device.type for leaf in tree.leaves(state)} == {"cuda"}


def test_a_schedule_sees_the_number_of_updates_made() -> None:
    params, seen = {"w": torch.zeros(1)}, []

    def schedule(count: Tensor) -> Tensor:
        assert count.dtype == torch.int64
        seen.append(int(count))
        return torch.tensor(0.1)

    follow(optim.adamw({"w": schedule}), params, example_grads(params, 3))
    assert seen == [0, 1, 2]


def test_a_schedule_may_return_a_plain_number() -> None:
    updates = moved(optim.sgd(lambda count: 0.5), {"w": torch.zeros(1)})
    assert_trees_close(updates, {"w": torch.tensor([-0.5])})


FACTORIES = [optim.sgd, optim.adam, optim.adamw, optim.rmsprop, optim.adagrad, optim.lion]


@pytest.mark.parametrize("make", FACTORIES)
def test_wrong_rates_are_refused_where_the_rule_is_made(make: Any) -> None:
    name = make.__name__
    with pytest.raises(ValueError, match=rf"^{name}: lr must be in \[0, inf\), got -0.1\."):
        make(-0.1)
    with pytest.raises(ValueError, match=rf"^{name}: lr must be in \[0, inf\), got nan\."):
        make(float("nan"))
    with pytest.raises(ValueError, match=rf"^{name}: weight_decay must be in \[0, inf\), got -1\."):
        make(0.1, weight_decay=-1)
    with pytest.raises(ValueError, match=rf"^{name}: lr must be in \[0, inf\), got -0.5\."):
        make({"w": 0.1, "b": -0.5})


@pytest.mark.parametrize(
    "wrong, kind",
    [
        ("0.1", "str"),
        (None, "NoneType"),
        (True, "bool"),
        (torch.tensor(1), "a tensor of torch.int64"),
        ({"w": 0.1, "b": [None]}, "NoneType"),
    ],
)
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_rate_of_a_wrong_kind_is_refused(name: str, wrong: Any, kind: str) -> None:
    text = f"^adam: {name} must be a number, a floating-point tensor, a schedule or a dict .* got {kind}\\."
    with pytest.raises(TypeError, match=text):
        optim.adam(**{name: wrong})


@pytest.mark.parametrize(
    "given, text",
    [
        ({"w": 0.1}, r"lr must have the keys of the parameters, got missing \['b'\] and unknown \[\]\."),
        (
            {"w": 0.1, "b": 0.1, "c": 1.0},
            r"got missing \[\] and unknown \['c'\]\. Give one rate per parameter",
        ),
        (
            {"w": {"x": 0.1}, "b": 0.1},
            r"^sgd: lr\['w'\] must have the keys .* missing \[\] and unknown \['x'\]",
        ),
        ((0.1, 0.2), r"missing \['b', 'w'\] and unknown \[0, 1\]"),
        (
            torch.ones(2),
            r"^sgd: lr has shape \(2,\), which does not broadcast to a parameter of shape \(3,\)\.",
        ),
        ({"w": torch.ones(1, 3), "b": 0.1}, r"^sgd: lr\['w'\] has shape \(1, 3\), which does not broadcast"),
        (lambda count: "0.1", r"^sgd: the schedule given as lr must return a tensor, got str\."),
    ],
)
def test_rates_that_do_not_fit_the_parameters_are_refused(given: Any, text: str) -> None:
    rule, params = optim.sgd(given), {"w": torch.zeros(3), "b": torch.zeros(2)}
    with pytest.raises((ValueError, TypeError), match=text):
        rule.update(params, rule.init(params), params)


def test_numbers_have_a_range_and_a_kind() -> None:
    with pytest.raises(
        ValueError, match=r"^f: x must be in \[0, 1\), got 1\.0\. Pass a value in that range\."
    ):
        rates.number("f", "x", 1.0, below=1.0)
    with pytest.raises(TypeError, match=r"^f: x must be a number, got Tensor\. Pass a Python float\."):
        rates.number("f", "x", torch.tensor(0.5))
    with pytest.raises(TypeError, match=r"^f: x must be a number, got bool\."):
        rates.number("f", "x", True)


OUT_OF_RANGE: list[tuple[Any, dict[str, Any]]] = [
    (optim.sgd, {"momentum": 1.0}), (optim.sgd, {"momentum": -0.1}), (optim.sgd, {"dampening": 1.0}),
    (optim.adam, {"b1": 1.0}), (optim.adam, {"b2": -0.1}), (optim.adam, {"eps": -1.0}),
    (optim.adam, {"eps_root": -1.0}),
    (optim.adamw, {"b1": 1.0}), (optim.adamw, {"b2": 1.5}), (optim.adamw, {"eps_root": -1e-8}),
    (optim.rmsprop, {"alpha": 1.0}), (optim.rmsprop, {"eps": -1.0}), (optim.rmsprop, {"momentum": 1.0}),
    (optim.rmsprop, {"eps_root": -1.0}), (optim.adagrad, {"lr_decay": -1.0}), (optim.adagrad, {"eps": -1.0}),
    (optim.adagrad, {"initial_accumulator": -1.0}), (optim.adagrad, {"eps_root": -1.0}),
    (optim.lion, {"b1": 1.0}), (optim.lion, {"b2": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize("make, options", OUT_OF_RANGE)
def test_hyperparameters_out_of_range_are_refused(make: Any, options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(
        ValueError, match=rf"^{make.__name__}: {name} must be in \[0, (1|inf)\), got {value}\."
    ):
        make(0.1, **options)


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_momentum_without_dampening(options: dict[str, float]) -> None:
    with pytest.raises(
        ValueError, match=r"^sgd: nesterov=True needs momentum > 0 and dampening = 0, got momentum="
    ):
        optim.sgd(0.1, nesterov=True, **options)


@pytest.mark.parametrize("make, name", [(optim.clip_by_norm, "max_norm"), (optim.clip_by_value, "limit")])
def test_a_limit_must_be_positive(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{make.__name__}: {name} must be positive, got 0\."):
        make(0.0)
    with pytest.raises(ValueError, match=rf"^{make.__name__}: {name} must be in \[0, inf\), got -1\."):
        make(-1)
    with pytest.raises(ValueError, match=r"^clip_by_norm: eps must be in"):
        optim.clip_by_norm(1.0, eps=-1.0)


def test_only_transforms_can_be_combined() -> None:
    with pytest.raises(
        TypeError, match=r"^chain: expected a Transform, got function\. Pass what a factory such as"
    ):
        optim.chain(optim.sgd(0.1), optim.adam)
    with pytest.raises(TypeError, match=r"^masked: expected a Transform, got float\."):
        optim.masked(0.1, "head")


def test_a_mask_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^select: 'haed' matches no parameter. Did you mean 'head'"):
        optim.masked(optim.sgd(0.1), "haed").init({"head.w": torch.zeros(1), "body.w": torch.zeros(1)})
