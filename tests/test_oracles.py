"""Meta-gradients known in closed form, or as published by other test suites.

The integers are those of torchmeta's test of ``gradient_update_parameters`` (MIT licence, Deleu et al. 2019);
the network is of the kind that functorch's own tests of MAML use. Both problems are written anew here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_trees_close
from problems import classification_tasks, episodes, negative_log_likelihood, normal
from reference import rules
from reference.loops import maml, meta_gradient
from reference.networks import groupnorm_cnn, groupnorm_cnn_weights
from torch import Tensor

import fmeta
from fmeta import Batch, Plan, Task

ENGINES = (
    Plan(engine="adjoint", compile=False),
    Plan(engine="nested", compile=False),
    Plan(engine="autograd", tasks="loop", compile=False),
)
every_engine = pytest.mark.parametrize("plan", ENGINES, ids=[plan.engine for plan in ENGINES])

# A linear model without bias, w = (2, 3, 5), with inputs x = (1, 2, 3) and z = (4, 5, 6).
W, X, Z = torch.tensor([2.0, 3.0, 5.0]), torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 5.0, 6.0]])


def half_square(params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    return (0.5 * (batch.x @ params["w"]) ** 2).sum(), {}


def output(params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    return (batch.x @ params["w"]).sum(), {}


def linear_task(support: Tensor, query: Tensor) -> Task:
    nothing = torch.zeros(1, 1)
    return Task(Batch(support[None], nothing), Batch(query[None], nothing))


@every_engine
def test_second_order_maml_in_integers(plan: Plan) -> None:
    """One step of rate 1/2 on ``(x w)^2 / 2`` gives ``w' = w - x (x w) / 2 = (-9.5, -20, -29.5)``.

    Then ``z w' = (z - (z x) x / 2) w = (-12, -27, -42) w = -315``, so that the gradient of
    ``(z w')^2 / 2`` is ``-315 (-12, -27, -42)``.
    """
    algorithm = fmeta.maml(half_square, fmeta.sgd(0.5), steps=1)
    adapted = algorithm.adapt({"w": W}, Batch(X, torch.zeros(1)))
    assert torch.equal(adapted.params["w"], torch.tensor([-9.5, -20.0, -29.5]))
    assert torch.equal(adapted.losses, torch.tensor([264.5]))
    grads, metrics = fmeta.meta_grad(algorithm, plan)({"w": W}, linear_task(X, Z))
    assert torch.equal(grads["w"], torch.tensor([3780.0, 8505.0, 13230.0]))
    assert metrics["loss"] == 49612.5


@every_engine
def test_first_order_maml_in_integers(plan: Plan) -> None:
    """Adapting on z gives ``w' = w - z (z w) / 2 = (-104, -129.5, -154)``, with the gradient ``x (x w')``."""
    algorithm = fmeta.maml(half_square, fmeta.sgd(0.5), steps=1, adjoint=fmeta.first_order())
    adapted = algorithm.adapt({"w": W}, Batch(Z, torch.zeros(1)))
    assert torch.equal(adapted.params["w"], torch.tensor([-104.0, -129.5, -154.0]))
    grads, metrics = fmeta.meta_grad(algorithm, plan)({"w": W}, linear_task(Z, X))
    assert torch.equal(grads["w"], torch.tensor([-825.0, -1650.0, -2475.0]))
    assert metrics["loss"] == 340312.5


@every_engine
def test_three_steps_in_integers(plan: Plan) -> None:
    """At rate 1, ``w_k+1 = (1 - x x^T) w_k``, and the gradient of ``z w_3`` is ``(1 - x x^T)^3 z``.

    ``x^T x = 14``, so ``(1 - x x^T)^3 = 1 - x x^T (3 - 3 14 + 14^2) = 1 - 157 x x^T``, and with ``x z = 32``
    that is ``z - 5024 x``.
    """
    algorithm = fmeta.maml(half_square, fmeta.sgd(1.0), steps=3, query_loss=output)
    adapted = algorithm.adapt({"w": W}, Batch(X, torch.zeros(1)))
    assert torch.equal(adapted.params["w"], torch.tensor([-3609.0, -7219.0, -10828.0]))
    assert torch.equal(adapted.losses, torch.tensor([264.5, 44700.5, 7554384.5]))
    grads, metrics = fmeta.meta_grad(algorithm, plan)({"w": W}, linear_task(X, Z))
    assert torch.equal(grads["w"], torch.tensor([-5020.0, -10043.0, -15066.0]))
    assert metrics["loss"] == -115499.0


@every_engine
@pytest.mark.parametrize("steps", [1, 4])
def test_quadratic_in_closed_form(plan: Plan, steps: int) -> None:
    """With ``L_t(w) = (w - c_t)^T A (w - c_t) / 2`` and rate r, ``w_K = c_t + (1 - r A)^K (w - c_t)``.

    The query loss ``|w_K - q_t|^2 / 2`` then has the gradient ``(1 - r A)^K (w_K - q_t)``.
    """
    root, centres, targets = normal(3, 3, seed=1), normal(4, 3, seed=2), normal(4, 3, seed=3)
    curvature, rate, w = root @ root.T, 0.1, normal(3, seed=4)
    shrink = torch.linalg.matrix_power(torch.eye(3, dtype=torch.float64) - rate * curvature, steps)
    ends = centres + (w - centres) @ shrink

    def inner_loss(params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        away = params["w"] - batch.y
        return 0.5 * away @ curvature @ away, {}

    def query_loss(params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return 0.5 * (params["w"] - batch.y).square().sum(), {}

    nothing = torch.zeros(4, 1, dtype=torch.float64)
    tasks = Task(Batch(nothing, centres), Batch(nothing, targets))
    algorithm = fmeta.maml(inner_loss, fmeta.sgd(rate), steps=steps, query_loss=query_loss)
    grads, metrics = fmeta.meta_grad(algorithm, plan)({"w": w}, tasks)
    assert_trees_close(grads["w"], ((ends - targets) @ shrink).mean(0), 1e-12)
    assert_trees_close(metrics["loss"], 0.5 * (ends - targets).square().sum(1).mean(), 1e-12)


@every_engine
def test_groupnorm_cnn_is_the_loop(plan: Plan) -> None:
    """Two inner steps on a convolutional network with GroupNorm and ReLU, mapped over tasks."""
    weights = groupnorm_cnn_weights(4, 3, torch.Generator().manual_seed(0))
    tasks = classification_tasks(1, 8, 8)

    def loss(params: dict[str, Tensor], pair: Any) -> Tensor:
        return negative_log_likelihood(groupnorm_cnn(params, pair[0]), pair[1])

    want, value = meta_gradient(maml(loss, rules.sgd(0.1), 2), weights, episodes(tasks))
    algorithm = fmeta.maml(fmeta.losses.cross_entropy(groupnorm_cnn), fmeta.sgd(0.1), steps=2)
    got, metrics = fmeta.meta_grad(algorithm, plan)(weights, tasks)
    assert_trees_close(got, want, 1e-10)
    assert_trees_close(metrics["loss"], value, 1e-12)
