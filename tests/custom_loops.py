"""Algorithms of the tests' own, which read meta where fmeta's do not, each with its reference."""

from __future__ import annotations

from typing import Any

import problems
import torch
from problems import WAYS, Problem, network
from reference import networks, rules
from reference.loops import Episode, Objective, Weights, trajectory
from torch import Tensor

from fmeta import Adapted, Batch, InnerLoop, Task, Transform
from fmeta.adapt import from_loop

LEARNED_STEPS = 3


def anchored(rate: float, pull: float) -> Transform:
    """A rule whose first state is the parameters themselves."""

    def update(grads: Weights, anchor: Weights, params: Weights) -> tuple[Weights, Weights]:
        return {name: -rate * (grads[name] + pull * (params[name] - anchor[name])) for name in grads}, anchor

    return Transform(dict, update)


def decayed_error(weights: Weights, log_decay: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Squared error plus a weight decay that is learned with the weights."""
    size = torch.stack([value.pow(2).sum() for value in weights.values()]).sum()
    return ((networks.mlp(weights, x) - y) ** 2).mean() + log_decay.exp() * size


def learned_inner_loop() -> Problem:
    """Learned weights, decay of the support loss, and one rate for every step and tensor (LSLR)."""

    def step_rates(meta: Any, k: Tensor) -> Transform:
        def update(grads: Weights, state: Any, params: Weights) -> tuple[Weights, Any]:
            rates = {name: value.index_select(0, k[None])[0] for name, value in meta["rates"].items()}
            return {name: -rates[name] * grads[name] for name in grads}, state

        return Transform(lambda params: (), update)

    loop = InnerLoop(
        start=lambda meta, support: meta["weights"],
        loss=lambda params, meta, batch, k: (decayed_error(params, meta["log_decay"], *batch), {}),
        inner=step_rates,
        outer=lambda params, meta, task: (problems.squared_error(params, tuple(task.query)), {}),
        steps=LEARNED_STEPS,
    )
    rates = {key: 0.1 + 0.02 * torch.arange(LEARNED_STEPS) for key in network()}
    meta = {"weights": network(), "log_decay": torch.tensor(-3.0), "rates": rates}
    meta = torch.utils._pytree.tree_map(torch.Tensor.double, meta)
    return Problem(from_loop(lambda params: meta, loop, no_prediction), meta, problems.regression_tasks())


def learned_inner_objective(meta: Any, episode: Episode) -> Tensor:
    (x, y), (query_x, query_y) = episode
    rates = [{key: value[k] for key, value in meta["rates"].items()} for k in range(LEARNED_STEPS)]

    def step(params: Weights, grads: Weights, state: Any, k: int) -> tuple[Weights, Any]:
        return {key: value - rates[k][key] * grads[key] for key, value in params.items()}, state

    loss = lambda params, pair: decayed_error(params, meta["log_decay"], *pair)  # noqa: E731
    end = trajectory(loss, meta["weights"], (x, y), rules.Rule(dict, step), LEARNED_STEPS)[-1]
    return problems.squared_error(end, (query_x, query_y))


def hidden(weights: Weights, x: Tensor) -> Tensor:
    return torch.tanh(x @ weights["body0.weight"].T + weights["body0.bias"])


def class_scores(weights: Weights, head: Weights, x: Tensor) -> Tensor:
    return hidden(weights, x) @ head["weight"].T + head["bias"]


def head_from_support() -> Problem:
    """The head starts from the class means of the support set (ProtoMAML) and adapts; the body is shared."""

    def start(meta: Weights, support: Batch) -> Weights:
        member = (support.y[:, None] == torch.arange(WAYS)).to(support.x.dtype)
        means = member.T @ hidden(meta, support.x) / member.sum(0)[:, None]
        return {"weight": 2 * means, "bias": -means.pow(2).sum(1)}

    def loss(head: Weights, meta: Weights, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return problems.negative_log_likelihood(class_scores(meta, head, batch.x), batch.y), {}

    rule = anchored(0.2, 0.5)
    loop = InnerLoop(
        start=start,
        loss=lambda head, meta, batch, k: loss(head, meta, batch),
        inner=lambda meta, k: rule,
        outer=lambda head, meta, task: loss(head, meta, task.query),
        steps=3,
    )
    body = {key: value for key, value in network().items() if key.startswith("body0")}
    tasks: Task = problems.classification_tasks(2)
    return Problem(from_loop(lambda params: body, loop, no_prediction), body, tasks)


def head_from_support_objective(meta: Weights, episode: Episode) -> Tensor:
    (x, y), (query_x, query_y) = episode
    embedded = hidden(meta, x)
    means = torch.stack([embedded[y == way].mean(0) for way in range(WAYS)])
    head = {"weight": 2 * means, "bias": -means.pow(2).sum(1)}

    def loss(head: Weights, pair: tuple[Tensor, Tensor]) -> Tensor:
        return problems.negative_log_likelihood(class_scores(meta, head, pair[0]), pair[1])

    end = trajectory(loss, head, (x, y), rules.anchored(0.2, 0.5), 3)[-1]
    return loss(end, (query_x, query_y))


def no_prediction(meta: Any, adapted: Adapted, x: Any) -> Tensor:
    raise AssertionError("these algorithms are only differentiated")


OBJECTIVES: dict[str, tuple[Any, Objective]] = {
    "custom learned rates and decay": (learned_inner_loop, learned_inner_objective),
    "custom head from support": (head_from_support, head_from_support_objective),
}
