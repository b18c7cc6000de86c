"""Checkpoints: one safetensors file each, written aside and renamed, so that a reader never sees half of one.

A checkpoint holds a pytree of tensors under readable names (``meta.layers.0.weight``, ``opt_state[0]...``)
and a record of plain JSON values. Nothing here pickles or unpickles.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fmeta import tree
from fmeta.types import Tree

FORMAT = "fmeta checkpoint 1"


def save(path: Path, state: Tree, record: Mapping[str, Any]) -> None:
    """Replace the checkpoint at ``path`` at once: whoever kills this leaves the old one or the new one.

    Args:
        path: the file, ending in ``.safetensors``; its folder exists.
        state: pytree of tensors on any device.
        record: JSON values to keep beside it.

    Raises:
        OSError: if it cannot be written (a full disk); the previous checkpoint is then as it was.
    """
    tensors = {name: _storable(leaf) for name, leaf in tree.paths(state)}
    metadata = {"format": FORMAT, "record": json.dumps(record)}
    write_atomic(path, safetensors.torch.save(tensors, metadata))


def finite_or_none(value: float) -> float | None:
    """A number for JSON, which has no NaN: null stands for what is not finite."""
    return value if math.isfinite(value) else None


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file aside, flush it to the disk, then rename it over the old one."""
    aside = path.with_name(f".{path.name}.part")
    try:
        _write_through(aside, content)
        aside.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(
            f"save: {path} could not be written: {error.strerror or error}. What was there before is intact."
        ) from error


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can open folders."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _storable(leaf: Tensor) -> Tensor:
    return leaf.detach().cpu().contiguous().clone()  # clone: safetensors refuses tensors that share memory


def load(path: Path, template: Tree) -> tuple[Tree, dict[str, Any]]:
    """Read a checkpoint into the structure of ``template``.

    Args:
        path: the file.
        template: pytree with the structure, shapes, dtypes and devices to expect.

    Returns:
        The tree and the record.

    Raises:
        ValueError: if the file is missing, a pickle, cut short, not fmeta's, or of another architecture.
    """
    tensors, record = read(path)
    return _structured(path, tensors, template), record


def load_meta(path: Path, template: Tree) -> tuple[Tree, dict[str, Any]]:
    """What was learned, of a checkpoint of a whole state or of that alone, as ``load``."""
    tensors, record = read(path)
    if not record.get("meta_only"):
        whole, tensors = tensors, {}
        for name, value in whole.items():
            if name.startswith(("meta.", "meta[")):
                tensors[name.removeprefix("meta").removeprefix(".")] = value
    return _structured(path, tensors, template), record


def _structured(path: Path, tensors: dict[str, Tensor], template: Tree) -> Tree:
    _check_names_and_shapes(path, tensors, dict(tree.paths(template)))
    leaves = [tensors[name].to(leaf.device) for name, leaf in tree.paths(template)]
    return tree.unflatten(leaves, tree.flatten(template)[1])


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The named tensors and the record of a checkpoint, whatever its architecture.

    Raises:
        ValueError: if the file is missing, a pickle, cut short or not fmeta's.
    """
    if not path.is_file():
        raise ValueError(f"load: {path} does not exist. Give a folder that `fmeta train` wrote.")
    content = path.read_bytes()  # at once: a writer may put another file in its place at any moment
    _refuse_pickle(path, content)
    try:
        tensors = dict(sorted(safetensors.torch.load(content).items()))
        metadata = _metadata(content)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"load: {path} is cut short or damaged ({error}). Use the run's other checkpoint, best or last."
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"load: {path} is a safetensors file but not a checkpoint of this version of fmeta: expected "
            f"format {FORMAT!r}, got {metadata.get('format')!r}. Give a run that `fmeta train` wrote."
        )
    return tensors, json.loads(metadata["record"])


def _metadata(content: bytes) -> dict[str, str]:
    """The free text of a safetensors file: eight bytes with the header's length, then the header, JSON."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]).get("__metadata__", {})


def _refuse_pickle(path: Path, content: bytes) -> None:
    # After the header's length a safetensors file has a brace.
    if content[8:9] != b"{" and content.startswith((b"PK\x03\x04", b"\x80")):
        raise ValueError(
            f"load: {path} is a pickle (a torch.save file), expected safetensors. fmeta never unpickles, "
            "because a pickle can run any code. Give a checkpoint that `fmeta train` wrote."
        )


def _check_names_and_shapes(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    both = [name for name in expected if name in found]
    shapes = [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in both
        if found[name].shape != expected[name].shape
    ]
    dtypes = [
        f"{name} is {found[name].dtype} instead of {expected[name].dtype}"
        for name in both
        if found[name].dtype != expected[name].dtype
    ]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "another shape": shapes,
        "another dtype": dtypes,
    }
    said = [f"{problem}: {_first_few(names)}" for problem, names in problems.items() if names]
    if said:
        raise ValueError(
            f"load: {path} is of another architecture. {'; '.join(said)}. Build the model with the options "
            "that are in the run's config.json."
        )


def _first_few(names: list[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def random_state(device: torch.device) -> dict[str, str]:
    """State of torch's generators that a run on ``device`` draws from, as JSON values."""
    states = {"cpu": torch.get_rng_state()}
    states |= {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {name: bytes(state.tolist()).hex() for name, state in states.items()}


def restore_random_state(state: Mapping[str, str], device: torch.device) -> None:
    """Put torch's generators back where ``random_state`` found them."""
    read_state = lambda name: torch.tensor(list(bytes.fromhex(state[name])), dtype=torch.uint8)  # noqa: E731
    torch.set_rng_state(read_state("cpu"))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(read_state("cuda"), device)
