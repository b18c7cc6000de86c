"""Average precision as COCO measures it, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Precision(NamedTuple):
    """Average precision over classes, in [0, 1]."""

    ap: float
    """Mean over overlaps of 0.5, 0.55, ... 0.95."""
    ap50: float
    """At an overlap of 0.5."""
    ap75: float
    classes: list[float]
    """At an overlap of 0.5, for each class; NaN where no picture shows it."""


def average_precision(
    predictions: Sequence[dict[str, Tensor]], y: dict[str, Tensor], classes: int
) -> Precision:
    """COCO's average precision of predictions for some pictures.

    Args:
        predictions: ``boxes``, ``labels`` and ``scores`` of each picture.
        y: true ``boxes``, ``[n, most, 4]``, and ``labels``, ``[n, most]``, 0 where there is no box.
        classes: number of classes; labels are 1 .. classes.

    Raises:
        ImportError: without pycocotools.
        ValueError: where predictions and pictures differ in number, or no picture has a box.
    """
    if len(predictions) != len(y["labels"]):
        raise ValueError(
            f"average_precision: every picture needs predictions, got {len(predictions)} for {len(y['labels'])}."
        )
    if not bool((y["labels"] > 0).any()):
        raise ValueError("average_precision: pictures must show objects, got none with a box.")
    coco_type, eval_type = load()
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        truth = coco_type()
        truth.dataset = true_boxes(y, classes)
        truth.createIndex()
        found = found_boxes(predictions)
        if not found:
            return Precision(0.0, 0.0, 0.0, [0.0] * classes)
        evaluation = eval_type(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    by_class = evaluation.eval["precision"][0, :, :, 0, -1]  # [recall, class] at an overlap of 0.5
    means = [
        float(column[column > -1].mean()) if (column > -1).any() else float("nan") for column in by_class.T
    ]
    ap, ap50, ap75 = (float(value) for value in evaluation.stats[:3])
    return Precision(ap, ap50, ap75, means)


def load() -> tuple[Any, Any]:
    """pycocotools, which is an optional dependency."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError(
            "average_precision: COCO's average precision needs pycocotools, which is not installed. Install it with "
            "pip install 'fmeta[detection]'."
        ) from error
    return COCO, COCOeval


def true_boxes(y: dict[str, Tensor], classes: int) -> dict[str, Any]:
    """Annotations in COCO's form."""
    entries: list[dict[str, Any]] = []
    for image, (boxes, labels) in enumerate(zip(y["boxes"].tolist(), y["labels"].tolist(), strict=True)):
        for box, label in zip(boxes, labels, strict=True):
            if label:
                left, top, right, bottom = box
                area = (right - left) * (bottom - top)
                place = {"bbox": [left, top, right - left, bottom - top], "area": area, "iscrowd": 0}
                entries.append({"id": len(entries) + 1, "image_id": image, "category_id": label, **place})
    return {
        "info": {},
        "images": [{"id": image} for image in range(len(y["labels"]))],
        "categories": [{"id": label, "name": str(label)} for label in range(1, classes + 1)],
        "annotations": entries,
    }


def found_boxes(predictions: Sequence[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Detections in COCO's form."""
    found: list[dict[str, Any]] = []
    for image, one in enumerate(predictions):
        parts = (one[name].tolist() for name in ("boxes", "labels", "scores"))
        for (left, top, right, bottom), label, score in zip(*parts, strict=True):
            box = [left, top, right - left, bottom - top]
            found.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    return found
