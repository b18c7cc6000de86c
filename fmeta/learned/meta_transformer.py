"""``meta_transformer``: an optimiser that is a transformer (what state training is in) and a policy (what to do).

``params -= lr * exp(s) * (adam direction + unit(d * exp(m)))`` where, for each parameter tensor, the
transformer gives a log-step ``s`` and the context of the policy, and the policy gives a direction ``d`` and
a log-magnitude ``m`` for each single parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import tree
from fmeta.learned.blocks import Blockwise
from fmeta.learned.features import (
    FEATURES,
    TOKEN,
    Moments,
    averaged,
    corrections,
    of_parameters,
    of_tensors,
    progressed,
    scales,
    seen,
    start,
    sums,
)
from fmeta.learned.networks import Weights, by_columns, linear, transformer
from fmeta.learned.rule import TIMESCALES, LearnedOptimizer, learned_optimizer, real, soft_unit, time_features
from fmeta.rates import positive
from fmeta.tasks.checks import check_counts
from fmeta.types import Params, Transform, Tree

LARGEST = 5.0
"""Bound of the log-step: a step is within a factor of 150 of ``lr``."""


class Plans(NamedTuple):
    """What the transformer says of all parameter tensors, and the state that it told the time from."""

    log_step: Tensor  # [tensors]
    film: Tensor  # [tensors, 2, hidden]: scale and shift of the policy's first hidden layer
    scale: Tensor  # [tensors, 4], see ``scales``
    progress: Tensor
    first: Tensor


def meta_transformer(
    *,
    lr: float = 1e-3,
    width: int = 32,
    layers: int = 2,
    heads: int = 4,
    hidden: int = 8,
    knowledge: bool = True,
    policy: bool = True,
    longest: int | None = None,
) -> LearnedOptimizer:
    """A learned optimiser made of a transformer (knowledge) and a policy (decision).

    The transformer sees one token for each parameter tensor (sizes and angles of its gradient, momenta and weights,
    its shape) and one for the whole training (time, how far it is, how gradients have shrunk); it has no positions,
    so the order of tensors does not matter, and its cost does not depend on how many parameters they hold. The policy
    is a small network that sees eight numbers of each parameter.

    With the weights that ``init`` draws it is Adam at rate ``lr``, exactly: whatever learning does, it
    starts from there. A step is bounded whatever the weights: ``lr * exp(5)`` times Adam's direction and a
    vector of mean square 1.

    **Meta-gradient:** exact to ``theta``, and safe at zero gradients in its inner form, as Adam's.
    **Cost:** 4 numbers of state a parameter, about 170 multiplications a parameter and step. ``Optimizer`` on a CPU
    holds 5 numbers a parameter more, memory that steps use again.

    Args:
        lr: step at the start, above 0.
        width: of the transformer's tokens, a multiple of ``heads``.
        layers: of the transformer.
        heads: of its attention.
        hidden: width of the policy's two hidden layers.
        knowledge: whether there is a transformer; without, all tensors are treated alike, whatever the time.
        policy: whether there is a policy; without, what is learned is a step size for each tensor.
        longest: steps of the longest training that it learns on. On a longer one (``steps`` above this) its clock goes
            slower by as much, and without ``steps`` it stops there, so that it never reads a time that it has not seen;
            None reads the time as it is.

    Returns:
        A ``LearnedOptimizer``: ``rule(theta, steps=n)`` is a ``Transform``.

    Raises:
        ValueError: for a width that ``heads`` does not divide, or neither knowledge nor policy.

    Example:
        >>> import torch, fmeta
        >>> rule = fmeta.learned.meta_transformer(lr=0.1)
        >>> inner, params = rule(rule.init(0), steps=100), {"w": torch.zeros(2)}
        >>> inner.update({"w": torch.tensor([3.0, -0.01])}, inner.init(params), params)[0]["w"]
        tensor([-0.1000,  0.1000])

    References:
        The parts are those of the literature: attention over tensors (Gärtner et al., "Transformer-based learned
        optimization", 2023, arXiv 2212.01055), a network for each parameter steered by one for each tensor
        (Metz et al., "VeLO", 2022, arXiv 2211.09760), normalised updates (Moudgil et al., "Celo", 2025,
        arXiv 2501.12670). The sum is our own: Adam's direction as the start, learned corrections beside it.
        The update has no loss to read, so the transformer is told of progress by the size of gradients.
    """
    settings: dict[str, Any] = dict(lr=lr, width=width, layers=layers, heads=heads, hidden=hidden)
    settings |= dict(knowledge=knowledge, policy=policy) | told(longest)
    check_settings(
        "meta_transformer", lr, width=width, layers=layers, heads=heads, hidden=hidden, **told(longest)
    )
    if not (knowledge or policy):
        raise ValueError(
            "meta_transformer: knowledge or policy must be true, got neither. fmeta.adam has neither."
        )
    parts = Parts(lr, width, layers, heads, hidden, knowledge, policy, longest)
    return learned_optimizer(
        "meta_transformer", settings, parts.draw, parts.make, parts.blocks if policy else None
    )


def told(longest: int | None) -> dict[str, int]:
    """The setting, where it is given: files from before there was one have none."""
    return {} if longest is None else {"longest": longest}


def check_settings(call: str, lr: float, **sizes: int) -> None:
    """Refuse a rate or sizes that no such transformer has."""
    positive(call, "lr", lr)
    check_counts(call, **sizes)
    width, heads = sizes["width"], sizes["heads"]
    if width % heads:
        raise ValueError(
            f"{call}: width must be a multiple of heads, got {width} and {heads}. Pass 32 and 4, say."
        )


class Parts(NamedTuple):
    """The two networks, by their sizes."""

    lr: float
    width: int
    layers: int
    heads: int
    hidden: int
    knowledge: bool
    policy: bool
    longest: int | None = None

    def draw(self, seed: int) -> Params:
        """First weights: what leaves a network is zero."""
        weights, width, hidden = Weights(seed), self.width, self.hidden
        if self.knowledge:
            weights.linear("token", TOKEN, width)
            weights.linear("global", len(TIMESCALES) + 3 + 2, width)
            weights.transformer("transformer", width, self.layers)
            weights.linear("step", width, 1, scale=0.0)
        if self.knowledge and self.policy:
            weights.linear("film", width, 2 * hidden, scale=0.0)
        if self.policy:
            weights.linear("policy.0", FEATURES, hidden)
            weights.linear("policy.1", hidden, hidden)
            weights.linear("policy.2", hidden, 2, scale=0.0)
        return weights.found

    def knows(self, theta: Params, tokens: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """The transformer, ``[tensors, TOKEN] -> [tensors], [tensors, 2, hidden]``: log-steps and films."""
        count = len(tokens)
        if not self.knowledge:
            return whole.new_zeros(count), whole.new_zeros(count, 2, self.hidden)
        both = torch.cat([linear(theta, "token", tokens), linear(theta, "global", whole)[None]])
        seen = transformer(theta, "transformer", both, self.layers, self.heads)[:count]
        steps = LARGEST * torch.tanh(linear(theta, "step", seen)[:, 0] / LARGEST)
        films = linear(theta, "film", seen) if self.policy else steps.new_zeros(count, 2 * self.hidden)
        return steps, films.reshape(count, 2, self.hidden)

    def plans(
        self,
        theta: Params,
        total: Tensor,
        state: Moments,
        shapes: Sequence[torch.Size],
        steps: Tensor | float | None,
    ) -> Plans:
        """From the ``sums`` of all tensors, ``[tensors, 10]``, and the state before, to what is done with each."""
        numel = [shape.numel() for shape in shapes]
        mean = total / total.new_tensor(numel).clamp(min=1)[:, None]
        progress, first = progressed(state, total[:, 0].sum(), sum(numel))
        time = time_features((state.t + 1).to(mean.dtype), steps, self.longest)
        known = self.knows(theta, of_tensors(mean, shapes), torch.cat([time, progress]))
        return Plans(*known, scales(mean), progress, first)

    @staticmethod
    def decides(theta: Params, seen: Sequence[Tensor], film: Tensor) -> Tensor:
        """The policy: from ``FEATURES`` numbers of each parameter to its move before that is bounded, ``[numel]``."""
        scale, shift = film[..., None].unbind()
        numbers = torch.stack(list(seen)).reshape(FEATURES, -1)
        first = torch.relu(by_columns(theta, "policy.0", numbers) * (1 + scale) + shift)
        d, m = by_columns(theta, "policy.2", torch.relu(by_columns(theta, "policy.1", first))).unbind()
        return d * torch.exp(torch.tanh(m))

    def blocks(self, shapes: Sequence[torch.Size], steps: float | None) -> Blockwise:
        """The update of parameters of these shapes by blocks."""
        return Blockwise(self, shapes, steps)

    def make(self, theta: Params, steps: Tensor | float | None, root: float) -> Transform:
        """The optimiser with these weights."""

        def update(grads: Tree, state: Moments, params: Tree) -> tuple[Tree, Moments]:
            leaves = list(map(tree.leaves, (params, grads, *state.mu, state.nu)))
            over = corrections(real(state.t + 1, params))
            after = [averaged(g, ms, v) for _, g, *ms, v in zip(*leaves, strict=True)]
            now = [
                seen(p, g, mu, nu, over, root)
                for p, g, (mu, nu) in zip(leaves[0], leaves[1], after, strict=True)
            ]
            plans = self.plans(
                theta, torch.stack(list(map(sums, now))), state, [p.shape for p in leaves[0]], steps
            )
            moves = []
            for one, log_step, film, scale in zip(now, *(part.unbind() for part in plans[:3]), strict=True):
                move = one.adam
                if self.policy:
                    move = move + soft_unit(self.decides(theta, of_parameters(one, scale), film)).reshape(
                        move.shape
                    )
                moves.append((-self.lr * torch.exp(log_step) * move).to(one.param.dtype))
            back = lambda found: tree.unflatten(list(found), tree.flatten(params)[1])  # noqa: E731
            mu = tuple(map(back, zip(*(ms for ms, _ in after), strict=True)))
            return back(moves), Moments(
                state.t + 1, mu, back(v for _, v in after), plans.progress, plans.first
            )

        return Transform(start, update)
