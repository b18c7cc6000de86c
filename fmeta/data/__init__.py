"""Datasets as tensors, divided by class into ``.train``, ``.val`` and ``.test``."""

from fmeta.data.cache import cache_dir
from fmeta.data.cactus import cactus
from fmeta.data.families import Families, FamilySplit, csv_families
from fmeta.data.folder import image_folder
from fmeta.data.glyphs import glyphs
from fmeta.data.omniglot import omniglot
from fmeta.data.pool import Pool, Pools, class_pool
from fmeta.data.tensors import from_tensors
from fmeta.data.warp import random_affine

__all__ = (
    "Families",
    "FamilySplit",
    "Pool",
    "Pools",
    "cache_dir",
    "cactus",
    "class_pool",
    "csv_families",
    "from_tensors",
    "glyphs",
    "image_folder",
    "omniglot",
    "random_affine",
)
