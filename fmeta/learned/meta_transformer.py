"""``meta_transformer``: an optimiser that is a transformer (what state training is in) and a policy (what to do).

``params -= lr * exp(s) * (adam direction + unit(d * exp(m)))`` where, for each parameter tensor, the
transformer gives a log-step ``s`` and the context of the policy, and the policy gives a direction ``d`` and
a log-magnitude ``m`` for each single parameter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmeta import tree
from fmeta.learned.features import FEATURES, TOKEN, Moments, corrected, of_parameters, of_tensor, start
from fmeta.learned.networks import Weights, by_columns, linear, transformer
from fmeta.learned.rule import TIMESCALES, LearnedOptimizer, learned_optimizer, real, soft_unit, time_features
from fmeta.rates import positive
from fmeta.types import Params, Transform, Tree

LARGEST = 5.0
"""Bound of the log-step: a step is within a factor of 150 of ``lr``."""


class Decision(NamedTuple):
    """What the transformer says of one parameter tensor."""

    log_step: Tensor  # []
    film: Tensor  # [2, hidden]: scale and shift of the policy's first hidden layer


def meta_transformer(
    *,
    lr: float = 1e-3,
    width: int = 32,
    layers: int = 2,
    heads: int = 4,
    hidden: int = 8,
    knowledge: bool = True,
    policy: bool = True,
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
    **Cost:** 4 numbers of state a parameter, about 170 multiplications a parameter and step.

    Args:
        lr: step at the start, above 0.
        width: of the transformer's tokens, a multiple of ``heads``.
        layers: of the transformer.
        heads: of its attention.
        hidden: width of the policy's two hidden layers.
        knowledge: whether there is a transformer; without, all tensors are treated alike, whatever the time.
        policy: whether there is a policy; without, what is learned is a step size for each tensor.

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
    settings = dict(lr=lr, width=width, layers=layers, heads=heads, hidden=hidden)
    settings |= dict(knowledge=knowledge, policy=policy)
    positive("meta_transformer", "lr", lr)
    if width % heads or not (knowledge or policy):
        raise ValueError(
            f"meta_transformer: width must be a multiple of heads, and knowledge or policy true, got {settings}. "
            "fmeta.adam has neither."
        )

    parts = Parts(lr, width, layers, heads, hidden, knowledge, policy)
    return learned_optimizer("meta_transformer", settings, parts.draw, parts.make)


class Parts(NamedTuple):
    """The two networks, by their sizes."""

    lr: float
    width: int
    layers: int
    heads: int
    hidden: int
    knowledge: bool
    policy: bool

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

    def knows(self, theta: Params, tokens: list[Tensor], whole: Tensor) -> list[Decision]:
        """The transformer: one decision for each tensor's token."""
        if not self.knowledge:
            return [Decision(whole.new_zeros(()), whole.new_zeros(2, self.hidden)) for _ in tokens]
        stacked = linear(theta, "token", torch.stack(tokens))
        both = torch.cat([stacked, linear(theta, "global", whole)[None]])
        seen, _ = transformer(theta, "transformer", both, self.layers, self.heads).split([len(tokens), 1])
        steps = LARGEST * torch.tanh(linear(theta, "step", seen)[:, 0] / LARGEST)
        films = linear(theta, "film", seen) if self.policy else steps.new_zeros(len(tokens), 2 * self.hidden)
        return list(map(Decision, steps.unbind(), films.reshape(-1, 2, self.hidden).unbind()))

    @staticmethod
    def decides(theta: Params, seen: Tensor, told: Decision) -> Tensor:
        """The policy: a move for each parameter, ``[FEATURES, numel] -> [numel]``."""
        scale, shift = told.film[..., None].unbind()
        first = torch.relu(by_columns(theta, "policy.0", seen) * (1 + scale) + shift)
        d, m = by_columns(theta, "policy.2", torch.relu(by_columns(theta, "policy.1", first))).unbind()
        return soft_unit(d * torch.exp(torch.tanh(m)))

    def make(self, theta: Params, steps: Tensor | float | None, root: float) -> Transform:
        """The optimiser with these weights."""

        def update(grads: Tree, state: Moments, params: Tree) -> tuple[Tree, Moments]:
            state, now = corrected(grads, state, params, root)
            tokens = [of_tensor(one) for one in now]
            whole = torch.cat([time_features(real(state.t, params), steps), state.progress])
            moves = []
            for one, told in zip(now, self.knows(theta, tokens, whole), strict=True):
                move = one.adam
                if self.policy:
                    move = move + self.decides(theta, of_parameters(one), told).reshape(move.shape)
                moves.append((-self.lr * torch.exp(told.log_step) * move).to(one.param.dtype))
            return tree.unflatten(moves, tree.flatten(params)[1]), state

        return Transform(start, update)
