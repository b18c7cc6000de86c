"""Inner loops of later algorithms, by ``torch.autograd`` and dense matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reference.loops import Episode, Loss, Objective, Weights, gradient, trajectory
from reference.prototypes import prototypes
from reference.rules import Rule, sgd


def context(loss: Loss, rate: float, steps: int, name: str) -> Objective:
    """CAVIA (Zintgraf et al. 2019): one parameter adapts, from zero."""

    def objective(meta: Weights, episode: Episode) -> Tensor:
        support, query = episode
        start = {name: torch.zeros_like(meta[name]).requires_grad_()}
        support_loss = lambda moved, batch: loss({**meta, **moved}, batch)  # noqa: E731
        return loss({**meta, **trajectory(support_loss, start, support, sgd(rate), steps)[-1]}, query)

    return objective


def step_rates(loss: Loss, steps: int, weights: Sequence[float] | None, last: int | None = None) -> Objective:
    """MAML++ (Antoniou et al. 2019): a rate for every parameter and step, losses after every step."""

    def objective(meta: Any, episode: Episode) -> Tensor:
        support, query = episode

        def step(params: Weights, grads: Weights, state: Any, k: int) -> tuple[Weights, Any]:
            return {n: p - meta["lr"][n][k] * grads[n] for n, p in params.items()}, state

        visited = trajectory(loss, meta["params"], support, Rule(dict, step), steps, last=last)
        each = weights or [0.0] * steps + [1.0]
        return sum(w * loss(params, query) for w, params in zip(each, visited, strict=True))  # type: ignore[return-value]

    return objective


def curvature(loss: Loss, rate: float, steps: int) -> Objective:
    """Meta-Curvature (Park and Oliva 2019), the products written with ``einsum``."""

    def turned(g: Tensor, sides: Weights) -> Tensor:
        if g.dim() == 1:
            return torch.einsum("oa,a->o", sides["out"], g)
        if g.dim() == 2:
            return torch.einsum("oa,ib,ab->oi", sides["out"], sides["in"], g)
        flat = torch.einsum("oa,ib,fc,abc->oif", sides["out"], sides["in"], sides["filter"], g.flatten(2))
        return flat.reshape(g.shape)

    def objective(meta: Any, episode: Episode) -> Tensor:
        support, query = episode

        def step(params: Weights, grads: Weights, state: Any, k: int) -> tuple[Weights, Any]:
            return {n: p - rate * turned(grads[n], meta["curvature"][n]) for n, p in params.items()}, state

        return loss(trajectory(loss, meta["params"], support, Rule(dict, step), steps)[-1], query)

    return objective


def proto_head(
    embed: Callable[[Weights, Tensor], Tensor],
    nll: Callable[[Tensor, Tensor], Tensor],
    rate: float,
    steps: int,
    ways: int,
) -> Objective:
    """Proto-MAML (Triantafillou et al. 2020): embedding and head adapt, the head from the class means."""

    def loss(weights: Weights, pair: tuple[Tensor, Tensor]) -> Tensor:
        body = {n.removeprefix("body:"): w for n, w in weights.items() if n.startswith("body:")}
        return nll(embed(body, pair[0]) @ weights["weight"].T + weights["bias"], pair[1])

    def objective(meta: Weights, episode: Episode) -> Tensor:
        (x, y), query = episode
        means = torch.stack(prototypes(embed(meta, x), y, ways))
        start = {f"body:{n}": w.clone() for n, w in meta.items()}  # apart from what the head is made of
        start |= {"weight": 2 * means, "bias": -(means**2).sum(1)}
        return loss(trajectory(loss, start, (x, y), sgd(rate), steps)[-1], query)

    return objective


def implicit(
    loss: Loss, rate: float, steps: int, strength: float, solve: Callable[[Tensor, Tensor], Tensor],
    meta: Weights, episodes: Sequence[Episode],
) -> tuple[Weights, Tensor]:  # fmt: skip
    """iMAML (Rajeswaran et al. 2019, equation 6); ``solve(H / strength, g)`` with the whole Hessian."""
    total, losses = {n: torch.zeros_like(w) for n, w in meta.items()}, []
    for support, query in episodes:

        def pulled(params: Weights, batch: Any) -> Tensor:
            away = sum(((params[n] - meta[n]) ** 2).sum() for n in params)
            return loss(params, batch) + 0.5 * strength * away

        start = {n: w.detach().clone().requires_grad_() for n, w in meta.items()}
        end = trajectory(pulled, start, support, sgd(rate), steps)[-1]
        end = {n: w.detach().requires_grad_() for n, w in end.items()}
        names, sizes = list(end), [w.numel() for w in end.values()]

        def flat_loss(
            flat: Tensor, names: Any = names, sizes: Any = sizes, end: Any = end, s: Any = support
        ) -> Tensor:
            parts = zip(names, flat.split(sizes), strict=True)
            return loss({n: part.reshape(end[n].shape) for n, part in parts}, s)

        flat = torch.cat([w.detach().flatten() for w in end.values()])
        H = torch.autograd.functional.hessian(flat_loss, flat)
        value = loss(end, query)
        slope = torch.cat([g.detach().flatten() for g in gradient(value, end).values()])
        for n, part in zip(names, solve(H / strength, slope).split(sizes), strict=True):
            total[n] = total[n] + part.reshape(total[n].shape) / len(episodes)
        losses.append(value.detach())
    return total, torch.stack(losses).mean()
