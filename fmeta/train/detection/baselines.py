"""Detection without meta-learning: a detector trained in the ordinary way, fine-tuned on a task's pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

import fmeta
from fmeta.adapt import from_loop
from fmeta.models.detecting import Detection
from fmeta.models.new_classes import PREDICTOR, SCORES
from fmeta.parts.select import Pattern
from fmeta.tasks.detection import pictures_of_step
from fmeta.tasks.seeding import generator
from fmeta.types import Algorithm, Params, Transform

COSINE = 20.0
"""Scale of cosine scores, as in TFA."""


def fine_tuning(
    loss_fn: Detection,
    params: Params,
    inner: Transform,
    *,
    ways: int,
    seed: int,
    scores: Literal["linear", "cosine"] = "linear",
    adapts: Pattern = PREDICTOR,
) -> tuple[Algorithm, Params]:
    """TFA: fine-tune the last layer of a detector on new classes, whose scores start at random.

    Returns an algorithm and the weights it starts from, for ``adapt_heads``. The box moves, one set for all
    classes, and everything that does not adapt are those of the base; with linear scores the background's too.

    Args:
        loss_fn: the detector's loss.
        params: heads after base training.
        inner: the optimiser.
        ways: new classes.
        seed: of the new scores.
        scores: a linear layer, or cosines between features and rows.
        adapts: what is fine-tuned; ``("rpn", "roi_heads")`` for all heads.

    References:
        Wang et al., "Frustratingly simple few-shot object detection", 2020, arXiv 2003.06957, section 3.2.
    """
    random = generator(seed, 0)
    width = params[f"{SCORES}.weight"].shape[1]
    weight = 0.01 * torch.randn(ways + 1, width, generator=random)
    bias = torch.zeros(ways + 1)
    if scores == "linear":
        weight[0], bias[0] = params[f"{SCORES}.weight"][0], params[f"{SCORES}.bias"][0]
    start = {**params, f"{SCORES}.weight": weight, f"{SCORES}.bias": bias}
    trains = adapts != PREDICTOR
    loss_fn = replace(loss_fn, cosine=COSINE if scores == "cosine" else None, train_proposals=trains)
    algorithm = fmeta.maml(loss_fn, inner, steps=1, adapts=adapts, adjoint=fmeta.first_order())
    loop = algorithm.inner_loop._replace(
        loss=lambda params, meta, batch, k: loss_fn({**meta, **params}, pictures_of_step(batch, k))
    )
    predict = lambda meta, adapted, x: loss_fn.predict({**meta, **adapted.params}, x)  # noqa: E731
    return from_loop(algorithm.init, loop, predict), start
