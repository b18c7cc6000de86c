"""Pools from a folder or zip of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import PIL
import torch

from fmeta.data.cache import cached
from fmeta.data.images import Source, decode_file, in_chunks, open_source, square
from fmeta.data.index import locate, read_index
from fmeta.data.mapped import Recipe
from fmeta.data.pool import SPLITS, Pools, split_pools
from fmeta.data.split import ClassSplit, assign_splits

CALL = "image_folder"
VERSION = 1  # raise it when the pixels that the same files give change


def image_folder(
    path: str | Path,
    *,
    size: int = 84,
    grey: bool = False,
    split: Sequence[float] | Mapping[str, str] | str | Path = (0.64, 0.16, 0.2),
    seed: int = 0,
) -> Pools:
    """Decode class folders of images once, and divide the classes into splits.

    The folder that holds an image is its class, named by its path below ``path``; hidden files and files
    that are not images are passed over. Images become uint8 ``[n, C, size, size]``: the middle square of
    each, resized by Lanczos' filter. They may differ in size and mode: 16 bits are reduced to 8, palettes and
    CMYK become colours, transparent parts white.

    Decoded images are kept in the cache directory, ``n * C * size * size`` bytes, and mapped into memory: a
    second call takes a moment, and pixels are read when they are used. They are decoded again when a file
    changes its size or time. The splits of the first call are views of the file; other ones are copies.

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

    Example:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("cat", "dog", "emu"):
        ...     (root / name).mkdir()
        ...     Image.new("RGB", (40, 30), "red").save(root / name / "1.png")
        >>> pools = image_folder(root, size=8, split={"cat": "train", "dog": "train", "emu": "test"})
        >>> pools.train.names, pools.test.x.shape
        (('cat', 'dog'), torch.Size([1, 3, 8, 8]))
    """
    check_size(CALL, size)
    with open_source(Path(path), CALL) as source:
        wanted: ClassSplit
        index = Path(split).resolve() if isinstance(split, str | Path) else None
        if isinstance(split, str | Path):
            labels, wanted = read_index(Path(split), CALL)
            labels = locate(labels, source, CALL)
        else:
            labels, wanted = _classes(source, Path(path)), split
        return source_pools(CALL, source, labels, wanted, seed=seed, size=size, grey=grey, index=index)


def source_pools(
    call: str,
    source: Source,
    labels: Mapping[str, str],
    wanted: ClassSplit,
    *,
    size: int,
    grey: bool,
    seed: int = 0,
    index: Path | None = None,
) -> Pools:
    """Pools of the images that ``labels`` names, from the cache where they are in it.

    Args:
        call: the public function that errors name.
        source: where the images are.
        labels: class of every file.
        wanted: split of the classes.
        size: side in pixels.
        grey: one channel in place of three.
        seed: which classes go where, for fractions.
        index: the file that ``labels`` come from, if they do.
    """
    names = tuple(sorted(set(labels.values())))
    split_of = assign_splits(names, wanted, seed, call)

    def build() -> Recipe:
        # Sorted by split and class, so that every split is one piece of the file.
        files = sorted(labels, key=lambda file: (SPLITS.index(split_of[labels[file]]), labels[file]))
        number = {name: position for position, name in enumerate(names)}
        decode = partial(decode_file, source, files, partial(square, size=size, grey=grey), call)
        return Recipe(
            shape=(1 if grey else 3, size, size),
            y=torch.tensor([number[labels[file]] for file in files]),
            names=names,
            chunks=lambda: in_chunks(decode, len(files)),
        )

    key = [call, str(source.where.resolve()), size, grey, index and str(index)]
    files = [[file, label, *source.stats[file]] for file, label in labels.items()]
    examples = cached(call, key, build, stamp=[VERSION, PIL.__version__, files])
    return split_pools(*examples, split_of, call, mapped=True)


def check_size(call: str, size: int) -> None:
    """A side is a positive int."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(
            f"{call}: size must be a positive int, got {size!r}. Pass a side in pixels, such as 84."
        )


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
    classes = {PurePosixPath(label) for label in labels.values()}
    used = {str(folder) for label in classes for folder in (label, *label.parents)}
    for folder in source.folders:
        if folder not in used:
            raise ValueError(f"{CALL}: folder {folder} of {path} has no images. Remove it or add some.")
    return labels
