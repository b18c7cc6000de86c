"""What a look at a loss refuses, and what it lets through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fmeta
from fmeta.types import Batch, Metrics, Params, Plan, Task


def determinant(params: Params, batch: Batch) -> tuple[Tensor, Metrics]:
    """A loss through ``torch.linalg.det``, smooth and far from singular."""
    eye = torch.eye(3, dtype=torch.float64)
    return (torch.linalg.det(eye + 0.1 * params["w"] @ batch.x) - batch.y).square().mean(), {}


def problem() -> tuple[Params, Task]:
    draw = lambda: Batch(  # noqa: E731
        torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    )
    return {"w": torch.randn(3, 3, dtype=torch.float64)}, Task(draw(), draw())


def test_an_operator_that_the_adjoint_engine_would_differentiate_wrongly_is_refused() -> None:
    params, tasks = problem()
    algorithm = fmeta.maml(determinant, fmeta.sgd(0.1), steps=2)
    with pytest.raises(NotImplementedError, match=r"torch.ops.aten._linalg_det, .* got engine=\"adjoint\""):
        fmeta.meta_grad(algorithm, Plan(compile=False))(params, tasks)


def test_the_engines_that_take_another_nesting_are_right_there() -> None:
    params, tasks = problem()
    algorithm = fmeta.maml(determinant, fmeta.sgd(0.1), steps=2)
    nested, _ = fmeta.meta_grad(algorithm, Plan(engine="nested"))(params, tasks)
    loop, _ = fmeta.meta_grad(algorithm, Plan(engine="autograd", tasks="loop"))(params, tasks)
    torch.testing.assert_close(nested["w"], loop["w"], rtol=1e-10, atol=1e-12)


def test_first_order_through_it_is_refused_too_so_that_plans_do_not_change_what_is_accepted() -> None:
    params, tasks = problem()
    algorithm = fmeta.maml(determinant, fmeta.sgd(0.1), steps=1, adjoint=fmeta.first_order())
    with pytest.raises(NotImplementedError, match="_linalg_det"):
        fmeta.meta_grad(algorithm, Plan(compile=False))(params, tasks)


def test_a_rate_that_the_caller_differentiates_reaches_the_gradient_through_a_closure() -> None:
    apply, params = fmeta.functionalize(torch.nn.Linear(2, 1).double())
    tasks = fmeta.tasks.sinusoid(tasks=3, shots=4, queries=4, dtype=torch.float64)(0, 0)
    widen = lambda batch: Batch(torch.cat([batch.x, batch.x.square()], -1), batch.y)  # noqa: E731
    tasks = Task(widen(tasks.support), widen(tasks.query))

    def loss_of(lr: Tensor) -> Tensor:
        algorithm = fmeta.maml(fmeta.losses.mse(apply), fmeta.sgd(lr), steps=2)
        return fmeta.meta_grad(algorithm)(params, tasks)[1]["loss"]

    lr = torch.tensor(1e-3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss_of(lr), lr)
    with torch.no_grad():
        differences = (loss_of(lr + 1e-7) - loss_of(lr - 1e-7)) / 2e-7
    torch.testing.assert_close(slope, differences, rtol=1e-6, atol=0.0)
