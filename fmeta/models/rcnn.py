"""Builders of Faster R-CNN: torchvision's own with its COCO weights, and a small one on MobileNetV2."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

LEVELS = {"6": "0", "13": "1", "17": "2"}
"""Blocks of MobileNetV2 whose outputs, at strides 8, 16 and 32, the pyramid takes."""


def faster_rcnn(
    name: str = "fasterrcnn_mobilenet_v3_large_320_fpn",
    *,
    weights: Literal["default"] | None = "default",
    **options: Any,
) -> FasterRCNN:
    """One of torchvision's detectors, in eval mode.

    Args:
        name: ``fasterrcnn_...`` as torchvision lists it.
        weights: ``"default"``, those of COCO, which torchvision downloads at the first call, or None for random ones.
        options: passed on to torchvision.

    Raises:
        ValueError: for an unknown name, or where the weights cannot be downloaded.
    """
    known = [found for found in torchvision.models.list_models() if found.startswith("fasterrcnn")]
    if name not in known:
        raise ValueError(f"faster_rcnn: name must be one of {', '.join(known)}, got {name!r}.")
    given: dict[str, Any] = {"weights": "DEFAULT"} if weights == "default" else {"weights_backbone": None}
    try:
        return torchvision.models.get_model(name, **given, **options).eval()
    except OSError as error:
        raise ValueError(
            f"faster_rcnn: the weights of {name} must be downloaded, but that failed ({error}). Give weights of a "
            "backbone by mobilenet_detector(weights=...), or weights=None."
        ) from error


def mobilenet_detector(
    classes: int,
    *,
    weights: str | Path | None = None,
    channels: int = 96,
    hidden: int = 256,
    size: int = 320,
    proposals: int = 100,
    width: float = 1.0,
) -> FasterRCNN:
    """A small Faster R-CNN on MobileNetV2, in eval mode, with a feature pyramid of strides 8, 16 and 32.

    Args:
        classes: classes without the background.
        weights: a file of MobileNetV2's weights, a state dict under torchvision's names (``features...``) of a
            network that takes pixels in -1 .. 1 and has an eps of 1e-3; None draws all weights at random.
        channels: of the pyramid.
        hidden: width of the box head.
        size: longer side of the pictures, for torchvision's own forward.
        proposals: boxes of a picture that the heads look at.
        width: factor of MobileNetV2's channels.

    Raises:
        ValueError: for a file that is missing, or holds weights of another architecture.
    """
    network = torchvision.models.mobilenet_v2(
        width_mult=width, norm_layer=lambda channels: nn.BatchNorm2d(channels, eps=1e-3)
    )
    if weights is not None:
        load_backbone(network, Path(weights))
    features = network.features[: max(map(int, LEVELS)) + 1]
    inner = [features[int(block)].out_channels for block in LEVELS]
    backbone = BackboneWithFPN(features, dict(LEVELS), inner, channels)
    backbone.fpn.extra_blocks = None
    anchors = AnchorGenerator(((16, 26), (40, 60), (90, 140)), ((0.5, 1.0, 2.0),) * 3)
    return FasterRCNN(
        backbone,
        min_size=size,
        max_size=size,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=3 * proposals,
        rpn_pre_nms_top_n_test=3 * proposals,
        rpn_post_nms_top_n_train=proposals,
        rpn_post_nms_top_n_test=proposals,
        box_roi_pool=MultiScaleRoIAlign(list(LEVELS.values()), 7, 2, canonical_scale=80),
        box_head=TwoMLPHead(channels * 7 * 7, hidden),
        box_predictor=FastRCNNPredictor(hidden, classes + 1),
    ).eval()


def load_backbone(network: MobileNetV2, path: Path) -> None:
    """Put the weights of a file into MobileNetV2's features; its classifier may be there or not."""
    call = "mobilenet_detector"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{call}: {path} must be a file of weights that torch.save wrote, but reading it failed ({error}). "
            "Check the path."
        ) from error
    check_weights(call, path, network.features, found, "features.")
    network.load_state_dict({**network.state_dict(), **found})


def check_weights(call: str, path: Path, module: nn.Module, found: Any, prefix: str) -> None:
    """Refuse weights of another architecture, naming what differs first."""
    expected = {prefix + name: value for name, value in module.state_dict().items()}
    if not isinstance(found, Mapping):
        raise ValueError(f"{call}: {path} must hold a dict of tensors, got {type(found).__name__}.")
    counted = {name for name in expected if not name.endswith("num_batches_tracked")}
    missing = sorted(counted - found.keys())
    shapes = [
        f"{name} of shape {list(found[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    wrong = [f"no {name}" for name in missing] + shapes
    if wrong:
        raise ValueError(
            f"{call}: {path} holds weights of another architecture, got {wrong[0]} and {len(wrong) - 1} more "
            "differences. Give weights that this detector was made with."
        )


def with_norms_of(module: FasterRCNN, weights: Mapping[str, Tensor], *, eps: float) -> FasterRCNN:
    """A detector of torchvision's without weights, with the kind of norm layers that these weights are of.

    torchvision builds a detector that gets weights with frozen batch norms, which count no batches, and one that
    gets none with ordinary ones.

    Args:
        module: what ``faster_rcnn(name, weights=None)`` returned; its layers are replaced.
        weights: all weights that it is going to load.
        eps: of the frozen layers.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in weights:
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, FrozenBatchNorm2d(layer.num_features, eps=eps))
    return module
