"""Weights in and out: files of other libraries, half precision, ordinary state dicts, and models by name."""

from fmeta.weights.convert import DTYPES, Dtype, in_dtype, load, save, save_pretrained, state_dict
from fmeta.weights.files import read, record_of

__all__ = [
    "DTYPES",
    "Dtype",
    "in_dtype",
    "load",
    "read",
    "record_of",
    "save",
    "save_pretrained",
    "state_dict",
]
