"""Gradients to hyperparameters, against finite differences and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_trees_close
from torch import Tensor

import fmeta

EAGER = fmeta.Plan(compile=False)


def draw(rows: int) -> fmeta.Batch:
    return fmeta.Batch(torch.randn(rows, 3, dtype=torch.float64), torch.randn(rows, 1, dtype=torch.float64))


def problem() -> tuple[Any, Any, Any, Any, fmeta.Task]:
    module = fmeta.models.mlp([3, 5, 1], torch.nn.Tanh).double()
    apply, params = fmeta.functionalize(module)
    fit = lambda w, b: ((apply(w, b.x) - b.y) ** 2).mean()  # noqa: E731

    def inner_loss(w: Any, h: Any, b: fmeta.Batch) -> Tensor:
        return fit(w, b) + sum(
            d.exp() * (v**2).sum() for d, v in zip(h["decay"].unbind(), w.values(), strict=True)
        )

    hyper = {
        "decay": torch.full((4,), -4.0, dtype=torch.float64),
        "lr": torch.tensor(-3.0, dtype=torch.float64),
    }
    return (
        inner_loss,
        lambda w, h, b: (fit(w, b), {"fit": fit(w, b)}),
        params,
        hyper,
        fmeta.Task(draw(8), draw(6)),
    )


def rule(hyper: Any) -> fmeta.Transform:
    return fmeta.sgd(hyper["lr"].exp(), momentum=0.9)


def differences(loss: Any, hyper: Any, step: float = 1e-5) -> Any:
    found = {}
    for name, value in hyper.items():
        slopes = torch.zeros_like(value).flatten()
        for i in range(value.numel()):
            moved = [
                loss(
                    {
                        **hyper,
                        name: (value.flatten() + s * step * torch.eye(value.numel())[i]).reshape(value.shape),
                    }
                )
                for s in (1, -1)
            ]
            slopes[i] = (moved[0] - moved[1]) / (2 * step)
        found[name] = slopes.reshape(value.shape)
    return found


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.compiles)])
@pytest.mark.parametrize("batches", ["whole", "per_step"])
@pytest.mark.parametrize("method", ["unroll", "forward"])
def test_rates_and_decay_equal_finite_differences(method: Any, batches: Any, compile: bool) -> None:
    inner_loss, outer_loss, params, hyper, data = problem()
    if batches == "per_step":
        stacked = [draw(8) for _ in range(7)]
        support = fmeta.Batch(torch.stack([b.x for b in stacked]), torch.stack([b.y for b in stacked]))
        data = fmeta.Task(support, data.query)
    make = lambda plan: fmeta.hypergrad(  # noqa: E731
        inner_loss, outer_loss, rule, steps=7, method=method, batches=batches, plan=plan
    )
    grads, metrics = make(fmeta.Plan(compile=compile))(params, hyper, data)
    want = differences(lambda h: make(EAGER)(params, h, data)[1]["loss"], hyper)
    assert_trees_close(grads, want, 1e-6)
    assert metrics["finite"]


def ridge() -> tuple[Any, Any, Any, fmeta.Task]:
    def inner_loss(w: Any, h: Any, b: fmeta.Batch) -> Tensor:
        return ((b.x @ w["w"] - b.y) ** 2).mean() + (h["decay"].exp()[:, None] * w["w"] ** 2).sum()

    def outer_loss(w: Any, h: Any, b: fmeta.Batch) -> Tensor:
        return ((b.x @ w["w"] - b.y) ** 2).mean()

    return (
        inner_loss,
        outer_loss,
        {"decay": torch.tensor([-1.0, 0.0, -2.0], dtype=torch.float64)},
        fmeta.Task(draw(9), draw(5)),
    )


def closed_form(hyper: Any, data: fmeta.Task) -> Tensor:
    x, y = data.support
    w = torch.linalg.solve(x.T @ x / len(x) + torch.diag(hyper["decay"].exp()), x.T @ y / len(x))
    return ((data.query.x @ w - data.query.y) ** 2).mean()


@pytest.mark.parametrize(("solver", "scale"), [("cg", 1.0), ("neumann", 0.15)])
def test_implicit_equals_the_closed_form(solver: Any, scale: float) -> None:
    inner_loss, outer_loss, hyper, data = ridge()
    found = fmeta.hypergrad(
        inner_loss,
        outer_loss,
        fmeta.sgd(0.1),
        steps=2_000,
        method="implicit",
        solver=solver,
        iterations=400,
        scale=scale,
    )
    start = {"w": torch.zeros(3, 1, dtype=torch.float64)}
    grads, metrics = found(start, hyper, data)
    leaf = hyper["decay"].clone().requires_grad_()
    loss = closed_form({"decay": leaf}, data)
    assert_trees_close(grads["decay"], torch.autograd.grad(loss, leaf)[0], 1e-6)
    assert_trees_close(metrics["loss"], loss.detach(), 1e-8)


def test_identity_takes_the_outer_gradient_itself() -> None:
    inner_loss, outer_loss, hyper, data = ridge()
    trained = {"w": torch.randn(3, 1, dtype=torch.float64)}
    grads, _ = fmeta.hypergrad(
        inner_loss, outer_loss, fmeta.sgd(0.1), steps=0, method="implicit", solver="identity", scale=0.3
    )(trained, hyper, data)
    x, y = data.query
    v = 0.3 * 2 * x.T @ (x @ trained["w"] - y) / len(x)
    assert_trees_close(grads["decay"], -(2 * hyper["decay"].exp()[:, None] * trained["w"] * v)[:, 0])


def test_truncated_unroll_leaves_out_early_steps() -> None:
    inner_loss, outer_loss, params, hyper, data = problem()
    make = lambda adjoint: fmeta.hypergrad(  # noqa: E731
        inner_loss, outer_loss, rule, steps=6, adjoint=adjoint, plan=EAGER
    )(params, hyper, data)[0]
    assert_trees_close(make(fmeta.truncated(6)), make(fmeta.unroll()))
    assert (make(fmeta.truncated(1))["decay"] - make(fmeta.unroll())["decay"]).abs().max() > 1e-6


def test_a_parameter_without_dimensions() -> None:
    loss = lambda w, h, b: ((w["w"] * b.x - b.y) ** 2).mean() * h  # noqa: E731
    data = fmeta.Task(*(fmeta.Batch(b.x[:, 0], b.y[:, 0]) for b in (draw(5), draw(4))))
    start, hyper = {"w": torch.zeros((), dtype=torch.float64)}, torch.tensor(0.3, dtype=torch.float64)
    both = [
        fmeta.hypergrad(loss, loss, fmeta.sgd(0.1), steps=4, method=method, plan=EAGER)(start, hyper, data)[0]  # type: ignore[arg-type]
        for method in ("unroll", "forward")
    ]
    assert_trees_close(both[0], both[1])


def test_a_tuned_run_beats_the_untuned() -> None:
    inner_loss, outer_loss, params, hyper, data = problem()
    found = fmeta.hypergrad(inner_loss, outer_loss, rule, steps=20, plan=EAGER)
    outer = fmeta.adam(0.1)
    state, losses = outer.init(hyper), []
    for _ in range(25):
        grads, metrics = found(params, hyper, data)
        updates, state = outer.update(grads, state, hyper)
        hyper = {name: hyper[name] + updates[name] for name in hyper}
        losses.append(metrics["loss"].item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3, "method": "magic"}, r"^hypergrad: method must be among unroll, forward, implicit"),
        ({"steps": 3, "solver": "magic"}, r"^hypergrad: method must be among .* got 'unroll' and 'magic'"),
        ({"steps": 0}, r"^hypergrad: steps must be at least 1 for method='unroll'"),
        ({"steps": -1}, r"^hypergrad: steps must be a non-negative int"),
    ],
)
def test_arguments_are_checked(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fmeta.hypergrad(lambda w, h, b: w, lambda w, h, b: w, fmeta.sgd(0.1), **options)


def test_functions_and_hyperparameters_are_checked() -> None:
    loss = lambda w, h, b: (w["w"] * h).sum()  # noqa: E731
    with pytest.raises(TypeError, match=r"^hypergrad: inner must be a function or a Transform, got float"):
        fmeta.hypergrad(loss, loss, 0.1, steps=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^hypergrad: outer_loss must be a function, got NoneType"):
        fmeta.hypergrad(loss, None, fmeta.sgd(0.1), steps=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^hypergrad: batches must be 'whole' for method='implicit'"):
        fmeta.hypergrad(loss, loss, fmeta.sgd(0.1), steps=1, method="implicit", batches="per_step")
    found = fmeta.hypergrad(loss, loss, fmeta.sgd(0.1), steps=1, plan=EAGER)
    with pytest.raises(
        TypeError, match=r"^hypergrad: hyper must hold floating-point tensors, got torch.int64 at"
    ):
        found({"w": torch.ones(2)}, torch.tensor(3), fmeta.Task(draw(3), draw(3)))
    with pytest.raises(
        TypeError, match=r"^hypergrad: params must hold floating-point tensors, got float at 'w'"
    ):
        found({"w": 0.0}, torch.tensor(3.0), fmeta.Task(draw(3), draw(3)))
    with pytest.raises(ValueError, match=r"^hypergrad: hyper must hold tensors, got none"):
        found({"w": torch.ones(2)}, {}, fmeta.Task(draw(3), draw(3)))


@pytest.mark.parametrize("method", ["unroll", "forward", "implicit"])
@pytest.mark.parametrize("order", [("scale", "decay"), ("decay", "scale")])
def test_hyperparameters_of_two_types_that_require_gradients(method: Any, order: tuple[str, str]) -> None:
    """Each gets a gradient of its own type, without a graph behind it."""
    fit = lambda w, b: ((b.x @ w["w"] - b.y) ** 2).mean()  # noqa: E731
    inner_loss = lambda w, h, b: fit(w, b) * h["scale"] + h["decay"] * (w["w"] ** 2).sum()  # noqa: E731
    given = {
        "scale": torch.tensor(0.5, requires_grad=True),
        "decay": torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
    }
    found = fmeta.hypergrad(
        inner_loss, lambda w, h, b: fit(w, b), fmeta.sgd(0.1), steps=4, method=method, plan=EAGER
    )
    at = lambda h: found({"w": torch.zeros(3, 1, dtype=torch.float64)}, h, data)[0]  # noqa: E731
    data = fmeta.tree.map(lambda x: x.requires_grad_(), fmeta.Task(draw(6), draw(5)))
    mixed = at({name: given[name] for name in order})
    assert {n: (g.dtype, g.requires_grad) for n, g in mixed.items()} == {
        n: (given[n].dtype, False) for n in given
    }
    assert_trees_close(tree_double(mixed), at(tree_double(given)), 1e-6)


def tree_double(found: Any) -> Any:
    return {name: leaf.detach().double() for name, leaf in sorted(found.items())}
