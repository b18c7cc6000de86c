"""Networks of the few-shot literature, as plain modules without running statistics."""

from fmeta.models.conv4 import conv4
from fmeta.models.mlp import mlp
from fmeta.models.resnet12 import resnet12
from fmeta.models.warped import warped

__all__ = ("conv4", "mlp", "resnet12", "warped")
