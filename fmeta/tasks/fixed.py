"""A fixed set of tasks, the same whatever seed is asked for."""

from __future__ import annotations

from fmeta.tasks.checks import check_counts
from fmeta.types import Sampler, Task


def fixed(sampler: Sampler, *, seed: int, count: int) -> Sampler:
    """Turn a sampler into one that knows ``count`` batches of tasks only, to compare models on the same tasks.

    Samplers are pure, so the tasks of ``sampler(seed, 0)``, ``sampler(seed, 1)`` and so on are fixed already, in every
    process and on every device. This is for code that asks for other seeds or for more steps: the seed it asks for is
    ignored, and after ``count`` steps the first batch comes again. Nothing is stored; batches are made when asked for.

    Args:
        sampler: where the tasks come from.
        seed: its seed.
        count: how many steps of it, ``sampler(seed, 0)`` to ``sampler(seed, count - 1)``.

    Example:
        >>> from fmeta.tasks import sinusoid
        >>> held = fixed(sinusoid(tasks=4), seed=7, count=2)
        >>> bool((held(0, 0).query.y == held(5, 2).query.y).all())
        True
    """
    check_counts("fixed", count=count)

    own = seed

    def sample(seed: int, step: int) -> Task:
        return sampler(own, step % count if step >= 0 else step)

    return sample
