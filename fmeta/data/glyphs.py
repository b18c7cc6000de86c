"""The dataset that needs no download: characters as classes, fonts as writers, scripts as splits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta.data.cache import cached
from fmeta.data.fonts import SCRIPTS, draw_characters, select_classes
from fmeta.data.mapped import Examples
from fmeta.data.pool import Pools, split_pools
from fmeta.data.warp import random_affine

VERSION = 1  # raise it when the pixels or classes that this code makes change
INSTANCES = 24  # room for 5 shots and 15 queries; 4, 8 and 12 faces divide it


def glyphs(*, seed: int = 0) -> Pools:
    """Printed characters of 14 scripts and symbol sets, uint8 ``[n, 1, 28, 28]``, ink 255 on 0.

    More than 1,300 classes of 24 instances each. An instance is one of 16 faces (DejaVu Sans, Serif, Sans
    Mono, STIX, each upright, bold, slanted and both), turned by up to 15 degrees, slanted, stretched and
    moved by a little. Every class has at least 4 faces that draw it differently; half of them have 8 or more.

    Splits hold different scripts: Canadian syllabics validate; Georgian, Armenian, Hebrew and Lao test; all
    others train. No two classes, in one split or in two, look alike in any face: Latin A, Greek Alpha and
    Cyrillic A are one class, and so are c and C, because position and size say nothing here.

    Turned shapes can be other classes (b and q, arrows, nearly all syllabics): ``augment="rotations"`` gives
    some shapes two labels. Few meet in a task of 5 classes; test without it.

    Args:
        seed: of the affine changes; classes and faces do not depend on it.

    The first call draws for some seconds and keeps the result in the cache directory, about 27 MB.

    Example:
        >>> pools = glyphs()
        >>> pools.test.x.shape[1:], int(pools.test.counts.min())
        (torch.Size([1, 28, 28]), 24)
    """
    import matplotlib
    import PIL

    key = [VERSION, matplotlib.__version__, PIL.__version__, seed]
    x, y, names = cached("glyphs", key, lambda: _draw(seed))
    split_of = {name: SCRIPTS[name.partition("/")[0]][0] for name in names}
    return split_pools(x, y, names, split_of, "glyphs")


def _draw(seed: int) -> Examples:
    drawings = draw_characters()
    chosen, faces = select_classes(drawings)
    generator = torch.Generator().manual_seed(seed)
    images = [_instances(drawings.images[faces[:, index], index], generator) for index in chosen]
    names = tuple(f"{drawings.characters[i].script}/U+{drawings.characters[i].code:04X}" for i in chosen)
    return Examples(torch.cat(images), torch.arange(len(chosen)).repeat_interleave(INSTANCES), names)


def _instances(faces: Tensor, generator: torch.Generator) -> Tensor:
    """``[INSTANCES, 1, 28, 28]`` from the drawings of one character, ``[face, 56, 56]``."""
    turn = torch.arange(INSTANCES) % len(faces)
    # The nearest neighbour in pixels, 5 ways and 1 shot, is right on 94 % of unchanged drawings of the test
    # scripts. With these amounts it is right on 42 %, as on Omniglot (44 %): the task needs learning.
    moved = random_affine(
        faces[turn, None] / 255, generator, degrees=15, shear=0.25, scale=(0.75, 1.1), shift=0.1
    )
    return (F.avg_pool2d(moved, 2) * 255).round().to(torch.uint8)
