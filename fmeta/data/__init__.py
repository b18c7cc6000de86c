"""Datasets as tensors, divided by class into ``.train``, ``.val`` and ``.test``."""

from fmeta.data.boxes import BoxPool, box_folder, coco_boxes
from fmeta.data.cache import cache_dir
from fmeta.data.cactus import cactus
from fmeta.data.change import random_crop, random_flip, random_jitter, random_resized_crop
from fmeta.data.datasets import from_dataset
from fmeta.data.families import Families, FamilySplit, csv_families
from fmeta.data.featured import Featured, featured
from fmeta.data.features import embedded, prepared_pool
from fmeta.data.folder import image_folder
from fmeta.data.glyphs import glyphs
from fmeta.data.imagenet import mini_imagenet, tiered_imagenet
from fmeta.data.omniglot import omniglot
from fmeta.data.pool import Pool, Pools, class_pool
from fmeta.data.scenes import scenes
from fmeta.data.tensors import from_tensors
from fmeta.data.text import text_csv
from fmeta.data.tokens import load_tokenizer
from fmeta.data.transforms import reproducible
from fmeta.data.vision import cifar_fs, fc100, torchvision_pool
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
    "cactus",
    "cifar_fs",
    "class_pool",
    "coco_boxes",
    "csv_families",
    "embedded",
    "fc100",
    "featured",
    "from_dataset",
    "from_tensors",
    "glyphs",
    "image_folder",
    "load_tokenizer",
    "mini_imagenet",
    "omniglot",
    "prepared_pool",
    "random_affine",
    "random_crop",
    "random_flip",
    "random_jitter",
    "random_resized_crop",
    "reproducible",
    "scenes",
    "text_csv",
    "tiered_imagenet",
    "torchvision_pool",
)
