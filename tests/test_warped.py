"""Warp layers: the identity at first, meta-learned, and never adapted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_trees_close
from problems import EAGER, classification_tasks
from torch import Tensor, nn

import fmeta
from fmeta.models import conv4, mlp, resnet12, warped

NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (lambda: mlp([2, 5, 4, 3]), (6, 2)),
    "conv4": (lambda: conv4(ways=3, channels=4, size=16), (6, 1, 16, 16)),
    "resnet12": (lambda: resnet12(1, ways=3), (2, 1, 16, 16)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_warps_start_as_the_identity_in_a_copy(name: str) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    module, x = make().double(), torch.randn(shape).double()
    names = [n for n, _ in module.named_parameters()]
    apply, params = fmeta.functionalize(module)
    warped_apply, warped_params = fmeta.functionalize(warped(module))
    assert torch.equal(warped_apply(warped_params, x), apply(params, x))
    assert [n for n, _ in module.named_parameters()] == names
    assert {n.replace(".layer.", ".") for n in warped_params if ".warp." not in n} == set(names)
    assert "head.weight" in warped_params and any(".warp." in n for n in warped_params)


def problem() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return fmeta.functionalize(warped(mlp([2, 5, 4, 3], nn.Tanh)).double())


def test_only_the_other_layers_adapt() -> None:
    apply, params = problem()
    algorithm = fmeta.boil(fmeta.losses.cross_entropy(apply), fmeta.sgd(0.2), steps=3, keeps="*.warp")
    task = fmeta.types.Task(*(fmeta.Batch(b.x[0], b.y[0]) for b in classification_tasks(2)))
    adapted = algorithm.adapt(params, task.support).params
    assert sorted(adapted) == sorted(n for n in params if ".warp." not in n)
    assert all(not torch.equal(value, params[name]) for name, value in adapted.items())
    grads, _ = fmeta.meta_grad(algorithm, EAGER)(params, classification_tasks(2))
    assert all(grads[n].abs().max() > 1e-6 for n in params)


def test_at_the_identity_the_first_step_is_that_of_maml() -> None:
    apply, params = problem()
    torch.manual_seed(0)
    plain_apply, plain = fmeta.functionalize(mlp([2, 5, 4, 3], nn.Tanh).double())
    assert_trees_close(params["layers.1.layer.weight"], plain["layers.1.weight"], 0.0)
    support = fmeta.Batch(*(leaf[0] for leaf in classification_tasks(2).support))
    losses = [fmeta.losses.cross_entropy(one) for one in (apply, plain_apply)]
    got = fmeta.boil(losses[0], fmeta.sgd(0.2), steps=1, keeps="*.warp").adapt(params, support).params
    want = fmeta.maml(losses[1], fmeta.sgd(0.2), steps=1).adapt(plain, support).params
    assert_trees_close({n.replace(".layer.", "."): p for n, p in got.items()}, want, 1e-12)


def test_a_warp_turns_the_step_of_the_layer_before_it() -> None:
    """The output of a warped layer moves along ``warp warp^T grad`` (T-nets, section 3.1)."""
    torch.manual_seed(0)
    module = warped(nn.Sequential(nn.Linear(2, 3, bias=False)).double(), at="*")
    module[0].warp.weight.data.normal_()  # type: ignore[union-attr]
    apply, params = fmeta.functionalize(module)
    x, direction = torch.randn(1, 2).double(), torch.randn(3).double()

    def loss(p: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return (apply(p, batch.x)[0] * direction).sum(), {}

    algorithm = fmeta.boil(loss, fmeta.sgd(0.1), steps=1, keeps="*.warp")
    adapted = {**params, **algorithm.adapt(params, fmeta.Batch(x, x)).params}
    warp = params["0.warp.weight"]
    want = -0.1 * x.square().sum() * warp @ warp.T @ direction
    assert_trees_close((apply(adapted, x) - apply(params, x))[0], want, 1e-12)


def test_there_must_be_layers_to_warp() -> None:
    with pytest.raises(ValueError, match=r"warped: at must name linear or Conv2d layers, got 'activation'"):
        warped(mlp([1, 2, 1]), at="activation")
    with pytest.raises(ValueError, match=r"select: 'boby' matches no parameter"):
        warped(mlp([1, 2, 1]), at="boby")
