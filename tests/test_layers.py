"""Every layer of torch.nn through functionalize: second derivatives under vmap against loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_cases import LAYERS, NOT_LAYERS, RANDOM, REFUSED, WRONG_IN_TORCH, LayerCase, Net
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import fmeta
from fmeta.functional import functionalize
from fmeta.types import Params

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning"),  # torch's first jvp
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # no batching rule: slow, but right
]
TASKS, STEPS, RATE = 2, 2, 0.1
Loss = Callable[[Params, Tensor], Tensor]
Gradient = Callable[[Params, Tensor], Params]


@pytest.fixture(autouse=True)
def double_precision(deterministic: None) -> Any:
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(False)  # unpooling has no deterministic form
    yield
    torch.set_default_dtype(torch.float32)


def assert_close(got: Params, want: Params, tolerance: float) -> None:
    """Raise unless the largest difference is below ``tolerance`` times the largest number of all leaves."""
    assert got.keys() == want.keys()
    scale = max(leaf.abs().max() for leaf in want.values())
    assert scale > 1e-6, "nothing to compare: the derivative is zero"
    for name in want:
        error = (got[name] - want[name]).abs().max() / scale
        assert error <= tolerance, f"{name}: relative difference {error:.1e}"


def adapted_loss(loss: Loss, gradient: Gradient, params: Params, x: Tensor) -> Tensor:
    """Loss on the second set after gradient steps on the first: ``x`` is ``[2, *shape]``."""
    for _ in range(STEPS):
        grads = gradient(params, x[0])
        params = {name: params[name] - RATE * grads[name] for name in params}
    return loss(params, x[1])


def autograd(loss: Loss) -> Gradient:
    def gradient(params: Params, x: Tensor) -> Params:
        value = loss(params, x)
        grads = torch.autograd.grad(value, list(params.values()), create_graph=True, materialize_grads=True)
        return dict(zip(params, grads, strict=True))

    return gradient


def inputs(case: LayerCase) -> Tensor:
    return torch.randn(TASKS, 2, *case.shape)


def directions(params: Params) -> Params:
    return {name: torch.randn_like(leaf) for name, leaf in params.items()}


def per_task(params: Params) -> Params:
    return {name: leaf.expand(TASKS, *leaf.shape).contiguous() for name, leaf in params.items()}


def original(net: nn.Module) -> Loss:
    """The module as it is, with torch's own norm layers and attention by the plain formula."""

    def loss(params: Params, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(net, params, (x,))

    return loss


def hessian_products(apply: Loss, params: Params, v: Params, x: Tensor) -> dict[str, Params]:
    """``H v`` for each task by both nestings that engines use; ``params`` and ``v`` have a task axis."""
    gradient_of = lambda p: vmap(grad(apply))(p, x)  # noqa: E731
    slope = lambda p, x, v: jvp(lambda p: apply(p, x), (p,), (v,))[1]  # noqa: E731
    return {
        "jvp(vmap(grad))": jvp(gradient_of, (params,), (v,))[1],
        "grad(vmap(jvp))": grad(lambda p: vmap(slope)(p, x, v).sum())(params),
    }


def by_name(case: LayerCase) -> str:
    return case.name


@pytest.mark.parametrize("case", [c for c in LAYERS if c.name not in WRONG_IN_TORCH], ids=by_name)
def test_meta_gradient_equals_the_loop_over_the_original(case: LayerCase) -> None:
    net, x = Net(case.make(), case.shape), inputs(case)
    apply, params = functionalize(net)
    got = grad(lambda p: vmap(lambda x: adapted_loss(apply, grad(apply), p, x))(x).mean())(params)

    loss = original(net)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    mean = sum(adapted_loss(loss, autograd(loss), leaves, x[task]) for task in range(TASKS)) / TASKS
    want = torch.autograd.grad(mean, list(leaves.values()), materialize_grads=True)
    assert_close(got, dict(zip(leaves, want, strict=True)), 1e-9)


@pytest.mark.parametrize("case", [c for c in LAYERS if c.name not in WRONG_IN_TORCH], ids=by_name)
def test_values_and_hessian_products_equal_the_loop_over_the_original(case: LayerCase) -> None:
    net, x = Net(case.make(), case.shape), inputs(case)[:, 0]
    apply, params = functionalize(net)
    torch.testing.assert_close(apply(params, x[0]), net(x[0]), rtol=1e-12, atol=1e-12)
    v = directions(params)

    gradient = autograd(original(net))
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    rows = []
    for task in range(TASKS):
        grads = gradient(leaves, x[task])
        product = sum((grads[name] * v[name]).sum() for name in v)
        rows.append(torch.autograd.grad(product, list(leaves.values()), materialize_grads=True))
    want = {name: torch.stack(column) for name, column in zip(v, zip(*rows, strict=True), strict=True)}
    for got in hessian_products(apply, per_task(params), per_task(v), x).values():
        assert_close(got, want, 1e-9)


@pytest.mark.parametrize("case", LAYERS, ids=by_name)
def test_hessian_products_equal_differences_of_the_gradient(case: LayerCase) -> None:
    """Independent of every second derivative of torch, so it also finds what torch.autograd gets wrong.

    Once for all parameters, and once each for those before the layer and of the layer alone: the others are
    then constants that all tasks share.
    """
    x = inputs(case)[:, 0]
    apply, params = functionalize(Net(case.make(), case.shape))
    v, h = directions(params), 1e-6
    for part in ("", "first.", "layer."):
        some = {name: p for name, p in params.items() if name.startswith(part)}
        if not some:
            continue
        loss = lambda p, x: apply({**params, **p}, x)  # noqa: E731
        up, down = ({name: p + sign * h * v[name] for name, p in some.items()} for sign in (1, -1))
        ends = [[grad(loss)(p, task) for task in x] for p in (up, down)]
        want = {n: torch.stack([(a[n] - b[n]) / (2 * h) for a, b in zip(*ends, strict=True)]) for n in some}
        if max(leaf.abs().max() for leaf in want.values()) < 1e-7:
            continue  # the loss is linear in this part
        products = hessian_products(loss, per_task(some), per_task({name: v[name] for name in some}), x)
        for got in products.values():
            assert_close(got, want, 1e-6)


def test_a_network_of_torchvision_without_second_derivatives_in_torch() -> None:
    """Hardswish, hardsigmoid, squeeze-and-excitation and frozen statistics, against differences."""
    from torchvision.models import mobilenet_v3_small

    apply, params = functionalize(mobilenet_v3_small(num_classes=3).eval())
    params = {
        name: p + 0.05 * torch.randn_like(p) for name, p in params.items()
    }  # away from relu's kink at zero
    x, v, h = torch.randn(1, 3, 32, 32), directions(params), 1e-6
    gradient = grad(lambda p: torch.sin(apply(p, x)).sum())
    _, got = jvp(gradient, (params,), (v,))
    up, down = (gradient({name: p + sign * h * v[name] for name, p in params.items()}) for sign in (1, -1))
    difference = {name: (up[name] - down[name]) / (2 * h) for name in params}
    flat = lambda tree: torch.cat([leaf.flatten() for leaf in tree.values()])  # noqa: E731
    assert (flat(got) - flat(difference)).norm() <= 1e-7 * flat(difference).norm()


@pytest.mark.parametrize(("case", "text"), REFUSED, ids=[case.name for case, _ in REFUSED])
def test_what_cannot_work_raises(case: LayerCase, text: str) -> None:
    x = inputs(case)
    with pytest.raises((ValueError, NotImplementedError, RuntimeError), match=text):
        apply, params = functionalize(Net(case.make(), case.shape))
        apply(params, x[0, 0])
        grad(lambda p: vmap(lambda x: adapted_loss(apply, grad(apply), p, x))(x).sum())(params)


@pytest.mark.parametrize("case", RANDOM, ids=by_name)
def test_random_layers_follow_the_mode_of_randomness(case: LayerCase) -> None:
    apply, params = functionalize(Net(case.make(), case.shape))
    x = inputs(case)[:1, 0].expand(TASKS, *case.shape)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: apply(params, x))(x)
    losses = vmap(lambda x: apply(params, x), randomness="different")(x)
    assert losses.unique().numel() == TASKS
    assert vmap(lambda x: apply(params, x), randomness="same")(x).unique().numel() == 1


def test_every_class_of_torch_nn_has_a_place() -> None:
    listed = {case.name.split()[0] for case in (*LAYERS, *RANDOM, *(case for case, _ in REFUSED))}
    missing = set(nn.modules.__all__) - listed - NOT_LAYERS.keys()
    assert not missing, f"torch.nn has classes that are not in layer_cases.py: {sorted(missing)}"


# What torch 2.14.1 gets wrong. When one of these fails, torch has been repaired, and what stands in for the
# function in fmeta.functional.rewrites can go.


def layer_norm_loss(params: Params, x: Tensor) -> Tensor:
    hidden = nn.functional.layer_norm(x @ params["w"], (5,), params["scale"], params["shift"])
    return torch.sin(2 * hidden).mean()


def batch_norm_loss(params: Params, x: Tensor) -> Tensor:
    hidden = nn.functional.batch_norm(
        x @ params["w"], None, None, params["scale"], params["shift"], training=True
    )
    return torch.sin(2 * hidden).mean()


def instance_norm_loss(params: Params, x: Tensor) -> Tensor:
    hidden = (x @ params["w"])[None]
    hidden = nn.functional.instance_norm(hidden, None, None, params["scale"], params["shift"])
    return torch.sin(2 * hidden).mean()


@pytest.mark.parametrize("loss", [layer_norm_loss, batch_norm_loss, instance_norm_loss])
def test_torch_is_wrong_through_affine_norms_and_fmeta_is_right(loss: Loss) -> None:
    """The weight's gradient comes from saved statistics that outer levels take for constants."""
    channels = 6 if loss is instance_norm_loss else 5
    params = {"w": torch.randn(4, 5), "scale": torch.rand(channels) + 0.5, "shift": torch.randn(channels)}
    x = torch.randn(TASKS, 2, 6, 4)
    nested = grad(lambda p: vmap(lambda x: adapted_loss(loss, grad(loss), p, x))(x).mean())

    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    mean = sum(adapted_loss(loss, autograd(loss), leaves, task) for task in x) / TASKS
    want = dict(zip(leaves, torch.autograd.grad(mean, list(leaves.values())), strict=True))
    with fmeta.functional.differentiable():
        assert_close(nested(params), want, 1e-12)
    with pytest.raises(AssertionError, match="relative difference"):
        assert_close(nested(params), want, 1e-4)


def test_torch_is_wrong_through_weight_norm() -> None:
    v, g = torch.randn(3, 4, requires_grad=True), torch.rand(3, 1, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v, g: fmeta.functional.rewrites.weight_norm(v, g), (v, g))
    assert not torch.autograd.gradgradcheck(
        lambda v, g: torch._weight_norm(v, g), (v, g), raise_exception=False
    )
