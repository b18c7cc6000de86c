"""Published class splits of datasets that torchvision reads: the classes for validation and testing, by name.

All other classes of a dataset train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Bertinetto, Henriques, Torr, Vedaldi, Meta-learning with differentiable closed-form solvers, 2018,
# arXiv 1805.08136: CIFAR-FS has 64, 16 and 20 classes of CIFAR-100.
CIFAR_FS_VAL = """
    beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea shark
    television tractor
""".split()
CIFAR_FS_TEST = """
    baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper table
    telephone wardrobe whale woman worm
""".split()

# Krizhevsky, Learning multiple layers of features from tiny images, 2009: the superclasses of CIFAR-100 that
# Oreshkin, Rodríguez López, Lacoste, TADAM, 2018, arXiv 1805.10123, take for FC100; the other twelve train.
FC100_VAL = {
    "large carnivores": "bear leopard lion tiger wolf",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "small mammals": "hamster mouse rabbit shrew squirrel",
}
FC100_TEST = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "medium mammals": "fox porcupine possum raccoon skunk",
    "people": "baby boy girl man woman",
}

# Triantafillou et al., Meta-Dataset, 2020, arXiv 1903.03096: the class splits of its release.
AIRCRAFT_VAL = """
    737-900|757-300|767-200|A310|A320|BAE 146-300|CRJ-900|DC-10|DC-8|DC-9-30|DHC-8-300|Gulfstream V|SR-20|Tornado|
    Yak-42
"""
AIRCRAFT_TEST = """
    737-400|737-800|757-200|767-400|ATR-42|BAE-125|Beechcraft 1900|Boeing 717|CRJ-200|CRJ-700|E-170|L-1011|MD-90|
    Saab 2000|Spitfire
"""
TEXTURES_VAL = "gauzy grid lined paisley porous scaly spiralled".split()
TEXTURES_TEST = "banded bumpy crosshatched knitted sprinkled stratified woven".split()
# Numbers from 1, as in the files of the dataset.
FLOWERS_VAL = (10, 16, 17, 23, 26, 47, 53, 56, 57, 62, 82, 83, 86, 97, 102)
FLOWERS_TEST = (5, 9, 15, 19, 35, 40, 41, 42, 45, 46, 65, 85, 89, 94, 96, 98)


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split("|")]


def _members(superclasses: Mapping[str, str]) -> list[str]:
    return " ".join(superclasses.values()).split()


PUBLISHED: dict[str, tuple[int, Sequence[str | int], Sequence[str | int]]] = {
    "cifar_fs": (100, CIFAR_FS_VAL, CIFAR_FS_TEST),
    "fc100": (100, _members(FC100_VAL), _members(FC100_TEST)),
    "fgvc_aircraft": (100, _listed(AIRCRAFT_VAL), _listed(AIRCRAFT_TEST)),
    "dtd": (47, TEXTURES_VAL, TEXTURES_TEST),
    "flowers102": (102, FLOWERS_VAL, FLOWERS_TEST),
}
"""Number of all classes, and those for validation and for testing, by name or by number from 1."""


def published_split(call: str, name: str, classes: Sequence[str]) -> dict[str, str]:
    """The split of every class of a dataset in ``PUBLISHED``; ``classes`` are all its classes in order."""
    count, val, test = PUBLISHED[name]
    if len(classes) != count:
        raise ValueError(
            f"{call}: the published split needs all {count} classes, got {len(classes)}. Complete the files, or "
            "use torchvision_pool with a split of your own."
        )
    split = dict.fromkeys(classes, "train")
    for kind, members in (("val", val), ("test", test)):
        split |= {classes[one - 1] if isinstance(one, int) else one: kind for one in members}
    return split
