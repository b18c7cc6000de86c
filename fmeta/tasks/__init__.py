"""Samplers of tasks: pure functions of ``(seed, step)``, so resuming a run needs no sampler state."""

from fmeta.tasks.few_shot import few_shot
from fmeta.tasks.sinusoid import sinusoid, sinusoid_waves

__all__ = ("few_shot", "sinusoid", "sinusoid_waves")
