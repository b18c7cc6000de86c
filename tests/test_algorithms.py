"""What later algorithms are when their settings make them an earlier one; their errors; their parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_trees_close
from problems import EAGER, LOSS, WAYS, classification_tasks, network, regression_tasks
from reference import networks
from torch import Tensor

import fmeta
from fmeta import Algorithm, implicit
from fmeta.algorithms.metacurvature import sides, turned
from fmeta.algorithms.metaoptnet import svm_dual
from fmeta.algorithms.protonet import protonet

TASKS = regression_tasks()
CLASSES = classification_tasks(2)
SGD = fmeta.sgd(0.1)


def gradient(algorithm: Algorithm, meta: Any, tasks: Any = TASKS) -> Any:
    return fmeta.meta_grad(algorithm, EAGER)(meta, tasks)[0]


def test_at_their_starting_settings_all_are_maml() -> None:
    maml = gradient(fmeta.maml(LOSS, SGD, steps=2), network())
    for make in (fmeta.mamlpp, fmeta.metacurvature, fmeta.metasgd):
        algorithm = make(LOSS, steps=2, lr=0.1)
        assert_trees_close(gradient(algorithm, algorithm.init(network()))["params"], maml)


def test_boil_and_anil_divide_what_maml_adapts() -> None:
    everything_but_the_head = fmeta.maml(LOSS, SGD, steps=2, adapts="!head")
    boil = fmeta.boil(LOSS, SGD, steps=2)
    assert_trees_close(gradient(boil, network()), gradient(everything_but_the_head, network()))
    with pytest.raises(ValueError, match="boil: some parameters must adapt"):
        fmeta.boil(LOSS, SGD, steps=1, keeps="*").init(network())


def test_protomaml_without_steps_is_a_prototypical_network() -> None:
    proto = fmeta.protomaml(networks.mlp, SGD, steps=0, ways=WAYS)
    want = gradient(protonet(networks.mlp, ways=WAYS), network(), CLASSES)
    assert_trees_close(gradient(proto, network(), CLASSES), want)


def test_implicit_gradients_approach_those_of_the_minimum() -> None:
    """Of a quadratic, whose minimum and its derivative to the start are known."""
    A = torch.diag(torch.tensor([1.0, 2.0, 5.0]).double())
    strength, target = 3.0, torch.tensor([1.0, -1.0, 0.5]).double()

    def loss(params: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        away = params["w"] - target
        return 0.5 * away @ A @ away + 0 * batch.x.sum(), {}

    def query(params: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return params["w"].square().sum() + 0 * batch.x.sum(), {}

    algorithm = fmeta.imaml(
        loss, fmeta.sgd(0.1), steps=400, strength=strength, iterations=3, query_loss=query
    )
    meta = {"w": torch.tensor([0.3, 0.2, -0.7]).double()}
    pulled = A + strength * torch.eye(3).double()
    minimum = torch.linalg.solve(pulled, A @ target + strength * meta["w"])
    want = strength * torch.linalg.solve(pulled, 2 * minimum)
    assert_trees_close(gradient(algorithm, meta)["w"], want, 1e-8)


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_solvers_solve(solver: str) -> None:
    torch.manual_seed(0)
    root = torch.randn(5, 5).double() / 5
    H, b = root @ root.T, torch.randn(5).double()
    found = implicit.SOLVERS[solver](lambda v: {"x": v["x"] + H @ v["x"]}, {"x": b}, 60)["x"]
    assert_trees_close(found, torch.linalg.solve(torch.eye(5).double() + H, b), 1e-9)


def test_conjugate_gradients_may_go_on_at_the_solution() -> None:
    zero = {"x": torch.zeros(3)}
    assert implicit.conjugate_gradient(lambda v: v, zero, 4)["x"].tolist() == [0.0, 0.0, 0.0]


def test_the_support_vector_machine_is_optimal() -> None:
    """The primal problem's value at the weights equals the dual's, which only the solution of both can do."""
    torch.manual_seed(0)
    X, y, C = torch.randn(9, 4).double(), torch.arange(9) % 3, 0.5
    member = torch.nn.functional.one_hot(y).double()
    a = svm_dual(X @ X.T, member, C, 3000)
    W = X.T @ a
    margins = (X @ W + 1 - member) - (X @ W * member).sum(1, keepdim=True)
    primal = 0.5 * W.square().sum() + C * margins.max(1).values.sum()
    dual = (a * member).sum() - 0.5 * W.square().sum()
    assert (a <= C * member + 1e-12).all() and a.sum(1).abs().max() < 1e-12
    assert 0 <= primal - dual < 1e-8


def test_the_curvature_of_a_filter_has_three_sides() -> None:
    torch.manual_seed(0)
    g = torch.randn(3, 2, 2, 2).double()
    m = {side: torch.randn_like(eye) for side, eye in sides(g).items()}
    assert {side: len(eye) for side, eye in m.items()} == {"out": 3, "in": 2, "filter": 4}
    want = torch.einsum("oa,ib,fc,abc->oif", m["out"], m["in"], m["filter"], g.flatten(2))
    assert_trees_close(turned(g, m), want.reshape(g.shape), 1e-12)


def test_the_context_of_a_network_is_more_inputs() -> None:
    torch.manual_seed(0)
    apply, params = fmeta.functionalize(fmeta.models.mlp([1, 5, 1], context=3))
    assert params["context"].shape == (3,) and params["layers.0.weight"].shape == (5, 4)
    x = torch.randn(6, 1)
    moved = {**params, "context": torch.ones(3)}
    assert not torch.allclose(apply(params, x), apply(moved, x))
    algorithm = fmeta.cavia(fmeta.losses.mse(apply), fmeta.sgd(1.0), steps=1)
    task = fmeta.tasks.sinusoid(tasks=2)(0, 0)
    grads, _ = fmeta.meta_grad(algorithm, EAGER)(algorithm.init(params), task)
    assert grads["context"].abs().sum() == 0 and grads["head.weight"].abs().sum() > 0
    with pytest.raises(ValueError, match="mlp: context must be at least 0, got -1"):
        fmeta.models.mlp([1, 1], context=-1)


def test_a_class_without_examples_is_never_predicted() -> None:
    support = fmeta.Batch(torch.randn(3, 2).double(), torch.tensor([0, 2, 2]))
    for make in (fmeta.matchingnet, fmeta.r2d2, fmeta.lrd2, fmeta.metaoptnet, fmeta.simpleshot, protonet):
        algorithm = make(networks.mlp, ways=4)
        scores = algorithm.predict(algorithm.init(network()), support, torch.randn(5, 2).double())
        assert scores.shape == (5, 4) and (scores[:, [1, 3]] == -1e9).all()


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: fmeta.matchingnet(torch.nn.Linear(1, 1)), TypeError, "matchingnet: apply must be a callable"),
        (lambda: fmeta.matchingnet(networks.mlp, scale=0.0), ValueError, "scale must be above 0, got 0.0"),
        (lambda: fmeta.r2d2(networks.mlp, ridge=-1.0), ValueError, "r2d2: ridge must be in"),
        (lambda: fmeta.r2d2(networks.mlp, scale=0.0), ValueError, "r2d2: scale must be above 0"),
        (lambda: fmeta.metaoptnet(networks.mlp, scale=-1.0), ValueError, "metaoptnet: scale must be"),
        (lambda: fmeta.lrd2(networks.mlp, iterations=0), ValueError, "lrd2: iterations must be a positive int"),
        (lambda: fmeta.metaoptnet(networks.mlp, C=0), ValueError, "metaoptnet: C must be above 0"),
        (lambda: fmeta.metaoptnet(networks.mlp, iterations=0), ValueError, "metaoptnet: iterations must be a pos"),
        (lambda: fmeta.relationnet(networks.mlp, 3), TypeError, "relationnet: relate must be a callable"),  # type: ignore[arg-type]
        (
            lambda: fmeta.relationnet(networks.mlp, networks.mlp).init(network()),
            TypeError,
            "relationnet: params must be .*'embedding'",
        ),
        (lambda: fmeta.protomaml(networks.mlp, SGD, steps=1, ways=1), ValueError, "ways must be an int of at least 2"),
        (lambda: fmeta.imaml(LOSS, SGD, steps=1, solver="lu"), ValueError, "solver must be one of"),  # type: ignore[arg-type]
        (lambda: fmeta.imaml(LOSS, SGD, steps=1, damping=-1.0), ValueError, "damping must be in"),
        (lambda: fmeta.imaml(LOSS, SGD, steps=1, iterations=-1), ValueError, "iterations must be a non-negative int"),
        (lambda: fmeta.mamlpp(LOSS, steps=0), ValueError, "mamlpp: steps must be at least 1"),
        (lambda: fmeta.mamlpp(LOSS, steps=2, weights=(1.0,)), ValueError, "weights hold steps . 1 numbers"),
        (lambda: fmeta.cavia(LOSS, SGD, steps=1).init(network()), ValueError, "'context' matches no parameter"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(make: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make()


def test_algorithms_without_steps_cannot_take_one() -> None:
    algorithm = fmeta.r2d2(networks.mlp, ways=WAYS)
    with pytest.raises(ValueError, match="r2d2: there is no inner loss, got steps above 0"):
        fmeta.meta_eval(algorithm, EAGER, steps=1)(algorithm.init(network()), CLASSES)


@pytest.mark.parametrize("name", ["mamlpp", "boil", "imaml", "matchingnet"])
def test_compiled_equals_eager(name: str) -> None:
    made: dict[str, tuple[Algorithm, Any]] = {
        "mamlpp": (fmeta.mamlpp(LOSS, steps=2), TASKS),
        "boil": (fmeta.boil(LOSS, SGD, steps=2), TASKS),
        "imaml": (fmeta.imaml(LOSS, SGD, steps=2, iterations=2), TASKS),
        "matchingnet": (fmeta.matchingnet(networks.mlp, ways=WAYS), CLASSES),
    }
    algorithm, tasks = made[name]
    meta = algorithm.init(network())
    compiled = fmeta.meta_grad(algorithm, fmeta.Plan(compile=True))(meta, tasks)
    assert_trees_close(compiled[0], gradient(algorithm, meta, tasks))
