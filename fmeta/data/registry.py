"""The classification datasets of torchvision that few-shot work uses: how each is opened and which files it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from fmeta.data.images import walk


class Entry(NamedTuple):
    """How torchvision reads a dataset: its class, the arguments that give all its images, and its files."""

    reader: str
    parts: tuple[dict[str, Any], ...]
    files: tuple[str, ...]


def _by(argument: str, *values: Any, **others: Any) -> tuple[dict[str, Any], ...]:
    return tuple({argument: value, **others} for value in values)


HALVES = _by("train", True, False)
REGISTRY = {
    "caltech101": Entry("Caltech101", ({},), ("caltech101/101_ObjectCategories",)),
    "caltech256": Entry("Caltech256", ({},), ("caltech256/256_ObjectCategories",)),
    "cifar10": Entry("CIFAR10", HALVES, ("cifar-10-batches-py",)),
    "cifar100": Entry("CIFAR100", HALVES, ("cifar-100-python",)),
    "country211": Entry("Country211", _by("split", "train", "valid", "test"), ("country211",)),
    "dtd": Entry("DTD", _by("split", "train", "val", "test"), ("dtd",)),
    "emnist": Entry("EMNIST", _by("train", True, False, split="balanced"), ("EMNIST/raw",)),
    "eurosat": Entry("EuroSAT", ({},), ("eurosat",)),
    "fashion_mnist": Entry("FashionMNIST", HALVES, ("FashionMNIST/raw",)),
    "fgvc_aircraft": Entry("FGVCAircraft", _by("split", "trainval", "test"), ("fgvc-aircraft-2013b",)),
    "flowers102": Entry("Flowers102", _by("split", "train", "val", "test"), ("flowers-102",)),
    "food101": Entry("Food101", _by("split", "train", "test"), ("food-101",)),
    "gtsrb": Entry("GTSRB", _by("split", "train", "test"), ("gtsrb",)),
    "imagenette": Entry("Imagenette", _by("split", "train", "val"), ("imagenette2",)),
    "kmnist": Entry("KMNIST", HALVES, ("KMNIST/raw",)),
    "mnist": Entry("MNIST", HALVES, ("MNIST/raw",)),
    "oxford_iiit_pet": Entry("OxfordIIITPet", _by("split", "trainval", "test"), ("oxford-iiit-pet",)),
    "stanford_cars": Entry("StanfordCars", _by("split", "train", "test"), ("stanford_cars",)),
    "stl10": Entry("STL10", _by("split", "train", "test"), ("stl10_binary",)),
    "svhn": Entry("SVHN", _by("split", "train", "test"), ("train_32x32.mat", "test_32x32.mat")),
    "usps": Entry("USPS", HALVES, ("usps.bz2", "usps.t.bz2")),
}


def open_parts(call: str, entry: Entry, folder: Path, download: bool) -> list[Any]:
    """All parts of a dataset as torchvision opens them; with ``download`` it fetches what is missing."""
    import torchvision.datasets  # takes seconds to import, and is needed only for the first reading

    reader = getattr(torchvision.datasets, entry.reader)
    if download:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        return [reader(str(folder), download=download, **part) for part in entry.parts]
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise ValueError(
            f"{call}: torchvision could not {'fetch or ' if download else ''}open {entry.reader} in {folder} "
            f"({error}). Check the files, the network and what it says is missing."
        ) from error


def complete(folder: Path, entry: Entry) -> bool:
    """Whether the files of a dataset seem to be there; torchvision looks closer."""
    return all((folder / file).exists() for file in entry.files)


def stamp(folder: Path, entry: Entry) -> list[object]:
    """Names, sizes and times of all files: tells one copy of the data from another unread."""
    found: list[object] = []
    for file in entry.files:
        path = folder / file
        if path.is_dir():
            found.append(sorted(walk(path)[0].items()))
        else:
            found.append([file, path.stat().st_size, path.stat().st_mtime_ns])
    return found
