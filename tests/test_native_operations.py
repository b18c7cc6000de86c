"""Operations that models are made of, in our own kernels: torch's value, gradient and gradient of its square."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_checks import check, numbers
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

from fmeta.functional import differentiable
from fmeta.parallel import Unsupported

pytestmark = pytest.mark.compiles
ROWS, LINE = numbers(3, 2, seed=3), numbers(5, 4, 3, seed=4)
AT = torch.tensor([2, 0, 2])

Operations = dict[str, Callable[[Tensor], Tensor]]
CURVES: Operations = {
    "leaky_relu": F.leaky_relu,
    "leaky_relu, its slope": lambda x: F.leaky_relu(x, 0.3),
    "celu": F.celu,
    "softshrink": F.softshrink,
    "hardshrink": lambda x: F.hardshrink(x, 0.3),
    "threshold": lambda x: F.threshold(x, 0.1, 0.2),
    "erfc": torch.erfc,
    "exp2": torch.exp2,
    "log10": lambda x: torch.log10(x.abs() + 0.1),
    "asinh": torch.asinh,
    "acosh": lambda x: torch.acosh(x.abs() + 1.1),
    "atanh": lambda x: torch.atanh(x.tanh() * 0.9),
    "sinc": torch.sinc,
    "nan_to_num": lambda x: torch.nan_to_num(x * 2),
    "safe softmax": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0],
}


def changed(x: Tensor) -> Tensor:
    """A tensor of which parts are written to."""
    y = x.clone()
    y[:, 1] = x[:, 0] * 2
    y[:, 2:4] = x[:, :2].sigmoid() * x[:, 4:]
    y[0] += x[1]
    return y * y.mT.contiguous().mT


PLACES: Operations = {
    "parts changed": changed,
    "circular": lambda x: F.pad(x[None], (1, 2), mode="circular")[0],
    "a list of places": lambda x: x[:, [0, 2, 2]],
    "index_put": lambda x: x.index_put((AT,), ROWS[:, :1] * x[0]),
    "index_put, added": lambda x: x.index_put((AT,), x[:3] * x[1:], accumulate=True),
    "index_fill": lambda x: x.index_fill(0, AT, 0.5),
    "repeat": lambda x: x.repeat(2, 3),
    "tile": lambda x: x.tile(1, 2) * x.repeat_interleave(2, 1),
    "rot90": torch.rot90,
    "trace": lambda x: torch.trace(x) * x,
    "topk": lambda x: x.topk(2, 1)[0],
    "topk, smallest": lambda x: x.topk(3, 0, largest=False)[0],
    "kthvalue": lambda x: x.kthvalue(2, 1)[0],
    "aminmax": lambda x: x.aminmax(dim=1)[0] - x.aminmax(dim=1)[1],
    "linspace": lambda x: x * torch.linspace(0, 1, 6, dtype=x.dtype),
    "cross": lambda x: torch.linalg.cross(x[:, :3], x[:, 3:]),
    "pairwise": lambda x: F.pairwise_distance(x, x.flip(0)),
    "nansum": lambda x: x.nansum(0),
    "inverse": lambda x: torch.linalg.inv(x[:, :4] @ x[:, :4].mT + torch.eye(4, dtype=x.dtype)),
}
PICTURES: Operations = {
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool2d, a rest": lambda x: F.avg_pool2d(x, 3),
    "avg_pool2d, overlapping": lambda x: F.avg_pool2d(x, (3, 2), (2, 1)),
    "avg_pool2d, apart": lambda x: F.avg_pool2d(x, 1, 3),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (2, 4)),
    "upsampled": lambda x: F.interpolate(x, scale_factor=(2, 3)),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
}
LINES: Operations = {
    "conv1d": lambda x: F.conv1d(x[:, :, 0], LINE, padding=1),
    "conv1d, strided": lambda x: F.conv1d(x[:, :, 0], LINE, stride=2),
    "max_pool1d": lambda x: F.max_pool1d(x[:, :, 0], 2),
    "avg_pool1d": lambda x: F.avg_pool1d(x[:, :, 0], 2),
}
TABLES = {
    "curves": (CURVES, (4, 6)), "places": (PLACES, (4, 6)), "pictures": (PICTURES, (2, 4, 8, 8)),
    "lines": (LINES, (2, 4, 8, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_value_and_two_derivatives(name: str) -> None:
    table, shape = TABLES[name]

    def every(x: Tensor) -> dict[str, Any]:
        def of(f: Callable[[Tensor], Tensor]) -> Any:
            loss = lambda x: (f(x) * f(x)).sum()  # noqa: E731
            twice = grad(lambda x: grad(loss)(x).square().sum())
            return vmap(f)(x), vmap(grad(loss))(x), vmap(twice)(x)

        with differentiable():
            return {name: of(f) for name, f in table.items()}

    check(every, numbers(3, *shape), axes=(0,), within=1e-8)


def test_the_determinant() -> None:
    a = numbers(3, 4, 4)
    check(lambda a: vmap(torch.linalg.det)(a), a, axes=(0,))
    check(lambda a: vmap(torch.linalg.det)(a), a[:, [1, 0, 2, 3]], axes=(0,))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: torch.round(x, decimals=2),
        lambda x: (x * 1).round_(decimals=2),
        lambda x: (x * 1).div_(x.abs() + 1, rounding_mode="floor"),
        lambda x: (x * 1).add_(x, alpha=2),
        lambda x: (x * 2).long().lt_(0.5),
    ],
    ids=["round", "round_", "div_", "add_", "lt_"],
)
def test_an_option_is_read_or_the_operation_refused(fn: Any) -> None:
    """Never passed over: inductor takes what is refused."""
    x = numbers(3, 4, 5)
    with contextlib.suppress(Unsupported):
        check(fn, x, axes=(0,))


def test_what_is_written_into_truth_values() -> None:
    """A half is true."""

    def fn(x: Tensor) -> Any:
        copied = torch.zeros_like(x, dtype=torch.bool)
        copied.copy_(x / 100)
        at = x.argmax(2, keepdim=True)
        scattered = torch.zeros_like(x, dtype=torch.bool).scatter(2, at, 0.5)
        filled = (x > 0).fill_(0.5), (x > 0).masked_fill_(x < 1, 0.5), (x > 0).masked_fill_(x < 1, 0.0)
        return copied, scattered, *filled

    check(fn, numbers(3, 4, 5), axes=(0,))
