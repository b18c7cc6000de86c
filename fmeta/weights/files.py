"""Reading files of weights: safetensors, and the state dicts that torch.save writes.

Nothing here runs code from a file: pickles are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def read(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a weights file: safetensors, or a ``state_dict`` saved by torch, on the CPU.

    A dict with the one key ``state_dict`` or ``model`` beside others is looked into, and a common prefix
    ``module.`` (of ``nn.DataParallel``) is taken off.

    Args:
        path: the file.

    Raises:
        ValueError: for no file, one that is damaged, holds something else, or would have to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights.read: {path} must be a weights file, but there is none. Check the path.")
    found = _safetensors(path) if _is_safetensors(path) else _pickled(path)
    for key in ("state_dict", "model"):
        found = found[key] if isinstance(found, Mapping) and isinstance(found.get(key), Mapping) else found
    if not isinstance(found, Mapping) or not found or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(
            f"weights.read: {path} must hold a state dict, names with tensors, got {type(found).__name__}. Save "
            "module.state_dict()."
        )
    wrapped = all(name.startswith("module.") for name in found)
    return {name.removeprefix("module.") if wrapped else name: x.detach() for name, x in found.items()}


def _is_safetensors(path: Path) -> bool:
    """After the header's length, eight bytes, a safetensors file has a brace."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"weights.read: {path} is cut short or damaged ({error}). Copy or download it again."
        ) from error


def _pickled(path: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles of other programs
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(
            f"weights.read: {path} must be safetensors or a plain state dict of torch.save, but reading it failed "
            f"({str(error).splitlines()[0]}). Save module.state_dict(); other pickles could run any code."
        ) from error


def record_of(path: str | Path) -> dict[str, Any]:
    """The record that ``save`` put beside the tensors."""
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("fmeta", "{}"))
