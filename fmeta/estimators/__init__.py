"""Gradients of long processes: estimators as values, outer steps that take them, and those to hyperparameters."""

from fmeta.estimators.estimate import Estimate, estimate, estimate_init, estimate_step, unit_norm
from fmeta.estimators.hypergrad import hypergrad
from fmeta.estimators.values import Estimator, bptt, es, forward_mode, pes

__all__ = [
    "Estimate",
    "Estimator",
    "bptt",
    "es",
    "estimate",
    "estimate_init",
    "estimate_step",
    "forward_mode",
    "hypergrad",
    "pes",
    "unit_norm",
]
