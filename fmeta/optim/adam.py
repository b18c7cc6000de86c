"""Adam, AMSGrad and AdamW."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fmeta import rates, tree
from fmeta.rates import RateLike
from fmeta.types import Transform, Tree


class AdamState(NamedTuple):
    """The moments are those before bias correction."""

    t: Tensor  # [], int64: updates made so far
    mu: Tree  # like params: mean of the gradients
    nu: Tree  # like params: mean of their squares
    nu_max: Tree  # like params: largest nu so far; () without amsgrad


def adam(
    lr: RateLike = 1e-3,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float | None = None,
    weight_decay: RateLike = 0.0,
    amsgrad: bool = False,
) -> Transform:
    """Adam, equal to ``torch.optim.Adam``: steps of about ``lr`` whatever the gradients' scale.

    With ``g = grads + weight_decay * params`` and ``t`` the number of this update::

        mu = b1 * mu + (1 - b1) * g               nu = b2 * nu + (1 - b2) * g^2
        updates = -lr * (mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t) + eps_root) + eps)

    and with ``amsgrad`` the largest ``nu`` so far in place of ``nu``.

    **Meta-gradient:** exact. At a zero gradient the root of 0 has an infinite slope, and one such entry
    makes a whole meta-gradient NaN; ``eps_root > 0`` makes the slope finite. So it is 0 for an outer rule
    and 1e-8 for an inner one unless you set it; the inner rule then takes smaller steps than
    ``torch.optim.Adam`` where gradients are below about 1e-4.

    Args:
        lr: at least 0; a number, a tensor (may be differentiated), a schedule, or a dict with the parameters'
            keys. The default, like those of ``b1``, ``b2`` and ``eps``, is the paper's.
        b1: decay of the mean, in [0, 1).
        b2: decay of the mean square, in [0, 1).
        eps: at least 0, outside the root.
        eps_root: at least 0, inside the root; None for 0 outside and 1e-8 inside an inner loop.
        weight_decay: at least 0, in any form that ``lr`` may have; added to the gradient, unlike adamw's.
        amsgrad: use the largest mean square so far.

    Example:
        >>> import torch
        >>> rule, params = adam(0.1), {"w": torch.zeros(2)}
        >>> updates, state = rule.update({"w": torch.tensor([3.0, -0.01])}, rule.init(params), params)
        >>> updates["w"], state.t
        (tensor([-0.1000,  0.1000]), tensor(1))

    References:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, arXiv 1412.6980, Algorithm 1.
        Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond", 2018, arXiv 1904.09237, Algorithm 2;
        as in torch, the maximum is taken before the bias correction, which the paper leaves out.
    """
    return _adam("adam", lr, b1, b2, eps, eps_root, weight_decay, amsgrad, decoupled=False)


def adamw(
    lr: RateLike = 1e-3,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float | None = None,
    weight_decay: RateLike = 1e-2,
    amsgrad: bool = False,
) -> Transform:
    """Adam with decoupled weight decay, equal to ``torch.optim.AdamW``.

    ``updates = (those of adam on grads) - lr * weight_decay * params``: the decay passes the moments by.
    Arguments, inner form and meta-gradient as for :func:`adam`; the default ``weight_decay`` is torch's.

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, arXiv 1711.05101, Algorithm 2,
        with ``lr`` in the place of the product of schedule multiplier and rate, as in torch.
    """
    return _adam("adamw", lr, b1, b2, eps, eps_root, weight_decay, amsgrad, decoupled=True)


def _adam(
    call: str,
    lr: RateLike,
    b1: float,
    b2: float,
    eps: float,
    eps_root: float | None,
    weight_decay: RateLike,
    amsgrad: bool,
    *,
    decoupled: bool,
) -> Transform:
    rate, decay = rates.rate(call, "lr", lr), rates.rate(call, "weight_decay", weight_decay)
    rates.number(call, "b1", b1, below=1.0)
    rates.number(call, "b2", b2, below=1.0)
    rates.number(call, "eps", eps)

    def init(params: Tree) -> AdamState:
        mu, nu = tree.zeros_like(params), tree.zeros_like(params)
        return AdamState(rates.start_count(params), mu, nu, tree.zeros_like(params) if amsgrad else ())

    def make(root: float) -> Transform:
        def update(grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
            if not decoupled:
                grads = rates.decay(grads, decay, state.t, params)
            t = state.t + 1
            mu = tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
            nu = tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
            nu_max = tree.map(torch.maximum, state.nu_max, nu) if amsgrad else ()
            c1, c2 = (_correction(b, rates.real_count(t, params)) for b in (b1, b2))
            step = lambda m, v: (m / c1) / (torch.sqrt(v / c2 + root) + eps)  # noqa: E731
            direction = tree.map(step, mu, nu_max if amsgrad else nu)
            if decoupled:
                direction = rates.decay(direction, decay, state.t, params)
            updates = rates.descend(direction, rate, state.t, params)
            return updates, AdamState(t, mu, nu, nu_max)

        return Transform(init, update)

    return rates.rooted(make, call, eps_root)


def _correction(b: float, t: Tensor) -> Tensor:
    """``1 - b^t``, by expm1: written out, float32 keeps four digits of it at ``b = 0.999, t = 1``."""
    return -torch.expm1(t * math.log(b)) if b else torch.ones_like(t)
