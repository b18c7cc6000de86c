"""Inner loops of later algorithms, by ``torch.autograd`` and dense matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from reference.loops import Episode, Loss, Objective, Weights, gradient, meta_gradient, trajectory
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


def step_rates(
    loss: Loss,
    steps: int,
    weights: Sequence[float] | None,
    last: int | None = None,
    adapts: Collection[str] | None = None,
) -> Objective:
    """MAML++ (Antoniou et al. 2019): a rate for every parameter and step, losses after every step.

    After ``k`` updates, the parameters in ``meta["per_step"]`` have their value number ``k``.
    """
    each = weights or [0.0] * steps + [1.0]

    def objective(meta: Any, episode: Episode) -> Tensor:
        support, query = episode
        moving = {n: p for n, p in meta["params"].items() if adapts is None or n in adapts}
        total = torch.zeros((), dtype=torch.float64)
        for k in range(steps + 1):
            tables = meta.get("per_step", {})
            now = {**meta["params"], **{n: table[k] for n, table in tables.items()}, **moving}
            now = {n: now[n] for n in sorted(now)}  # "body0" before "head", as the network was built
            total = total + each[k] * loss(now, query)
            if k < steps:
                grads = gradient(loss(now, support), moving)
                if last is not None and k < steps - last:
                    grads = {n: g.detach() for n, g in grads.items()}
                moving = {n: p - meta["lr"][n][k] * grads[n] for n, p in moving.items()}
        return total

    return objective


def blended(
    loss: Loss, steps: int, learns_start: bool, last: int | None = None, adapts: str | None = None
) -> Objective:
    """A learned update (Andrychowicz et al. 2016): two learned numbers weigh the gradient and its running sum."""

    def objective(meta: Any, episode: Episode) -> Tensor:
        support, query = episode
        start = {n: p if learns_start else p.detach().requires_grad_() for n, p in meta["params"].items()}
        params = {n: p for n, p in start.items() if adapts is None or n.startswith(adapts)}
        sums = {n: torch.zeros_like(p) for n, p in params.items()}
        for k in range(steps):
            grads = gradient(loss({**start, **params}, support), params)
            if last is not None and k < steps - last:
                grads = {n: g.detach() for n, g in grads.items()}
            sums = {n: 0.5 * sums[n] + grads[n] for n in sums}
            params = {
                n: p - meta["theta"]["a"] * grads[n] - meta["theta"]["b"] * sums[n] for n, p in params.items()
            }
        # a start that stays has a gradient of zero, not none
        return loss({**start, **params}, query) + sum(0.0 * p.sum() for p in meta["params"].values())

    return objective


def uphill(at: Weights, grads: Weights, radius: float) -> Weights:
    """Foret et al. 2021, equation 2, with a root that can be differentiated."""
    norm = (torch.cat([g.flatten() for g in grads.values()]).square().sum() + 1e-8).sqrt()
    return {n: p + radius * grads[n] / norm for n, p in at.items()}


def sharp(loss: Loss, rate: float, steps: int, inner_radius: float, last: int | None = None) -> Objective:
    """Sharp-MAML, lower level (Abbas et al. 2022, algorithm 1): inner gradients from uphill of the parameters."""

    def objective(meta: Weights, episode: Episode) -> Tensor:
        support, query = episode
        params = meta
        for k in range(steps):
            above = uphill(params, gradient(loss(params, support), params), inner_radius)
            grads = gradient(loss(above, support), above)
            if last is not None and k < steps - last:
                grads = {n: g.detach() for n, g in grads.items()}
            params = {n: p - rate * grads[n] for n, p in params.items()}
        return loss(params, query)

    return objective


def sharp_outside(
    objective: Objective, outer_radius: float, meta: Any, episodes: Sequence[Episode]
) -> tuple[Any, Tensor]:
    """Sharp-MAML, upper level: the mean meta-gradient from uphill of meta, and the loss at meta."""
    grads, value = meta_gradient(objective, meta, episodes)
    return meta_gradient(objective, uphill(meta, grads, outer_radius), episodes)[0], value


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
