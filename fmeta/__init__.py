"""Meta-learning in PyTorch as pure functions.

Write the loss of one task; fmeta maps it over tasks, differentiates through the adaptation exactly, and
runs the whole meta-gradient as a few compiled, batched kernels.
"""

from fmeta import data, losses, models, optim, schedules, tasks
from fmeta.adapt import adapt
from fmeta.adjoint import first_order, truncated, unroll
from fmeta.algorithms import (
    anil,
    boil,
    cavia,
    imaml,
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
    simpleshot,
)
from fmeta.algorithms.mamlpp import multi_step_weights
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
from fmeta.predict import meta_predict
from fmeta.select import select
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
    Task,
    Transform,
)

__version__ = "0.3.0"

__all__ = [
    "Adapted",
    "Adjoint",
    "Algorithm",
    "Batch",
    "InnerLoop",
    "LossFn",
    "MetaLearningWarning",
    "MetaState",
    "Metrics",
    "Params",
    "Plan",
    "Task",
    "Transform",
    "__version__",
    "adagrad",
    "adam",
    "adamw",
    "adapt",
    "anil",
    "boil",
    "cavia",
    "chain",
    "clip_by_norm",
    "clip_by_value",
    "data",
    "explain",
    "first_order",
    "functionalize",
    "imaml",
    "lion",
    "losses",
    "lrd2",
    "maml",
    "mamlpp",
    "masked",
    "matchingnet",
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
    "optim",
    "protomaml",
    "protonet",
    "r2d2",
    "relationnet",
    "reptile",
    "rmsprop",
    "schedules",
    "select",
    "sgd",
    "simpleshot",
    "tasks",
    "truncated",
    "unroll",
]
