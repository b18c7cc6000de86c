"""MAML++'s settings over a training run, and its parameters of every step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import assert_trees_close, assert_trees_differ, unstacked
from problems import (
    EAGER,
    LOSS,
    batchnorm_model,
    classification_tasks,
    model_problem,
    network,
    regression_tasks,
    squared_error,
)

import fmeta
from fmeta import Plan
from fmeta.parallel.native.build import library

TASKS = regression_tasks()


def gradient(algorithm: fmeta.Algorithm, meta: Any, tasks: Any = TASKS) -> Any:
    return fmeta.meta_grad(algorithm, EAGER)(meta, tasks)[0]


def rising(table: torch.Tensor) -> torch.Tensor:
    """The same with entry ``k`` multiplied by ``k + 1``."""
    return table * (1 + torch.arange(len(table))).reshape(-1, *[1] * (table.dim() - 1))


# Annealing


def test_a_schedule_goes_from_all_steps_to_the_last_and_from_first_order_to_exact() -> None:
    phases = fmeta.mamlpp_schedule(5, 1000, multi_step=0.2, first_order=0.5, levels=4)
    assert [phase.start for phase in phases] == [0, 50, 100, 150, 200, 500]
    for level, phase in enumerate(phases[:4]):
        assert phase.weights == fmeta.multi_step_weights(5, level / 4)
    assert [phase.weights for phase in phases[4:]] == [None, None]
    assert [phase.adjoint for phase in phases] == [fmeta.first_order()] * 5 + [fmeta.unroll()]


@pytest.mark.parametrize("total", [1, 3, 17, 60_000])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_phases_are_few_and_differ(steps: int, total: int) -> None:
    phases = fmeta.mamlpp_schedule(steps, total)
    starts = [phase.start for phase in phases]
    assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < total
    assert len(phases) <= 12
    assert all(one[1:] != other[1:] for one, other in pairwise(phases))
    for phase in phases:
        fmeta.mamlpp(LOSS, steps=steps, adjoint=phase.adjoint, weights=phase.weights)  # are settings


def test_either_annealing_can_be_left_out() -> None:
    assert fmeta.mamlpp_schedule(3, 100, multi_step=0, first_order=0) == [(0, fmeta.unroll(), None)]
    assert fmeta.mamlpp_schedule(3, 100, multi_step=0, first_order=1) == [(0, fmeta.first_order(), None)]
    weighted = fmeta.mamlpp_schedule(3, 100, multi_step=1, first_order=0, levels=2)
    assert [phase.start for phase in weighted] == [0, 50]
    assert all(phase.weights for phase in weighted)


def test_a_state_goes_through_all_phases() -> None:
    outer, lr = fmeta.adam(1e-2), 0.1
    phases = fmeta.mamlpp_schedule(2, 6, multi_step=0.5, first_order=0.7, levels=2)
    assert len(phases) == 4
    starts = [phase.start for phase in phases] + [6]
    state = None
    losses = []
    for phase, end in zip(phases, starts[1:], strict=True):
        algorithm = fmeta.mamlpp(LOSS, steps=2, lr=lr, adjoint=phase.adjoint, weights=phase.weights)
        state = state or fmeta.meta_init(algorithm, outer, network())
        step = fmeta.meta_step(algorithm, outer, EAGER)
        while int(state.step) < end:
            state, metrics = step(state, TASKS)
            losses.append(float(metrics["loss"]))
    assert len(losses) == 6 and losses[-1] < losses[0]


@pytest.mark.compiles
def test_phases_of_one_order_share_what_is_compiled() -> None:
    """Weights never reach a kernel."""
    meta = fmeta.mamlpp(LOSS, steps=2).init(network())
    compiled = []
    for weights in ((0.0, 0.5, 0.5), (0.0, 0.3, 0.7), (0.0, 0.1, 0.9)):
        algorithm = fmeta.mamlpp(LOSS, steps=2, weights=weights)
        got = fmeta.meta_grad(algorithm, Plan(compile=True))(meta, TASKS)
        assert_trees_close(got[0], gradient(algorithm, meta), 1e-9)
        compiled.append(library.cache_info().misses)
    assert compiled[1] == compiled[2] == compiled[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps must be a positive int, got 0"),
        ({"total": 2.5}, "total must be a positive int, got 2.5"),
        ({"levels": True}, "levels must be a positive int, got True"),
        ({"multi_step": 1.5}, r"multi_step must be at most 1, got 1.5"),
        ({"first_order": -0.1}, r"first_order must be in .*got -0.1"),
    ],
)
def test_wrong_schedules_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"mamlpp_schedule: {said}"):
        fmeta.mamlpp_schedule(**{"steps": 3, "total": 10, **options})


def test_weights_of_several_steps_sum_to_one() -> None:
    for progress in (0.0, 0.3, 1.0, 5.0):
        weights = fmeta.multi_step_weights(4, progress)
        assert len(weights) == 5 and weights[0] == 0 and sum(weights) == pytest.approx(1)
    assert fmeta.multi_step_weights(4, 1.0)[-1] == pytest.approx(1 - 3 * 0.03 / 4)


# Parameters of every step


@pytest.mark.parametrize("adjoint", [fmeta.unroll(), fmeta.first_order(), fmeta.truncated(1)], ids=str)
def test_equal_entries_are_one_shared_parameter(adjoint: fmeta.Adjoint) -> None:
    """Where all entries of a norm agree, it is MAML without adapting the norm, and their gradients sum to its own."""
    found = model_problem(batchnorm_model())
    loss, tasks = fmeta.losses.cross_entropy(found.apply), classification_tasks(2)
    plain = fmeta.maml(loss, fmeta.sgd(0.1), steps=3, adapts="!norm", adjoint=adjoint)
    want = gradient(plain, found.params, tasks)
    algorithm = fmeta.mamlpp(loss, steps=3, lr=0.1, per_step="norm", adjoint=adjoint)
    meta = algorithm.init(found.params)
    assert sorted(meta["per_step"]) == ["norm.bias", "norm.weight"]
    assert sorted(meta["lr"]) == sorted(meta["params"]) == sorted(set(found.params) - set(meta["per_step"]))
    got = gradient(algorithm, meta, tasks)
    summed = {name: table.sum(0) for name, table in got["per_step"].items()}
    assert_trees_close({**got["params"], **summed}, {n: want[n] for n in [*got["params"], *summed]}, 1e-10)
    entries = got["per_step"]["norm.weight"]
    assert entries.shape == (4, 4)
    assert_trees_differ(entries[1:], entries[:-1], 1e-4)


def test_beyond_the_trained_steps_the_last_entry_and_rate_repeat() -> None:
    algorithm = fmeta.mamlpp(LOSS, steps=2, per_step="*.bias")
    meta = algorithm.init(network())
    for part in ("lr", "per_step"):
        meta[part] = {name: rising(table) for name, table in meta[part].items()}
    task = unstacked(TASKS)[0]
    got = fmeta.meta_eval(algorithm, EAGER, steps=[0, 1, 2, 4])(meta, TASKS)["loss"][0]
    params, want = meta["params"], []
    for k in range(5):
        own = {n: t[min(k, 2)] for n, t in meta["per_step"].items()}
        want.append(squared_error({**params, **own}, tuple(task.query)))
        slope = torch.func.grad(lambda p, own=own: squared_error({**p, **own}, tuple(task.support)))(params)
        params = {n: p - meta["lr"][n][min(k, 1)] * slope[n] for n, p in params.items()}
    assert_trees_close(got, torch.stack([want[k] for k in (0, 1, 2, 4)]), 1e-12)


def test_predictions_have_the_last_entry() -> None:
    found = model_problem(batchnorm_model())
    algorithm = fmeta.mamlpp(fmeta.losses.cross_entropy(found.apply), steps=2, per_step="norm")
    meta = algorithm.init(found.params)
    meta["per_step"] = {n: t + torch.arange(3)[:, None] for n, t in meta["per_step"].items()}
    task = unstacked(classification_tasks(2))[0]
    adapted = algorithm.adapt(meta, task.support)
    assert_trees_close(adapted.params["norm.bias"], meta["per_step"]["norm.bias"][2], 1e-12)
    outputs = algorithm.predict(meta, task.support, task.query.x)
    assert_trees_close(outputs, found.apply(adapted.params, task.query.x), 1e-12)


def test_something_must_adapt_and_names_must_exist() -> None:
    with pytest.raises(ValueError, match=r"mamlpp: some parameters must adapt, but per_step='\*' takes all"):
        fmeta.mamlpp(LOSS, steps=1, per_step="*").init(network())
    with pytest.raises(ValueError, match=r"mamlpp: some parameters must adapt"):
        fmeta.mamlpp(LOSS, steps=1, per_step="head", adapts="head").init(network())
    with pytest.raises(ValueError, match=r"select: 'nrom' matches no parameter"):
        fmeta.mamlpp(LOSS, steps=1, per_step="nrom").init(network())
