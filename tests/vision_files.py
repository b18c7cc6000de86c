"""Small datasets in the files that torchvision reads: one colour a class, few images each, real formats.

Each writer fills a folder, adjusts the checksums that torchvision knows, and says what was written.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torchvision.datasets as tv
from PIL import Image

Patch = pytest.MonkeyPatch
CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
""".split()
"""The fine labels of CIFAR-100 in order."""
AIRCRAFT = """
    A340-300|A318|Falcon 2000|F-16A/B|F/A-18|C-130|MD-80|BAE 146-200|777-200|747-400|Cessna 172|An-12|A330-300|A321|
    Fokker 100|Fokker 50|DHC-1|Fokker 70|A340-200|DC-6|747-200|Il-76|747-300|Model B200|Saab 340|Cessna 560|Dornier 328|
    E-195|ERJ 135|747-100|737-600|C-47|DR-400|ATR-72|A330-200|727-200|737-700|PA-28|ERJ 145|737-300|767-300|737-500|
    737-200|DHC-6|Falcon 900|DC-3|Eurofighter Typhoon|Challenger 600|Hawk T1|A380|777-300|E-190|DHC-8-100|Cessna 525|
    Metroliner|EMB-120|Tu-134|Embraer Legacy 600|Gulfstream IV|Tu-154|MD-87|A300B4|A340-600|A340-500|MD-11|707-320|
    Cessna 208|Global Express|A319|DH-82|737-400|737-800|757-200|767-400|ATR-42|BAE-125|Beechcraft 1900|Boeing 717|
    CRJ-200|CRJ-700|E-170|L-1011|MD-90|Saab 2000|Spitfire|737-900|757-300|767-200|A310|A320|BAE 146-300|CRJ-900|DC-10|
    DC-8|DC-9-30|DHC-8-300|Gulfstream V|SR-20|Tornado|Yak-42
"""
TEXTURES = """
    banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted fibrous flecked
    freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined marbled matted meshed paisley
    perforated pitted pleated polka-dotted porous potholed scaly smeared spiralled sprinkled stained stratified striped
    studded swirly veined waffled woven wrinkled zigzagged
""".split()


class Written(NamedTuple):
    """What a dataset must be found to hold."""

    names: list[str]  # in the order of the labels
    each: int  # images a class, all parts together
    grey: bool = False


def colour(label: int) -> tuple[int, int, int]:
    """Far enough from the next class for a JPEG file."""
    return 20 * (label % 12), 120, 20 * (label // 12)


def grey(label: int) -> int:
    return 5 * label


def picture(label: int, width: int = 24, height: int = 16) -> Image.Image:
    return Image.new("RGB", (width, height), colour(label))


def save(path: Path, label: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(label).save(path, quality=100)


def text(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def rows(labels: list[int]) -> np.ndarray:
    """Images as CIFAR stores them: ``[n, 3072]``, a plane of 32 by 32 a colour."""
    return np.stack([np.repeat(np.array(colour(label), np.uint8), 1024) for label in labels])


def cifar(root: Path, patch: Patch, reader: Any, names: list[str], parts: list[str], key: str) -> Written:
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    labels = list(range(len(names)))[::-1]
    for part in parts:
        content = {"data": rows(labels), key: labels}
        (folder / part).write_bytes(pickle.dumps(content))
    meta = dict(reader.meta)
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: names}))
    listed = [[part, md5(folder / part)] for part in parts]
    patch.setattr(reader, "train_list", listed[:-1])
    patch.setattr(reader, "test_list", listed[-1:])
    patch.setattr(reader, "meta", meta | {"md5": md5(folder / meta["filename"])})
    return Written(names, len(parts))


def cifar10(root: Path, patch: Patch) -> Written:
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    return cifar(root, patch, tv.CIFAR10, names, ["data_batch_1", "data_batch_2", "test_batch"], "labels")


def cifar100(root: Path, patch: Patch) -> Written:
    return cifar(root, patch, tv.CIFAR100, CIFAR100, ["train", "test"], "fine_labels")


def idx(path: Path, array: np.ndarray) -> None:
    """The format of MNIST's files: a magic number, the shape, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = b"".join(number.to_bytes(4, "big") for number in (0x800 + array.ndim, *array.shape))
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def idx_pairs(folder: Path, names: list[str], classes: int) -> None:
    labels = np.arange(classes)
    pixels = np.stack([np.full((28, 28), grey(label)) for label in labels])
    for name in names:
        idx(folder / f"{name}-images-idx3-ubyte", pixels)
        idx(folder / f"{name}-labels-idx1-ubyte", labels)


def digits(reader: str) -> Callable[[Path, Patch], Written]:
    def write(root: Path, patch: Patch) -> Written:
        idx_pairs(root / reader / "raw", ["train", "t10k"], 10)
        return Written(list(getattr(tv, reader).classes), 2, grey=True)

    return write


def emnist(root: Path, patch: Patch) -> Written:
    idx_pairs(root / "EMNIST" / "raw", ["emnist-balanced-train", "emnist-balanced-test"], 47)
    return Written(tv.EMNIST.classes_split_dict["balanced"], 2, grey=True)


def svhn(root: Path, patch: Patch) -> Written:
    from scipy.io import savemat

    root.mkdir(parents=True)
    labels = np.arange(10)
    images = np.stack([np.broadcast_to(np.uint8(colour(label)), (32, 32, 3)) for label in labels], -1)
    known = {}
    for part in ("train", "test"):
        path = root / f"{part}_32x32.mat"
        savemat(path, {"X": images, "y": np.where(labels == 0, 10, labels)[:, None]})
        known[part] = ["", path.name, md5(path)]
    patch.setattr(tv.SVHN, "split_list", known)
    return Written([str(label) for label in labels], 2)


def stl10(root: Path, patch: Patch) -> Written:
    folder = root / "stl10_binary"
    names = "airplane bird car cat deer dog horse monkey ship truck".split()
    text(folder / "class_names.txt", names)
    text(folder / "fold_indices.txt", ["0"])
    planes = np.stack([np.repeat(np.array(colour(label), np.uint8), 96 * 96) for label in range(10)])
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(planes.tobytes())
        (folder / f"{part}_y.bin").write_bytes(np.arange(1, 11, dtype=np.uint8).tobytes())
    (folder / "unlabeled_X.bin").write_bytes(b"")
    listed = {name: [name, md5(folder / name)] for name in sorted(p.name for p in folder.glob("*.bin"))}
    patch.setattr(
        tv.STL10, "train_list", [listed[n] for n in ("train_X.bin", "train_y.bin", "unlabeled_X.bin")]
    )
    patch.setattr(tv.STL10, "test_list", [listed["test_X.bin"], listed["test_y.bin"]])
    return Written(names, 2)


def usps(root: Path, patch: Patch) -> Written:
    root.mkdir(parents=True)
    known = {}
    for part, name in (("train", "usps.bz2"), ("test", "usps.t.bz2")):
        lines = []
        for label in range(10):
            value = 2 * (grey(label) + 0.5) / 255 - 1
            lines.append(f"{label + 1} " + " ".join(f"{pixel}:{value:.6f}" for pixel in range(1, 257)))
        (root / name).write_bytes(bz2.compress(("\n".join(lines) + "\n").encode()))
        known[part] = ["", name, md5(root / name)]
    patch.setattr(tv.USPS, "split_list", known)
    return Written([str(label) for label in range(10)], 2, grey=True)


def flowers102(root: Path, patch: Patch) -> Written:
    from scipy.io import savemat

    folder = root / "flowers-102"
    labels = [1 + index % 102 for index in range(306)]
    for number, label in enumerate(labels, start=1):
        save(folder / "jpg" / f"image_{number:05d}.jpg", label - 1)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels])})
    thirds = np.arange(1, 307).reshape(3, 1, 102)
    savemat(folder / "setid.mat", dict(zip(("trnid", "valid", "tstid"), thirds, strict=True)))
    known = dict(tv.Flowers102._file_dict)
    for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        known[key] = (name, md5(folder / name))
    patch.setattr(tv.Flowers102, "_file_dict", known)
    return Written(tv.Flowers102.classes, 3)


def fgvc_aircraft(root: Path, patch: Patch) -> Written:
    folder = root / "fgvc-aircraft-2013b" / "data"
    names = [name.strip() for name in AIRCRAFT.split("|")]
    text(folder / "variants.txt", names)
    for part, first in (("trainval", 0), ("test", 100)):
        lines = []
        for label, name in enumerate(names):
            save(folder / "images" / f"{first + label:07d}.jpg", label)
            lines.append(f"{first + label:07d} {name}")
        text(folder / f"images_variant_{part}.txt", lines)
    return Written(names, 2)


def dtd(root: Path, patch: Patch) -> Written:
    folder = root / "dtd" / "dtd"
    for part in ("train", "val", "test"):
        for label, name in enumerate(TEXTURES):
            save(folder / "images" / name / f"{name}_{part}.jpg", label)
        text(folder / "labels" / f"{part}1.txt", [f"{name}/{name}_{part}.jpg" for name in TEXTURES])
    return Written(TEXTURES, 3)


def gtsrb(root: Path, patch: Patch) -> Written:
    folder = root / "gtsrb"
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for label in range(43):
        save(folder / "GTSRB" / "Training" / f"{label:05d}" / "00000_00000.ppm", label)
        save(folder / "GTSRB" / "Final_Test" / "Images" / f"{label:05d}.ppm", label)
        lines.append(f"{label:05d}.ppm;24;16;0;0;24;16;{label}")
    text(folder / "GT-final_test.csv", lines)
    return Written([str(label) for label in range(43)], 2)


def stanford_cars(root: Path, patch: Patch) -> Written:
    from scipy.io import savemat

    folder = root / "stanford_cars"
    names = [f"Maker Model {label} 2012" for label in range(6)]
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([names], object)})
    kinds = [("class", np.int64), ("fname", object)]
    for part, path in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        for label in range(6):
            save(folder / f"cars_{part}" / f"{label:05d}.jpg", label)
        table = np.array([(label + 1, f"{label:05d}.jpg") for label in range(6)], kinds)
        savemat(folder / path, {"annotations": table[None]})
    return Written(names, 2)


def food101(root: Path, patch: Patch) -> Written:
    folder = root / "food-101"
    names = ["apple_pie", "baklava", "ceviche", "donuts", "falafel"]
    for part in ("train", "test"):
        for label, name in enumerate(names):
            save(folder / "images" / name / f"{part}7.jpg", label)
        text(folder / "meta" / f"{part}.json", [json.dumps({n: [f"{n}/{part}7"] for n in names})])
    return Written(names, 2)


def oxford_iiit_pet(root: Path, patch: Patch) -> Written:
    folder = root / "oxford-iiit-pet"
    names = ["Abyssinian", "American Bulldog", "Bengal", "Pug"]
    for part, first in (("trainval", 1), ("test", 2)):
        lines = []
        for label, name in enumerate(names):
            image = f"{name.replace(' ', '_').lower()}_{first}"
            save(folder / "images" / f"{image}.jpg", label)
            lines.append(f"{image} {label + 1} 1 1")
        text(folder / "annotations" / f"{part}.txt", lines)
    return Written(names, 2)


def class_folders(folder: Path, names: list[str], file: str) -> None:
    for label, name in enumerate(names):
        save(folder / name / file.format(number=label + 1), label)


def eurosat(root: Path, patch: Patch) -> Written:
    names = ["AnnualCrop", "Forest", "Highway", "River"]
    class_folders(root / "eurosat" / "2750", names, "one.jpg")
    class_folders(root / "eurosat" / "2750", names, "two.jpg")
    return Written(names, 2)


def caltech101(root: Path, patch: Patch) -> Written:
    folder = root / "caltech101" / "101_ObjectCategories"
    names = ["Faces", "accordion", "anchor", "wrench"]
    class_folders(folder, names, "image_0001.jpg")
    class_folders(folder, names, "image_0002.jpg")
    save(folder / "BACKGROUND_Google" / "image_0001.jpg", 50)
    return Written(names, 2)


def caltech256(root: Path, patch: Patch) -> Written:
    names = ["001.ak47", "002.american-flag", "003.backpack"]
    class_folders(root / "caltech256" / "256_ObjectCategories", names, "{number:03d}_0001.jpg")
    class_folders(root / "caltech256" / "256_ObjectCategories", names, "{number:03d}_0002.jpg")
    return Written(names, 2)


def country211(root: Path, patch: Patch) -> Written:
    names = ["AD", "AE", "AF"]
    for part in ("train", "valid", "test"):
        class_folders(root / "country211" / part, names, "1.jpg")
    return Written(names, 3)


def imagenette(root: Path, patch: Patch) -> Written:
    known = tv.Imagenette._WNID_TO_CLASS
    for part in ("train", "val"):
        class_folders(root / "imagenette2" / part, sorted(known), "1.JPEG")
    return Written([", ".join(known[wnid]) for wnid in sorted(known)], 2)


WRITERS: dict[str, Callable[[Path, Patch], Written]] = {
    "caltech101": caltech101,
    "caltech256": caltech256,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "country211": country211,
    "dtd": dtd,
    "emnist": emnist,
    "eurosat": eurosat,
    "fashion_mnist": digits("FashionMNIST"),
    "fgvc_aircraft": fgvc_aircraft,
    "flowers102": flowers102,
    "food101": food101,
    "gtsrb": gtsrb,
    "imagenette": imagenette,
    "kmnist": digits("KMNIST"),
    "mnist": digits("MNIST"),
    "oxford_iiit_pet": oxford_iiit_pet,
    "stanford_cars": stanford_cars,
    "stl10": stl10,
    "svhn": svhn,
    "usps": usps,
}
NEEDS_SCIPY = ("caltech101", "flowers102", "stanford_cars", "svhn")


def splits(pools: Any) -> Iterator[Any]:
    yield from (pools.train, pools.val, pools.test)
