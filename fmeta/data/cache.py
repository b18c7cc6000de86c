"""Decoded datasets on disk: made once, mapped into memory, made again when damaged or out of date."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from fmeta.data.mapped import Examples, Recipe, in_memory, locked, read, recipe_of, write
from fmeta.types import MetaLearningWarning


def cache_dir() -> Path:
    """Where fmeta keeps what it can make again: ``$FMETA_CACHE``, else the user's cache directory.

    Example:
        >>> cache_dir()  # doctest: +SKIP
        PosixPath('/home/me/.cache/fmeta')
    """
    if os.environ.get("FMETA_CACHE"):
        return Path(os.environ["FMETA_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fmeta"


def data_folder(call: str, name: str, root: str | Path | None, download: bool) -> Path:
    """Where the files of a dataset are: ``root``, else ``$FMETA_DATA/name``, else ``name`` in the cache."""
    if root is not None:
        return Path(root).expanduser()
    if os.environ.get("FMETA_DATA"):
        return Path(os.environ["FMETA_DATA"]).expanduser() / name
    folder = cache_dir() / name
    if download or folder.is_dir():
        return folder
    raise ValueError(
        f"{call}: root must say where the files are, got none. Pass root=, or set FMETA_DATA to the folder "
        f"that holds {name}/. download=True fetches what may be fetched."
    )


def cached(name: str, key: object, build: Callable[[], Examples | Recipe], stamp: object = None) -> Examples:
    """Map the examples that ``build`` made before, or build and store them.

    Processes that ask for the same examples at once wait for the first, which builds them. Examples that
    cannot be stored are returned in memory, with a warning.

    Args:
        name: start of the file's name, for people who look into the directory.
        key: what is asked for, as JSON values; another key is another file.
        build: makes the examples, uint8 or floating. It must depend on nothing but ``key`` and ``stamp``.
        stamp: what they are made from, as JSON values: files and their times, versions. A file with another
            stamp is replaced.
    """
    path = cache_dir() / f"{name}-{_digest(key)}.safetensors"
    mark = _digest(stamp)
    found = read(path, mark)
    if found is not None:
        return found
    failure: OSError | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        failure = error
    with locked(path):
        found = read(path, mark)  # another process may have made it in the meantime
        if found is None:
            made = build()
            recipe = made if isinstance(made, Recipe) else recipe_of(made)
            try:
                write(path, recipe, mark)
            except OSError as error:
                failure = failure or error
            found = read(path, mark)
    if found is None:
        warnings.warn(
            f"{name}: the data could not be kept in {path.parent} ({failure}), so it will be made again "
            "next time. Set FMETA_CACHE to a writable directory.",
            MetaLearningWarning,
            stacklevel=3,
        )
        found = in_memory(recipe)
    return found


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
