"""Reading files of weights: safetensors, and the state dicts that torch.save writes.

Nothing here runs code from a file: pickles are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

BESIDE = "beside"
"""In a record: names of tensors that are no weights of the model."""


def read(path: str | Path, *, beside: bool = True) -> dict[str, Tensor]:
    """The named tensors of a weights file: safetensors, or a ``state_dict`` saved by torch, on the CPU.

    A dict with the one key ``state_dict`` or ``model`` beside others is looked into, and a common prefix
    ``module.`` (of ``nn.DataParallel``) is taken off.

    Args:
        path: the file.
        beside: whether to give what ``fmeta export --what meta`` keeps beside a model's weights too: learned rates,
            say.

    Raises:
        ValueError: for no file, one that is damaged, holds something else, or would have to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights.read: {path} must be a weights file, but there is none. Check the path.")
    found: Any = _safetensors(path, "weights.read", _tensors) if _is_safetensors(path) else _pickled(path)
    for key in ("state_dict", "model"):
        found = found[key] if isinstance(found, Mapping) and isinstance(found.get(key), Mapping) else found
    if not isinstance(found, Mapping) or not found or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(
            f"weights.read: {path} must hold a state dict, names with tensors, got {type(found).__name__}. Save "
            "module.state_dict()."
        )
    if not beside and _is_safetensors(path):
        others = record_of(path).get(BESIDE, ())
        found = {name: x for name, x in found.items() if name not in others}
    wrapped = all(name.startswith("module.") for name in found)
    return {name.removeprefix("module.") if wrapped else name: x.detach() for name, x in found.items()}


def _is_safetensors(path: Path) -> bool:
    """After the header's length, eight bytes, a safetensors file has a brace."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _safetensors(path: Path, call: str, take: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What is taken of an open file."""
    try:
        with safe_open(path, framework="pt") as file:
            return take(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{call}: {path} is cut short or damaged ({error}). Copy or download it again."
        ) from error


def _tensors(file: Any) -> dict[str, Tensor]:
    return {name: file.get_tensor(name) for name in file.keys()}


def _record(file: Any) -> dict[str, Any]:
    return json.loads((file.metadata() or {}).get("fmeta", "{}"))


def _pickled(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise ValueError(
            f"weights.read: {path} must be a weights file, but it is empty. Copy or download it again."
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles of other programs
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch does on bytes that are none of its own
        raise ValueError(
            f"weights.read: {path} must be safetensors or a plain state dict of torch.save, but reading it failed "
            f"({_reason(start, str(error))}). Save module.state_dict(), or copy it again; other pickles could run any "
            "code."
        ) from error


def _reason(start: bytes, said: str) -> str:
    """Why torch cannot read a file that begins so, without its advice to run whatever is in it."""
    code = re.search(r"GLOBAL ([\w.]+)", said)
    if code:
        return f"it is a pickle that calls {code[1]}"
    if start.startswith(b"PK"):
        return "it is cut short or damaged"
    if start.startswith(b"\x80"):
        return "it is a pickle of something else, cut short or damaged"
    return f"it begins with {start!r}, as neither of them does"


def record_of(path: str | Path) -> dict[str, Any]:
    """The record that ``save`` put beside the tensors.

    Raises:
        ValueError: for no file, one that is damaged, or of another kind.
    """
    path = Path(path)
    if not path.is_file() or not _is_safetensors(path):
        got = "one of another kind" if path.is_file() else "none"
        raise ValueError(
            f"weights.record_of: {path} must be a safetensors file, got {got}. weights.save and `fmeta export` write "
            "them with a record."
        )
    return _safetensors(path, "weights.record_of", _record)
