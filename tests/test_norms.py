"""Norms and other rewritten functions: the values of torch's, in every dtype and by every calling convention."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fmeta.functional import differentiable, norms, rewrites

CHANNELS = 5


def channels(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        "weight": torch.randn(CHANNELS, dtype=dtype),
        "bias": torch.randn(CHANNELS, dtype=dtype),
        "running_mean": torch.randn(CHANNELS, dtype=dtype),
        "running_var": torch.rand(CHANNELS, dtype=dtype) + 0.1,
    }


def calls(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]]:
    """Name -> torch's function, and arguments that reach every branch."""
    x, c = torch.randn(4, CHANNELS, 3, 2, dtype=dtype) * 2 + 1, channels(dtype)
    w, b, mean, var = c["weight"], c["bias"], c["running_mean"], c["running_var"]
    w2, b2 = torch.randn(3, 2, dtype=dtype), torch.randn(3, 2, dtype=dtype)
    return {
        "layer": (F.layer_norm, (x, (3, 2), w2, b2, 1e-3), {}),
        "layer, plain": (F.layer_norm, (x, [2]), {}),
        "layer, low level": (torch.layer_norm, (x, (3, 2), w2, None, 1e-3, False), {}),
        "rms": (F.rms_norm, (x, (3, 2), w2), {}),
        "rms, low level": (torch.rms_norm, (x, (2,)), {"eps": 0.1}),
        "batch": (F.batch_norm, (x, None, None, w, b, True), {"eps": 1e-3}),
        "batch, rows": (F.batch_norm, (x[..., 0, 0], None, None, w, b, True), {}),
        "batch, plain": (F.batch_norm, (x, None, None), {"training": True}),
        "batch, frozen": (F.batch_norm, (x, mean, var, w, b), {}),
        "batch, low level": (torch.batch_norm, (x, w, b, None, None, True, 0.1, 1e-3, False), {}),
        "batch, low level, frozen": (torch.batch_norm, (x, w, b, mean, var, False, 0.1, 1e-3, False), {}),
        "instance": (F.instance_norm, (x, None, None, w, b), {"eps": 1e-3}),
        "instance, plain": (F.instance_norm, (x,), {}),
        "instance, frozen": (F.instance_norm, (x, mean, var, w, b, False), {}),
        "instance, low level": (torch.instance_norm, (x, w, b, None, None, True, 0.1, 1e-3, False), {}),
    }


TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", calls(torch.float64))
def test_values_equal_those_of_torch(name: str, dtype: torch.dtype) -> None:
    function, args, kwargs = calls(dtype)[name]
    want = function(*args, **kwargs)
    with differentiable():
        got = function(*args, **kwargs)
    torch.testing.assert_close(got, want, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    if dtype == torch.float64:
        assert norms.REWRITES[function](*args, **kwargs).equal(got), "the rewrite was not called"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    """A mean far above the spread: sums in half precision would lose the spread."""
    x = (100 + torch.randn(64, 256)).to(dtype)
    want = F.layer_norm(x.double(), (256,))
    torch.testing.assert_close(norms.layer_norm(x, (256,)).double(), want, rtol=1e-2, atol=1e-2)


def test_the_arguments_are_those_of_torch() -> None:
    for name in ("layer_norm", "batch_norm", "instance_norm", "rms_norm"):
        ours, theirs = getattr(norms, name), getattr(F, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def refused() -> list[tuple[Callable[[], Any], str]]:
    x, c = torch.randn(4, CHANNELS, 3), channels(torch.float32)
    mean, var = c["running_mean"], c["running_var"]
    again = "running statistics would be updated in place.*fmeta.functionalize.*running_mean=None"
    return [
        (lambda: F.batch_norm(x, mean, var, training=True), f"batch_norm: {again}"),
        (lambda: torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, False), f"batch_norm: {again}"),
        (lambda: F.instance_norm(x, mean, var), f"instance_norm: {again}"),
        (lambda: norms.batch_norm(x, mean, None, training=True), f"batch_norm: {again}"),
        (
            lambda: torch.batch_norm(x, None, None, None, None, False, 0.1, 1e-5, False),
            "are needed to normalise",
        ),
        (lambda: torch.instance_norm(x, None, None, None, None, False, 0.1, 1e-5, False), "are needed to"),
        (lambda: norms.batch_norm(x[:1, :, 0], None, None, training=True), r"batch_norm: more than 1 value"),
        (lambda: norms.instance_norm(x[:, :, :1]), r"instance_norm: more than 1 value.*\(4, 5, 1\)"),
        (
            lambda: F.layer_norm(x, (4,)),
            r"layer_norm: input must end in normalized_shape \(4,\), got shape \(4, 5, 3\)",
        ),
        (lambda: F.layer_norm(x, ()), r"layer_norm: input must end in normalized_shape \(\)"),
        (lambda: F.rms_norm(x, (5,)), r"rms_norm: input must end in normalized_shape \(5,\)"),
    ]


@pytest.mark.parametrize(("call", "text"), refused(), ids=range(len(refused())))
def test_what_cannot_be_pure_or_right_is_refused(call: Callable[[], Any], text: str) -> None:
    with differentiable(), pytest.raises(ValueError, match=text):
        call()


def test_native_functions_are_refused_by_name() -> None:
    """They return statistics, and their second derivatives are the wrong ones."""
    x = torch.randn(4, 3)
    with (
        differentiable(),
        pytest.raises(NotImplementedError, match=r"torch.native_layer_norm: its second derivative"),
    ):
        torch.native_layer_norm(x, (3,), None, None, 1e-5)


def attention_arguments() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.float64) for n in (5, 6, 6))
    boolean = torch.rand(2, 1, 5, 6) > 0.3
    boolean[..., 0] = True
    few = (q, k[:, :2], v[:, :2])
    return [
        ((q, k, v), {}),
        ((q, k, v, boolean), {}),
        ((q, k, v), {"attn_mask": torch.randn(5, 6, dtype=torch.float64)}),
        ((q, q, q), {"is_causal": True}),
        ((q, k, v), {"scale": 0.1}),
        (few, {"enable_gqa": True}),
    ]


@pytest.mark.parametrize(("args", "kwargs"), attention_arguments(), ids=range(6))
def test_attention_equals_that_of_torch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    want = F.scaled_dot_product_attention(*args, **kwargs)
    with differentiable():
        got = F.scaled_dot_product_attention(*args, **kwargs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert rewrites.attention(*args, **kwargs).equal(got)


def other_calls() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    d = torch.float64
    x, y = torch.randn(4, 6, dtype=d) * 3, torch.randn(4, 6, dtype=d).sign()
    var = torch.rand(4, 6, dtype=d) - 0.01
    v, g = torch.randn(3, 4, 5, dtype=d), torch.rand(3, 4, 5, dtype=d)
    h, w = torch.randn(4, 5, dtype=d), torch.randn(20, 6, dtype=d)
    cell = (w, torch.randn(20, 5, dtype=d))
    small = (w[:5], cell[1][:5])
    bags = torch.arange(12).view(4, 3) % 5
    gates = (w[:15], cell[1][:15], w[:15, 0], w[:15, 1])
    return {
        "glu": (F.glu, (x,), {}),
        "glu, dim": (F.glu, (x, 0), {}),
        "hardsigmoid": (F.hardsigmoid, (x,), {}),
        "rrelu": (F.rrelu, (x, 0.1, 0.5), {}),
        "bilinear": (F.bilinear, (x, h, torch.randn(3, 6, 5, dtype=d), torch.randn(3, dtype=d)), {}),
        "bilinear, 3d": (F.bilinear, (x[:, None], h[:, None], torch.randn(3, 6, 5, dtype=d)), {}),
        "bag": (F.embedding_bag, (bags, w), {"padding_idx": 3}),
        "bag, weighted": (F.embedding_bag, (bags, w), {"mode": "sum", "per_sample_weights": x[:, :3]}),
        "soft margin": (F.soft_margin_loss, (x, y), {}),
        "soft margin, sum": (F.soft_margin_loss, (x, y), {"reduction": "sum"}),
        "soft margin, none": (F.soft_margin_loss, (x, y), {"reduction": "none"}),
        "gaussian": (F.gaussian_nll_loss, (x, y, var.abs()), {"full": True}),
        "gaussian, one for a row": (F.gaussian_nll_loss, (x, y, var[:, 0].abs()), {"eps": 0.2}),
        "gaussian, number": (F.gaussian_nll_loss, (x, y, 0.7), {"reduction": "sum"}),
        "weight norm": (torch._weight_norm, (v, g[:, :1, :1], 0), {}),
        "weight norm, last": (torch._weight_norm, (v, g[:1, :1], 2), {}),
        "weight norm, all": (torch._weight_norm, (v, g[0, 0, 0], -1), {}),
        "tanh cell": (torch.rnn_tanh_cell, (x, h, *small), {}),
        "relu cell": (torch.rnn_relu_cell, (x, h, *small, w[:5, 0], w[:5, 1]), {}),
        "lstm cell": (torch.lstm_cell, (x, (h, h + 1), *cell, w[:, 0], w[:, 1]), {}),
        "gru cell": (torch.gru_cell, (x, h, *gates), {}),
    }


@pytest.mark.parametrize("name", other_calls())
def test_other_rewrites_equal_torch(name: str) -> None:
    function, args, kwargs = other_calls()[name]
    want = function(*args, **kwargs)
    with differentiable():
        got = function(*args, **kwargs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rewrites.REWRITES[function](*args, **kwargs), got, rtol=0, atol=0)


def test_the_gradient_of_the_variance_is_that_of_torch() -> None:
    """Torch clamps the variance without telling the gradient."""
    x, var = (
        torch.zeros(3, dtype=torch.float64),
        torch.tensor([1e-9, 0.5, 2.0], dtype=torch.float64, requires_grad=True),
    )
    (want,) = torch.autograd.grad(F.gaussian_nll_loss(x, x + 1, var), var)
    (got,) = torch.autograd.grad(rewrites.gaussian_nll_loss(x, x + 1, var), var)
    torch.testing.assert_close(got, want)


def test_a_random_slope_lies_between_its_bounds() -> None:
    x = -torch.ones(1000)
    slope = -rewrites.rrelu(x, 0.2, 0.3, training=True)
    assert 0.2 <= slope.min() and slope.max() <= 0.3 and slope.unique().numel() > 900
    assert math.isclose(slope.mean().item(), 0.25, abs_tol=0.005)
