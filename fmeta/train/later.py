"""Samplers that are made when they are first asked: a test of a run needs none for training and validation."""

from __future__ import annotations

import functools
from collections.abc import Callable

from fmeta.types import Sampler, Task


def later(make: Callable[[], Sampler], split: str = "") -> Sampler:
    """The sampler that ``make`` gives; what is wrong with its sizes is then said, with the split that it is of."""

    @functools.cache
    def made() -> Sampler:
        try:
            return make()
        except ValueError as error:
            raise ValueError(f"train: {split} tasks: {error}" if split else str(error)) from error

    def sample(seed: int, step: int) -> Task:
        return made()(seed, step)

    return sample
