"""Datasets as tensors, divided by class into ``.train``, ``.val`` and ``.test``."""

from fmeta.data.cache import cache_dir
from fmeta.data.families import Families, FamilySplit, csv_families
from fmeta.data.folder import image_folder
from fmeta.data.glyphs import glyphs
from fmeta.data.omniglot import omniglot
from fmeta.data.pool import Pool, Pools, class_pool
from fmeta.data.prepared import prepared_pool
from fmeta.data.tensors import from_tensors
from fmeta.data.text import text_csv
from fmeta.data.tokens import load_tokenizer
from fmeta.data.warp import random_affine

__all__ = (
    "Families",
    "FamilySplit",
    "Pool",
    "Pools",
    "cache_dir",
    "class_pool",
    "csv_families",
    "from_tensors",
    "glyphs",
    "image_folder",
    "load_tokenizer",
    "omniglot",
    "prepared_pool",
    "random_affine",
    "text_csv",
)
