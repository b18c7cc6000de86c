"""MAML++'s settings that change while training: as data, for a trainer to switch the algorithm by."""

from __future__ import annotations

from typing import NamedTuple

from fmeta import adjoint
from fmeta.rates import number
from fmeta.types import Adjoint


class Phase(NamedTuple):
    """The settings from one outer step to the start of the next phase."""

    start: int
    adjoint: Adjoint
    weights: tuple[float, ...] | None


def mamlpp_schedule(
    steps: int,
    total: int,
    *,
    multi_step: float = 0.1,
    first_order: float = 1 / 3,
    levels: int = 10,
) -> list[Phase]:
    """MAML++'s annealing of the multi-step loss and of the order of derivatives, in a few phases.

    The loss is of every step at first, of the last one alone from ``multi_step * total`` on, and in between
    ``multi_step_weights`` in equal steps. Gradients are first-order until ``first_order * total``, then exact.

    All phases have one form of meta, so that a state goes from one to the next: with ``phase`` the last whose
    ``start`` has come, train by ``mamlpp(..., adjoint=phase.adjoint, weights=phase.weights)``.

    **Cost:** a ``meta_step`` for each phase. It traces its kernels anew, but their code does not depend on the
    weights (unless ``steps`` is 1), so that all phases of one order share what is compiled.

    Args:
        steps: number of inner updates, at least 1.
        total: number of outer steps, at least 1.
        multi_step: part of the outer steps with a loss after every inner step, in [0, 1]. The authors' code for
            Omniglot has 10 of 100 epochs.
        first_order: part of the outer steps with first-order gradients, in [0, 1]. The paper says 50 epochs, of
            150; 0 leaves this out, as the authors' configurations do.
        levels: phases that the multi-step loss is annealed in, at least 1.

    Returns:
        Phases in the order of their ``start``, the first of which is 0.

    References:
        Antoniou, Edwards, Storkey, "How to train your MAML", 2019, arXiv 1810.09502, section 4 (MSL, DA).

    >>> for phase in mamlpp_schedule(2, 1000, multi_step=0.2, first_order=0.5, levels=2):
    ...     print(phase.start, phase.adjoint.last, phase.weights)
    0 0 (0.0, 0.5, 0.5)
    100 0 (0.0, 0.25, 0.75)
    200 0 None
    500 None None
    """
    for name, count in (("steps", steps), ("total", total), ("levels", levels)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(
                f"mamlpp_schedule: {name} must be a positive int, got {count!r}. Pass 1 or more."
            )
    for name, part in (("multi_step", multi_step), ("first_order", first_order)):
        number("mamlpp_schedule", name, part)
        if part > 1:
            raise ValueError(
                f"mamlpp_schedule: {name} must be at most 1, got {part}. It is a part of all steps."
            )
    ends = [round(multi_step * total * level / levels) for level in range(levels + 1)]
    exact = round(first_order * total)
    phases: list[Phase] = []
    for start in sorted({0, *ends, exact}):
        level = max((level for level, end in enumerate(ends) if end <= start), default=0)
        weights = multi_step_weights(steps, level / levels) if level < levels and steps > 1 else None
        order = adjoint.first_order() if start < exact else adjoint.unroll()
        if start < total and (not phases or phases[-1][1:] != (order, weights)):
            phases.append(Phase(start, order, weights))
    return phases


def multi_step_weights(steps: int, progress: float) -> tuple[float, ...]:
    """Weights of the query losses after 0, 1, ... ``steps`` updates: even at first, then nearly all on the last.

    ``progress`` is 0 at the start of the annealing and 1 at its end, when each early weight is 0.03 / steps.
    Antoniou et al., 2019, section 4 (MSL); the linear decay is that of its code.

    >>> multi_step_weights(2, 0.0)
    (0.0, 0.5, 0.5)
    """
    number("multi_step_weights", "progress", progress)
    early = max((1 - progress) / steps, 0.03 / steps)
    return (0.0, *[early] * (steps - 1), 1 - early * (steps - 1))
