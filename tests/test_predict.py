"""``meta_predict``: outputs of adapted models are those of ``Algorithm.predict``, however they are run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import case_named
from helpers import assert_trees_close, assert_trees_equal, unstacked
from problems import EAGER, LOSS, QUERIES, TASKS, WAYS, classification_tasks, network, regression_tasks
from reference import networks
from torch import Tensor

import fmeta
from fmeta import Algorithm, Batch, Plan, Task
from fmeta.adapt import run

WITH_MODEL = [
    *("protomaml", "matchingnet", "relationnet", "r2d2", "lrd2", "metaoptnet", "simpleshot"),
    *("protonet euclidean", "maml BatchNorm", "maml LayerNorm", "maml convolution"),
]


def maml(steps: int = 2) -> Algorithm:
    return fmeta.maml(fmeta.losses.cross_entropy(networks.mlp), fmeta.sgd(0.5), steps=steps)


@pytest.mark.parametrize("name", WITH_MODEL)
def test_outputs_are_those_of_one_task_after_another(name: str) -> None:
    algorithm, meta, tasks = case_named(name).make()
    want = [algorithm.predict(meta, task.support, task.query.x) for task in unstacked(tasks)]
    got = fmeta.meta_predict(algorithm, EAGER)(meta, tasks)
    assert got.shape == (TASKS, QUERIES, WAYS)
    assert_trees_close(got, torch.stack(want), 1e-10)


LOOPS: dict[str, Any] = {
    "maml": lambda loss: fmeta.maml(loss, fmeta.adam(0.1), steps=2),
    "anil": lambda loss: fmeta.anil(loss, fmeta.sgd(0.5), steps=2, adapts="head"),
    "metasgd": lambda loss: fmeta.metasgd(loss, steps=2, lr=0.5),
    "mamlpp": lambda loss: fmeta.mamlpp(loss, steps=2, lr=0.5),
    "metacurvature": lambda loss: fmeta.metacurvature(loss, steps=2, lr=0.5),
    "reptile": lambda loss: fmeta.reptile(loss, fmeta.sgd(0.5), steps=2),
    "imaml": lambda loss: fmeta.imaml(loss, fmeta.sgd(0.5), steps=2),
}


@pytest.mark.parametrize("name", LOOPS)
def test_outputs_along_the_way(name: str) -> None:
    algorithm = LOOPS[name](fmeta.losses.cross_entropy(networks.mlp))
    meta, tasks, at = algorithm.init(network()), classification_tasks(2), [0, 1, 4]
    got = fmeta.meta_predict(algorithm, EAGER, steps=at)(meta, tasks)
    assert got.shape == (TASKS, len(at), QUERIES, WAYS)
    for found, task in zip(got, unstacked(tasks), strict=True):
        for outputs, steps in zip(found, at, strict=True):
            adapted = run(algorithm.inner_loop, meta, task.support, steps)
            assert_trees_close(outputs, algorithm.predict(meta, adapted, task.query.x), 1e-10)
    assert_trees_equal(fmeta.meta_predict(algorithm, EAGER, steps=1)(meta, tasks), got[:, 1])


def test_outputs_give_the_metrics_of_evaluation() -> None:
    algorithm, meta, tasks = maml(), network(), classification_tasks(2)
    outputs = fmeta.meta_predict(algorithm, EAGER, steps=[0, 1, 3])(meta, tasks)
    metrics = fmeta.meta_eval(algorithm, EAGER, steps=[0, 1, 3])(meta, tasks)
    right = (outputs.argmax(-1) == tasks.query.y[:, None]).float().mean(-1)
    assert_trees_close(right, metrics["accuracy"], 1e-6)
    labels = tasks.query.y[:, None].expand(outputs.shape[:-1])
    loss = torch.nn.functional.cross_entropy(outputs.movedim(-1, 1), labels, reduction="none").mean(-1)
    assert_trees_close(loss, metrics["loss"], 1e-10)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(chunk_size=2, compile=False),
        Plan(tasks="loop", compile=False),
        Plan(engine="nested", compile=False),
        Plan(engine="autograd", tasks="loop", compile=False),
        pytest.param(Plan(compile=True), marks=pytest.mark.compiles),
    ],
    ids=["chunks", "loop", "nested", "autograd", "compiled"],
)
def test_outputs_do_not_depend_on_the_plan(plan: Plan) -> None:
    for algorithm, meta, tasks in (
        (maml(), network(), classification_tasks(2)),
        case_named("protonet euclidean").make(),
    ):
        steps = [0, 1, 3] if algorithm.inner_loop.steps else [0]
        want = fmeta.meta_predict(algorithm, EAGER, steps)(meta, tasks)
        predict = fmeta.meta_predict(algorithm, plan, steps)
        for _ in range(3):  # compiled calls are recorded at the second and replayed from the third
            assert_trees_close(predict(meta, tasks), want, 1e-9)


def test_outputs_have_a_derivative() -> None:
    tasks = classification_tasks(2)
    predict = fmeta.meta_predict(maml(1), EAGER)
    got = torch.func.grad(lambda meta: predict(meta, tasks)[0, 0, 0])(network())

    def first(meta: Any) -> Tensor:
        task = unstacked(tasks)[0]
        return maml(1).predict(meta, task.support, task.query.x)[0, 0]

    assert_trees_close(got, torch.func.grad(first)(network()), 1e-9)


def test_query_labels_are_not_looked_at() -> None:
    tasks = classification_tasks(2)
    other = tasks._replace(query=Batch(tasks.query.x, torch.full_like(tasks.query.y, 99)))
    predict = fmeta.meta_predict(maml(), EAGER)
    assert_trees_equal(predict(network(), other), predict(network(), tasks))


def test_tasks_of_different_support_sets_run_one_by_one() -> None:
    one, other = unstacked(classification_tasks(2))[:2]
    fewer = Task(Batch(other.support.x[:2], other.support.y[:2]), other.query)
    plan = Plan(tasks="loop", compile=False)
    got = fmeta.meta_predict(maml(), plan)(network(), [one, fewer])
    assert_trees_close(got[1], maml().predict(network(), fewer.support, fewer.query.x), 1e-10)
    short = Task(other.support, Batch(other.query.x[:2], other.query.y[:2]))
    with pytest.raises(ValueError, match="meta_predict: query sets must have one shape, got 2"):
        fmeta.meta_predict(maml(), plan)(network(), [one, short])


def test_what_cannot_predict_says_so() -> None:
    tasks = regression_tasks()
    bare = fmeta.maml(LOSS, fmeta.sgd(0.1), steps=1)
    with pytest.raises(ValueError, match="predict: the loss must carry its model, got a bare function"):
        fmeta.meta_predict(bare, EAGER)(network(), tasks)
    pair = fmeta.protonet(networks.mlp)._replace(predict=lambda meta, support, x: (x, x))
    with pytest.raises(TypeError, match="meta_predict: the model must return one tensor, got tuple"):
        fmeta.meta_predict(pair, EAGER)(network(), classification_tasks(2))
    with pytest.raises(TypeError, match="meta_predict: algorithm must be an Algorithm, got str"):
        fmeta.meta_predict("maml")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"meta_predict: steps must be non-negative ints, got \[-1\]"):
        fmeta.meta_predict(maml(), EAGER, steps=[-1])
    vector = lambda params, batch: ((networks.mlp(params, batch.x) ** 2).mean(0), {})  # noqa: E731
    with pytest.raises(ValueError, match="meta_predict: the support loss must be a floating scalar"):
        algorithm = fmeta.maml(vector, fmeta.sgd(0.1), steps=1, query_loss=fmeta.losses.mse(networks.mlp))
        fmeta.meta_predict(algorithm, EAGER)(network(), tasks)
