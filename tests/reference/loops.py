"""Meta-gradients by differentiating a Python loop with ``torch.autograd``, one task after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from reference.rules import Rule, Weights, sgd

Pair = tuple[Any, Any]  # (x, y)
Episode = tuple[Pair, Pair]  # (support, query)
Loss = Callable[[Weights, Pair], Tensor]
Objective = Callable[[Any, Episode], Tensor]  # (meta, episode) -> scalar


def trajectory(
    loss: Loss,
    params: Weights,
    support: Pair,
    rule: Rule,
    steps: int,
    *,
    last: int | None = None,
    per_step: bool = False,
) -> list[Weights]:
    """The weights after 0, 1, ... ``steps`` updates, connected to ``params`` by autograd.

    The gradients of all but the ``last`` steps are constants; None keeps all of them differentiable. The
    weights themselves are never cut off. ``per_step``: support leaves are ``[steps, shots, ...]``.
    """
    weights, state = [params], rule.start(params)
    for k in range(steps):
        batch = pytree.tree_map(lambda leaf, k=k: leaf[k], support) if per_step else support
        grads = gradient(loss(weights[-1], batch), weights[-1])
        if last is not None and k < steps - last:
            grads = {name: value.detach() for name, value in grads.items()}
        new, state = rule.step(weights[-1], grads, state, k)
        weights.append(new)
    return weights


def gradient(value: Tensor, params: Weights) -> Weights:
    """Gradient of a scalar that can be differentiated again; zeros for weights it does not use."""
    grads = torch.autograd.grad(value, list(params.values()), create_graph=True, materialize_grads=True)
    return dict(zip(params, grads, strict=True))


def maml(
    loss: Loss,
    rule: Rule,
    steps: int,
    *,
    query_loss: Loss | None = None,
    adapts: Collection[str] | None = None,
    last: int | None = None,
    weights: Sequence[float] | None = None,
    per_step: bool = False,
) -> Objective:
    """The query loss after adaptation (MAML, Finn et al. 2017, algorithm 1).

    ``last=0`` is FOMAML, ``adapts`` the names that the inner loop changes (ANIL: the head), ``weights`` those
    of the query losses after 0, 1, ... ``steps`` updates (Antoniou et al. 2019, MAML++).
    """
    query_loss = query_loss or loss

    def objective(meta: Weights, episode: Episode) -> Tensor:
        support, query = episode
        moving = {name: value for name, value in meta.items() if adapts is None or name in adapts}

        def support_loss(params: Weights, batch: Pair) -> Tensor:
            return loss({**meta, **params}, batch)

        visited = trajectory(support_loss, moving, support, rule, steps, last=last, per_step=per_step)
        if weights is None:
            return query_loss({**meta, **visited[-1]}, query)
        values = [query_loss({**meta, **params}, query) for params in visited]
        terms = [weight * value for weight, value in zip(weights, values, strict=True)]
        return sum(terms[1:], terms[0])

    return objective


def metasgd(loss: Loss, steps: int, *, last: int | None = None) -> Objective:
    """Meta-SGD (Li et al. 2017, equation 3): a learned rate for every weight, in ``meta["lr"]``."""

    def objective(meta: dict[str, Weights], episode: Episode) -> Tensor:
        support, query = episode
        visited = trajectory(loss, meta["params"], support, sgd(meta["lr"]), steps, last=last)
        return loss(visited[-1], query)

    return objective


def meta_gradient(objective: Objective, meta: Any, episodes: Sequence[Episode]) -> tuple[Any, Tensor]:
    """Gradient and value of the objective's mean over tasks."""
    leaves, structure = pytree.tree_flatten(meta)
    total, value = [torch.zeros_like(leaf) for leaf in leaves], torch.zeros_like(leaves[0]).sum()
    for episode in episodes:
        inputs = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        result = objective(pytree.tree_unflatten(inputs, structure), episode)
        grads = torch.autograd.grad(result, inputs, materialize_grads=True)
        total = [kept + grad / len(episodes) for kept, grad in zip(total, grads, strict=True)]
        value = value + result.detach() / len(episodes)
    return pytree.tree_unflatten(total, structure), value


def reptile(
    loss: Loss, rule: Rule, steps: int, meta: Weights, episodes: Sequence[Episode]
) -> tuple[Weights, Tensor]:
    """Reptile (Nichol et al. 2018, algorithm 2): ``meta - mean(adapted)``, and the mean query loss."""
    ends = []
    for support, _ in episodes:
        start = {name: value.detach().clone().requires_grad_() for name, value in meta.items()}
        end = trajectory(loss, start, support, rule, steps)[-1]
        ends.append({name: value.detach() for name, value in end.items()})
    step = {name: meta[name] - torch.stack([end[name] for end in ends]).mean(0) for name in meta}
    losses = [loss(end, query) for end, (_, query) in zip(ends, episodes, strict=True)]
    return step, torch.stack(losses).mean().detach()
