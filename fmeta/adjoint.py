"""What part of the inner loop is differentiated, as data.

An algorithm carries one ``Adjoint`` and does not know how it is carried out; every engine reads it. An
inner gradient outside the differentiated part counts as a constant; the path through the carry (parameters
and optimiser state) always stays, so a learned rate keeps its gradient under ``first_order``.
"""

from __future__ import annotations

from fmeta.types import Adjoint


def unroll() -> Adjoint:
    """Differentiate through every inner step: the exact meta-gradient.

    **Cost:** about three support gradients a step beyond adaptation; ``steps`` carries of memory, or about
    ``2 sqrt(steps)`` of them with ``Plan(remat=...)``.

    References:
        Finn, Abbeel, Levine, "Model-agnostic meta-learning", 2017, arXiv 1703.03400, eq. 1.
    """
    return Adjoint(None)


def first_order() -> Adjoint:
    """Take inner gradients as constants: no Hessian, so the meta-gradient is that at the adapted parameters.

    **Cost:** nothing beyond adaptation and one query gradient, unless the update itself reads the parameters
    (weight decay) or meta (a learned rate).

    References:
        Finn, Abbeel, Levine, 2017, arXiv 1703.03400, section 5.2 (FOMAML).
    """
    return Adjoint(0)


def truncated(last: int) -> Adjoint:
    """Differentiate through the gradients of the ``last`` inner steps only.

    ``truncated(0)`` is ``first_order()`` and ``truncated(steps)`` is ``unroll()``.

    Args:
        last: number of final inner steps, at least 0.

    References:
        Shaban, Cheng, Hatch, Boots, "Truncated back-propagation for bilevel optimization", 2019,
        arXiv 1810.10667, section 3 (K-RMD). There the carry is cut as well; here it stays connected, so that
        the initialisation of a long loop keeps a gradient.
    """
    if not isinstance(last, int) or isinstance(last, bool) or last < 0:
        raise ValueError(
            f"truncated: last must be a non-negative int, got {last!r}. Use truncated(0) for first order."
        )
    return Adjoint(last)


def differentiates(adjoint: Adjoint, k: int, steps: int) -> bool:
    """Whether the gradient of inner step ``k`` of ``steps`` is itself differentiated."""
    return adjoint.last is None or k >= steps - adjoint.last
