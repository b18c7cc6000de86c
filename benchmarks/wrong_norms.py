"""Fact 1: nested torch.func transforms are silently wrong through affine norm layers; fmeta is right.

The meta-gradient of one-step MAML in float64: how far torch.func and fmeta are from a plain loop over tasks
on torch.autograd. Finite differences, which need no derivative rule, vouch for the loop.

    python -m benchmarks.wrong_norms
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fmeta
from benchmarks.harness import record, table
from benchmarks.problems import classification
from fmeta.types import Params, Task

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


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    flat, image = (
        classification(4, 3, 3, 8, dtype=torch.float64),
        classification(4, 3, 3, 2, 8, 8, dtype=torch.float64),
    )
    nets: dict[str, tuple[nn.Module, Task]] = {
        "MLP, one LayerNorm": (nn.Sequential(nn.Linear(8, 16), *layers(16, 1), nn.Linear(16, 3)), flat),
        "MLP, four LayerNorms": (nn.Sequential(nn.Linear(8, 16), *layers(16, 4), nn.Linear(16, 3)), flat),
        "convnet, two BatchNorms": (
            nn.Sequential(
                nn.Conv2d(2, 6, 3),
                nn.BatchNorm2d(6, track_running_stats=False),
                nn.Tanh(),
                nn.Conv2d(6, 6, 3),
                nn.BatchNorm2d(6, track_running_stats=False),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(96, 3),
            ),
            image,
        ),
        "convnet, InstanceNorm": (
            nn.Sequential(
                nn.Conv2d(2, 6, 3),
                nn.InstanceNorm2d(6, affine=True),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(216, 3),
            ),
            image,
        ),
        "MLP without norm": (nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), flat),
    }
    rows = []
    for name, (net, tasks) in nets.items():
        found = measure(net, tasks)
        record("wrong_norms", {"net": name}, found)
        rows.append([name, *(f"{value:.1e}" for value in found.values())])
    print(f"Relative error of the meta-gradient of one-step MAML, float64, torch {torch.__version__}\n")
    head = ["network", "torch.func, nested", "fmeta", "(the loop against finite differences)"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
