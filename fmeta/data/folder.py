"""Pools from a folder or zip of images."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import torch
from PIL import Image, ImageOps

from fmeta.data.images import Source, open_source, read_images
from fmeta.data.pool import Pools, split_pools
from fmeta.data.split import ClassSplit, assign_splits

CALL = "image_folder"
COLUMNS = ("file", "label", "split")


def image_folder(
    path: str | Path,
    *,
    size: int = 84,
    grey: bool = False,
    split: Sequence[float] | Mapping[str, str] | str | Path = (0.64, 0.16, 0.2),
    seed: int = 0,
) -> Pools:
    """Read class folders of images into memory and divide the classes into splits.

    The folder that holds an image is its class, named by its path below ``path``; hidden files and files
    that are not images are passed over. Images become uint8 ``[n, C, size, size]``: the middle square of
    each, resized by Lanczos' filter.

    Args:
        path: a folder, or a zip, which is read in place.
        size: side in pixels; the default is miniImageNet's.
        grey: one channel in place of red, green and blue.
        split: fractions of the classes for train, validation and test (the default is miniImageNet's
            64/16/20); or ``{class: "train" | "val" | "test"}`` for every class; or the path of a csv file
            with the columns ``file,label,split``, which then says which files are read and what they are.
            A split without classes is an empty pool.
        seed: which classes go where, for fractions.

    Raises:
        ValueError: nothing at ``path``, a folder without images, an unreadable image, a zip cut short, or
            a split that does not fit the classes.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(
            f"{CALL}: size must be a positive int, got {size!r}. Pass a side in pixels, such as 84."
        )
    with open_source(Path(path), CALL) as source:
        wanted: ClassSplit
        if isinstance(split, str | Path):
            labels, wanted = _read_index(Path(split))
            _check_present(labels, source, Path(path))
        else:
            labels, wanted = _classes(source, Path(path)), split
        names = tuple(sorted(set(labels.values())))
        split_of = assign_splits(names, wanted, seed, CALL)
        prepare = partial(_square, size=size, mode="L" if grey else "RGB")
        x = read_images(source, list(labels), prepare, CALL)
    number = {name: index for index, name in enumerate(names)}
    return split_pools(x, torch.tensor([number[label] for label in labels.values()]), names, split_of, CALL)


def _square(image: Image.Image, size: int, mode: str) -> Image.Image:
    return ImageOps.fit(image.convert(mode), (size, size), Image.Resampling.LANCZOS)


def _classes(source: Source, path: Path) -> dict[str, str]:
    """Class of every file: the folder that holds it."""
    if not source.files:
        raise ValueError(
            f"{CALL}: {path} must hold one folder of images a class, but has no images. Check the path."
        )
    labels = {name: str(PurePosixPath(name).parent) for name in source.files}
    stray = next((name for name, label in labels.items() if label == "."), None)
    if stray is not None:
        raise ValueError(
            f"{CALL}: every image must lie in the folder of its class, but {stray} lies in none. "
            "Move it, or give an index with split='index.csv'."
        )
    for folder in source.folders:
        if not any(name.startswith(f"{folder}/") for name in source.files):
            raise ValueError(f"{CALL}: folder {folder} of {path} has no images. Remove it or add some.")
    return labels


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """``{file: label}`` and ``{label: split}`` of an index file."""
    if not path.is_file():
        raise ValueError(f"{CALL}: split must be an index file, but there is no file {path}. Check the path.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        lacking = [column for column in COLUMNS if column not in (table.fieldnames or ())]
        if lacking:
            raise ValueError(
                f"{CALL}: {path} must have the columns {','.join(COLUMNS)}, but {lacking[0]!r} is missing. "
                "Add a header line."
            )
        rows = [(row["file"], row["label"], row["split"]) for row in table]
    split_of: dict[str, str] = {}
    for line, (_, label, kind) in enumerate(rows, start=2):
        if split_of.setdefault(label, kind) != kind:
            raise ValueError(
                f"{CALL}: a class must be in one split, but line {line} of {path} puts {label!r} into "
                f"{kind!r} after {split_of[label]!r}. Divide classes, not images."
            )
    if not rows:
        raise ValueError(f"{CALL}: {path} must list images, but has no lines. Add some.")
    return {name: label for name, label, _ in rows}, split_of


def _check_present(labels: Mapping[str, str], source: Source, path: Path) -> None:
    present = set(source.files)
    missing = [name for name in labels if name not in present]
    if missing:
        raise ValueError(
            f"{CALL}: the index lists {len(missing)} images that {path} does not hold, such as {missing[0]}. "
            "Paths must be relative to it, with forward slashes."
        )
