"""Kernels on rows that lie anywhere in memory, and what they make of networks that are written out number by number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from native_checks import numbers
from torch import Tensor

import fmeta
from fmeta.parallel import Rows, by_rows, kernels
from fmeta.parallel.native.known import Known

LENGTH = 20


def rows_of(tensors: list[Tensor]) -> Rows:
    return Rows(torch.tensor([x.data_ptr() for x in tensors]), LENGTH, tensors)


def moved(p: Tensor, g: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    return p - rate * torch.tanh(g) * p.exp(), (g * g).sum()


@pytest.mark.compiles
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_read_and_written_where_they_are(threads: int) -> None:
    """Backwards in one tensor, by twos in another; what lies between them stays."""
    torch.set_num_threads(threads)
    apart = numbers(9, LENGTH + 3, dtype=torch.float32)
    slopes, rates = numbers(8, LENGTH, dtype=torch.float32), numbers(4, dtype=torch.float32)
    ps, gs = [apart[8 - 2 * i, 1 : LENGTH + 1] for i in range(4)], list(slopes[::2])
    want = [moved(p, g, rate) for p, g, rate in zip(ps, gs, rates, strict=True)]
    between = apart.clone()
    p, g = rows_of(ps), rows_of(gs)
    call = by_rows(moved, (0, 0, 0), (p, g, rates), results=[0])
    _, squares = call([p, g, rates], [p])
    for i, (after, square) in enumerate(want):
        torch.testing.assert_close(ps[i], after)
        torch.testing.assert_close(squares[i], square)
        between[8 - 2 * i, 1 : LENGTH + 1] = ps[i]
    assert torch.equal(apart, between), "nothing else is written"
    few = [rows_of(ps[:2]), rows_of(gs[:2])]
    room: list[Any] = [rows_of([torch.empty(LENGTH), torch.empty(LENGTH)])]
    assert call([*few, rates[:2]], room)[1].shape == (2,), "another number of rows"


def test_what_is_known_of_numbers() -> None:
    known = Known()
    for name, code in {
        "v1": "(v0 * v0)", "v2": "(v1 * ((float)0.5))", "v3": "(v2 + ((float)1))", "v4": "(v2 + ((float)1e-40))",
        "v5": "(v0 + ((float)1))", "v6": "(v1 * ((float)-2.0))", "v7": "(v0 * v3)",
    }.items():  # fmt: skip
        known.note(name, code)
    assert known.least == {"v1": 0.0, "v2": 0.0, "v3": 1.0, "v4": 1e-40}
    assert known.simpler("fm_rsqrt(v3)") == "fm_rsqrt_normal(v3)"
    assert [known.simpler(f"fm_rsqrt({v})") for v in ("v1", "v4", "v5")] == [
        f"fm_rsqrt({v})" for v in ("v1", "v4", "v5")
    ]


@pytest.mark.compiles
def test_a_root_of_what_is_positive_takes_every_number() -> None:
    """It is written without the cases of zero and below: infinity and NaN stay what they are."""
    x = torch.cat(
        [10.0 ** torch.linspace(-40, 38, 10_001), torch.tensor([0.0, math.inf, -math.inf, math.nan])]
    )
    fn = lambda x: torch.rsqrt(x * x * (1 / 9) + 1)  # noqa: E731
    got = kernels.Kernel("root", fn, fmeta.Plan(compile=True))(x)
    want = fn(x.double())
    want = torch.where(fn(x) == 0, 0.0, want)  # where the square is too large for single precision
    torch.testing.assert_close(got.double(), want, rtol=3e-7, atol=0.0, equal_nan=True)


@pytest.mark.compiles
def test_exponentials_at_the_ends() -> None:
    """The largest numbers, those that are denormal, and those that are neither."""
    x = torch.cat(
        [torch.linspace(88.5, 89.5, 2001), torch.linspace(-104.5, -86.5, 8001), torch.tensor([1e9, -1e9])]
    )
    got, want = kernels.Kernel("exp", torch.exp, fmeta.Plan(compile=True))(x), torch.exp(x.double()).float()
    torch.testing.assert_close(got, want, rtol=3e-7, atol=1.5e-45)
    assert torch.equal(got.isinf(), want.isinf())


@pytest.mark.compiles
def test_a_network_written_out_shares_a_loop() -> None:
    """Its numbers stay in registers: no tensor between the layers is kept."""

    def network(xs: Tensor, w: Tensor) -> Tensor:
        layer = list(xs.unbind())
        for weight in w.unbind():
            layer = [
                torch.relu(sum(a * b for a, b in zip(layer, row, strict=True))) for row in weight.unbind()
            ]
        return sum(layer)

    torch.set_num_threads(1)
    xs, w = numbers(2, 8, 1000, dtype=torch.float32), numbers(2, 8, 8, dtype=torch.float32)
    kernel = kernels.compiled_map("network", network, (0, None), fmeta.Plan(compile=True))
    torch.testing.assert_close(kernel(xs, w), torch.func.vmap(network, (0, None))(xs, w))
    (built,) = kernel.compiled.values()
    assert built.maker == "fmeta"
    assert built.cost.peak < 2 * 1000 * 4 + 1000, "no more than the results of two tasks"
