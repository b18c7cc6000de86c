"""Fact 1: nested torch.func transforms are silently wrong through affine norm layers; fmeta is right.

The meta-gradient of one-step MAML in float64: how far torch.func and fmeta are from a plain loop over tasks
on torch.autograd. Finite differences, which need no derivative rule, vouch for the loop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fmeta
from benchmarks.options import Options
from benchmarks.results import Results
from fmeta.types import Batch, Params, Task

LR = 0.5


def torch_objective(net: nn.Module, params: Params, tasks: Task) -> Tensor:
    """One-step MAML as the torch.func tutorials write it."""

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (x,)), y)

    def one(task: Task) -> Tensor:
        grads = grad(loss)(params, *task.support)
        return loss({name: params[name] - LR * grads[name] for name in params}, *task.query)

    return vmap(one)(tasks).mean()


def loop(net: nn.Module, params: Params, tasks: Task) -> Params:
    """The same meta-gradient by torch.autograd, task after task: slow, and right."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(tasks.support.y)):
        support, query = [(batch.x[i], batch.y[i]) for batch in tasks]
        loss = F.cross_entropy(functional_call(net, leaves, (support[0],)), support[1])
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        adapted = {name: p - LR * g for (name, p), g in zip(leaves.items(), grads, strict=True)}
        total = total + F.cross_entropy(functional_call(net, adapted, (query[0],)), query[1]) / len(
            tasks.support.y
        )
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def error(grads: Params, truth: Params) -> float:
    """Relative error of a gradient, ``|g - truth| / |truth|`` over all parameters together."""
    flat = lambda tree: torch.cat([tree[name].flatten() for name in truth])  # noqa: E731
    return ((flat(grads) - flat(truth)).norm() / flat(truth).norm()).item()


def finite_differences(net: nn.Module, params: Params, tasks: Task, grads: Params) -> float:
    """Relative error of a gradient along a random direction, by the five-point rule."""
    generator = torch.Generator().manual_seed(1)
    direction = {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in params.items()}
    step = 1e-4

    def value(times: int) -> float:
        return torch_objective(
            net, {k: p + times * step * direction[k] for k, p in params.items()}, tasks
        ).item()

    with torch.no_grad():
        slope = (8 * (value(1) - value(-1)) - (value(2) - value(-2))) / (12 * step)
    return abs(sum((grads[k] * direction[k]).sum().item() for k in grads) / slope - 1)


def measure(net: nn.Module, tasks: Task) -> dict[str, float]:
    """Relative errors on one network, whose affine weights are moved away from ones and zeros."""
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn_like(p)
    apply, params = fmeta.functionalize(net)
    algorithm = fmeta.maml(fmeta.losses.cross_entropy(apply), fmeta.sgd(LR), steps=1)
    truth = loop(net, params, tasks)
    return {
        "torch_func": error(grad(lambda p: torch_objective(net, p, tasks))(params), truth),
        "fmeta": error(fmeta.meta_grad(algorithm, fmeta.Plan(compile=False))(params, tasks)[0], truth),
        "loop_vs_finite_differences": finite_differences(net, params, tasks, truth),
    }


def layers(width: int, depth: int) -> list[nn.Module]:
    """Blocks of linear, layer norm, tanh."""
    return [m for _ in range(depth) for m in (nn.Linear(width, width), nn.LayerNorm(width), nn.Tanh())]


def networks() -> dict[str, tuple[nn.Module, bool]]:
    """Networks by name, and whether they take images."""
    norm = lambda: nn.BatchNorm2d(6, track_running_stats=False)  # noqa: E731
    flat = lambda depth: nn.Sequential(nn.Linear(8, 16), *layers(16, depth), nn.Linear(16, 3))  # noqa: E731
    return {
        "MLP, one LayerNorm": (flat(1), False),
        "MLP, four LayerNorms": (flat(4), False),
        "convnet, two BatchNorms": (
            nn.Sequential(
                nn.Conv2d(2, 6, 3), norm(), nn.Tanh(), nn.Conv2d(6, 6, 3), norm(), nn.Tanh(),
                nn.Flatten(), nn.Linear(96, 3),
            ),
            True,
        ),
        "convnet, InstanceNorm": (
            nn.Sequential(
                nn.Conv2d(2, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.Tanh(), nn.Flatten(), nn.Linear(216, 3)
            ),
            True,
        ),
        "MLP without norm": (nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), False),
    }  # fmt: skip


def tasks_of(*shape: int) -> Task:
    """Four tasks of three classes and three shots, float64."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Batch:
        x = torch.randn(4, 9, *shape, generator=generator, dtype=torch.float64)
        return Batch(x, torch.arange(3).repeat(4, 3))

    return Task(draw(), draw())


def run(options: Options, results: Results) -> None:
    """Each network; ``who`` is what computed the meta-gradient that is compared with the loop."""
    torch.manual_seed(0)
    flat, image = tasks_of(8), tasks_of(2, 8, 8)
    for name, (net, images) in networks().items():
        if name not in options.pick([name]) or results.has("norms", name):
            continue
        for who, value in measure(net, image if images else flat).items():
            results.add("norms", name, who, {"lr": LR, "dtype": "float64"}, {"error": value}, "measured")
