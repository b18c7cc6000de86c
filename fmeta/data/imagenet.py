"""mini-ImageNet and tiered-ImageNet from their images: neither may be passed on, so neither can be fetched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from fmeta.data.cache import data_folder
from fmeta.data.folder import check_size, source_pools
from fmeta.data.images import Source, open_source
from fmeta.data.index import locate, read_lists
from fmeta.data.pool import SPLITS, Pools

MINI_CLASSES, MINI_IMAGES = (64, 16, 20), 600
TIERED_CLASSES = (351, 97, 160)


def mini_imagenet(root: str | Path | None = None, *, size: int = 84, grey: bool = False) -> Pools:
    """mini-ImageNet in the split of Ravi and Larochelle: 64, 16 and 20 classes of 600 images.

    Args:
        root: a folder with ``train.csv``, ``val.csv`` and ``test.csv``, lines ``filename,label`` as their code
            has them, and the images, in ``images``, ``images.zip`` or any folders below; or with the folders
            ``train``, ``val`` and ``test``, each of which holds one folder of images a class. The default is
            ``$FMETA_DATA/mini_imagenet``.
        size: side in pixels.
        grey: one channel in place of three.

    Raises:
        ValueError: files missing, unreadable or not as many as published; a class in two splits.

    Example:
        >>> pools = mini_imagenet("data/mini_imagenet")  # doctest: +SKIP
        >>> pools.train  # doctest: +SKIP
        Pool(64 classes, x=uint8[38400, 3, 84, 84], device=cpu)

    References:
        Vinyals et al., Matching networks for one shot learning, 2016, arXiv 1606.04080; the split is of Ravi,
        Larochelle, Optimization as a model for few-shot learning, 2017.
    """
    call = "mini_imagenet"
    check_size(call, size)
    folder = data_folder(call, call, root, download=False)
    if any((folder / f"{kind}.csv").exists() for kind in SPLITS):
        labels, split_of = read_lists(folder, call)
        packed = folder / "images.zip"
        where = packed if packed.is_file() and not (folder / "images").is_dir() else folder
        with open_source(where, call) as source:
            labels = locate(labels, source, call)
            _check_counts(call, labels, split_of, MINI_CLASSES, MINI_IMAGES)
            return source_pools(call, source, labels, split_of, size=size, grey=grey)
    with open_source(folder, call) as source:
        labels, split_of = _split_folders(call, source)
        _check_counts(call, labels, split_of, MINI_CLASSES, MINI_IMAGES)
        return source_pools(call, source, labels, split_of, size=size, grey=grey)


def tiered_imagenet(root: str | Path | None = None, *, size: int = 84, grey: bool = False) -> Pools:
    """tiered-ImageNet: 351, 97 and 160 classes, which differ between splits by their superclass as well.

    With 779,165 images of 84 by 84 pixels the cached file has 16.5 GB, which are mapped, not loaded.

    Args:
        root: a folder (or a zip) with the folders ``train``, ``val`` and ``test``, each of which holds one folder
            of images a class. The default is ``$FMETA_DATA/tiered_imagenet``.
        size: side in pixels.
        grey: one channel in place of three.

    Raises:
        ValueError: files missing, unreadable, of more or fewer classes than published; a class in two splits.

    Example:
        >>> pools = tiered_imagenet("data/tiered_imagenet")  # doctest: +SKIP
        >>> len(pools.test.names)  # doctest: +SKIP
        160

    References:
        Ren et al., Meta-learning for semi-supervised few-shot classification, 2018, arXiv 1803.00676.
    """
    call = "tiered_imagenet"
    check_size(call, size)
    with open_source(data_folder(call, call, root, download=False), call) as source:
        labels, split_of = _split_folders(call, source)
        _check_counts(call, labels, split_of, TIERED_CLASSES, None)
        return source_pools(call, source, labels, split_of, size=size, grey=grey)


def _split_folders(call: str, source: Source) -> tuple[dict[str, str], dict[str, str]]:
    """``{file: class}`` and ``{class: split}`` of files ``split/class/file``."""
    labels: dict[str, str] = {}
    split_of: dict[str, str] = {}
    for name in source.files:
        kind, *inner = PurePosixPath(name).parent.parts or ("",)
        if kind not in SPLITS or not inner:
            raise ValueError(
                f"{call}: images must lie in train, val or test and there in the folder of their class, but "
                f"{name} of {source.where} does not. Move it."
            )
        labels[name] = label = "/".join(inner)
        if split_of.setdefault(label, kind) != kind:
            raise ValueError(
                f"{call}: splits must hold different classes, but {label!r} is in {split_of[label]} and in "
                f"{kind} of {source.where}. Put each class into one split."
            )
    return labels, split_of


def _check_counts(
    call: str,
    labels: Mapping[str, str],
    split_of: Mapping[str, str],
    classes: tuple[int, ...],
    images: int | None,
) -> None:
    """What is called by a published name must have the published sizes."""
    found = Counter(split_of.values())
    got = tuple(found[kind] for kind in SPLITS)
    if got != classes:
        raise ValueError(
            f"{call}: train, val and test must have {classes} classes, got {got}. Complete the files, or use "
            "image_folder for a dataset of your own."
        )
    for name, count in Counter(labels.values()).items():
        if images is not None and count != images:
            raise ValueError(
                f"{call}: every class must have {images} images, but {name!r} has {count}. Complete the "
                "files, or use image_folder for a dataset of your own."
            )
