"""Image files of a folder or a zip, read with errors that name the file."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
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
CHUNK = 256  # images in memory at once
THREADS = min(8, os.cpu_count() or 1)  # decoders let go of the interpreter

Stats = dict[str, tuple[int, int]]
"""Size and time of change of every file; in a zip, size and checksum."""


class Source(NamedTuple):
    """The images of a folder or zip, by path relative to its root, with forward slashes."""

    where: Path
    files: list[str]
    folders: list[str]  # without the root itself
    read: Callable[[str], bytes]
    stats: Stats


@contextmanager
def open_source(path: Path, call: str) -> Iterator[Source]:
    """List the images below a folder, or in a zip, which is read in place."""
    if path.is_dir():
        stats, folders = walk(path)
        read = lambda name: (path / name).read_bytes()  # noqa: E731
        yield Source(path, _images(sorted(stats)), _visible(sorted(folders)), read, stats)
    elif path.is_file():
        with _open_zip(path, call) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.filename)
            stats = {entry.filename: (entry.file_size, entry.CRC) for entry in entries if not entry.is_dir()}
            parents = {str(parent) for name in stats for parent in PurePosixPath(name).parents} - {"."}
            folders = sorted(parents | {entry.filename.rstrip("/") for entry in entries if entry.is_dir()})
            yield Source(path, _images(list(stats)), _visible(folders), archive.read, stats)
    else:
        raise ValueError(
            f"{call}: {path} must be a folder or a zip file, but there is nothing. Check the path."
        )


def walk(path: Path) -> tuple[Stats, list[str]]:
    """Files below a folder with their sizes and times, and the folders, by relative path; links are followed.

    One call a file: a million files take seconds, which a glob and a stat of each would multiply.
    """
    stats: Stats = {}
    folders: list[str] = []
    waiting = [("", str(path))]
    seen = {os.path.realpath(path)}
    while waiting:
        prefix, folder = waiting.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    if entry.is_symlink():  # followed once, and never in a circle
                        target = os.path.realpath(entry.path)
                        here = os.path.realpath(folder) + os.sep
                        if target in seen or here.startswith(target + os.sep):
                            continue
                        seen.add(target)
                    folders.append(prefix + entry.name)
                    waiting.append((f"{prefix}{entry.name}/", entry.path))
                elif entry.is_file():
                    stat = entry.stat()
                    stats[prefix + entry.name] = (stat.st_size, stat.st_mtime_ns)
    return stats, folders


def read_images(
    source: Source, names: Sequence[str], prepare: Callable[[Image.Image], Image.Image], call: str
) -> Tensor:
    """Decode at least one file to uint8 ``[n, C, H, W]``; ``prepare`` brings all to one size and mode."""
    return torch.cat(list(in_chunks(partial(decode_file, source, names, prepare, call), len(names))))


def in_chunks(decode: Callable[[int], Tensor], count: int, threads: int = THREADS) -> Iterator[Tensor]:
    """``decode(0)``, ``decode(1)``, ... ``decode(count - 1)`` stacked, some hundred at a time."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, count, CHUNK):
            yield torch.stack(list(pool.map(decode, range(start, min(start + CHUNK, count)))))


def decode_file(
    source: Source,
    names: Sequence[str],
    prepare: Callable[[Image.Image], Image.Image],
    call: str,
    index: int,
) -> Tensor:
    """One file as uint8 ``[C, H, W]``."""
    try:
        with Image.open(io.BytesIO(source.read(names[index]))) as image:
            return as_tensor(prepare(image))
    except DAMAGE as error:
        raise ValueError(
            f"{call}: {names[index]} in {source.where} must be a readable image, but decoding it failed "
            f"({error}). Replace or remove it."
        ) from error


def as_tensor(image: Image.Image) -> Tensor:
    """A picture in mode L or RGB as uint8 ``[C, H, W]``."""
    pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def square(image: Image.Image, size: int, grey: bool) -> Image.Image:
    """The middle square of a picture of any mode, in grey or colour, resized by Lanczos' filter."""
    return ImageOps.fit(eight_bits(image, "L" if grey else "RGB"), (size, size), Image.Resampling.LANCZOS)


def eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """A picture in mode ``"L"`` or ``"RGB"``: 16 bits lose the lower ones, transparent parts become white."""
    # PIL's own conversion of 16 bits cuts everything above 255 off.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide + 128) // 257).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("read_images: 8 or 16 bits a channel are expected, got 32, whose range is not known")
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return image.convert(mode)


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
