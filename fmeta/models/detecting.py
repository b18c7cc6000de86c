"""The losses and the predictions of a detector's heads, as pure functions of weights and cached features.

A batch of pictures is ``Batch(x, y)``: ``x["features"]`` holds feature maps by name, ``[n, channels, h, w]``,
``x["sizes"]`` the height and width of each picture on the canvas, ``[n, 2]``; ``y["boxes"]`` is ``[n, most, 4]``
in pixels, ``y["labels"]`` ``[n, most]``, 1, 2, ... for classes and 0 where there is no box.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from fmeta.models.detector import Detector
from fmeta.models.new_classes import PREDICTOR
from fmeta.types import Batch, Metrics, Params, Tree

BETA = 1 / 9
"""Where the smooth distance of boxes turns from squares to absolute values, as in torchvision."""


class Proposed(NamedTuple):
    """What the first head says of some pictures."""

    maps: OrderedDict[str, Tensor]
    canvas: tuple[int, int]
    anchors: list[Tensor]  # [anchors, 4] for each picture
    objectness: Tensor  # [n * anchors, 1]
    deltas: Tensor  # [n * anchors, 4]
    boxes: list[Tensor]  # [proposals, 4] for each picture, the likeliest first; constants


@dataclass(frozen=True, eq=False)
class Detection:
    """The loss of Faster R-CNN on one batch, and predictions; made by `detection`."""

    detector: Detector
    proposals: int | None = None
    train_proposals: bool = True
    cosine: float | None = None

    def __call__(self, params: Params, batch: Batch, /) -> tuple[Tensor, Metrics]:
        """``(params, batch) -> (sum of the four losses, each of them)``."""
        boxes, labels = objects(batch.y)
        proposed = self.propose(params, batch.x)
        losses = self.proposal_losses(proposed, boxes) if self.train_proposals else {}
        losses |= self.box_losses(params, proposed, boxes, labels)
        return torch.stack(list(losses.values())).sum(), {k: v.detach() for k, v in losses.items()}

    def propose(self, params: Params, x: Mapping[str, Tree]) -> Proposed:
        """Feature maps, what the first head says at every anchor, and the best boxes of each picture."""
        detector, rpn = self.detector, self.detector.module.rpn
        maps = detector.pyramid(params, x["features"])
        levels = list(maps.values())
        canvas = self.canvas(maps)
        sizes = [(int(height), int(width)) for height, width in x["sizes"].tolist()]
        scores, deltas = detector.apply(params, "proposals", levels)
        anchors = rpn.anchor_generator(ImageList(levels[0].new_empty(1, 1, *canvas), sizes), levels)
        counts = [level[0].numel() for level in scores]
        scores, deltas = concat_box_prediction_layers(scores, deltas)
        with torch.no_grad():
            decoded = rpn.box_coder.decode(deltas.detach(), anchors).view(len(sizes), -1, 4)
            found, _ = rpn.filter_proposals(decoded, scores, sizes, counts)
        return Proposed(maps, canvas, anchors, scores, deltas, [boxes[: self.proposals] for boxes in found])

    def canvas(self, maps: OrderedDict[str, Tensor]) -> tuple[int, int]:
        """Height and width of the pictures, padding included."""
        height, width = next(iter(maps.values())).shape[-2:]
        return height * self.detector.strides[0], width * self.detector.strides[0]

    def proposal_losses(self, proposed: Proposed, boxes: list[Tensor]) -> Metrics:
        """Whether there is an object at an anchor, and where."""
        rpn = self.detector.module.rpn
        targets = [{"boxes": found} for found in boxes]
        labels, matched = rpn.assign_targets_to_anchors(proposed.anchors, targets)
        wanted = torch.cat(rpn.box_coder.encode(matched, proposed.anchors))
        weight, positive = sampled(labels, rpn.fg_bg_sampler)
        weight = weight.to(proposed.deltas.dtype)
        labels = torch.cat(labels).to(weight.dtype)
        scores = F.binary_cross_entropy_with_logits(
            proposed.objectness.flatten(), labels.clamp_min(0), weight, reduction="sum"
        )
        places = distance(proposed.deltas[positive], wanted[positive])
        return {
            "loss_objectness": scores / weight.sum(),
            "loss_rpn_box_reg": (weight[positive] * places).sum() / weight.sum(),
        }

    def box_losses(
        self, params: Params, proposed: Proposed, boxes: list[Tensor], labels: list[Tensor]
    ) -> Metrics:
        """Which class is in a proposed box, and where its edges are."""
        roi = self.detector.module.roi_heads
        places = [torch.cat([found, own]) for found, own in zip(proposed.boxes, boxes, strict=True)]
        matches, kinds = roi.assign_targets_to_proposals(places, boxes, labels)
        matched = [
            own[match] if len(own) else torch.zeros_like(place)
            for own, match, place in zip(boxes, matches, places, strict=True)
        ]
        wanted = torch.cat(roi.box_coder.encode(matched, places))
        weight, positive = sampled(kinds, roi.fg_bg_sampler)
        weight = weight.to(wanted.dtype)
        kinds = torch.cat(kinds)
        logits, deltas = self.classify(params, self.embed(params, proposed.maps, proposed.canvas, places))
        scores = F.cross_entropy(logits, kinds.clamp_min(0), reduction="none")
        deltas = deltas.view(len(deltas), -1, 4)
        own = kinds[positive] if deltas.shape[1] > 1 else torch.zeros_like(kinds[positive])
        off = distance(deltas[positive, own], wanted[positive])
        return {
            "loss_classifier": (weight * scores).sum() / weight.sum(),
            "loss_box_reg": (weight[positive] * off).sum() / weight.sum(),
        }

    def embed(
        self, params: Params, maps: OrderedDict[str, Tensor], canvas: tuple[int, int], boxes: list[Tensor]
    ) -> Tensor:
        """What the box head makes of boxes: ``[all boxes, width]``."""
        pooled = self.detector.module.roi_heads.box_roi_pool(maps, boxes, [canvas] * len(boxes))
        return self.detector.apply(params, "boxes", pooled)

    def classify(self, params: Params, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of background and classes, and moves of the edges, one for each class or one for all."""
        logits, deltas = self.detector.apply(params, "classes", embedded)
        if self.cosine is not None:
            weight = params[f"{PREDICTOR}.cls_score.weight"]
            logits = self.cosine * F.normalize(embedded, dim=1) @ F.normalize(weight, dim=1).mT
        return logits, deltas

    def prototypes(self, params: Params, batch: Batch, ways: int) -> tuple[Tensor, Tensor]:
        """What the box head makes of each class's boxes: the mean, ``[ways, width]``, and mean square, ``[ways]``."""
        boxes, labels = objects(batch.y)
        maps = self.detector.pyramid(params, batch.x["features"])
        embedded = self.embed(params, maps, self.canvas(maps), boxes)
        is_of = (torch.cat(labels) == torch.arange(1, ways + 1, device=embedded.device)[:, None]).to(embedded)
        means = is_of / is_of.sum(1, keepdim=True)
        return means @ embedded, means @ embedded.square().sum(1)

    def predict(self, params: Params, x: Mapping[str, Tree]) -> list[dict[str, Tensor]]:
        """Boxes ``[k, 4]`` in pixels of the canvas with ``labels`` and ``scores`` for each picture, best first."""
        proposed = self.propose(params, x)
        sizes = [(int(height), int(width)) for height, width in x["sizes"].tolist()]
        logits, deltas = self.classify(
            params, self.embed(params, proposed.maps, proposed.canvas, proposed.boxes)
        )
        if deltas.shape[1] == 4:
            deltas = deltas.repeat(1, logits.shape[1])
        post = self.detector.module.roi_heads.postprocess_detections
        boxes, scores, labels = post(logits, deltas, proposed.boxes, sizes)
        parts = zip(boxes, scores, labels, strict=True)
        return [{"boxes": box, "scores": score, "labels": label} for box, score, label in parts]


def detection(
    detector: Detector,
    *,
    proposals: int | None = None,
    train_proposals: bool = True,
    cosine: float | None = None,
) -> Detection:
    """The loss of Faster R-CNN: ``loss_objectness + loss_rpn_box_reg + loss_classifier + loss_box_reg``.

    torchvision draws which anchors and boxes count; this loss is the mean over all such draws, so it is a pure
    function and has less noise. Where the weights have one set of four moves, it serves every class.

    Args:
        detector: what ``split_detector`` returned.
        proposals: boxes of a picture that the second head sees in training, the likeliest; as many as the
            detector proposes in evaluation if not given.
        train_proposals: whether the first two losses count.
        cosine: logits are cosines between features and rows times this, 20 say, in place of a linear layer.

    Returns:
        ``(params, batch) -> (loss, {the four losses})``, which also predicts. Its shapes depend on values: run it
        with ``Plan(engine="autograd", tasks="loop")``.

    Raises:
        ValueError: where no proposal is allowed.
    """
    if proposals is not None and proposals < 1:
        raise ValueError(f"detection: proposals must be at least 1, got {proposals}. None takes all.")
    return Detection(detector, proposals, train_proposals, cosine)


def objects(y: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Boxes and labels of each picture, without the padding."""
    kept = [labels > 0 for labels in y["labels"]]
    boxes = [boxes[keep] for boxes, keep in zip(y["boxes"], kept, strict=True)]
    return boxes, [labels[keep] for labels, keep in zip(y["labels"], kept, strict=True)]


def sampled(labels: list[Tensor], sampler: object) -> tuple[Tensor, Tensor]:
    """How likely each entry is drawn by torchvision's sampler, and where positive ones are.

    Of a picture at most ``batch_size_per_image * positive_fraction`` positives (labels from 1 on) are drawn, and
    as many negatives (label 0) as fill the batch. Their numbers do not depend on the draw, so the mean of a mean
    over what is drawn has these weights.
    """
    size, part = sampler.batch_size_per_image, sampler.positive_fraction  # type: ignore[attr-defined]
    weights = []
    for one in labels:
        positive, negative = one >= 1, one == 0
        yes, no = positive.sum(), negative.sum()
        taken = yes.clamp_max(int(size * part))
        rest = torch.minimum(no, size - taken)
        weights.append(positive * (taken / yes.clamp_min(1)) + negative * (rest / no.clamp_min(1)))
    return torch.cat(weights), torch.where(torch.cat(labels) >= 1)[0]


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Smooth absolute distance of four numbers, summed: ``[n]``."""
    return F.smooth_l1_loss(a, b, beta=BETA, reduction="none").sum(1)
