"""Networks of the few-shot literature, plain modules without running statistics; torchvision's with their weights."""

import importlib
from typing import Any

from fmeta.models.backbones import backbone, head_name
from fmeta.models.conv4 import conv4
from fmeta.models.encoder import Encoder, Projection, encoder, with_ways
from fmeta.models.mlp import mlp
from fmeta.models.new_classes import object_detector
from fmeta.models.parted import layers_of, part
from fmeta.models.resnet12 import resnet12
from fmeta.models.warped import warped

__all__ = (
    "Encoder",
    "Projection",
    "backbone",
    "conv4",
    "encoder",
    "head_name",
    "layers_of",
    "mlp",
    "object_detector",
    "part",
    "resnet12",
    "warped",
    "with_ways",
)

LATE = {
    "detection": "detecting",
    "faster_rcnn": "rcnn",
    "merged_detector": "detector",
    "mobilenet_detector": "rcnn",
    "split_detector": "detector",
}
"""Functions of modules that need torchvision, which takes seconds to import: at their first use."""


def __getattr__(name: str) -> Any:
    """Import what needs torchvision."""
    if name not in LATE:
        raise AttributeError(f"fmeta.models: there is no {name!r}.")
    return getattr(importlib.import_module(f"fmeta.models.{LATE[name]}"), name)
