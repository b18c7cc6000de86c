"""A run of a recipe of pictures put to use: new classes from a few pictures of each.

In Python::

    from fmeta.train.pictures.adapting import load_picture_classifier

    classifier = load_picture_classifier("runs/images-20261128-120000").fit([*cats, *dogs], ["cat"] * 5 + ["dog"] * 5)
    print(classifier.predict([new]))  # paths of pictures in, a probability for each class out
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fmeta
from fmeta import tree
from fmeta.data.images import Source, decode_file, open_source, square
from fmeta.train import folder
from fmeta.train.choices import STEPLESS
from fmeta.train.config import Config
from fmeta.train.device import pick_device
from fmeta.train.experiment import build
from fmeta.train.family import Family, model_parts
from fmeta.train.pictures.config import FewShotTask, ImagesTask
from fmeta.train.pictures.pretrained import Made, make_backbone
from fmeta.train.terminal import say
from fmeta.train.text.adapting import (
    CALL,
    Learner,
    said_accuracy,
    with_ways,
    without_tasks,
    write_predictions,
)
from fmeta.types import Algorithm, Tree

SIDE = 28
"""Pixels of a side of a character, as glyphs and Omniglot have them."""


def load_picture_classifier(
    path: str | Path, name: str = "best", *, root: str | Path | None = None
) -> Learner:
    """A run of glyphs, omniglot or images, ready to learn classes from a few pictures; examples are paths of files.

    It needs none of the pictures that the run was trained on.

    Args:
        path: a run folder.
        name: ``"best"`` by validation, or ``"last"``.
        root: not read any more; taken for calls of earlier versions, which looked at the run's data set.

    Raises:
        ValueError: for a run of another recipe, and as ``load_run``.
    """
    path, config = Path(path), folder.read_config(Path(path))
    task = config.task
    if not isinstance(task, FewShotTask):
        raise ValueError(
            f"{CALL}: {path} must be a run of text, detection or pictures, got one of {config.recipe}. Train one "
            "with `fmeta train images --data FOLDER`."
        )
    size, grey = getattr(task, "size", SIDE), getattr(task, "grey", True)
    device = pick_device(config.machine.device)

    @functools.cache
    def backbone() -> Made | None:
        if not isinstance(task, ImagesTask) or not task.backbone:
            return None
        return make_backbone(task)

    def family(config: Config[Any], device: torch.device) -> Family:
        picture = torch.Size((1 if grey else 3, size, size))
        return without_tasks(model_parts(config.task, picture, backbone()))

    @functools.cache
    def make(ways: int) -> tuple[Algorithm, Tree]:
        experiment = build(with_ways(config, ways), make=family)
        state, _, _ = folder.load(path, name, experiment)
        return experiment.algorithm, tree.detach(state.meta)

    @functools.cache
    def trunk() -> Tree:
        made = backbone()
        return (
            fmeta.functionalize(made.pieces.trunk.to(device))
            if made and made.pieces.trunk is not None
            else None
        )

    def prepare(files: Sequence[str | Path]) -> Tensor:
        if isinstance(files, str):
            raise TypeError(f"{CALL}: examples must be a list of paths, got {files!r}. Put it into a list.")
        pictures = torch.stack([read_picture(Path(file), size, grey) for file in files])
        if not isinstance(task, ImagesTask):
            pictures = light_on_dark(pictures)
        pictures = pictures.float().to(device) / 255
        frozen = trunk()
        return pictures if frozen is None else frozen[0](frozen[1], pictures)

    return Learner(prepare, make, 0 if config.inner.algorithm in STEPLESS else config.inner.test_steps)


def read_picture(file: Path, size: int, grey: bool) -> Tensor:
    """One file as uint8 ``[C, size, size]``."""
    source = Source(file.parent, [file.name], [], lambda name: (file.parent / name).read_bytes(), {})
    return decode_file(source, [file.name], lambda image: square(image, size, grey), CALL, 0)


def light_on_dark(pictures: Tensor) -> Tensor:
    """Characters as glyphs and omniglot have them, ink 255 on 0: turned over where most of a picture is light."""
    light = pictures.flatten(1).float().median(1).values > 127
    return torch.where(light[:, None, None, None], 255 - pictures, pictures)


def pictures_below(path: Path) -> list[tuple[Path, str]]:
    """The pictures of a folder, each with the folder inside it that it lies in (empty for none)."""
    if path.is_file():
        raise ValueError(
            f"{CALL}: {path} must be a folder of pictures, got a file. Name the folder, or unpack it."
        )
    with open_source(path, CALL) as source:
        files = list(source.files)
    if not files:
        raise ValueError(f"{CALL}: {path} must be a folder of pictures, got none in it. Check the path.")
    return [(path / name, str(Path(name).parent) if Path(name).parent != Path() else "") for name in files]


def adapt_pictures(
    path: Path, support: Path, query: Path, out: Path, *, name: str = "best", root: Path | None = None
) -> int:
    """Learn the classes of one folder of pictures and write those of another; returns 0.

    Args:
        path: a run folder of glyphs, omniglot or images.
        support: a folder with a folder for each class, a few pictures in each.
        query: a folder of pictures. Where they lie in folders of these names, the accuracy is said.
        out: the csv to write: file, predicted, probability, and the probability of each class.
        name: the checkpoint.
        root: not read any more; taken for calls of earlier versions.

    Raises:
        ValueError: for folders without pictures, and fewer than two classes.
    """
    known, asked = pictures_below(support), pictures_below(query)
    if any(not label for _, label in known):
        raise ValueError(
            f"{CALL}: {support} must hold a folder for each class, got pictures beside them. Move them into one."
        )
    classes, asked_of = ({label for _, label in pairs} for pairs in (known, asked))
    if asked_of & classes and asked_of - classes:
        raise ValueError(
            f"{CALL}: every folder of {query} must be one of {support}, or none, got {min(asked_of - classes)!r}. Add "
            "pictures of it to the support set, or put all pictures to be told apart into one folder."
        )
    classifier = load_picture_classifier(path, name, root=root).fit(*zip(*known, strict=True))
    found = classifier.probabilities([file for file, _ in asked])
    write_predictions(out, [str(file) for file, _ in asked], classifier.names, found, "file")
    say(f"{len(classifier.names)} classes from {len(known)} pictures; {len(asked)} predictions in {out}")
    if {label for _, label in asked} <= set(classifier.names):
        said_accuracy(classifier.names, found, [label for _, label in asked])
    return 0
