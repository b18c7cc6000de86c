"""Compiled kernels give the eager numbers, are built once, and say so where they cannot be built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case, case_named, each
from helpers import assert_trees_close, reordered
from problems import EAGER, LOSS, network, regression_tasks
from reference import networks
from torch.utils import _pytree as pytree

import fmeta
from fmeta import Plan
from fmeta.parallel import kernels

COMPILED = [case for case in CASES if case.compiled]
AUTO, ALWAYS = Plan(), Plan(compile=True)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for every kernel that is built while a test runs."""
    entries: list[Any] = []
    build: Callable[..., Any] = kernels.compile_flat

    def counted(*args: Any) -> Any:
        entries.append(args[0])
        return build(*args)

    monkeypatch.setattr(kernels, "compile_flat", counted)
    return entries


@pytest.mark.compiles
@pytest.mark.parametrize("compiler", ["auto", "inductor"])
@each(COMPILED)
def test_compiled_is_eager_and_built_once(
    case: Case, compiler: str, built: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls 2 and 3, with other meta and other tasks of the same shapes, build nothing."""
    monkeypatch.setenv("FMETA_COMPILER", compiler)
    algorithm, meta, tasks = case.make()
    compiled, eager = (fmeta.meta_grad(algorithm, plan) for plan in (ALWAYS, EAGER))
    counts = []
    for order in ([0, 1, 2], [2, 2, 0], [1, 0, 1]):
        want, got = eager(meta, reordered(tasks, order)), compiled(meta, reordered(tasks, order))
        assert_trees_close(got, want, 1e-9)
        counts.append(len(built))
        meta = pytree.tree_map(lambda leaf, grad: leaf - 0.1 * grad, meta, want[0])
    assert counts[0] > 0, "nothing was compiled"
    assert counts[0] == counts[2], f"kernels were built again for the same shapes: {counts}"


@pytest.mark.compiles
def test_the_outer_update_is_compiled_too(built: list[Any]) -> None:
    algorithm, meta, tasks = case_named("maml 3 steps").make()
    outer, counts = fmeta.adam(1e-2), []
    steps = [fmeta.meta_step(algorithm, outer, plan) for plan in (ALWAYS, EAGER)]
    states = [fmeta.meta_init(algorithm, outer, meta)] * 2
    for order in ([0, 1, 2], [2, 2, 0]):
        pairs = [step(state, reordered(tasks, order)) for step, state in zip(steps, states, strict=True)]
        assert_trees_close(pairs[0], pairs[1], 1e-9)
        states = [state for state, _ in pairs]
        counts.append(len(built))
    assert 0 < counts[0] == counts[1]


@pytest.mark.compiles
def test_kernels_do_not_multiply_with_inner_steps(built: list[Any]) -> None:
    counts = []
    for steps in (3, 7):
        algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=steps)
        got, _ = fmeta.meta_grad(algorithm, ALWAYS)(network(), regression_tasks())
        want, _ = fmeta.meta_grad(algorithm, EAGER)(network(), regression_tasks())
        assert_trees_close(got, want, 1e-9)
        counts.append(len(built) - sum(counts))
    assert counts[0] == counts[1], f"{counts[0]} kernels for 3 steps, {counts[1]} for 7"


@pytest.mark.compiles
def test_the_inner_step_reaches_a_kernel_as_data(built: list[Any]) -> None:
    """One kernel serves all steps of a loop whose rates differ from step to step."""
    algorithm, meta, tasks = case_named("custom learned rates and decay").make()
    compiled, eager = (fmeta.meta_eval(algorithm, plan, steps=[1, 2, 3, 5]) for plan in (ALWAYS, EAGER))
    assert_trees_close(compiled(meta, tasks), eager(meta, tasks), 1e-9)
    assert 0 < len(built) <= 3, f"{len(built)} kernels for a first step, the others, and the query loss"


@pytest.mark.compiles
def test_predictions_take_a_kernel_for_each_part(built: list[Any]) -> None:
    """A first step, the others, the outputs before and after: for any number of steps and any start."""
    algorithm = fmeta.metasgd(fmeta.losses.mse(networks.mlp), steps=2, lr=0.1)
    predict = fmeta.meta_predict(algorithm, ALWAYS, steps=[0, 1, 2, 5])
    eager = fmeta.meta_predict(algorithm, EAGER, steps=[0, 1, 2, 5])
    meta = algorithm.init(network())
    for other in (meta, fmeta.tree.scale(meta, 0.5), fmeta.tree.scale(meta, 2.0)):
        assert_trees_close(predict(other, regression_tasks()), eager(other, regression_tasks()), 1e-9)
        assert len(built) == 4


@pytest.mark.compiles
def test_new_shapes_get_new_kernels(built: list[Any]) -> None:
    algorithm, meta, tasks = case_named("protonet euclidean").make()
    compiled, eager = (fmeta.meta_grad(algorithm, plan) for plan in (AUTO, EAGER))
    counts = []
    for order in ([0, 1, 2], [0, 1], [2, 1, 0], [1, 2]):
        some = reordered(tasks, order)
        assert_trees_close(compiled(meta, some), eager(meta, some), 1e-9)
        counts.append(len(built))
    assert 0 < counts[0] < counts[1] == counts[2] == counts[3]


@pytest.mark.compiles
def test_a_captured_tensor_stays_a_reference() -> None:
    """A rate or a buffer that changes in place between calls is read anew by the kernels."""
    rate = torch.tensor(0.1, dtype=torch.float64)
    algorithm = fmeta.maml(LOSS, fmeta.sgd(rate), steps=1)
    compiled, eager = (fmeta.meta_eval(algorithm, plan) for plan in (ALWAYS, EAGER))
    first = compiled(network(), regression_tasks())["loss"]
    rate.fill_(0.3)
    second = compiled(network(), regression_tasks())["loss"]
    assert_trees_close(second, eager(network(), regression_tasks())["loss"], 1e-9)
    assert not torch.allclose(first, second)


@pytest.fixture
def unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a torch release that fmeta was not tested with."""
    monkeypatch.setattr(kernels, "TESTED", ("1.0",))
    monkeypatch.setattr(kernels, "told", set())


def test_auto_falls_back_and_says_so_once(unsupported: None) -> None:
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=2)
    function = fmeta.meta_grad(algorithm, AUTO)
    with pytest.warns(fmeta.MetaLearningWarning, match="uncompiled: torch .* not among the releases") as seen:
        got, _ = function(network(), regression_tasks())
        function(network(), regression_tasks())
    assert len(seen) == 1
    assert_trees_close(got, fmeta.meta_grad(algorithm, EAGER)(network(), regression_tasks())[0], 1e-12)


def test_true_raises_where_auto_would_fall_back(unsupported: None) -> None:
    function = fmeta.meta_grad(fmeta.maml(LOSS, fmeta.sgd(0.2), steps=1), ALWAYS)
    with pytest.raises(
        RuntimeError, match=r"compile=True: the \w+ kernel must compile, got torch .*releases"
    ):
        function(network(), regression_tasks())


def test_a_kernel_that_cannot_be_traced_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tracing refuses runs uncompiled and right, with a warning that names the reason."""
    monkeypatch.setattr(kernels, "told", set())

    def refuses(*args: Any) -> Any:
        raise NotImplementedError("no rule for this operation")

    monkeypatch.setattr(kernels, "compile_flat", refuses)
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=2)
    with pytest.warns(fmeta.MetaLearningWarning, match="NotImplementedError: no rule for this operation"):
        got, _ = fmeta.meta_grad(algorithm, AUTO)(network(), regression_tasks())
    assert_trees_close(got, fmeta.meta_grad(algorithm, EAGER)(network(), regression_tasks())[0], 1e-12)
