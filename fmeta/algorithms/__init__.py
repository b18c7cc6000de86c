"""Meta-learning algorithms: one file and one factory each, all of them pure functions of one task."""

from fmeta.algorithms.anil import anil
from fmeta.algorithms.boil import boil
from fmeta.algorithms.cavia import cavia
from fmeta.algorithms.few_shot_detection import few_shot_detection
from fmeta.algorithms.imaml import imaml
from fmeta.algorithms.learned_update import learned_update
from fmeta.algorithms.lrd2 import lrd2
from fmeta.algorithms.maml import maml
from fmeta.algorithms.mamlpp import mamlpp
from fmeta.algorithms.matchingnet import matchingnet
from fmeta.algorithms.metacurvature import metacurvature
from fmeta.algorithms.metaoptnet import metaoptnet
from fmeta.algorithms.metasgd import metasgd
from fmeta.algorithms.protomaml import protomaml
from fmeta.algorithms.protonet import protonet
from fmeta.algorithms.r2d2 import r2d2
from fmeta.algorithms.relationnet import relationnet
from fmeta.algorithms.reptile import reptile
from fmeta.algorithms.sharpmaml import sharpmaml
from fmeta.algorithms.simpleshot import simpleshot

__all__ = [
    "anil",
    "boil",
    "cavia",
    "few_shot_detection",
    "imaml",
    "learned_update",
    "lrd2",
    "maml",
    "mamlpp",
    "matchingnet",
    "metacurvature",
    "metaoptnet",
    "metasgd",
    "protomaml",
    "protonet",
    "r2d2",
    "relationnet",
    "reptile",
    "sharpmaml",
    "simpleshot",
]
