"""Clipping, chains and masks."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_trees_close, assert_trees_equal
from optim_cases import example_grads, example_params, follow

from fmeta import optim, tree


@pytest.mark.parametrize("max_norm", [1e-3, 0.7, 100.0])
def test_clip_by_norm_is_that_of_torch(max_norm: float) -> None:
    params = example_params()
    grads = next(example_grads(params, 1))
    got, _ = optim.clip_by_norm(max_norm).update(grads, (), params)
    leaves = [p.clone() for p in params.values()]
    for leaf, g in zip(leaves, grads.values(), strict=True):
        leaf.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    assert_trees_close(list(got.values()), [leaf.grad for leaf in leaves], tolerance=1e-13)


def test_clip_by_norm_of_float16_does_not_overflow() -> None:
    grads = {
        "w": torch.full((4096,), 30.0, dtype=torch.float16)
    }  # the sum of squares is 57 times its largest
    clipped, _ = optim.clip_by_norm(1.0).update(grads, (), grads)
    assert clipped["w"].dtype == torch.float16
    assert clipped["w"].double().norm().item() == pytest.approx(1.0, rel=1e-3)


def test_clip_by_value_clamps_each_entry() -> None:
    grads = {"w": torch.tensor([-3.0, -0.5, 0.2, 9.0])}
    clipped, _ = optim.clip_by_value(0.5).update(grads, (), grads)
    assert clipped["w"].tolist() == pytest.approx([-0.5, -0.5, 0.2, 0.5])


def test_clipping_an_empty_tree_is_no_error() -> None:
    assert optim.clip_by_norm(1.0).update({}, (), {}) == ({}, ())


def test_chain_applies_its_parts_in_order() -> None:
    params = {"w": torch.zeros(2, dtype=torch.float64)}
    grads = {"w": torch.tensor([3.0, 0.5], dtype=torch.float64)}
    first, _ = follow(optim.chain(optim.clip_by_value(1.0), optim.sgd(0.1)), params, iter([grads]))
    last, _ = follow(optim.chain(optim.sgd(0.1), optim.clip_by_value(0.04)), params, iter([grads]))
    assert first["w"].tolist() == pytest.approx([-0.1, -0.05])
    assert last["w"].tolist() == pytest.approx([-0.04, -0.04])


def test_chain_of_one_is_that_one_and_the_empty_chain_passes_gradients_on() -> None:
    params = example_params()
    got, _ = follow(optim.chain(optim.adam(0.1)), params, example_grads(params, 3))
    want, _ = follow(optim.adam(0.1), params, example_grads(params, 3))
    assert_trees_equal(got, want)
    grads = next(example_grads(params, 1))
    assert_trees_equal(optim.chain().update(grads, (), params)[0], grads)


def test_masked_updates_what_matches_and_keeps_no_state_for_the_rest() -> None:
    params = example_params()
    rule = optim.masked(optim.adam(0.1), "layer")
    got, state = follow(rule, params, example_grads(params, 3))
    part = {name: p for name, p in params.items() if name.startswith("layer.")}
    grads = ({name: g[name] for name in part} for g in example_grads(params, 3))
    want, part_state = follow(optim.adam(0.1), part, grads)
    assert_trees_equal(got, {**params, **want})
    assert_trees_equal(state, part_state)


def test_masked_finds_names_in_nested_trees_and_hides_the_rest_from_a_norm() -> None:
    params = {"net": {"head.w": torch.zeros(1), "body.w": torch.zeros(1)}, "rates": (torch.zeros(1),)}
    grads = tree.map(lambda p: torch.full_like(p, 3.0), params)
    updates, _ = optim.masked(optim.clip_by_norm(1.0, eps=0.0), "net.head*").update(grads, (), params)
    wanted = {"net": {"head.w": torch.ones(1), "body.w": torch.zeros(1)}, "rates": (torch.zeros(1),)}
    assert_trees_equal(updates, wanted)


def test_masked_zeros_hold_back_a_gradient_that_is_not_finite() -> None:
    params = {"w": torch.zeros(1), "frozen": torch.zeros(1)}
    grads = {"w": torch.ones(1), "frozen": torch.full((1,), torch.nan)}
    updates, _ = optim.masked(optim.sgd(1.0), "!frozen").update(grads, (), params)
    assert_trees_equal(updates, {"w": -torch.ones(1), "frozen": torch.zeros(1)})
