"""Samplers of tasks: pure functions of ``(seed, step)``, so resuming a run needs no sampler state."""

from fmeta.tasks.detection import detection
from fmeta.tasks.few_shot import few_shot
from fmeta.tasks.fixed import fixed
from fmeta.tasks.mixture import mixture
from fmeta.tasks.prepared import prepared, trimmed
from fmeta.tasks.regression import regression
from fmeta.tasks.sinusoid import sinusoid, sinusoid_waves
from fmeta.tasks.through import through
from fmeta.tasks.umtra import umtra
from fmeta.tasks.variable import variable_few_shot

__all__ = (
    "detection",
    "few_shot",
    "fixed",
    "mixture",
    "prepared",
    "regression",
    "sinusoid",
    "sinusoid_waves",
    "through",
    "trimmed",
    "umtra",
    "variable_few_shot",
)
