"""ProtoMAML: MAML whose head starts, in each task, as the prototypical network of its support set.

``weight_c = 2 prototype_c``, ``bias_c = -|prototype_c|^2``; then embedding and head adapt together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fmeta.adapt import check_loop, from_loop, weights_as_meta
from fmeta.adjoint import unroll
from fmeta.functional import check_apply
from fmeta.losses import check_integers, check_occur, outputs
from fmeta.metric import class_means
from fmeta.optim import as_inner
from fmeta.parts.select import Pattern, select
from fmeta.types import Adapted, Adjoint, Algorithm, Batch, InnerLoop, Metrics, Params, Task, Transform, Tree


def protomaml(
    apply: Callable[..., Tensor],
    inner: Transform,
    *,
    steps: int,
    ways: int,
    adapts: Pattern | None = None,
    adjoint: Adjoint = unroll(),
) -> Algorithm:
    """MAML with a head made from the support set: learns an embedding. Its meta is ``Params``.

    **Meta-gradient:** exact, through the prototypes too.
    **Cost:** as ``maml``, and one pass over the support set for the prototypes. Step 0 is not shared by tasks.

    Args:
        apply: the embedding, ``(params, x) -> [n, dim]``, as ``functionalize`` returns it.
        inner: inner optimiser.
        steps: number of inner updates; with 0 this is ``protonet``.
        ways: number of classes.
        adapts: names of the embedding's parameters that adapt beside the head; the default is all.
        adjoint: what part of the inner loop is differentiated.

    References:
        Triantafillou et al., "Meta-Dataset: a dataset of datasets for learning to learn from few examples",
        2020, arXiv 1903.03096, section 3 (Proto-MAML). The prototypes are differentiated, as there.
    """
    check_apply("protomaml", apply)
    check_loop("protomaml", apply, inner, steps, adjoint)
    if not isinstance(ways, int) or isinstance(ways, bool) or ways < 2:
        raise ValueError(f"protomaml: ways must be an int of at least 2, got {ways!r}.")
    inner = as_inner(inner)

    def start(meta: Params, support: Batch) -> dict[str, Params]:
        classes = torch.arange(ways, device=support.y.device)
        means = class_means(outputs(apply, meta, support.x), support.y[None] == classes[:, None])
        head = {"weight": 2 * means, "bias": -means.square().sum(-1)}
        return {"body": meta if adapts is None else select(meta, adapts), "head": head}

    def logits(params: Tree, meta: Params, x: Tree) -> Tensor:
        embedded = outputs(apply, {**meta, **params["body"]}, x)
        return F.linear(embedded, params["head"]["weight"], params["head"]["bias"])

    def loss(params: Tree, meta: Params, batch: Batch, k: Tensor | None = None) -> tuple[Tensor, Metrics]:
        check_integers("protomaml", batch.y)
        scores = logits(params, meta, batch.x)
        accuracy = (scores.argmax(-1) == batch.y).to(scores.dtype).mean()
        return F.cross_entropy(scores, batch.y.long()), {"accuracy": accuracy}

    def outer(params: Tree, meta: Params, task: Task) -> tuple[Tensor, Metrics]:
        check_occur("protomaml", task.query.y, task.support.y, ways)
        return loss(params, meta, task.query)

    loop = InnerLoop(
        start=start, loss=loss, inner=lambda meta, k: inner, outer=outer, steps=steps, adjoint=adjoint
    )

    def predict(meta: Params, adapted: Adapted, x: Tree) -> Tensor:
        return logits(adapted.params, meta, x)

    return from_loop(weights_as_meta("protomaml"), loop, predict)
