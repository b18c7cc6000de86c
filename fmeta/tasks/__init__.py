"""Samplers of tasks: pure functions of ``(seed, step)``, so resuming a run needs no sampler state."""

from fmeta.tasks.few_shot import few_shot
from fmeta.tasks.mixture import mixture
from fmeta.tasks.regression import regression
from fmeta.tasks.sinusoid import sinusoid, sinusoid_waves
from fmeta.tasks.umtra import umtra

__all__ = ("few_shot", "mixture", "regression", "sinusoid", "sinusoid_waves", "umtra")
