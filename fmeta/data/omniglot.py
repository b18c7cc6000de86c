"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each, in both published splits."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from PIL import Image, ImageOps

from fmeta.data.cache import cached, data_folder
from fmeta.data.images import open_source, read_images
from fmeta.data.mapped import Examples
from fmeta.data.pool import SPLITS, Pools, split_pools
from fmeta.data.split import assign_splits, shuffled

CALL = "omniglot"
VERSION = 1  # raise it when the pixels that the same files give change
PARTS = ("images_background", "images_evaluation")
CHARACTERS, DRAWINGS, SIDE = 1623, 20, 28
MAML_TRAIN, MAML_VAL = 1200, 100


def omniglot(
    root: str | Path | None = None,
    download: bool = False,
    split: Literal["maml", "vinyals"] = "maml",
    seed: int = 0,
) -> Pools:
    """Omniglot as uint8 ``[n, 1, 28, 28]``, ink 255 on 0, in one of its two published splits.

    Numbers from the two splits are not comparable, so there is no default that mixes them. Rotated
    characters as classes of their own, which both protocols train on, are made by
    ``few_shot(..., augment="rotations")``.

    Args:
        root: the folder that holds ``images_background`` and ``images_evaluation``, as folders or as the
            zips of the original release, or their parent where they lie in ``omniglot-py``. The default
            is ``$FMETA_DATA/omniglot``, else ``omniglot`` in fmeta's cache directory if it is there.
        download: let torchvision fetch the files into ``root`` where they are missing.
        split: ``"maml"``, the 1200 characters of Finn et al., drawn at random from all alphabets, of which
            100 are held out for validation as their code does, and 423 for testing; ``"vinyals"``, the
            1028/172/423 of Vinyals et al., by alphabet, from ``vinyals_train.txt``, ``vinyals_val.txt``
            and ``vinyals_test.txt`` in ``root``.
        seed: which characters, for ``"maml"``; the paper's own draw is not published.

    Raises:
        ValueError: files missing, incomplete or damaged.

    Example:
        >>> omniglot("data/omniglot", download=True).test  # doctest: +SKIP
        Pool(423 classes, x=uint8[8460, 1, 28, 28], device=cpu)

    References:
        Lake, Salakhutdinov, Tenenbaum, Human-level concept learning through probabilistic program
        induction, 2015; Finn, Abbeel, Levine, 2017, arXiv 1703.03400, section 5.2 and appendix A.1;
        Vinyals et al., 2016, arXiv 1606.04080. Deviation: drawings shrink from 105 to 28 pixels by area
        average; the MAML code takes the nearest pixel.
    """
    if split not in ("maml", "vinyals"):
        raise ValueError(f"{CALL}: split must be 'maml' or 'vinyals', got {split!r}. Choose one.")
    folder = data_folder(CALL, "omniglot", root, download)
    if download and _parts(folder) is None:
        _download(folder)
    parts = _parts(folder)
    if parts is None:
        raise ValueError(
            f"{CALL}: {folder} must hold {PARTS[0]} and {PARTS[1]}, as folders or zips, but one is missing. "
            "Pass the folder as root, set FMETA_DATA to its parent, or pass download=True."
        )
    x, y, names = cached("omniglot", [VERSION, _stamp(parts)], lambda: read_drawings(parts))
    wanted = _maml_split(names, seed) if split == "maml" else _vinyals_split(folder)
    return split_pools(x, y, names, assign_splits(names, wanted, seed, CALL), CALL)


def _parts(folder: Path) -> list[Path] | None:
    """The two halves, each a folder or a zip, or None where one is missing."""
    base = folder / "omniglot-py" if (folder / "omniglot-py").is_dir() else folder
    found = []
    for name in PARTS:
        candidates = [base / name, base / f"{name}.zip"]
        found += [next((path for path in candidates if path.exists()), None)]
    return [path for path in found if path] if all(found) else None


def _download(folder: Path) -> None:
    from torchvision.datasets import Omniglot  # takes seconds to import, and is needed only here

    for background in (True, False):
        try:
            Omniglot(str(folder), background=background, download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{CALL}: torchvision could not download the drawings into {folder} ({error}). Check the "
                "network and the folder, or copy the two zips there yourself."
            ) from error


def _stamp(parts: list[Path]) -> list[tuple[str, int, int]]:
    """Names, sizes and times of all files: tells one copy of the data from another unread."""
    stamp = []
    for part in parts:
        for file in sorted(part.rglob("*.png")) if part.is_dir() else [part]:
            stat = file.stat()
            stamp += [(file.relative_to(part.parent).as_posix(), stat.st_size, stat.st_mtime_ns)]
    return stamp


def read_drawings(parts: list[Path]) -> Examples:
    """Decode all drawings; a class is named ``alphabet/character``, as the Vinyals split names it."""
    with ExitStack() as stack:
        sources = [stack.enter_context(open_source(part, CALL)) for part in parts]
        labels = ["/".join(PurePosixPath(name).parts[-3:-1]) for source in sources for name in source.files]
        _check_complete(labels)
        pixels = [read_images(source, source.files, _shrink, CALL) for source in sources]
    names = tuple(sorted(set(labels)))
    number = {name: index for index, name in enumerate(names)}
    return Examples(torch.cat(pixels), torch.tensor([number[label] for label in labels]), names)


def _shrink(image: Image.Image) -> Image.Image:
    # The files are black and white: in grey first, or PIL takes the nearest pixel instead of the average.
    return ImageOps.invert(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def _check_complete(labels: list[str]) -> None:
    counts = Counter(labels)
    if len(counts) != CHARACTERS:
        raise ValueError(
            f"{CALL}: both halves together must have {CHARACTERS} characters, got {len(counts)}. "
            "Delete them, then extract or download them again."
        )
    for name, count in counts.items():
        if count != DRAWINGS:
            raise ValueError(
                f"{CALL}: every character must have {DRAWINGS} drawings, but {name} has {count}. "
                "Delete them, then extract or download them again."
            )


def _maml_split(names: tuple[str, ...], seed: int) -> dict[str, str]:
    cut = MAML_TRAIN - MAML_VAL
    kinds = ["train"] * cut + ["val"] * MAML_VAL + ["test"] * (CHARACTERS - MAML_TRAIN)
    return dict(zip(shuffled(names, seed), kinds, strict=True))


def _vinyals_split(folder: Path) -> dict[str, str]:
    """Characters of the three files, whose lines are ``alphabet/character/rot000`` in four rotations each."""
    split_of: dict[str, str] = {}
    for kind in SPLITS:
        path = folder / f"vinyals_{kind}.txt"
        if not path.is_file():
            raise ValueError(
                f"{CALL}: split='vinyals' needs the class list {path}, one alphabet/character/rotation a "
                "line, but there is none. Copy train.txt, val.txt and test.txt from "
                "github.com/jakesnell/prototypical-networks, data/omniglot/splits/vinyals, to "
                "vinyals_<split>.txt, or use split='maml'."
            )
        for number, line in enumerate(path.read_text(encoding="utf-8").split(), start=1):
            alphabet, _, rest = line.partition("/")
            character, _, rotation = rest.partition("/")
            if rotation not in ("rot000", "rot090", "rot180", "rot270"):
                raise ValueError(
                    f"{CALL}: line {number} of {path} must be alphabet/character/rotation, got {line!r}. "
                    "Copy the file again."
                )
            if split_of.setdefault(f"{alphabet}/{character}", kind) != kind:
                raise ValueError(
                    f"{CALL}: {path} puts {alphabet}/{character} into a second split. "
                    "Copy the three files again."
                )
    return split_of
