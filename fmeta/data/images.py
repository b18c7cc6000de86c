"""Image files of a folder or a zip, read with errors that name the file."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"})
# What PIL and zipfile raise on data that is cut short or overwritten.
DAMAGE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    Image.DecompressionBombError,
    RuntimeError,
)


class Source(NamedTuple):
    """The images of a folder or zip, by path relative to its root, with forward slashes."""

    where: Path
    files: list[str]
    folders: list[str]  # without the root itself
    read: Callable[[str], bytes]


@contextmanager
def open_source(path: Path, call: str) -> Iterator[Source]:
    """List the images below a folder, or in a zip, which is read in place."""
    if path.is_dir():
        below = sorted(entry for entry in path.rglob("*"))
        files = [entry.relative_to(path).as_posix() for entry in below if entry.is_file()]
        folders = [entry.relative_to(path).as_posix() for entry in below if entry.is_dir()]
        yield Source(path, _images(files), _visible(folders), lambda name: (path / name).read_bytes())
    elif path.is_file():
        with _open_zip(path, call) as archive:
            entries = sorted(archive.namelist())
            files = [entry for entry in entries if not entry.endswith("/")]
            parents = {str(parent) for entry in files for parent in PurePosixPath(entry).parents} - {"."}
            folders = sorted(parents | {entry.rstrip("/") for entry in entries if entry.endswith("/")})
            yield Source(path, _images(files), _visible(folders), archive.read)
    else:
        raise ValueError(
            f"{call}: {path} must be a folder or a zip file, but there is nothing. Check the path."
        )


def read_images(
    source: Source, names: Sequence[str], prepare: Callable[[Image.Image], Image.Image], call: str
) -> Tensor:
    """Decode at least one file to uint8 ``[n, C, H, W]``; ``prepare`` brings all to one size and mode."""
    first = _decode(source, names[0], prepare, call)
    pixels = torch.empty((len(names), *first.shape), dtype=torch.uint8)
    for index, name in enumerate(names):
        pixels[index] = _decode(source, name, prepare, call)
    return pixels


def _decode(source: Source, name: str, prepare: Callable[[Image.Image], Image.Image], call: str) -> Tensor:
    try:
        with Image.open(io.BytesIO(source.read(name))) as image:
            pixels = np.array(prepare(image))
    except DAMAGE as error:
        raise ValueError(
            f"{call}: {name} in {source.where} must be a readable image, but decoding it failed ({error}). "
            "Replace or remove it."
        ) from error
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def _open_zip(path: Path, call: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except DAMAGE as error:
        raise ValueError(
            f"{call}: {path} must be a complete zip file, but it is cut short or damaged ({error}). "
            "Copy or download it again."
        ) from error


def _images(names: Sequence[str]) -> list[str]:
    return [name for name in _visible(names) if PurePosixPath(name).suffix.lower() in SUFFIXES]


def _visible(names: Sequence[str]) -> list[str]:
    """Without hidden files and the folder that macOS adds to zips."""
    return [name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))]
