"""Meta-learning in PyTorch as pure functions.

Write the loss of one task; fmeta maps it over tasks, differentiates through the adaptation exactly, and
runs the whole meta-gradient as a few compiled, batched kernels.
"""

import typing

from fmeta import data, embeddings, learned, losses, models, optim, schedules, tasks, weights
from fmeta.adapt import adapt
from fmeta.adjoint import first_order, truncated, unroll
from fmeta.algorithms import (
    anil,
    boil,
    cavia,
    few_shot_detection,
    imaml,
    learned_update,
    lrd2,
    maml,
    mamlpp,
    matchingnet,
    metacurvature,
    metaoptnet,
    metasgd,
    protomaml,
    protonet,
    r2d2,
    relationnet,
    reptile,
    sharpmaml,
    simpleshot,
)
from fmeta.annealing import mamlpp_schedule, multi_step_weights
from fmeta.estimators import (
    Estimate,
    Estimator,
    bptt,
    es,
    estimate,
    estimate_init,
    estimate_step,
    forward_mode,
    hypergrad,
    pes,
    unit_norm,
)
from fmeta.functional import functionalize
from fmeta.meta import explain, meta_eval, meta_grad, meta_init, meta_step
from fmeta.optim import (
    adagrad,
    adam,
    adamw,
    chain,
    clip_by_norm,
    clip_by_value,
    lion,
    masked,
    rmsprop,
    sgd,
)
from fmeta.parts import (
    freeze,
    last_blocks,
    merged,
    norm_names,
    select,
    split,
    with_adapters,
    with_lora,
)
from fmeta.predict import meta_predict
from fmeta.sharp import sharpness_aware
from fmeta.standalone import export_adaptation
from fmeta.stopping import early_stopping
from fmeta.types import (
    Adapted,
    Adjoint,
    Algorithm,
    Batch,
    InnerLoop,
    LossFn,
    MetaLearningWarning,
    MetaState,
    Metrics,
    Params,
    Plan,
    System,
    Task,
    Transform,
)

if typing.TYPE_CHECKING:
    from fmeta.train.exporting import export, load

__version__ = "0.10.1"

__all__ = [
    "Adapted",
    "Adjoint",
    "Algorithm",
    "Batch",
    "Estimate",
    "Estimator",
    "InnerLoop",
    "LossFn",
    "MetaLearningWarning",
    "MetaState",
    "Metrics",
    "Params",
    "Plan",
    "System",
    "Task",
    "Transform",
    "__version__",
    "adagrad",
    "adam",
    "adamw",
    "adapt",
    "anil",
    "boil",
    "bptt",
    "cavia",
    "chain",
    "clip_by_norm",
    "clip_by_value",
    "data",
    "early_stopping",
    "embeddings",
    "es",
    "estimate",
    "estimate_init",
    "estimate_step",
    "explain",
    "export",
    "export_adaptation",
    "few_shot_detection",
    "first_order",
    "forward_mode",
    "freeze",
    "functionalize",
    "hypergrad",
    "imaml",
    "last_blocks",
    "learned",
    "learned_update",
    "lion",
    "load",
    "losses",
    "lrd2",
    "maml",
    "mamlpp",
    "mamlpp_schedule",
    "masked",
    "matchingnet",
    "merged",
    "meta_eval",
    "meta_grad",
    "meta_init",
    "meta_predict",
    "meta_step",
    "metacurvature",
    "metaoptnet",
    "metasgd",
    "models",
    "multi_step_weights",
    "norm_names",
    "optim",
    "pes",
    "protomaml",
    "protonet",
    "r2d2",
    "relationnet",
    "reptile",
    "rmsprop",
    "schedules",
    "select",
    "sgd",
    "sharpmaml",
    "sharpness_aware",
    "simpleshot",
    "split",
    "tasks",
    "truncated",
    "unit_norm",
    "unroll",
    "weights",
    "with_adapters",
    "with_lora",
]


def __getattr__(name: str) -> typing.Any:
    """``load`` and ``export`` belong to the trainer, which is imported when they are asked for."""
    if name in ("export", "load"):
        from fmeta.train import exporting

        return getattr(exporting, name)
    raise AttributeError(f"fmeta: there is no name {name!r} in it, see fmeta.__all__.")
