"""Patterns on names."""

from __future__ import annotations

import pytest

from fmeta.parts.select import Pattern, matches, select

NAMES = [
    "body.0.conv.weight",
    "body.0.norm.weight",
    "body.0.norm.bias",
    "body.1.conv.weight",
    "head.weight",
    "header",
]


@pytest.mark.parametrize(
    ("pattern", "want"),
    [
        ("head", ["head.weight"]),
        ("head.weight", ["head.weight"]),
        ("body.0", NAMES[:3]),
        ("body.*.conv", ["body.0.conv.weight", "body.1.conv.weight"]),
        ("*.bias", ["body.0.norm.bias"]),
        ("*norm*", NAMES[1:3]),
        ("body.[1-9]", ["body.1.conv.weight"]),
        ("!body", ["head.weight", "header"]),
        (["header", "head"], ["head.weight", "header"]),
        (["body", "!*.norm"], ["body.0.conv.weight", "body.1.conv.weight"]),
        (
            ["body", "!*.norm", "body.0.norm.bias"],
            ["body.0.conv.weight", "body.0.norm.bias", "body.1.conv.weight"],
        ),
        (["!body", "!header"], ["head.weight"]),
        (lambda name: "weight" not in name, ["body.0.norm.bias", "header"]),
        ("*", NAMES),
    ],
)
def test_patterns(pattern: Pattern, want: list[str]) -> None:
    assert matches(pattern, NAMES) == want
    assert select({name: i for i, name in enumerate(NAMES)}, pattern) == {n: NAMES.index(n) for n in want}


@pytest.mark.parametrize("pattern", ["haed", "!haed", ["head", "haed"]])
def test_a_pattern_without_a_match_gets_a_suggestion(pattern: Pattern) -> None:
    with pytest.raises(
        ValueError, match=r"'!?haed' matches no parameter. Did you mean 'head'.*The names are body.0"
    ):
        matches(pattern, NAMES)


@pytest.mark.parametrize("pattern", [[], ["head", "!head"], lambda name: False])
def test_selecting_nothing_is_an_error(pattern: Pattern) -> None:
    with pytest.raises(ValueError, match=r"selects no parameter\. The names are"):
        matches(pattern, NAMES)


def test_long_lists_of_names_are_cut() -> None:
    with pytest.raises(ValueError, match="layer19 and 80 more"):
        matches("qqq", [f"layer{i}" for i in range(100)])


def test_no_names_at_all() -> None:
    with pytest.raises(ValueError, match="The names are none at all"):
        matches("head", [])
