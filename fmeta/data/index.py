"""Index files: which image is of which class, and which class is in which split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fmeta.data.images import Source
from fmeta.data.lines import csv_lines
from fmeta.data.pool import SPLITS


def read_index(path: Path, call: str) -> tuple[dict[str, str], dict[str, str]]:
    """``{file: label}`` and ``{label: split}`` of a csv file with the columns ``file,label,split``."""
    if not path.is_file():
        raise ValueError(f"{call}: split must be an index file, but there is no file {path}. Check the path.")
    rows = _rows(path, ("file", "label", "split"), call)
    return _labels([(path, line, *row) for line, row in rows], call)


def read_lists(folder: Path, call: str) -> tuple[dict[str, str], dict[str, str]]:
    """``{file: label}`` and ``{label: split}`` of train.csv, val.csv and test.csv, ``filename,label`` each."""
    entries: list[Any] = []
    for kind in SPLITS:
        path = folder / f"{kind}.csv"
        if not path.is_file():
            raise ValueError(
                f"{call}: {folder} must hold {path.name}, but does not. Copy the three lists into it."
            )
        rows = _rows(path, ("filename", "label"), call)
        entries += [(path, line, *row, kind) for line, row in rows]
    return _labels(entries, call)


def locate(labels: dict[str, str], source: Source, call: str) -> dict[str, str]:
    """The same labels by path in ``source``; a list may leave out the folders of a file whose name is unique."""
    known, paths = set(source.files), {}
    for path in source.files:
        name = PurePosixPath(path).name
        paths[name] = None if name in paths else path
    found = {name: name if name in known else paths.get(name) for name in labels}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise ValueError(
            f"{call}: the index lists {len(missing)} images that {source.where} does not hold, such as "
            f"{missing[0]}. Paths must be relative to it, with forward slashes."
        )
    placed: dict[str, str] = {}
    for name, label in labels.items():
        if placed.setdefault(str(found[name]), label) != label:
            raise ValueError(
                f"{call}: an image must have one class, but the index lists {found[name]} twice, as "
                f"{placed[str(found[name])]!r} and as {label!r}. Remove one of the lines."
            )
    return placed


def _rows(path: Path, columns: Sequence[str], call: str) -> list[tuple[int, list[str]]]:
    lines = csv_lines(path, call)
    head = next(lines, (0, []))[1]
    lacking = [column for column in columns if column not in head]
    if lacking:
        raise ValueError(
            f"{call}: {path} must have the columns {','.join(columns)}, but {lacking[0]!r} is missing. "
            "Add a header line."
        )
    places = [head.index(column) for column in columns]
    rows = []
    for number, line in lines:
        found = [line[place].strip() if place < len(line) else "" for place in places]
        if "" in found:
            raise ValueError(
                f"{call}: {path}, line {number}: {columns[found.index('')]} is empty. Fill it in, or leave the "
                "line out."
            )
        rows.append((number, found))
    if not rows:
        raise ValueError(f"{call}: {path} must list images, but has no lines. Add some.")
    return rows


def _labels(entries: Sequence[Any], call: str) -> tuple[dict[str, str], dict[str, str]]:
    labels: dict[str, str] = {}
    split_of: dict[str, str] = {}
    for path, line, name, label, kind in entries:
        if split_of.setdefault(label, kind) != kind:
            raise ValueError(
                f"{call}: a class must be in one split, but line {line} of {path} puts {label!r} into "
                f"{kind!r} after {split_of[label]!r}. Divide classes, not images."
            )
        if labels.setdefault(name, label) != label:
            raise ValueError(
                f"{call}: an image must have one class, but line {line} of {path} gives {name} {label!r} "
                f"after {labels[name]!r}. Remove one of the lines."
            )
    return labels, split_of
