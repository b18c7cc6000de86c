"""Tasks of features: a frozen trunk runs once over all examples of a step, outside of adaptation."""

from __future__ import annotations

import copy

from torch import nn

from fmeta.data.features import check_trunk
from fmeta.tasks.prepared import prepared
from fmeta.types import Sampler


def through(sampler: Sampler, trunk: nn.Module) -> Sampler:
    """The same tasks with what ``trunk`` makes of each example in place of the example.

    For examples that differ from step to step (augmented pictures); where they do not, ``fmeta.data.embedded``
    keeps the features of a whole pool. This is ``prepared`` with a module that is checked and copied.

    Args:
        sampler: tasks whose ``x`` is one tensor, ``[task, n, *feature]``.
        trunk: ``x -> features [n, *feature]``, see ``fmeta.data.embedded``.

    Raises:
        TypeError: if the trunk is no module.
        ValueError: if it is in training mode or normalises by the batch.

    >>> import torch
    >>> from fmeta.data import from_tensors
    >>> from fmeta.tasks import few_shot
    >>> pool = from_tensors(torch.rand(8, 3), torch.arange(8) % 2, split=(1, 0, 0)).train
    >>> sampler = through(few_shot(pool, ways=2, shots=1, queries=1, tasks=4), nn.Linear(3, 5).eval())
    >>> sampler(seed=0, step=0).support.x.shape
    torch.Size([4, 2, 5])
    """
    check_trunk("through", trunk)
    return prepared(sampler, copy.deepcopy(trunk))
