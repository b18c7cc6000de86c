"""Convolutions written as products: the same numbers, every geometry, both derivatives; what is chosen and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import case_named
from helpers import assert_trees_close
from problems import EAGER
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fmeta
from fmeta import Plan, tree
from fmeta.parallel import convolutions, faster, inductor, store
from fmeta.parallel.convolutions import Geometry, as_products
from fmeta.parallel.cost import cost_of_graph
from fmeta.parallel.trace import trace

# groups, images, height, width, channels and filters of a group, kernel, stride, padding
SHAPES = [
    (3, 2, 7, 9, 4, 5, (3, 3), (2, 2), (1, 1)),
    (1, 4, 8, 8, 4, 5, (3, 3), (1, 1), (1, 1)),
    (2, 3, 9, 9, 1, 3, (3, 3), (1, 1), (0, 0)),
    (2, 3, 10, 9, 2, 3, (5, 3), (3, 2), (2, 1)),
    (2, 3, 8, 8, 2, 3, (1, 1), (2, 2), (0, 0)),
    (2, 3, 9, 9, 2, 3, (2, 2), (2, 2), (0, 0)),
    (2, 1, 9, 11, 2, 3, (3, 3), (4, 5), (1, 1)),
    (6, 2, 6, 6, 1, 1, (3, 3), (1, 1), (1, 1)),  # depthwise
]


def traced(shape: Any, biased: bool = False) -> tuple[Any, list[Tensor], Any]:
    """A convolution with all its derivatives as a graph, its inputs and its results."""
    groups, images, h, w, channels, filters, kernel, stride, padding = shape
    make = lambda *size: torch.randn(size, dtype=torch.float64)  # noqa: E731
    x, weight = make(images, groups * channels, h, w), make(groups * filters, channels, *kernel)
    bias = make(groups * filters) if biased else None
    settings = (list(stride), list(padding), [1, 1], False, [0, 0], groups)

    def fn(x: Tensor, weight: Tensor, ct: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        y = torch.ops.aten.convolution(x, weight, bias[0] if bias else None, *settings)
        return y, *torch.ops.aten.convolution_backward(ct, x, weight, [0], *settings, [True] * 3)

    y = torch.ops.aten.convolution(x, weight, bias, *settings)
    flat, spec = tree.flatten((x, weight, torch.randn_like(y), *([] if bias is None else [bias])))
    return trace(fn, flat, spec).graph, flat, fn(*flat)


def names(graph: Any) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes]


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_the_convolution_and_its_derivatives(shape: Any, biased: bool) -> None:
    graph, flat, want = traced(shape, biased)
    assert as_products(graph.graph, lambda *args: True) == (3, 0)
    assert not any("convolution" in name for name in names(graph))
    graph.recompile()
    for got, expected in zip(graph(*flat), want, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["output", "input", "weight"])
def test_each_product_is_chosen_by_itself(kind: str) -> None:
    graph, flat, want = traced(SHAPES[0])
    assert as_products(graph.graph, lambda wanted, g, dtype: wanted == kind) == (1, 2)
    graph.recompile()
    for got, expected in zip(graph(*flat), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_what_cannot_be_a_product_stays() -> None:
    def dilated(x: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, w, dilation=2)

    def transposed(x: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.conv_transpose2d(x, w)

    def line(x: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.conv1d(x[:, :, 0], w[:, :, 0])

    for fn in (dilated, transposed, line):
        flat, spec = tree.flatten((torch.randn(2, 2, 9, 9), torch.randn(2, 2, 3, 3)))
        graph = trace(fn, flat, spec).graph
        assert as_products(graph.graph, lambda *args: True) == (0, 1), fn
        assert any("convolution" in name for name in names(graph))


def test_large_patches_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "LARGEST", 1000)
    assert as_products(traced(SHAPES[0])[0].graph, lambda *args: True)[0] == 0


BIG = Geometry(2, 4, (16, 16), 16, 16, (3, 3), (1, 1), (1, 1))


@pytest.mark.parametrize("kind", ["output", "input", "weight"])
def test_both_forms_are_timed_once_and_remembered(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path))
    device, threads = torch.device("cpu"), torch.get_num_threads()
    faster.timed.cache_clear()
    product, native = faster.timed(kind, BIG, torch.float32, device, threads)
    assert product > 0 and native > 0
    wanted = faster.faster_as_product(device)
    assert wanted(kind, BIG, torch.float32) == (product < native)
    (file,) = (tmp_path / "kernels" / "convolutions").iterdir()
    faster.timed.cache_clear()
    monkeypatch.setattr(faster, "median_ms", lambda *args: pytest.fail("timed again"))
    assert faster.timed(kind, BIG, torch.float32, device, threads) == (product, native)
    for times, answer in (([1.0, 2.0], True), ([2.0, 1.0], False)):
        store.write("convolutions", file.stem, times)
        faster.timed.cache_clear()
        assert wanted(kind, BIG, torch.float32) is answer
    faster.timed.cache_clear()


@pytest.mark.compiles
@pytest.mark.parametrize("answer", [True, False], ids=["products", "convolutions"])
def test_a_compiled_meta_gradient_is_the_same_either_way(
    answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMETA_COMPILER", "inductor")
    monkeypatch.setattr(inductor, "faster_as_product", lambda device: lambda *args: answer)
    algorithm, meta, tasks = case_named("maml convolution").make()
    got = fmeta.meta_grad(algorithm, Plan(compile=True))(meta, tasks)
    assert_trees_close(got, fmeta.meta_grad(algorithm, EAGER)(meta, tasks), 1e-9)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=["groups", "one group"])
def test_flops_of_groups_are_those_of_each_apart(shape: Any) -> None:
    groups, *rest = shape
    graph, _, _ = traced(shape)
    one, flat, _ = traced((1, *rest))
    with FlopCounterMode(display=False) as counter:
        one(*flat)
    assert cost_of_graph(graph.graph).flops == groups * counter.get_total_flops()
