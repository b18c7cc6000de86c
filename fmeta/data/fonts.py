"""Characters of many scripts, drawn from the font files that matplotlib ships.

Every drawing is cut to its ink and scaled to one size, so what makes a class is shape alone: a comma and an
apostrophe, or c and C, are the same shape, and one of them is dropped.
"""

from __future__ import annotations

import unicodedata
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageFont
from torch import Tensor
from torch.nn import functional as F

# Left out: the Last Resort font, whose glyphs are placeholders; Computer Modern, which is encoded as TeX
# encodes it; display and size variants, which hold few characters.
FACES = tuple(
    family + style
    for family, styles in {
        "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
        "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
    }.items()
    for style in styles
)

# Script: split, then ranges of code points. Of two equal shapes the one that comes first here stays.
# Scripts that fewer than MIN_FACES faces hold (Tifinagh, N'Ko, Ogham) are not listed.
SCRIPTS: dict[str, tuple[str, tuple[tuple[int, int], ...]]] = {
    "Latin": (
        "train",
        ((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x2AF), (0x1D00, 0x1D7F), (0x1E00, 0x1EFF),
         (0x2C60, 0x2C7F), (0xA720, 0xA7FF)),
    ),
    "Greek": ("train", ((0x370, 0x3FF), (0x1F00, 0x1FFF))),
    "Cyrillic": ("train", ((0x400, 0x52F), (0xA640, 0xA69F))),
    "Arabic": ("train", ((0x600, 0x6FF), (0x750, 0x77F), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF))),
    "Old Italic": ("train", ((0x10300, 0x1032F),)),
    "Currency": ("train", ((0x20A0, 0x20CF),)),
    "Letterlike": ("train", ((0x2100, 0x214F),)),
    "Arrows": ("train", ((0x2190, 0x21FF),)),
    "Mathematics": ("train", ((0x2200, 0x22FF), (0x2A00, 0x2AFF))),
    "Canadian Syllabics": ("val", ((0x1400, 0x167F),)),
    "Georgian": ("test", ((0x10A0, 0x10FF), (0x2D00, 0x2D2F))),
    "Armenian": ("test", ((0x530, 0x58F), (0xFB13, 0xFB17))),
    "Hebrew": ("test", ((0x590, 0x5FF), (0xFB1D, 0xFB4F))),
    "Lao": ("test", ((0xE80, 0xEFF),)),
}  # fmt: skip
CATEGORIES = frozenset({"Lu", "Ll", "Lt", "Lo", "Nd", "Nl", "No", "Sc", "Sm", "So"})  # no marks, no spaces
NO_CHARACTER = 0x10FFFF  # not assigned and in no font, so it shows the placeholder, '.notdef'

POINTS, CANVAS, LONG_SIDE = 64, 56, 40
MIN_FACES = 4
SAME_CLASS = 0.93  # chosen by eye: pairs above it differ by less than two faces of one character do
SAME_FACE = 0.995  # faces that draw a character this much alike count once


class Character(NamedTuple):
    """A candidate for a class."""

    script: str
    split: str
    code: int


class Drawings(NamedTuple):
    """Characters drawn in every face, ink 255 on 0."""

    characters: list[Character]
    images: Tensor  # [face, character, CANVAS, CANVAS] uint8
    usable: Tensor  # [face, character] bool


def draw_characters() -> Drawings:
    """Draw all candidates; a face without the character, or with a placeholder or nothing, is not usable."""
    from matplotlib.ft2font import FT2Font  # heavy, and not needed once the result is cached

    files = [font_file(face) for face in FACES]
    charmaps = [frozenset(FT2Font(str(file)).get_charmap()) for file in files]
    # All in the first face, so that any two characters share a face in which they can be compared.
    characters = [character for character in _candidates() if character.code in charmaps[0]]
    images = torch.zeros(len(FACES), len(characters), CANVAS, CANVAS, dtype=torch.uint8)
    for face, (file, charmap) in enumerate(zip(files, charmaps, strict=True)):
        draw = partial(
            draw_character, ImageFont.truetype(str(file), POINTS, layout_engine=ImageFont.Layout.BASIC)
        )
        placeholder = draw(NO_CHARACTER)
        for index, character in enumerate(characters):
            if character.code in charmap:
                drawing = draw(character.code)
                if not torch.equal(drawing, placeholder):
                    images[face, index] = drawing
    return Drawings(characters, images, images.amax((-2, -1)) > 0)


def font_file(face: str) -> Path:
    """Where matplotlib keeps a face."""
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not file.is_file():
        raise ValueError(
            f"glyphs: matplotlib {matplotlib.__version__} must bring its fonts, but {file} is missing. "
            "Install matplotlib from PyPI."
        )
    return file


def draw_character(font: ImageFont.FreeTypeFont, code: int) -> Tensor:
    """Draw one character, its ink scaled to ``LONG_SIDE`` and centred: uint8 ``[CANVAS, CANVAS]``."""
    mask = font.getmask(chr(code))
    canvas = Image.new("L", (CANVAS, CANVAS))
    image = Image.frombytes("L", mask.size, bytes(mask)) if min(mask.size) else canvas
    box = image.getbbox()
    if box is not None:
        image = image.crop(box)
        ratio = LONG_SIDE / max(image.size)
        width, height = (max(1, round(side * ratio)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        canvas.paste(image, ((CANVAS - width) // 2, (CANVAS - height) // 2))
    return torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(CANVAS, CANVAS)


def select_classes(drawings: Drawings) -> tuple[list[int], Tensor]:
    """Choose the characters that become classes, and the faces that really differ for each.

    A character is dropped if fewer than ``MIN_FACES`` faces differ, or if in any face it looks like a
    character chosen before it, of whatever script and split: cosine similarity above ``SAME_CLASS``.

    Returns:
        Indices of the chosen characters, and the faces that count for all characters, ``[face, character]``.
    """
    looks = torch.stack([_look(images) for images in drawings.images])  # [face, character, 14 * 14]
    faces = drawings.usable.clone()
    for face in range(1, len(faces)):
        similarity = torch.einsum("cp,fcp->fc", looks[face], looks[:face])
        faces[face] &= ~((similarity > SAME_FACE) & faces[:face]).any(0)
    alike = torch.zeros(len(drawings.characters), len(drawings.characters), dtype=torch.bool)
    for look in looks:  # an unusable drawing is all zeros, and like nothing
        alike |= look @ look.T > SAME_CLASS
    enough = faces.sum(0) >= MIN_FACES
    chosen = torch.zeros_like(enough)
    for index in enough.nonzero().flatten().tolist():
        chosen[index] = not bool((alike[index] & chosen).any())
    return chosen.nonzero().flatten().tolist(), faces


def _look(images: Tensor) -> Tensor:
    """Drawings as unit vectors of 14 by 14 soft pixels, so that a hair's breadth does not matter."""
    return F.normalize(F.avg_pool2d(images / 255, CANVAS // 14).flatten(1), dim=-1)


def _candidates() -> list[Character]:
    return [
        Character(script, split, code)
        for script, (split, ranges) in SCRIPTS.items()
        for first, last in ranges
        for code in range(first, last + 1)
        if unicodedata.category(chr(code)) in CATEGORIES
    ]
