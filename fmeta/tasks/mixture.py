"""Tasks from several sources in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fmeta import tree
from fmeta.tasks.checks import check_counts
from fmeta.tasks.seeding import generator, splitmix64
from fmeta.types import Sampler, Task

CALL = "mixture"


def mixture(samplers: Sequence[Sampler], *, tasks: int) -> Sampler:
    """Sample each task of a batch from one of several samplers, all equally likely.

    Args:
        samplers: at least one, of tasks of one shape. Make them with ``tasks=1``; one that gives more at once fills a
            batch with more of its own at a time, and ``tasks`` counts draws.
        tasks: draws a step.

    Returns:
        ``(seed, step) -> Task``, pure as the samplers are.

    Example:
        >>> from fmeta.data import from_tensors
        >>> from fmeta.tasks import few_shot
        >>> pools = from_tensors(torch.rand(40, 3), torch.arange(40) % 4, split=(0.5, 0.5, 0))
        >>> parts = [few_shot(part, ways=2, shots=1, queries=5, tasks=1) for part in (pools.train, pools.val)]
        >>> mixture(parts, tasks=8)(seed=0, step=0).query.x.shape
        torch.Size([8, 10, 3])
    """
    check_counts(CALL, tasks=tasks)
    samplers = list(samplers)
    if not samplers or not all(callable(one) for one in samplers):
        got = [type(one).__name__ for one in samplers]
        raise TypeError(
            f"{CALL}: samplers must be functions (seed, step) -> Task, got {got}. Pass at least one."
        )

    def sample(seed: int, step: int) -> Task:
        which = torch.randint(len(samplers), (tasks,), generator=generator(splitmix64(seed), step)).tolist()
        # every draw is a step of its own to its sampler, so that none comes twice
        drawn = [samplers[one](seed, step * tasks + place) for place, one in enumerate(which)]
        shapes = {tuple(leaf.shape[1:] for leaf in tree.leaves(task)) for task in drawn}
        if len(shapes) > 1:
            raise ValueError(
                f"{CALL}: samplers must give tasks of one shape, got {len(shapes)} shapes. Make them with equal "
                "ways, shots and queries."
            )
        return tree.map(lambda *leaves: torch.cat(leaves), *drawn)

    return sample
