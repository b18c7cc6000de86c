"""The update of ``meta_transformer`` a block of parameters after the other, for a CPU.

What a parameter is told of its tensor are sums, so an update takes three passes: moments and sums, the policy, the
step. In each a block goes through all of it while its numbers stay in the first caches, where whole tensors would
go to memory and back between any two operations. Blocks are the task axis of the kernels, which therefore serve
models of any size; they read and write parameters where these lie, but for the last, shorter block of each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import tree
from fmeta.learned.features import Moments, Seen, averaged, corrections, of_parameters, seen, sums
from fmeta.learned.networks import by_numbers
from fmeta.learned.rule import real
from fmeta.parallel import Rows, by_rows, compiled
from fmeta.types import Params

BLOCK = 1024


class Layout:
    """Where the blocks of tensors of given shapes are."""

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        """An empty tensor has a block too, of which nothing counts."""
        self.shapes = shapes
        self.numel = torch.tensor([shape.numel() for shape in shapes])
        counts = (-(-self.numel // BLOCK)).clamp(min=1)
        ends = counts.cumsum(0)
        self.owner = torch.arange(len(shapes)).repeat_interleave(counts)
        inside = torch.arange(len(self.owner)) - (ends - counts)[self.owner]
        self.filled = (self.numel[self.owner] - inside * BLOCK).clamp(max=BLOCK).float()  # of each block
        self.starts = ((ends - counts) * BLOCK).tolist()
        self.bytes = inside * BLOCK * torch.float32.itemsize
        self.rest = (self.filled < BLOCK).nonzero()[:, 0]
        """Blocks that are shorter, the last of their tensors."""
        self.cut = [(int(self.owner[i]), int(inside[i]) * BLOCK, int(self.filled[i])) for i in self.rest]

    def views(self, blocks: Tensor) -> list[Tensor]:
        """The place of each tensor in memory of whole blocks, flat."""
        flat = blocks.view(-1)
        return [flat[s : s + n.numel()] for s, n in zip(self.starts, self.shapes, strict=True)]

    def packed(self, tensors: Sequence[Tensor]) -> Tensor:
        """All tensors one behind the other, ``[blocks, BLOCK]``, each filled up with zeros."""
        blocks = torch.zeros(len(self.owner), BLOCK)
        torch._foreach_copy_(self.views(blocks), [x.reshape(-1) for x in tensors])
        return blocks

    def room(self) -> Tensor:
        """Memory for the shorter blocks."""
        return torch.zeros(len(self.cut), BLOCK)

    def rows(self, tensors: Sequence[Tensor], room: Tensor) -> Rows:
        """The blocks of contiguous tensors where they are, the shorter ones copied to ``room``."""
        places = torch.tensor([x.data_ptr() for x in tensors])[self.owner] + self.bytes
        places[self.rest] = torch.arange(len(self.cut)) * room.stride(0) * room.itemsize + room.data_ptr()
        torch._foreach_copy_(*self.shorter(tensors, room))
        return Rows(places, BLOCK, [*tensors, room])

    def shorter(self, tensors: Sequence[Tensor], room: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The shorter blocks in their room, and in their tensors."""
        ends = [tensors[i].view(-1)[begin : begin + count] for i, begin, count in self.cut]
        return [line[:count] for line, (*_, count) in zip(room.unbind(), self.cut, strict=True)], ends


class Blockwise:
    """Updates of parameters of given shapes, all float32, in place."""

    def __init__(self, rule: Any, shapes: Sequence[torch.Size], steps: float | None) -> None:
        """Nothing is compiled before the first update."""
        self.rule, self.steps, self.layout = rule, steps, Layout(shapes)
        self.place = torch.arange(BLOCK).float()
        self.numel = self.layout.numel.float().clamp(min=1)
        self.lines: list[Tensor] = []
        """Room for the shorter blocks of parameters and gradients, and for the moves of a step."""
        self.spare: list[Tensor] = []
        """Where the next state is written, and the one after it over the last."""
        self.made: dict[str, Any] = {}
        self.plan = compiled("plan", self._plan)

    def start(self, state: Moments) -> Moments:
        """A state of tensors as one of blocks; takes the memory that steps need."""
        nothing = torch.zeros(len(self.layout.owner), BLOCK)
        self.lines = [self.layout.room(), self.layout.room(), nothing]
        self.spare = [torch.zeros_like(nothing) for _ in range(4)]
        mu = tuple(self.layout.packed(tree.leaves(m)) for m in state.mu)
        return state._replace(mu=mu, nu=self.layout.packed(tree.leaves(state.nu)))

    def rest(self) -> None:
        """Let go of the memory, until the next ``start``."""
        self.lines, self.spare = [], []

    def kept(self, state: Moments, names: Sequence[str]) -> Moments:
        """A state of blocks as one of tensors."""

        def named(blocks: Any) -> Params:
            leaves = zip(names, self.layout.views(blocks), self.layout.shapes, strict=True)
            return {name: view.view(shape).clone() for name, view, shape in leaves}

        return state._replace(mu=tuple(map(named, state.mu)), nu=named(state.nu))

    def __call__(
        self, theta: Params, grads: Params, state: Moments, params: Params, rates: Params
    ) -> tuple[Moments, Tensor]:
        """Update the parameters; the new state, and whether the gradients were finite, else all stays as it was."""
        weights = [p.contiguous() for p in params.values()]
        p = self.layout.rows(weights, self.lines[0])
        g = self.layout.rows([g.contiguous() for g in grads.values()], self.lines[1])
        theta = {name: leaf.float() for name, leaf in theta.items()}
        over, owner = corrections(real(state.t + 1, params)), self.layout.owner
        about = self.layout.filled, self.place, over
        *moments, part, finite = self.run("first", (p, g, state.mu, state.nu, *about), self.spare)
        total = self._totals(part)
        fine = finite.all() & total[:, 0].sum().isfinite()
        if not fine:  # known at once on a CPU
            return state, fine
        plans = self.plan(theta, total, state._replace(mu=(), nu=()))
        film = (plans.film + plans.film.new_tensor([[1.0], [0.0]]))[owner]
        policy = {name: leaf for name, leaf in theta.items() if name.startswith("policy.")}
        seen = p, g, tuple(moments[:-1]), moments[-1]
        raw, square = self.run("second", (policy, film, plans.scale[owner], *seen, *about), self.lines[2:])
        unit = torch.rsqrt(1 + self._totals(square) / self.numel)
        step = torch.stack(list(rates.values())) * -self.rule.lr * plans.log_step.exp()
        self.run("third", (p, moments[0], moments[-1], raw, step[owner], unit[owner], over), [p])
        self.returned(list(params.values()), weights)
        self.spare = [
            *state.mu,
            state.nu,
        ]  # not before all is done: a step that is interrupted leaves the old state
        return Moments(state.t + 1, tuple(moments[:-1]), moments[-1], plans.progress, plans.first), fine

    def returned(self, params: list[Tensor], weights: list[Tensor]) -> None:
        """What kernels wrote beside the parameters goes there."""
        room, ends = self.layout.shorter(weights, self.lines[0])
        torch._foreach_copy_(ends, room)
        for p, w in zip(params, weights, strict=True):
            if p is not w:
                p.copy_(w)

    def run(self, name: str, args: tuple[Any, ...], into: list[Any]) -> list[Any]:
        """One of the three passes."""
        if name not in self.made:
            passes: dict[str, tuple[Any, Any, Any]] = {
                "first": (self._first, (0, 0, 0, 0, 0, None, None), ()),
                "second": (self._second, (None, 0, 0, 0, 0, 0, 0, 0, None, None), ()),
                "third": (self._third, (0, 0, 0, 0, 0, 0, None), (0,)),
            }
            fn, axes, results = passes[name]
            self.made[name] = by_rows(fn, axes, args, results)
        return self.made[name](tree.leaves(args), into)

    def _totals(self, parts: Tensor) -> Tensor:
        """Sums over the blocks of each tensor."""
        return parts.new_zeros(len(self.numel), *parts.shape[1:]).index_add(0, self.layout.owner, parts)

    @staticmethod
    def _first(p: Tensor, g: Tensor, mu: Any, nu: Tensor, filled: Tensor, place: Tensor, over: Tensor) -> Any:
        mu, nu = averaged(g, mu, nu)
        one = seen(p, g, mu, nu, over, 0.0)
        one = one._replace(root=torch.where(place < filled, one.root, 0.0))
        return mu, nu, sums(one), g.isfinite().all()

    def _plan(self, theta: Params, total: Tensor, state: Moments) -> Any:
        return self.rule.plans(theta, total, state, self.layout.shapes, self.steps)

    @staticmethod
    def _second(
        policy: Params, film: Tensor, scale: Tensor, p: Tensor, g: Tensor, mu: Any, nu: Tensor,
        filled: Tensor, place: Tensor, over: Tensor,
    ) -> Any:  # fmt: skip
        one: Seen = seen(p, g, mu, nu, over, 0.0)
        raw = decided(policy, of_parameters(one, scale), film)
        raw = torch.where(place < filled, raw, 0.0)
        return raw, (raw * raw).sum()

    @staticmethod
    def _third(
        p: Tensor, quick: Tensor, nu: Tensor, raw: Tensor, step: Tensor, unit: Tensor, over: Tensor
    ) -> Tensor:
        one = seen(p, p, (quick,) * 3, nu, over, 0.0)
        return p + step * (one.adam + unit * raw)


def decided(policy: Params, numbers: Sequence[Tensor], film: Tensor) -> Tensor:
    """What ``Parts.decides`` gives, with its networks written out; scales of ``film`` are one more than there."""
    scale, shift = (part.unbind() for part in film.unbind())
    layer = by_numbers(policy, "policy.0", numbers)
    layer = [torch.relu(x * a + b) for x, a, b in zip(layer, scale, shift, strict=True)]
    d, m = by_numbers(policy, "policy.2", list(map(torch.relu, by_numbers(policy, "policy.1", layer))))
    return d * torch.exp(torch.tanh(m))
