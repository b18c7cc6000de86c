"""Weights in and out: files of other libraries, half precision, ordinary state dicts.

A file of another library is read by ``read`` without running code from it.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fmeta.parts.select import Pattern, matches
from fmeta.types import Params
from fmeta.weights.files import read, record_of

__all__ = ("in_dtype", "load", "read", "record_of", "save", "save_pretrained", "state_dict")

Dtype = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KEPT = ("*running_mean", "*running_var", "lr.*", "curvature.*")
"""What stays in float32 in a half file: statistics, whose range is that of activations squared, and rates."""
COUNTERS = "num_batches_tracked"
"""Of batch norm's momentum, which nobody reads in evaluation; many files lack them."""


def load(
    module: nn.Module,
    weights: Mapping[str, Tensor] | str | Path,
    *,
    new: Pattern | None = None,
    source: str | None = None,
) -> nn.Module:
    """A copy of a module with these weights; every name and shape must fit.

    Args:
        module: the architecture.
        weights: a state dict, or its file; what ``fmeta export`` keeps beside a model's weights is left out.
        new: names of the module's tensors that keep their values whatever the weights hold: a new head, say.
        source: what errors call the weights; their path by default.

    Raises:
        ValueError: naming the first differences; the names must match but for ``new``.
    """
    if isinstance(weights, str | Path):
        source, weights = source or str(weights), read(weights, beside=False)
    module = copy.deepcopy(module)
    own = module.state_dict()
    kept = set() if new is None else set(matches(new, own))
    kept |= {name for name in own if name.endswith(COUNTERS) and name not in weights}
    given = {name: x for name, x in weights.items() if name not in kept}
    of = f" of {source}" if source else ""
    _check_fit(module, of, {name: x for name, x in own.items() if name not in kept}, given)
    module.load_state_dict(own | given)
    return module


def _check_fit(
    module: nn.Module, source: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> None:
    shapes = [
        f"{name} is {tuple(given[name].shape)}, not {tuple(x.shape)}"
        for name, x in own.items()
        if name in given and given[name].shape != x.shape
    ]
    differ = {
        "missing": [name for name in own if name not in given],
        "unknown": [name for name in given if name not in own],
        "another shape": shapes,
    }
    said = "; ".join(f"{what}: {_first(names)}" for what, names in differ.items() if names)
    if said:
        raise ValueError(
            f"weights.load: the weights{source} must be those of {type(module).__name__}, but they are of another "
            f"architecture. {said}. Choose the architecture that they were made for."
        )


def _first(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def in_dtype(tensors: Mapping[str, Tensor], dtype: Dtype, *, kept: Sequence[str] = KEPT) -> dict[str, Tensor]:
    """The same tensors in another floating-point type; integers stay, and what is kept stays float32.

    Complex tensors have no half type: only complex64 is taken, for ``"fp32"``, and stays.

    Args:
        tensors: by name.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        kept: globs of names that stay float32; the default holds batch norm's statistics and learned rates.

    Raises:
        ValueError: for an unknown dtype, a number that is too large for it, or a complex tensor, with its name.

    >>> {n: x.dtype for n, x in in_dtype({"a": torch.ones(1), "bn.running_var": torch.ones(1)}, "fp16").items()}
    {'a': torch.float16, 'bn.running_var': torch.float32}
    """
    if dtype not in DTYPES:
        raise ValueError(f"weights.in_dtype: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")

    def converted(name: str, x: Tensor) -> Tensor:
        if x.is_complex() and (dtype, x.dtype) != ("fp32", torch.complex64):
            raise ValueError(
                f"weights.in_dtype: tensors must be real for {dtype}, but {name} is {str(x.dtype)[6:]}. Use fp32 with "
                "complex64, or pass torch.view_as_real of it."
            )
        if not x.is_floating_point():
            return x
        stays = any(fnmatchcase(name, glob) for glob in kept)
        changed = x.to(torch.float32 if stays else DTYPES[dtype])
        if bool((torch.isfinite(x) & ~torch.isfinite(changed)).any()):
            raise ValueError(
                f"weights.in_dtype: numbers must be at most {torch.finfo(changed.dtype).max:.4g} for {dtype}, but "
                f"{name} has one of size {float(x.abs().max()):.4g}. Use bf16 or fp32."
            )
        return changed

    return {name: converted(name, x) for name, x in tensors.items()}


def save(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: Dtype = "fp32",
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors as one safetensors file, written aside and renamed.

    Args:
        path: the file; its folder exists.
        tensors: by name, on any device; see ``in_dtype`` for what stays float32 in a half file.
        dtype: of the file.
        record: JSON values kept beside them, for ``record_of``.

    Raises:
        ValueError: for numbers too large for the dtype.
        OSError: if it cannot be written.
    """
    stored = {name: x.detach().cpu().contiguous().clone() for name, x in in_dtype(tensors, dtype).items()}
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"weights.save: there is no folder {path.parent} for {path.name}. Make it first."
        )
    aside = path.with_name(f".{path.name}-{os.getpid()}.part")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # as for any new file; save_file's own is for the user alone
        save_file(stored, aside, metadata={"fmeta": json.dumps(dict(record or {}))})
        aside.chmod(mode)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def state_dict(module: nn.Module, params: Params) -> dict[str, Tensor]:
    """An ordinary state dict: the module's own, with learned or adapted parameters in their places.

    ``type(module)(...).load_state_dict(found)`` loads it with ``strict=True``: buffers, frozen parameters and the
    second names of tied ones are there. For a model with low-rank updates pass ``fmeta.merged(params)`` and the
    module without them.

    Args:
        module: what the parameters belong to; it is not changed.
        params: some or all of its parameters.

    Raises:
        ValueError: for a name that the module does not have, or another shape.
    """
    module = copy.deepcopy(module)
    own = dict(module.named_parameters())
    for name, value in params.items():
        if name not in own or own[name].shape != value.shape:
            got = f"shape {tuple(value.shape)}" if name in own else "no such parameter"
            raise ValueError(
                f"weights.state_dict: params must belong to {type(module).__name__}, got {name!r} with {got}. Pass "
                "the module that they come from; fmeta.merged takes low-rank updates in."
            )
        own[name].data = value.detach().to(own[name].device)
    return {name: x.detach().clone() for name, x in module.state_dict().items()}


def save_pretrained(module: nn.Module, params: Params, folder: str | Path) -> None:
    """Save a model of transformers with these parameters; ``from_pretrained(folder)`` loads it.

    Args:
        module: a model of transformers; it is not changed.
        params: some or all of its parameters.
        folder: where its files go.

    Raises:
        TypeError: for a module that has no ``save_pretrained``.
    """
    if not hasattr(module, "save_pretrained"):
        raise TypeError(
            f"weights.save_pretrained: a model of transformers was expected, got {type(module).__name__}. Use "
            "weights.save(path, weights.state_dict(module, params))."
        )
    own = copy.deepcopy(module)
    own.load_state_dict(state_dict(module, params))
    own.save_pretrained(folder)  # type: ignore[operator]
