"""Faster R-CNN in two parts: a frozen one, run once a picture, and heads as pure functions of their weights.

RoI align has no second derivative and torchvision's module draws random samples and keeps what it has seen, so a
whole detector is no pure function. `split_detector` cuts it: what comes before the cut gives features, as
constants; what has weights after it (the feature pyramid if it is wanted, the heads of the proposals and of the
boxes) is functionalized under the names it has in the detector, so that weights go back and forth.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from fmeta.functional import Apply, functionalize
from fmeta.models.new_classes import BOXES, SCORES
from fmeta.types import Params


class Heads(nn.Module):
    """The parts after the cut, under their names in the detector."""

    def __init__(self, detector: GeneralizedRCNN, pyramid: bool) -> None:
        """Share the detector's modules."""
        super().__init__()
        if pyramid:
            self.backbone = nn.ModuleDict({"fpn": detector.backbone.fpn})
        self.rpn = nn.ModuleDict({"head": detector.rpn.head})
        roi = detector.roi_heads
        self.roi_heads = nn.ModuleDict({"box_head": roi.box_head, "box_predictor": roi.box_predictor})

    def forward(self, part: str, x: Any) -> Any:
        """One part: ``pyramid``, ``proposals``, ``boxes`` or ``classes``."""
        if part == "pyramid":
            return self.backbone["fpn"](x)
        if part == "proposals":
            return self.rpn["head"](x)
        return self.roi_heads["box_head" if part == "boxes" else "box_predictor"](x)


@dataclass(frozen=True, eq=False)
class Detector:
    """A detector cut in two; made by `split_detector`.

    Attributes:
        module: a copy of the detector, in eval mode; its heads' own weights are only a template.
        apply: ``(params, part, x)``, the heads as a pure function.
        cut: whether features come after the whole ``"backbone"`` or after its ``"body"``, before the pyramid.
        strides: pixels between neighbours in each feature map that the heads see.
    """

    module: GeneralizedRCNN = field(repr=False)
    apply: Apply = field(repr=False)
    cut: Literal["backbone", "body"]
    strides: tuple[int, ...]

    def features(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """What the heads start from: constants, without gradient.

        Args:
            images: ``[n, 3, H, W]``, bytes or floats in 0 .. 1, on canvases whose sides are multiples of 32.
            sizes: height and width of each picture on its canvas, ``[n, 2]``.

        Returns:
            Feature maps by name, ``[n, channels, height, width]``.
        """
        with torch.no_grad():
            images = images / 255 if images.dtype == torch.uint8 else images
            seen = self.module.transform.normalize(images)
            rows, columns = (torch.arange(side, device=seen.device) for side in seen.shape[-2:])
            inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]
            seen = seen * inside[:, None]
            found = (self.module.backbone.body if self.cut == "body" else self.module.backbone)(seen)
            return {"0": found} if isinstance(found, Tensor) else dict(found)

    def pyramid(self, params: Params, features: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
        """The feature maps that the heads see."""
        maps = OrderedDict(features)
        return self.apply(params, "pyramid", maps) if self.cut == "body" else maps


def split_detector(
    module: GeneralizedRCNN, *, cut: Literal["backbone", "body"] = "backbone"
) -> tuple[Detector, Params]:
    """Cut a detector of torchvision's Faster R-CNN interface; returns ``(detector, params)`` of its heads.

    Args:
        module: any detector with a ``backbone``, an ``rpn`` and ``roi_heads`` without masks and key points.
        cut: ``"body"`` counts the feature pyramid among the heads.

    Raises:
        TypeError: for a module of another interface.
        ValueError: where there is no feature pyramid to cut before.

    Norm layers use their running statistics, which stay as they are.
    """
    parts = ("backbone", "rpn", "roi_heads", "transform")
    if not all(hasattr(module, part) for part in parts) or not hasattr(module.roi_heads, "box_predictor"):
        raise TypeError(
            f"split_detector: module must have {', '.join(parts)} as torchvision's Faster R-CNN has, got "
            f"{type(module).__name__}. Use fmeta.models.faster_rcnn() or mobilenet_detector(classes)."
        )
    if module.roi_heads.has_mask() or module.roi_heads.has_keypoint():
        raise TypeError(
            "split_detector: heads for masks and key points are not supported, got a module with one."
        )
    if cut == "body" and not hasattr(module.backbone, "fpn"):
        raise ValueError(
            f"split_detector: cut='body' needs a backbone with a feature pyramid (body and fpn), got "
            f"{type(module.backbone).__name__}. Use cut='backbone'."
        )
    module = copy.deepcopy(module).eval()
    for weight in module.parameters():
        weight.requires_grad_(True)
    apply, params = functionalize(Heads(module, cut == "body"))
    weight = next(iter(params.values()))
    with torch.no_grad():
        side = 256
        found = module.backbone(torch.zeros(1, 3, side, side, dtype=weight.dtype, device=weight.device))
        maps = OrderedDict({"0": found} if isinstance(found, Tensor) else found)
        # RoI align looks once for the scales of its maps and keeps them: here, so that no loss changes anything.
        module.roi_heads.box_roi_pool(
            maps, [torch.tensor([[0.0, 0.0, 32.0, 32.0]]).to(weight)], [(side, side)]
        )
    return Detector(module, apply, cut, tuple(side // level.shape[-1] for level in maps.values())), params


def merged_detector(detector: Detector, params: Params) -> GeneralizedRCNN:
    """A copy of torchvision's module with these weights in its heads, for any number of classes."""
    module = copy.deepcopy(detector.module)
    weights = dict(params)
    classes, width = weights[f"{SCORES}.weight"].shape
    for name in (f"{BOXES}.weight", f"{BOXES}.bias"):
        if len(weights[name]) == 4:  # one set of boxes for all classes
            weights[name] = weights[name].repeat(classes, *[1] * (weights[name].dim() - 1))
    predictor = FastRCNNPredictor(width, classes).to(weights[f"{SCORES}.weight"])
    module.roi_heads.box_predictor = predictor
    known = module.state_dict()
    module.load_state_dict({**known, **{name: value.detach().clone() for name, value in weights.items()}})
    return module.eval()
