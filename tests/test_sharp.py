"""Sharpness-aware gradients: what they are at no radius, what they report, what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import case_named
from helpers import assert_trees_close, assert_trees_differ, assert_trees_equal, reordered, unstacked
from problems import EAGER, LOSS, classification_tasks, network, regression_tasks
from reference import inner, networks
from torch import Tensor

import fmeta
from fmeta import Algorithm, Batch, Plan
from fmeta.uphill import uphill

SGD = fmeta.sgd(0.2)
TASKS = regression_tasks()


def gradient(algorithm: Algorithm, meta: Any = None, tasks: Any = TASKS) -> Any:
    return fmeta.meta_grad(algorithm, EAGER)(network() if meta is None else meta, tasks)[0]


def test_without_radii_it_is_maml() -> None:
    flat = fmeta.sharpmaml(LOSS, SGD, steps=2, inner_radius=0.0, outer_radius=0.0)
    assert_trees_equal(gradient(flat), gradient(fmeta.maml(LOSS, SGD, steps=2)))


@pytest.mark.parametrize(("inside", "outside"), [(0.3, 0.0), (0.0, 0.3), (0.3, 0.3)])
def test_the_factory_and_the_wrapper_agree_and_do_something(inside: float, outside: float) -> None:
    radii = {"inner_radius": inside, "outer_radius": outside}
    maml = fmeta.maml(LOSS, SGD, steps=2)
    got = gradient(fmeta.sharpness_aware(maml, **radii))
    assert_trees_equal(got, gradient(fmeta.sharpmaml(LOSS, SGD, steps=2, **radii)))
    assert_trees_differ(got, gradient(maml), 1e-2)


@pytest.mark.parametrize("name", ["metasgd", "reptile", "imaml cg", "protonet euclidean", "r2d2"])
def test_outside_it_is_the_gradient_of_another_meta(name: str) -> None:
    """Of any algorithm, with or without steps, exact or stated."""
    algorithm, meta, tasks = case_named(name).make()
    plain = fmeta.meta_grad(algorithm, EAGER)
    grads, metrics = plain(meta, tasks)
    want, _ = plain(uphill(meta, grads, 0.1), tasks)
    sharp = fmeta.sharpness_aware(algorithm, outer_radius=0.1)
    got, reported = fmeta.meta_grad(sharp, EAGER)(meta, tasks)
    assert_trees_close(got, want, 1e-12)
    assert_trees_equal(reported, metrics)
    assert_trees_differ(got, grads, 1e-4)


def test_adaptation_goes_uphill_in_evaluation_and_prediction() -> None:
    apply, loss = networks.mlp, fmeta.losses.cross_entropy(networks.mlp)
    algorithm = fmeta.sharpmaml(loss, SGD, steps=1, inner_radius=0.4)
    task = unstacked(classification_tasks(2))[0]
    slope = torch.func.grad(lambda p: loss(p, task.support)[0])
    start = network()
    above = inner.uphill(start, slope(start), 0.4)
    want = {name: start[name] - 0.2 * g for name, g in slope(above).items()}
    adapted = algorithm.adapt(start, task.support)
    assert_trees_close(adapted.params, want, 1e-12)
    assert_trees_close(adapted.losses[0], loss(start, task.support)[0], 1e-12)
    outputs = algorithm.predict(start, task.support, task.query.x)
    assert_trees_close(outputs, apply(want, task.query.x), 1e-12)
    wrapped = fmeta.sharpness_aware(fmeta.maml(loss, SGD, steps=1), inner_radius=0.4, outer_radius=0.0)
    assert_trees_equal(wrapped.predict(start, task.support, task.query.x), outputs)


def test_where_the_gradient_is_zero_nothing_moves_and_the_slope_is_finite() -> None:
    start = {"w": torch.zeros(3)}
    assert_trees_equal(uphill(start, {"w": torch.zeros(3)}, 0.5), start)
    tasks = TASKS._replace(support=Batch(TASKS.support.x, torch.zeros_like(TASKS.support.y)))
    dead = {name: torch.zeros_like(value) for name, value in network().items()}
    _, want = fmeta.meta_grad(fmeta.maml(LOSS, SGD, steps=2), EAGER)(dead, tasks)
    for plan in (EAGER, Plan(engine="nested", compile=False)):
        algorithm = fmeta.sharpmaml(LOSS, SGD, steps=2, inner_radius=1e-3, outer_radius=0.0)
        grads, metrics = fmeta.meta_grad(algorithm, plan)(dead, tasks)
        assert bool(metrics["finite"]) and max(g.abs().max() for g in grads.values()) < 1e3
        assert_trees_equal(metrics["loss"], want["loss"])


def test_the_length_is_of_all_leaves_together_and_integers_stay() -> None:
    start = {"a": torch.zeros(2), "n": torch.tensor(3), "b": torch.zeros(1)}
    moved = uphill(
        start, {"a": torch.tensor([2.0, 4.0]), "n": torch.tensor(0), "b": torch.tensor([4.0])}, 3.0
    )
    assert_trees_close(moved["a"], torch.tensor([1.0, 2.0]))
    assert moved["b"].item() == pytest.approx(2.0) and moved["n"].item() == 3


def test_what_overflows_uphill_only_changes_nothing() -> None:
    def steep(params: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return params["w"].square().sum() * batch.y.square().mean(), {}

    algorithm = fmeta.sharpmaml(steep, SGD, steps=1, inner_radius=0.0, outer_radius=1e30)
    outer, meta = fmeta.sgd(0.1), {"w": torch.ones(2)}
    tasks = fmeta.tasks.sinusoid(tasks=2, shots=3, queries=3)(0, 0)
    state = fmeta.meta_init(algorithm, outer, meta)
    after, metrics = fmeta.meta_step(algorithm, outer, EAGER)(state, tasks)
    assert not bool(metrics["finite"]) and bool(torch.isfinite(metrics["loss"]))
    assert metrics["first_bad"].tolist() == [0, 0]
    assert_trees_equal(after, state)


def test_outside_doubles_the_cost() -> None:
    def explained(outer_radius: float) -> Any:
        algorithm = fmeta.sharpmaml(LOSS, SGD, steps=2, inner_radius=0.0, outer_radius=outer_radius)
        return fmeta.explain(algorithm, Plan(compile=False, chunk_size=2), network(), TASKS)

    plain, sharp = explained(0.0), explained(0.1)
    assert sharp.flops == 2 * plain.flops > 0
    assert sharp.chunks == plain.chunks == 2


@pytest.mark.compiles
def test_compiled_steps_are_eager_ones() -> None:
    """The third step and those after it are replayed."""
    algorithm = fmeta.sharpmaml(LOSS, SGD, steps=2, inner_radius=0.2, outer_radius=0.2)
    outer = fmeta.adam(1e-2)
    steps = [fmeta.meta_step(algorithm, outer, plan) for plan in (Plan(compile=True), EAGER)]
    states = [fmeta.meta_init(algorithm, outer, network())] * 2
    for order in ([0, 1, 2], [2, 2, 0], [1, 0, 1], [0, 0, 2], [2, 1, 0]):
        pairs = [step(state, reordered(TASKS, order)) for step, state in zip(steps, states, strict=True)]
        assert_trees_close(pairs[0], pairs[1], 1e-9)
        states = [state for state, _ in pairs]


@pytest.mark.parametrize("name", ["inner_radius", "outer_radius"])
def test_radii_are_lengths(name: str) -> None:
    for make in (
        lambda **radii: fmeta.sharpmaml(LOSS, SGD, steps=1, **radii),
        lambda **radii: fmeta.sharpness_aware(fmeta.maml(LOSS, SGD, steps=1), **radii),
    ):
        for radius in (-0.1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=rf"sharp\w+: {name} must be in \[0, inf\), got"):
                make(**{name: radius})
        with pytest.raises(TypeError, match=rf"sharp\w+: {name} must be a number, got str"):
            make(**{name: "0.1"})


def test_only_algorithms_are_made_sharpness_aware() -> None:
    with pytest.raises(TypeError, match=r"sharpness_aware: algorithm must be an Algorithm, got function"):
        fmeta.sharpness_aware(LOSS)  # type: ignore[arg-type]
