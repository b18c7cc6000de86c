"""Datasets as tensors, divided by class into ``.train``, ``.val`` and ``.test``."""

from fmeta.data.boxes import BoxPool, box_folder, coco_boxes
from fmeta.data.cache import cache_dir
from fmeta.data.families import Families, FamilySplit, csv_families
from fmeta.data.featured import Featured, featured
from fmeta.data.folder import image_folder
from fmeta.data.glyphs import glyphs
from fmeta.data.omniglot import omniglot
from fmeta.data.pool import Pool, Pools, class_pool
from fmeta.data.scenes import scenes
from fmeta.data.tensors import from_tensors
from fmeta.data.warp import random_affine

__all__ = (
    "BoxPool",
    "Families",
    "FamilySplit",
    "Featured",
    "Pool",
    "Pools",
    "box_folder",
    "cache_dir",
    "class_pool",
    "coco_boxes",
    "csv_families",
    "featured",
    "from_tensors",
    "glyphs",
    "image_folder",
    "omniglot",
    "random_affine",
    "scenes",
)
