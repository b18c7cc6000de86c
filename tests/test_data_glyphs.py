"""Glyphs: what the embedded dataset promises, checked on its pixels and with another reader of fonts."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont
from PIL import ImageFont
from torch import Tensor

from fmeta.data import Pool, Pools, cache_dir, fonts, glyphs
from fmeta.data.fonts import Drawings


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    return fonts.draw_characters()


@pytest.fixture(scope="module")
def chosen(drawings: Drawings) -> tuple[list[int], Tensor]:
    return fonts.select_classes(drawings)


@pytest.fixture(scope="module")
def pools(drawings: Drawings, chosen: tuple[list[int], Tensor]) -> Iterator[Pools]:
    """The dataset, made of the drawings at hand, which spares the time to draw them again."""
    module = sys.modules["fmeta.data.glyphs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "draw_characters", lambda: drawings)
        patch.setattr(module, "select_classes", lambda _: chosen)
        yield glyphs()


def splits(pools: Pools) -> list[Pool]:
    return [pools.train, pools.val, pools.test]


def scripts(pool: Pool) -> set[str]:
    return {name.partition("/")[0] for name in pool.names}


def test_counts(pools: Pools) -> None:
    assert [len(pool.names) > least for pool, least in zip(splits(pools), (900, 250, 170), strict=True)] == [
        True
    ] * 3
    assert sum(len(pool.names) for pool in splits(pools)) > 1300
    for pool in splits(pools):
        assert pool.counts.unique().tolist() == [24]
        assert pool.x.shape[1:] == (1, 28, 28) and pool.x.dtype == torch.uint8


def test_splits_hold_whole_scripts(pools: Pools) -> None:
    train, val, test = (scripts(pool) for pool in splits(pools))
    assert len(train) >= 5 and len(test) >= 4
    assert not train & val and not train & test and not val & test
    smallest = {script: sum(name.startswith(script) for name in pools.test.names) for script in test}
    assert min(smallest.values()) >= 30, "each script has enough characters for 20-way tasks"


def test_instances_are_ink_on_black_and_all_differ(pools: Pools) -> None:
    for pool in splits(pools):
        brightest = pool.x.flatten(1).max(1).values
        assert brightest.min() > 100 and brightest.float().mean() > 240
        assert pool.x[..., 0, 0].float().mean() < 1
    seen: dict[bytes, str] = {}
    for pool in splits(pools):
        for image, label in zip(pool.x.numpy(), pool.y.tolist(), strict=True):
            other = seen.setdefault(image.tobytes(), pool.names[label])
            assert other == pool.names[label], f"{other} and {pool.names[label]} share an image"
    assert len(seen) == sum(len(pool.x) for pool in splits(pools)), "no instance is a copy of another"


def test_letters_that_scripts_share_are_one_class(pools: Pools) -> None:
    everything = {name for pool in splits(pools) for name in pool.names}
    for latin, greek, cyrillic in (("A", 0x391, 0x410), ("B", 0x392, 0x412), ("T", 0x3A4, 0x422)):
        names = [f"Latin/U+{ord(latin):04X}", f"Greek/U+{greek:04X}", f"Cyrillic/U+{cyrillic:04X}"]
        assert [name in everything for name in names] == [True, False, False]
        assert names[0] in pools.train.names
    assert sum(f"Latin/U+{ord(letter):04X}" in everything for letter in "sS") == 1, "size is no difference"


def test_every_class_has_four_faces_of_sixteen(chosen: tuple[list[int], Tensor]) -> None:
    classes, faces = chosen
    assert faces.shape[0] == 16 and faces[:, classes].any(1).all()
    counts = faces[:, classes].sum(0)
    assert counts.min() >= 4 and (counts >= 8).float().mean() > 0.45


def test_no_class_is_a_placeholder(drawings: Drawings, chosen: tuple[list[int], Tensor]) -> None:
    classes, faces = chosen
    for face, name in enumerate(fonts.FACES):
        file = fonts.font_file(name)
        glyph_of = TTFont(file).getBestCmap()
        font = ImageFont.truetype(str(file), fonts.POINTS, layout_engine=ImageFont.Layout.BASIC)
        placeholder = fonts.draw_character(font, fonts.NO_CHARACTER)
        assert fonts.NO_CHARACTER not in glyph_of
        for index in classes:
            if faces[face, index]:
                assert glyph_of[drawings.characters[index].code] != ".notdef"
                assert not torch.equal(drawings.images[face, index], placeholder)
                assert drawings.images[face, index].max() > 200


def soft(images: Tensor) -> np.ndarray:
    """Images as unit vectors of 14 by 14 means, written without the package's own pooling."""
    blocks = images.numpy().astype(np.float64).reshape(len(images), 14, 4, 14, 4).mean((2, 4))
    return blocks.reshape(len(images), -1) / np.linalg.norm(blocks, axis=(1, 2))[:, None]


def test_no_two_classes_look_alike_in_any_face(drawings: Drawings, chosen: tuple[list[int], Tensor]) -> None:
    usable = drawings.usable[:, chosen[0]]
    for face in range(len(fonts.FACES)):
        kept = torch.tensor(chosen[0])[usable[face]]
        looks = soft(drawings.images[face, kept])
        similarity = looks @ looks.T - np.eye(len(kept))
        assert similarity.max() <= fonts.SAME_CLASS + 1e-5
    # The bound is worth something: it is what drops a, of several alphabets, that a wider one would let in.
    dropped = len(drawings.characters) - len(chosen[0])
    assert dropped > 1000


def test_faces_that_count_differ(drawings: Drawings, chosen: tuple[list[int], Tensor]) -> None:
    classes, faces = chosen
    for index in classes[::7]:
        looks = soft(drawings.images[faces[:, index], index])
        assert (looks @ looks.T - np.eye(len(looks))).max() <= fonts.SAME_FACE + 1e-5


def test_pools_are_what_was_chosen(
    drawings: Drawings, chosen: tuple[list[int], Tensor], pools: Pools
) -> None:
    characters = [drawings.characters[index] for index in chosen[0]]
    for split, pool in zip(("train", "val", "test"), splits(pools), strict=True):
        assert pool.names == tuple(f"{c.script}/U+{c.code:04X}" for c in characters if c.split == split)


def test_seed_changes_instances_and_nothing_else(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path))
    other, same = glyphs(seed=1), glyphs(seed=0)
    assert other.train.names == pools.train.names
    assert not torch.equal(other.train.x, pools.train.x)
    assert torch.equal(same.test.x, pools.test.x), "the same pixels whenever they are made"
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_result_is_kept_and_damage_noticed(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for file in cache_dir().glob("glyphs-*.safetensors"):
        shutil.copy(file, tmp_path)
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path))
    module = sys.modules["fmeta.data.glyphs"]

    def draw(seed: int) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(module, "_draw", draw)
    assert torch.equal(glyphs().val.x, pools.val.x)
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(AssertionError, match="drawn again"):
        glyphs()


def test_missing_font_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(
        ValueError, match=r"glyphs: matplotlib \S+ must bring its fonts, but .*DejaVuSans\.ttf is missing"
    ):
        fonts.draw_characters()
