"""The update of ``meta_transformer`` a block of parameters after the other, for a CPU.

What a parameter is told of its tensor are sums, so an update takes three passes: moments and sums, the policy, the
step. In each a block goes through all of it while its numbers stay in the first caches, where whole tensors would
go to memory and back between any two operations. Blocks are the task axis of the kernels, which therefore serve
models of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import tree
from fmeta.learned.features import Moments, Seen, averaged, corrections, of_parameters, seen, sums
from fmeta.learned.rule import real
from fmeta.parallel import compiled, compiled_map
from fmeta.types import Params

BLOCK = 1024


class Blockwise:
    """Updates of parameters of given shapes, all float32."""

    def __init__(self, rule: Any, shapes: Sequence[torch.Size], steps: float | None) -> None:
        """Nothing is compiled before the first update."""
        self.rule, self.shapes, self.steps = rule, list(shapes), steps
        counts = torch.tensor([max(1, -(-shape.numel() // BLOCK)) for shape in shapes])
        self.owner = torch.arange(len(shapes)).repeat_interleave(counts)
        ends = counts.cumsum(0)
        inside = torch.arange(len(self.owner)) - (ends - counts)[self.owner]
        numel = torch.tensor([shape.numel() for shape in shapes])
        self.filled = (numel[self.owner] - inside * BLOCK).clamp(max=BLOCK).float()  # of each block
        self.place = torch.arange(BLOCK).float()
        self.room: list[Tensor] = []
        """Weights, gradients, moves and new weights of a step, in memory that is used again."""
        self.spare: list[Tensor] = []
        """Where the next state is written, and the one after it over the last."""
        self.starts = ((ends - counts) * BLOCK).tolist()
        self.numel = numel.float()
        self.first = compiled_map("moments", self._first, (0, 0, 0, 0, 0, None, None))
        self.second = compiled_map("policy", self._second, (None, 0, 0, 0, 0, 0, 0, 0, None, None))
        self.third = compiled_map("step", self._third, (0, 0, 0, 0, 0, 0, None))
        self.plan = compiled("plan", self._plan)

    def packed(self, tensors: Sequence[Tensor], blocks: Tensor | None = None) -> Tensor:
        """All tensors one behind the other, ``[blocks, BLOCK]``, each filled up with zeros, in ``blocks`` if given."""
        blocks = torch.zeros(len(self.owner), BLOCK) if blocks is None else blocks
        torch._foreach_copy_(self.views(blocks), [x.reshape(-1) for x in tensors])
        return blocks

    def views(self, blocks: Tensor) -> list[Tensor]:
        """The place of each tensor in blocks, flat."""
        flat = blocks.view(-1)
        return [flat[s : s + n.numel()] for s, n in zip(self.starts, self.shapes, strict=True)]

    def start(self, state: Moments) -> Moments:
        """A state of tensors as one of blocks; takes the memory that steps need."""
        self.room, self.spare = ([torch.zeros(len(self.owner), BLOCK) for _ in range(4)] for _ in range(2))
        mu = tuple(self.packed(tree.leaves(m)) for m in state.mu)
        return state._replace(mu=mu, nu=self.packed(tree.leaves(state.nu)))

    def rest(self) -> None:
        """Let go of the memory, until the next ``start``."""
        self.room, self.spare = [], []

    def kept(self, state: Moments, names: Sequence[str]) -> Moments:
        """A state of blocks as one of tensors."""

        def named(blocks: Any) -> Params:
            leaves = zip(names, self.views(blocks), self.shapes, strict=True)
            return {name: view.view(shape).clone() for name, view, shape in leaves}

        return state._replace(mu=tuple(map(named, state.mu)), nu=named(state.nu))

    def __call__(
        self, theta: Params, grads: Params, state: Moments, params: Params, rates: Params
    ) -> tuple[Params, Moments, Tensor]:
        """New parameters and state, and whether the gradients were finite; if not, both are as they were."""
        p, g, raw, moved = self.room
        p, g = self.packed(list(params.values()), p), self.packed(list(grads.values()), g)
        theta = {name: leaf.float() for name, leaf in theta.items()}
        over = corrections(real(state.t + 1, params))
        about = self.filled, self.place, over
        mu, nu, part, finite = self.first(p, g, state.mu, state.nu, *about, into=self.spare)
        fine = finite.all()
        if not fine:  # known at once on a CPU
            return params, state, fine
        plans = self.plan(theta, self._totals(part), state._replace(mu=(), nu=()))
        policy = {name: leaf for name, leaf in theta.items() if name.startswith("policy.")}
        film, scale = plans.film[self.owner], plans.scale[self.owner]
        raw, square = self.second(policy, film, scale, p, g, mu, nu, *about, into=[raw])
        unit = torch.rsqrt(1 + self._totals(square) / self.numel.clamp(min=1))
        step = torch.stack(list(rates.values())) * -self.rule.lr * plans.log_step.exp()
        moved = self.third(p, mu[0], nu, raw, step[self.owner], unit[self.owner], over, into=[moved])
        self.spare = [
            *state.mu,
            state.nu,
        ]  # not before all is done: a step that is interrupted leaves the old state
        after = Moments(state.t + 1, mu, nu, plans.progress, plans.first)
        found = zip(params.items(), self.views(moved), strict=True)
        return {name: view.view(old.shape) for (name, old), view in found}, after, fine

    def _totals(self, parts: Tensor) -> Tensor:
        """Sums over the blocks of each tensor."""
        return parts.new_zeros(len(self.shapes), *parts.shape[1:]).index_add(0, self.owner, parts)

    @staticmethod
    def _first(p: Tensor, g: Tensor, mu: Any, nu: Tensor, filled: Tensor, place: Tensor, over: Tensor) -> Any:
        mu, nu = averaged(g, mu, nu)
        one = seen(p, g, mu, nu, over, 0.0)
        one = one._replace(root=torch.where(place < filled, one.root, 0.0))
        return mu, nu, sums(one), g.isfinite().all()

    def _plan(self, theta: Params, total: Tensor, state: Moments) -> Any:
        return self.rule.plans(theta, total.unbind(), state, self.shapes, self.steps)

    def _second(
        self, policy: Params, film: Tensor, scale: Tensor, p: Tensor, g: Tensor, mu: Any, nu: Tensor,
        filled: Tensor, place: Tensor, over: Tensor,
    ) -> Any:  # fmt: skip
        one: Seen = seen(p, g, mu, nu, over, 0.0)
        raw = self.rule.decides(policy, of_parameters(one, scale), film)
        raw = torch.where(place < filled, raw, 0.0)
        return raw, (raw * raw).sum()

    @staticmethod
    def _third(
        p: Tensor, quick: Tensor, nu: Tensor, raw: Tensor, step: Tensor, unit: Tensor, over: Tensor
    ) -> Tensor:
        one = seen(p, p, (quick,) * 3, nu, over, 0.0)
        return p + step * (one.adam + unit * raw)
