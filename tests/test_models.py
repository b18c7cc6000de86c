"""The ready-made networks: shapes, names, initial values, and their protocols."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_trees_close
from torch import nn
from torch.func import functional_call, grad, vmap

from fmeta import models
from fmeta.functional import functionalize
from fmeta.types import Params


def sizes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def test_mlp() -> None:
    net = models.mlp([1, 40, 40, 1])
    assert sizes(net) == {
        "layers.0.weight": (40, 1),
        "layers.0.bias": (40,),
        "layers.1.weight": (40, 40),
        "layers.1.bias": (40,),
        "head.weight": (1, 40),
        "head.bias": (1,),
    }
    assert net(torch.randn(7, 1)).shape == (7, 1)


def test_mlp_flattens_images_and_takes_an_activation() -> None:
    net = models.mlp([12, 5, 3], activation=nn.Tanh)
    x = torch.randn(4, 3, 2, 2)
    hidden = torch.tanh(x.view(4, 12) @ net.layers[0].weight.T + net.layers[0].bias)
    torch.testing.assert_close(net(x), hidden @ net.head.weight.T + net.head.bias)


def test_mlp_with_batch_norm_is_mamls_network_without_convolutions() -> None:
    net = models.mlp([784, 256, 128, 64, 64, 5], norm=True)
    assert [name for name in sizes(net) if "norm" in name] == [
        f"norms.{i}.{part}" for i in range(4) for part in ("weight", "bias")
    ]
    x, first = torch.rand(6, 1, 28, 28), net.layers[0]
    z = first(x.flatten(1))
    z = torch.relu((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt())
    torch.testing.assert_close(torch.relu(net.norms[0](first(x.flatten(1)))), z)
    assert net(x).shape == (6, 5) and not list(net.buffers())


@pytest.mark.parametrize("widths", [[], [4], [4, 0], [4, -1, 2]])
def test_mlp_needs_two_positive_widths(widths: list[int]) -> None:
    with pytest.raises(ValueError, match="sizes must be at least two positive widths"):
        models.mlp(widths)


def test_conv4_of_the_omniglot_protocol() -> None:
    net = models.conv4()
    names = [f"blocks.{i}.{part}" for i in range(4) for part in ("conv.weight", "norm.weight", "norm.bias")]
    assert list(sizes(net)) == [*names, "head.weight", "head.bias"]
    assert sizes(net)["blocks.0.conv.weight"] == (64, 1, 3, 3)
    assert sum(p.numel() for p in net.parameters()) == 9 * (1 + 3 * 64) * 64 + 4 * 2 * 64 + 5 * 64 + 5
    assert not list(net.buffers()), "running statistics"
    assert net(torch.randn(5, 1, 28, 28)).shape == (5, 5)


@pytest.mark.parametrize(
    ("pool", "head", "size", "features"),
    [
        ("stride", "mean", 28, 32),
        ("max", "mean", 28, 32),
        ("stride", "flatten", 28, 32 * 2 * 2),
        ("max", "flatten", 28, 32 * 1 * 1),
        ("stride", "flatten", 84, 32 * 6 * 6),
        ("max", "flatten", 84, 32 * 5 * 5),
        ("stride", "flatten", 15, 32),
        ("max", "flatten", 16, 32),
    ],
)
def test_conv4_embeddings(pool: str, head: str, size: int, features: int) -> None:
    net = models.conv4(3, None, 32, pool=pool, head=head, size=size)  # type: ignore[arg-type]
    assert net(torch.randn(2, 3, size, size)).shape == (2, features)
    ways = models.conv4(3, 7, 32, pool=pool, head=head, size=size)  # type: ignore[arg-type]
    assert ways(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_conv4_mean_is_over_positions() -> None:
    net = models.conv4(ways=None, channels=8)
    x = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(net(x), net.blocks(x).flatten(2).mean(2))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"pool": "avg"}, 'pool must be "stride" or "max", got \'avg\''),
        ({"head": "max"}, 'head must be "mean" or "flatten", got \'max\''),
        ({"pool": "max", "size": 15}, "size must be at least 16, got 15"),
        ({"size": 0}, "size must be at least 1, got 0"),
    ],
)
def test_conv4_refuses(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        models.conv4(**arguments)  # type: ignore[arg-type]


def test_resnet12() -> None:
    net = models.resnet12(ways=None)
    assert sum(p.numel() for p in net.parameters()) == 12_424_320  # the literature's "12.4M parameters"
    assert not list(net.buffers())
    x = torch.randn(2, 3, 32, 32)
    assert net(x).shape == (2, 640)
    assert models.resnet12(in_channels=1, ways=4)(x[:, :1]).shape == (2, 4)
    assert sizes(net)["blocks.3.convs.2.weight"] == (640, 640, 3, 3)
    assert net.blocks(torch.randn(1, 3, 84, 84)).shape == (1, 640, 5, 5)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (lambda: models.mlp([6, 40, 40, 40, 5]), (64, 6)),
        (lambda: models.conv4(), (10, 1, 28, 28)),
        (lambda: models.conv4(pool="max"), (10, 1, 28, 28)),
        (lambda: models.resnet12(), (4, 3, 32, 32)),
    ],
)
def test_initial_outputs_and_gradients_are_of_a_sound_size(net: object, shape: tuple[int, ...]) -> None:
    """Neither dead nor exploding: outputs of order one, a gradient at every parameter, zero biases."""
    module = net()  # type: ignore[operator]
    out = module(torch.randn(shape))
    assert 0.05 < out.std() < 5
    torch.nn.functional.cross_entropy(out, torch.arange(shape[0]) % out.shape[1]).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        if name.endswith("head.bias"):
            assert (parameter == 0).all()


def test_predictions_use_the_statistics_of_the_batch_also_in_an_evaluation() -> None:
    apply, params = functionalize(models.conv4(channels=8).eval())
    x = torch.randn(6, 1, 28, 28)
    assert (apply(params, x)[:3] - apply(params, x[:3])).abs().max() > 1e-3


@pytest.mark.parametrize("pool", ["stride", "max"])
@pytest.mark.parametrize("head", ["mean", "flatten"])
def test_meta_gradient_of_conv4_equals_the_loop(pool: str, head: str) -> None:
    """Through convolution, batch norm and pooling, tasks side by side against one at a time."""
    net = models.conv4(1, 3, 4, pool=pool, head=head, size=16).double()  # type: ignore[arg-type]
    apply, params = functionalize(net)
    x, y = torch.randn(2, 2, 6, 1, 16, 16, dtype=torch.float64), torch.arange(6) % 3

    def adapted(params: Params, x: torch.Tensor, gradient: Any, call: Any) -> torch.Tensor:
        loss = lambda p, x: nn.functional.cross_entropy(call(p, x), y)  # noqa: E731
        grads = gradient(loss, params, x[0])
        return loss({name: p - 0.4 * grads[name] for name, p in params.items()}, x[1])

    def autograd(loss: Any, params: Params, x: torch.Tensor) -> Params:
        grads = torch.autograd.grad(loss(params, x), list(params.values()), create_graph=True)
        return dict(zip(params, grads, strict=True))

    by_func = lambda loss, params, x: grad(loss)(params, x)  # noqa: E731
    got = grad(lambda p: vmap(lambda x: adapted(p, x, by_func, apply))(x).mean())(params)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    module = lambda p, x: functional_call(net, p, (x,))  # noqa: E731
    mean = sum(adapted(leaves, task, autograd, module) for task in x) / 2
    want = torch.autograd.grad(mean, list(leaves.values()))
    assert_trees_close(got, dict(zip(leaves, want, strict=True)), 1e-10)
