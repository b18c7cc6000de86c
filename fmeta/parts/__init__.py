"""Which parts of a model are learned: chosen by name, frozen, cut off, or put in."""

from fmeta.parts.freeze import freeze, last_blocks, norm_names
from fmeta.parts.inserts import merged, with_adapters, with_lora
from fmeta.parts.select import select
from fmeta.parts.split import split

__all__ = [
    "freeze",
    "last_blocks",
    "merged",
    "norm_names",
    "select",
    "split",
    "with_adapters",
    "with_lora",
]
