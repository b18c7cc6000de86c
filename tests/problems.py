"""Tiny smooth problems in float64, for fmeta and for plain torch: regression, few-shot classification."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from reference import networks
from reference.loops import Episode, Loss
from torch import Tensor, nn
from torch.func import functional_call

import fmeta
from fmeta import Algorithm, Batch, Plan, Task

TASKS, SHOTS, QUERIES, WAYS = 3, 4, 5, 3


class Problem(NamedTuple):
    """An algorithm with something to run it on, in float64."""

    algorithm: Algorithm
    meta: Any
    tasks: Task  # leaves [TASKS, ...]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def regression_tasks(steps: int | None = None) -> Task:
    """Points in the plane with three targets; ``steps`` gives each inner step a batch of its own."""
    lead = (TASKS,) if steps is None else (TASKS, steps)
    support = Batch(normal(*lead, SHOTS, 2, seed=1), normal(*lead, SHOTS, WAYS, seed=2))
    return Task(support, Batch(normal(TASKS, QUERIES, 2, seed=3), normal(TASKS, QUERIES, WAYS, seed=4)))


def classification_tasks(*feature: int) -> Task:
    """Every class occurs in every support set; ``feature`` is the shape of one example."""

    def examples(count: int, seed: int) -> Batch:
        x = normal(TASKS, count, *feature, seed=seed)
        y = torch.arange(count) % WAYS
        return Batch(x, torch.stack([y.roll(i) for i in range(TASKS)]))

    return Task(examples(SHOTS, seed=5), examples(QUERIES, seed=6))


def network() -> dict[str, Tensor]:
    return networks.mlp_weights([2, 4, WAYS], generator(0))


def warp_network() -> dict[str, Tensor]:
    """Two layers and the head, with a layer between that does not adapt."""
    names = {"body0": "body0", "body1": "warp0", "body2": "body1", "head": "head"}
    weights = networks.mlp_weights([2, 4, 4, 4, WAYS], generator(0))
    return {f"{names[n.split('.')[0]]}.{n.split('.')[1]}": value for n, value in weights.items()}


def squared_error(params: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
    return ((networks.mlp(params, pair[0]) - pair[1]) ** 2).mean()


def context_network() -> dict[str, Tensor]:
    """A network of two more inputs, which are parameters."""
    return {"context": normal(2, seed=7), **networks.mlp_weights([4, 4, WAYS], generator(0))}


def context_error(params: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
    x = torch.cat([pair[0], params["context"].expand(len(pair[0]), -1)], 1)
    return ((networks.mlp(params, x) - pair[1]) ** 2).mean()


def log_cosh_error(params: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
    return torch.log(torch.cosh(networks.mlp(params, pair[0]) - pair[1])).mean()


def with_metrics(loss: Loss) -> fmeta.LossFn:
    """A reference's loss in the form that fmeta takes."""
    return lambda params, batch: (value := loss(params, (batch.x, batch.y)), {"double": 2 * value.detach()})


LOSS = with_metrics(squared_error)
EAGER = Plan(compile=False)


def negative_log_likelihood(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.logsumexp(1) - scores.gather(1, labels[:, None]).squeeze(1)).mean()


class ModelProblem(NamedTuple):
    """A torch module that classifies, in fmeta's form and in plain torch's."""

    apply: Callable[..., Tensor]
    params: dict[str, Tensor]
    loss: Loss


def model_problem(module: nn.Module) -> ModelProblem:
    """``loss`` calls the module itself under torch.autograd, native norm layers included."""
    for name, value in module.named_parameters():
        noise = normal(*value.shape, seed=len(name)) / max(value[0].numel(), 4) ** 0.5
        value.data = noise + 1 if name == "norm.weight" else noise
    apply, params = fmeta.functionalize(module)

    def loss(weights: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
        return negative_log_likelihood(functional_call(module, weights, (pair[0],)), pair[1])

    return ModelProblem(apply, params, loss)


def named_layers(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers)).double()


def batchnorm_model() -> nn.Module:
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    return named_layers(body=nn.Linear(2, 4), norm=norm, act=nn.Tanh(), head=nn.Linear(4, WAYS))


def layernorm_model() -> nn.Module:
    return named_layers(body=nn.Linear(2, 4), norm=nn.LayerNorm(4), act=nn.Tanh(), head=nn.Linear(4, WAYS))


def conv_model() -> nn.Module:
    conv = nn.Conv2d(1, 2, 3, stride=2, padding=1)
    return named_layers(conv=conv, act=nn.Tanh(), flat=nn.Flatten(), head=nn.Linear(8, WAYS))


def episodes(tasks: Task) -> list[Episode]:
    """A batch of tasks in the form of the references."""
    pairs = zip(*(leaf.unbind(0) for leaf in (*tasks.support, *tasks.query)), strict=True)
    return [((sx, sy), (qx, qy)) for sx, sy, qx, qy in pairs]
