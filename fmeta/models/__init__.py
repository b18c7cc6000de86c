"""Networks of the few-shot literature, as plain modules without running statistics."""

from fmeta.models.conv4 import conv4
from fmeta.models.encoder import Encoder, Projection, encoder, with_ways
from fmeta.models.mlp import mlp
from fmeta.models.parted import layers_of, part
from fmeta.models.resnet12 import resnet12

__all__ = ("Encoder", "Projection", "conv4", "encoder", "layers_of", "mlp", "part", "resnet12", "with_ways")
