"""Meta-learning algorithms: one file and one factory each, all of them pure functions of one task."""

from fmeta.algorithms.anil import anil
from fmeta.algorithms.maml import maml
from fmeta.algorithms.metasgd import metasgd
from fmeta.algorithms.protonet import protonet
from fmeta.algorithms.reptile import reptile

__all__ = ["anil", "maml", "metasgd", "protonet", "reptile"]
