"""Learning rates that change with the step: pure functions of a count.

Each factory returns ``schedule(count) -> rate``, where ``count`` is the number of updates made so far as a
tensor without dimensions, so that one compiled kernel serves every step. Pass one wherever a rule of
``fmeta.optim`` takes ``lr`` or ``weight_decay``. Rates may be tensors, and are then differentiated.
An integer count is computed with in torch's default dtype, a floating-point one in its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fmeta.rates import Schedule, number


def constant(rate: float | Tensor) -> Schedule:
    """The same rate at every step, as a schedule."""
    _check_rate("constant", "rate", rate)
    return lambda count: rate + torch.zeros_like(_real(count))


def linear(start: float | Tensor, end: float | Tensor, steps: int) -> Schedule:
    """Go from ``start`` at step 0 to ``end`` at step ``steps`` in a straight line, and stay there.

    ``start + (end - start) * min(count / steps, 1)``, as ``torch.optim.lr_scheduler.LinearLR``. With
    ``start=0`` it is a linear warm-up, with ``end=0`` a linear decay.

    Args:
        start: first rate, at least 0.
        end: last rate, at least 0.
        steps: at least 1.

    Example:
        >>> linear(0.0, 1.0, steps=4)(torch.tensor(1))
        tensor(0.2500)
    """
    _check_rate("linear", "start", start)
    _check_rate("linear", "end", end)
    _check_count("linear", "steps", steps, 1)
    return lambda count: start + (end - start) * (_real(count) / steps).clamp(0, 1)


def cosine(peak: float | Tensor, steps: int, *, warmup: int = 0, end: float | Tensor = 0.0) -> Schedule:
    """Half a cosine from ``peak`` down to ``end`` at step ``steps``, after a linear warm-up from 0.

    ``peak * count / warmup`` for the first ``warmup`` steps, then, with
    ``progress = (count - warmup) / (steps - warmup)``, at most 1,
    ``end + (peak - end) * (1 + cos(pi * progress)) / 2``. Without warm-up it is
    ``torch.optim.lr_scheduler.CosineAnnealingLR`` up to ``steps``; it then stays at ``end``, where torch's
    goes up again. With a warm-up the very first rate is 0.

    Args:
        peak: largest rate, at least 0.
        steps: all steps, those of the warm-up among them.
        warmup: at least 0 and below ``steps``.
        end: last rate, at least 0.

    Example:
        >>> rate = cosine(1e-3, 1000, warmup=100)
        >>> [round(rate(torch.tensor(count)).item(), 6) for count in (0, 50, 100, 550, 1000)]
        [0.0, 0.0005, 0.001, 0.0005, 0.0]

    References:
        Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, arXiv 1608.03983,
        eq. 5, without restarts.
    """
    _check_rate("cosine", "peak", peak)
    _check_rate("cosine", "end", end)
    _check_count("cosine", "steps", steps, 1)
    _check_count("cosine", "warmup", warmup, 0)
    if warmup >= steps:
        raise ValueError(
            f"cosine: warmup must be below steps, got warmup={warmup} and steps={steps}. "
            "steps counts the warm-up too."
        )

    def schedule(count: Tensor) -> Tensor:
        t = _real(count)
        progress = ((t - warmup) / (steps - warmup)).clamp(0, 1)
        down = end + (peak - end) * (1 + torch.cos(math.pi * progress)) / 2
        return torch.where(t < warmup, peak * t / warmup, down) if warmup else down

    return schedule


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """Climb linearly from 0 to the first rate of ``schedule`` in ``steps`` steps, then follow it from there.

    ``count / steps * schedule(0)`` for the first ``steps`` steps, then ``schedule(count - steps)``.

    Args:
        schedule: what follows the warm-up, counted from its end.
        steps: at least 1.

    Example:
        >>> rate = warmup(exponential(1.0, 0.5), steps=2)
        >>> [rate(torch.tensor(count)).item() for count in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.25]
    """
    _check_count("warmup", "steps", steps, 1)
    if not callable(schedule):
        raise TypeError(
            f"warmup: schedule must be a schedule, got {type(schedule).__name__}. "
            "For a constant rate pass constant(rate)."
        )

    def warmed(count: Tensor) -> Tensor:
        after = schedule((count - steps).clamp_min(0))
        return after * (_real(count) / steps).clamp(0, 1)

    return warmed


def exponential(start: float | Tensor, decay: float | Tensor, every: int = 1) -> Schedule:
    """Multiply the rate by ``decay`` every ``every`` steps, smoothly: ``start * decay^(count / every)``.

    With ``every=1`` it is ``torch.optim.lr_scheduler.ExponentialLR``. :func:`step` falls in jumps instead.

    Args:
        start: first rate, at least 0.
        decay: factor in (0, 1] for a falling rate; above 1 the rate grows.
        every: at least 1.

    Example:
        >>> exponential(1.0, 0.5, every=10)(torch.tensor(20))
        tensor(0.2500)
    """
    _check_rate("exponential", "start", start)
    _check_factor("exponential", "decay", decay)
    _check_count("exponential", "every", every, 1)
    return lambda count: start * decay ** (_real(count) / every)


def step(
    start: float | Tensor,
    factor: float | Tensor,
    *,
    every: int | None = None,
    boundaries: Sequence[int] | None = None,
) -> Schedule:
    """Multiply the rate by ``factor`` every ``every`` steps, or on reaching each step of ``boundaries``.

    ``start * factor^(count // every)``, as ``torch.optim.lr_scheduler.StepLR``, or
    ``start * factor^(number of boundaries <= count)``, as ``MultiStepLR``. Give one of the two.

    Args:
        start: first rate, at least 0.
        factor: positive.
        every: at least 1.
        boundaries: rising steps, each at least 0.

    Example:
        >>> rate = step(1.0, 0.1, boundaries=[100, 200])
        >>> [round(rate(torch.tensor(count)).item(), 4) for count in (99, 100, 200)]
        [1.0, 0.1, 0.01]
    """
    _check_rate("step", "start", start)
    _check_factor("step", "factor", factor)
    if (every is None) == (boundaries is None):
        raise ValueError(
            f"step: expected either every or boundaries, got every={every} and "
            f"boundaries={boundaries}. Give one."
        )
    if every is not None:
        _check_count("step", "every", every, 1)
        return lambda count: start * factor ** _real(torch.div(count, every, rounding_mode="floor"))
    marks = list(boundaries or ())
    for mark in marks:
        _check_count("step", "boundaries", mark, 0)
    if sorted(set(marks)) != marks:
        raise ValueError(f"step: boundaries must rise, got {marks}. Sort them and drop repeats.")

    def schedule(count: Tensor) -> Tensor:
        t = _real(count)
        passed = sum(((t >= mark).to(t.dtype) for mark in marks), torch.zeros_like(t))
        return start * factor**passed

    return schedule


def per_step(rates: Tensor) -> Schedule:
    """Entry ``count`` of ``rates``, differentiable: rates learned for each inner step, as in MAML++.

    Beyond the last entry the last one repeats.

    Args:
        rates: ``[steps, ...]``; what follows the first dimension must broadcast to the parameters.

    Example:
        >>> rate = per_step(torch.tensor([0.3, 0.2, 0.1]))
        >>> [round(rate(torch.tensor(count)).item(), 1) for count in (0, 2, 9)]
        [0.3, 0.1, 0.1]

    References:
        Antoniou, Edwards and Storkey, "How to train your MAML", 2019, arXiv 1810.09502, section 4 (LSLR).
    """
    if not isinstance(rates, Tensor) or not rates.is_floating_point() or not rates.ndim or not len(rates):
        got = f"{rates.dtype} {tuple(rates.shape)}" if isinstance(rates, Tensor) else type(rates).__name__
        raise TypeError(
            f"per_step: rates must be a floating-point tensor [steps, ...] with steps > 0, got {got}. "
            "Put a list of numbers in torch.tensor."
        )
    last = rates.shape[0] - 1
    return lambda count: rates.index_select(0, count.clamp(0, last).long().reshape(1)).squeeze(0)


def _real(count: Tensor) -> Tensor:
    return count if count.is_floating_point() else count.to(torch.get_default_dtype())


def _check_rate(call: str, name: str, value: float | Tensor) -> None:
    if not isinstance(value, Tensor):
        number(call, name, value)


def _check_factor(call: str, name: str, value: float | Tensor) -> None:
    _check_rate(call, name, value)
    if not isinstance(value, Tensor) and value == 0:
        raise ValueError(f"{call}: {name} must be positive, got 0. Pass a factor such as 0.1.")


def _check_count(call: str, name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{call}: {name} must be an int, got {type(value).__name__}. Steps are counted.")
    if value < least:
        raise ValueError(f"{call}: {name} must be at least {least}, got {value}. Pass a larger number.")
