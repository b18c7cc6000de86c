"""Pools from the classification datasets that torchvision reads and downloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import PIL

from fmeta.data.cache import cached, data_folder
from fmeta.data.datasets import Divide, dataset_recipe
from fmeta.data.folder import check_size
from fmeta.data.mapped import Recipe
from fmeta.data.pool import Pools, split_pools
from fmeta.data.published import PUBLISHED, published_split
from fmeta.data.registry import REGISTRY, complete, open_parts, stamp
from fmeta.data.split import assign_splits

VERSION = 1  # raise it when the pixels that the same files give change
FRACTIONS = (0.64, 0.16, 0.2)  # miniImageNet's


def torchvision_pool(
    name: str,
    root: str | Path | None = None,
    download: bool = False,
    *,
    size: int = 84,
    grey: bool = False,
    split: Sequence[float] | Mapping[str, str] | None = None,
    seed: int = 0,
) -> Pools:
    """All images of a dataset of torchvision, of its training and test parts, divided by class.

    Images become uint8 ``[n, C, size, size]``, the middle square of each, are kept in the cache directory and
    mapped into memory, as ``image_folder`` does.

    Args:
        name: one of caltech101, caltech256, cifar10, cifar100, country211, dtd, emnist (its 47 balanced
            classes), eurosat, fashion_mnist, fgvc_aircraft (its 100 variants), flowers102, food101, gtsrb,
            imagenette, kmnist, mnist, oxford_iiit_pet, stanford_cars, stl10, svhn, usps.
        root: the folder that torchvision's class takes as ``root``; by default ``$FMETA_DATA/name``, else
            ``name`` in the cache directory.
        download: let torchvision fetch what is missing into ``root``.
        size: side in pixels; the default is miniImageNet's.
        grey: one channel in place of three.
        split: fractions of the classes for train, validation and test, or ``{class: "train" | "val" | "test"}``.
            The default is Meta-Dataset's for fgvc_aircraft (70, 15 and 15 classes), dtd (33, 7, 7) and
            flowers102 (71, 15, 16), and fractions of 0.64, 0.16 and 0.2 for the others.
        seed: which classes go where, for fractions.

    Raises:
        ValueError: an unknown name, files missing, damaged or not to be fetched, a split that does not fit.

    Example:
        >>> pools = torchvision_pool("flowers102", download=True)  # doctest: +SKIP
        >>> len(pools.train.names), len(pools.val.names), len(pools.test.names)  # doctest: +SKIP
        (71, 15, 16)

    References:
        Triantafillou et al., Meta-Dataset, 2020, arXiv 1903.03096, appendix 3, for the three default splits.
    """
    call = "torchvision_pool"
    if name not in REGISTRY:
        raise ValueError(f"{call}: name must be one of {', '.join(REGISTRY)}, got {name!r}. Choose one.")
    divide: Divide = lambda names: assign_splits(names, FRACTIONS if split is None else split, seed, call)  # noqa: E731
    if split is None and name in PUBLISHED:
        divide = _published(call, name)
    return _pools(call, name, root, download, divide, size=size, grey=grey)


def cifar_fs(
    root: str | Path | None = None, download: bool = False, *, size: int = 32, grey: bool = False
) -> Pools:
    """CIFAR-FS: the classes of CIFAR-100 divided at random, 64, 16 and 20, with 600 images each.

    Args:
        root: the folder that holds ``cifar-100-python``; by default ``$FMETA_DATA/cifar100``, else ``cifar100`` in
            the cache directory.
        download: let torchvision fetch CIFAR-100 into ``root`` where it is missing.
        size: side in pixels; the default is CIFAR's own.
        grey: one channel in place of three.

    Example:
        >>> cifar_fs("data", download=True).test  # doctest: +SKIP
        Pool(20 classes, x=uint8[12000, 3, 32, 32], device=cpu)

    References:
        Bertinetto, Henriques, Torr, Vedaldi, Meta-learning with differentiable closed-form solvers, 2018,
        arXiv 1805.08136, section 4.1; Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """
    call = "cifar_fs"
    return _pools(call, "cifar100", root, download, _published(call, call), size=size, grey=grey)


def fc100(
    root: str | Path | None = None, download: bool = False, *, size: int = 32, grey: bool = False
) -> Pools:
    """FC100: the classes of CIFAR-100 divided by superclass, 60, 20 and 20: unseen classes resemble few seen ones.

    Args:
        root: as for ``cifar_fs``.
        download: as for ``cifar_fs``.
        size: as for ``cifar_fs``.
        grey: as for ``cifar_fs``.

    Example:
        >>> fc100("data", download=True).train  # doctest: +SKIP
        Pool(60 classes, x=uint8[36000, 3, 32, 32], device=cpu)

    References:
        Oreshkin, Rodríguez López, Lacoste, TADAM: task dependent adaptive metric for improved few-shot
        learning, 2018, arXiv 1805.10123, section 4.
    """
    call = "fc100"
    return _pools(call, "cifar100", root, download, _published(call, call), size=size, grey=grey)


def _pools(
    call: str,
    name: str,
    root: str | Path | None,
    download: bool,
    divide: Divide,
    *,
    size: int,
    grey: bool,
) -> Pools:
    check_size(call, size)
    entry = REGISTRY[name]
    folder = data_folder(call, name, root, download)
    if download and not complete(folder, entry):
        open_parts(call, entry, folder, download=True)
    if not complete(folder, entry):
        raise ValueError(
            f"{call}: {folder} must hold {' and '.join(entry.files)}, but does not. Pass the folder as root, set "
            "FMETA_DATA to its parent, or pass download=True."
        )

    def build() -> Recipe:
        return dataset_recipe(call, open_parts(call, entry, folder, download), divide, size=size, grey=grey)

    key = [call, name, str(folder.resolve()), size, grey]
    title = name if call == "torchvision_pool" else call
    found = cached(title, key, build, stamp=[VERSION, PIL.__version__, stamp(folder, entry)])
    return split_pools(*found, divide(found.names), call, mapped=True)


def _published(call: str, name: str) -> Divide:
    return lambda names: assign_splits(names, published_split(call, name, names), 0, call)
