"""Any algorithm made sharpness-aware: its gradients are taken a little uphill, so that it ends where it is flat."""

from __future__ import annotations

from typing import Any

from fmeta.adapt import from_loop
from fmeta.rates import number
from fmeta.types import Algorithm, InnerLoop


def sharpness_aware(
    algorithm: Algorithm, *, inner_radius: float = 0.0, outer_radius: float = 0.05
) -> Algorithm:
    """The same algorithm with sharpness-aware gradients inside, outside, or both. Its meta is the same.

    Inside, ``params_k+1 = params_k + inner.update(grad L_t(params_k + inner_radius * u_k))`` with ``u_k`` the
    direction of ``grad L_t(params_k)``. Outside, the meta-gradient is that at ``meta + outer_radius * u`` with
    ``u`` the direction of the mean meta-gradient at ``meta``. A radius of 0 leaves that level as it was.

    **Meta-gradient:** with ``inner_radius`` alone exact, through ``u_k`` too (``Algorithm.loss`` is what it is
    of); ``outer_radius`` makes it that of another point, with ``u`` constant.
    **Cost:** ``outer_radius`` doubles a meta-gradient; ``inner_radius`` adds one support gradient a step, and about
    four more where the step is differentiated.

    Adaptation takes its gradients uphill in evaluation too. ``metrics`` of training are those at ``meta``; dropout
    draws other masks there than uphill of it. A radius is a length in all weights together, so that it does not carry
    over to larger networks. Inside ``imaml``, ``inner_radius`` changes where adaptation ends, while the implicit
    gradient is that of the minimum without it: use ``outer_radius`` there.

    Args:
        algorithm: any.
        inner_radius: at least 0.
        outer_radius: at least 0; the default is that of Foret et al. for plain training.

    Example:
        >>> import fmeta
        >>> apply, params = fmeta.functionalize(fmeta.models.conv4(ways=None))
        >>> algorithm = fmeta.sharpness_aware(fmeta.protonet(apply), outer_radius=0.01)
        >>> algorithm.inner_loop.outer_radius
        0.01

    References:
        Abbas, Xiao, Chen, Chen, Chen, "Sharp-MAML: sharpness-aware model-agnostic meta learning", 2022,
        arXiv 2206.03996, algorithm 1. Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-aware minimization for
        efficiently improving generalization", 2021, arXiv 2010.01412, eqs. 2 and 3.
    """
    if not isinstance(algorithm, Algorithm):
        raise TypeError(
            f"sharpness_aware: algorithm must be an Algorithm, got {type(algorithm).__name__}. Make one with "
            "fmeta.maml(loss_fn, inner, steps=1), say."
        )
    loop = with_radii("sharpness_aware", algorithm.inner_loop, inner_radius, outer_radius)
    return from_loop(algorithm.init, loop, algorithm.predict)


def with_radii(call: str, loop: InnerLoop, inner_radius: Any, outer_radius: Any) -> InnerLoop:
    """A loop whose gradients are taken uphill, inside and outside, by checked radii."""
    for name, radius in (("inner_radius", inner_radius), ("outer_radius", outer_radius)):
        number(call, name, radius)
    return loop._replace(inner_radius=float(inner_radius), outer_radius=float(outer_radius))
