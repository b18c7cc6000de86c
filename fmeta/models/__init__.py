"""Networks of the few-shot literature, as plain modules without running statistics; torchvision's with weights."""

from fmeta.models.backbones import backbone, head_name
from fmeta.models.conv4 import conv4
from fmeta.models.mlp import mlp
from fmeta.models.resnet12 import resnet12

__all__ = ("backbone", "conv4", "head_name", "mlp", "resnet12")
