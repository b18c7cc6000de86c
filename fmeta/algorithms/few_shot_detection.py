"""Few-shot detection: meta-learns a detector of objects whose heads adapt to the classes of a task.

``scores_0 = object's row moved to each class's prototype``; then the chosen heads take gradient steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fmeta import tree
from fmeta.adapt import check_loop, from_loop
from fmeta.adjoint import first_order
from fmeta.models.new_classes import BOXES, check_query, class_rows, count_classes, moved_to
from fmeta.optim import as_inner
from fmeta.parts.select import Pattern, select
from fmeta.tasks.detection import pictures_of_step
from fmeta.types import Adapted, Adjoint, Algorithm, Batch, InnerLoop, Metrics, Params, Task, Transform, Tree

if TYPE_CHECKING:  # torchvision takes seconds to import
    from fmeta.models.detecting import Detection

CALL = "few_shot_detection"


def few_shot_detection(
    loss_fn: Detection,
    inner: Transform,
    *,
    steps: int,
    adapts: Pattern = ("rpn", "roi_heads"),
    head: Literal["prototypes", "object"] = "prototypes",
    objective: Literal["query", "reptile"] = "query",
    adjoint: Adjoint = first_order(),
) -> Algorithm:
    """Learn an object detector from which a few pictures make a detector of their classes.

    Its meta is ``{"params", "strength"}``: heads with two scores (background, object) and one set of boxes, and the
    logarithm of how much prototypes count. A task may have any number of classes; its scores and the heads in
    ``adapts`` take the inner steps, each on the pictures in its row of ``support.x["order"]`` if that is there.

    **Meta-gradient:** first-order by default, exact through the start (the prototypes) either way. With
    ``unroll()`` it is exact as long as the feature pyramid does not adapt, since RoI align has no second
    derivative. ``objective="reptile"`` states it: start minus adapted, pulled back through the start.
    **Cost:** ``steps + 2`` gradients of the loss on the pictures of one step.

    Args:
        loss_fn: what ``fmeta.models.detection`` returned.
        inner: inner optimiser.
        steps: number of inner updates.
        adapts: which heads adapt; ``"roi_heads.box_predictor"`` is ANIL.
        head: whether a class starts at its prototype, or as any object.
        objective: the loss on the query set, or the distance from the start.
        adjoint: what part of the inner loop is differentiated.

    Raises:
        ValueError: for a support set without boxes or with gaps in its labels, a query class that it lacks.

    Run it with ``Plan(engine="autograd", tasks="loop")``. It is ANIL (arXiv 1909.09157) with the start of ProtoMAML
    (arXiv 1903.03096, section 3.2) on Faster R-CNN (arXiv 1506.01497).
    """
    check_loop(CALL, loss_fn, inner, steps, adjoint)
    inner = as_inner(inner)

    def init(params: Params | None) -> Tree:
        if params is None or len(params.get(f"{BOXES}.bias", ())) != 4:
            raise ValueError(
                f"{CALL}: params must be the heads of a detector of objects, got other ones. Convert those of "
                "split_detector by object_detector(params)."
            )
        return {"params": tree.detach(params), "strength": params[f"{BOXES}.bias"].new_tensor(math.log(8.0))}

    def start(meta: Tree, support: Batch) -> Params:
        ways = count_classes(CALL, support)
        scores = class_rows(meta["params"], ways)
        if head == "prototypes":
            found = loss_fn.prototypes(meta["params"], support, ways)
            scores = moved_to(scores, *found, meta["strength"].exp())
        return {**select(meta["params"], adapts), **scores}

    def loss(params: Params, meta: Tree, batch: Batch, k: Tensor) -> tuple[Tensor, Metrics]:
        return loss_fn({**meta["params"], **params}, pictures_of_step(batch, k))

    def outer(params: Params, meta: Tree, task: Task) -> tuple[Tensor, Metrics]:
        check_query(CALL, task.query, count_classes(CALL, task.support))
        if objective == "query":
            return loss_fn({**meta["params"], **params}, task.query)
        ended, began = tree.detach(params), start(meta, task.support)
        value, metrics = loss_fn({**tree.detach(meta["params"]), **ended}, task.query)
        distance = 0.5 * tree.squared_norm(tree.map(torch.sub, began, ended))
        return distance, {**metrics, "loss": value.detach()}

    def predict(meta: Tree, adapted: Adapted, x: Tree) -> Tree:
        return loss_fn.predict({**meta["params"], **adapted.params}, x)

    loop = InnerLoop(start, loss, lambda meta, k: inner, outer, steps, adjoint=adjoint)
    return from_loop(init, loop, predict)
