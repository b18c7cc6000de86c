"""Losses: values, second derivatives, what they refuse and when they look."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, vmap

from fmeta.losses import checking_labels, cross_entropy, mse
from fmeta.types import Batch, Params


def linear(params: Params, x: Tensor) -> Tensor:
    return x @ params["w"]


def problem(dtype: torch.dtype = torch.float64) -> tuple[Params, Batch]:
    x, w = torch.randn(6, 4, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    return {"w": w}, Batch(x, torch.tensor([0, 1, 2, 2, 1, 0]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_mean_of_minus_log_softmax(smoothing: float) -> None:
    params, batch = problem()
    loss, metrics = cross_entropy(linear, label_smoothing=smoothing)(params, batch)
    log_p = linear(params, batch.x).log_softmax(1)
    true = F.one_hot(batch.y, 3) * (1 - smoothing) + smoothing / 3
    torch.testing.assert_close(loss, -(true * log_p).sum(1).mean())
    right = (log_p.argmax(1) == batch.y).float().mean()
    torch.testing.assert_close(metrics, {"accuracy": right})


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_derivatives_of_cross_entropy_equal_differences(smoothing: float) -> None:
    params, batch = problem()
    loss_fn = cross_entropy(linear, label_smoothing=smoothing)
    value = lambda w: loss_fn({"w": w}, batch)[0]  # noqa: E731
    slope = lambda w: (grad(value)(w) ** 2).sum()  # second derivatives  # noqa: E731
    bend = lambda w: (hessian(value)(w) ** 2).sum()  # third  # noqa: E731
    w, v, h = params["w"], torch.randn(4, 3, dtype=torch.float64), 1e-5
    for f in (value, slope, bend):
        want = (f(w + h * v) - f(w - h * v)) / (2 * h)
        torch.testing.assert_close((grad(f)(w) * v).sum(), want, rtol=1e-7, atol=1e-9)


def test_mse_is_the_mean_square() -> None:
    params, batch = problem()
    y = torch.randn(6, 3, dtype=torch.float64)
    loss, metrics = mse(linear)(params, Batch(batch.x, y))
    torch.testing.assert_close(loss, ((linear(params, batch.x) - y) ** 2).sum() / 18)
    assert metrics == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_taken_in_float32(dtype: torch.dtype) -> None:
    params, batch = problem(dtype)
    assert cross_entropy(linear)(params, batch)[0].dtype == torch.float32
    assert mse(linear)(params, Batch(batch.x, torch.zeros(6, 3)))[0].dtype == torch.float32


class Output(NamedTuple):
    loss: Tensor
    logits: Tensor


def test_inputs_may_be_a_dict_a_tuple_or_a_tensor() -> None:
    params, batch = problem()
    want = cross_entropy(linear)(params, batch)
    by_name = cross_entropy(lambda params, *, tokens, shift: linear(params, tokens + shift))
    by_place = cross_entropy(lambda params, tokens, shift: linear(params, tokens + shift))
    record = cross_entropy(lambda params, x: Output(torch.zeros(()), linear(params, x)))
    shift = torch.ones(4, dtype=torch.float64)
    assert by_name(params, Batch({"tokens": batch.x - shift, "shift": shift}, batch.y))[0] == pytest.approx(
        want[0]
    )
    assert by_place(params, Batch((batch.x - shift, shift), batch.y))[0] == pytest.approx(want[0])
    assert record(params, batch)[0] == want[0]


@pytest.mark.parametrize("labels", [torch.zeros(6), torch.ones(6, dtype=torch.bool)])
def test_labels_must_be_integers(labels: Tensor) -> None:
    params, batch = problem()
    with pytest.raises(TypeError, match=f"labels must be integers, got {labels.dtype}"):
        cross_entropy(linear)(params, Batch(batch.x, labels))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_any_integer_labels_do(dtype: torch.dtype) -> None:
    params, batch = problem()
    assert (
        cross_entropy(linear)(params, Batch(batch.x, batch.y.to(dtype)))[0]
        == cross_entropy(linear)(params, batch)[0]
    )


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_named(label: int) -> None:
    params, batch = problem()
    labels = batch.y.clone()
    labels[2] = label
    with pytest.raises(ValueError, match=f"labels must be in 0..2 for 3 outputs, got {label}"):
        cross_entropy(linear)(params, Batch(batch.x, labels))


def test_labels_are_looked_at_in_the_first_plain_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading values waits for the device, and is impossible inside vmap and make_fx."""
    looks: list[int] = []
    monkeypatch.setattr("fmeta.losses._check_range", lambda call, labels, ways: looks.append(ways))
    params, batch = problem()
    loss_fn = cross_entropy(linear)
    tasks = Batch(batch.x.expand(2, 6, 4), batch.y.expand(2, 6))
    vmap(grad(lambda p, b: loss_fn(p, b)[0]), (None, 0))(params, tasks)
    grad(lambda p: loss_fn(p, batch)[0])(params)
    assert not looks
    for _ in range(3):
        loss_fn(params, batch)
    assert looks == [3]
    with checking_labels():
        loss_fn(params, batch)
    assert looks == [3, 3]


def test_traced_and_compiled_losses_do_not_read_labels() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    params, batch = problem()
    loss_fn = cross_entropy(linear)
    value = lambda p, b: loss_fn(p, b)[0]  # noqa: E731
    want = cross_entropy(linear)(params, batch)[0]
    assert make_fx(value, tracing_mode="real")(params, batch)(params, batch) == want
    assert torch.compile(value, fullgraph=True, backend="eager")(params, batch) == want


def test_shapes_are_never_broadcast() -> None:
    params, batch = problem()
    with pytest.raises(ValueError, match=r"one shape, got \(6, 3\) and \(6,\)"):
        mse(linear)(params, Batch(batch.x, torch.zeros(6)))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_is_a_share(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
        cross_entropy(linear, label_smoothing=smoothing)
