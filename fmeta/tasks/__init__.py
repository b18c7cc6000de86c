"""Samplers of tasks: pure functions of ``(seed, step)``, so resuming a run needs no sampler state."""

from fmeta.tasks.few_shot import few_shot
from fmeta.tasks.prepared import prepared, trimmed
from fmeta.tasks.regression import regression
from fmeta.tasks.sinusoid import sinusoid, sinusoid_waves
from fmeta.tasks.umtra import umtra

__all__ = ("few_shot", "prepared", "regression", "sinusoid", "sinusoid_waves", "trimmed", "umtra")
