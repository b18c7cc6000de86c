"""Pools from a csv of texts and labels."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fmeta.data.lines import csv_lines
from fmeta.data.pool import SPLITS, Pools, split_pools
from fmeta.data.split import assign_splits
from fmeta.data.tokens import Tokenizer, tokenise
from fmeta.types import MetaLearningWarning

CALL = "text_csv"
SPELLINGS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}


def text_csv(
    path: str | Path,
    tokenizer: Tokenizer | str | Path | None = None,
    *,
    text: str = "text",
    label: str = "label",
    split: Sequence[float] | Mapping[str, str] | str | Path = (0.64, 0.16, 0.2),
    fold: str = "",
    max_length: int | None = 64,
    seed: int = 0,
) -> Pools:
    """Read labelled texts, tokenise them once, and divide their classes into splits.

    ``x`` of a pool is what a model of ``transformers`` takes by keyword: ``input_ids`` and ``attention_mask``,
    ``[n, length]``, padded on the right to the longest text.

    Args:
        path: a csv in UTF-8 whose first line names its columns.
        tokenizer: one of ``transformers``, the name or path of its model, or ``"minilm"``; None takes the bytes
            of the text, with the ids of ByT5, for which no model is needed.
        text: the column of the texts.
        label: the column of their classes.
        split: fractions of the classes for train, validation and test; ``{class: "train" | "val" | "test"}``;
            the name of a column that says so in each line (all lines of a class must agree); or the path of a
            JSON file of ``{class: split}`` or ``{split: [classes]}``. Texts of classes that a file does not name
            are left out, with a warning.
        fold: where in the JSON file, as in ``"banking77/fold1"``.
        max_length: most tokens of a text, which then loses its end, with a warning that counts such texts; None
            for what the tokenizer's model takes.
        seed: which classes go where, for fractions.

    Raises:
        ValueError: for a file that is not there or not UTF-8, a column that is missing, a line with an empty
            text or label or too many cells (with its number), fewer than two classes, a fold or split that does
            not fit.
    """
    path = Path(path).expanduser()
    column = split if isinstance(split, str) and not split.endswith(".json") else None
    rows = read_texts(path, (text, label, *([column] if column else [])), CALL)
    texts, labels = [row[0] for row in rows], [row[1] for row in rows]
    if column:
        where: Any = column_split(path, rows, column)
    elif isinstance(split, str | Path):
        where = file_split(Path(split).expanduser(), fold)
        texts, labels = named_only(path, texts, labels, where)
        where = {name: kind for name, kind in where.items() if name in set(labels)}
    else:
        where = split
    names = tuple(dict.fromkeys(labels))
    if len(names) < 2:
        raise ValueError(
            f"{CALL}: {path} must hold at least 2 classes, got {len(names)} in column {label!r}."
        )
    found = tokenise(CALL, texts, tokenizer, max_length)
    if found.cut:
        tell(f"{found.cut:,} of {len(texts):,} texts are longer than {max_length} tokens and lost their end")
    number = {name: i for i, name in enumerate(names)}
    y = torch.tensor([number[name] for name in labels])
    return split_pools(found.x, y, names, assign_splits(names, where, seed, CALL), CALL)


def tell(what: str) -> None:
    """Warn about something that a caller may want otherwise."""
    warnings.warn(f"{CALL}: {what}.", MetaLearningWarning, stacklevel=3)


def read_texts(
    path: Path, columns: Sequence[str], call: str, may_be_empty: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """Some columns of a csv, whose cells must not be empty, but for those of columns that may be.

    Raises:
        ValueError: for a file that is not there, not UTF-8 or without lines; a column that is missing; a line
            of another length than the first, or with an empty cell, by its number.
    """
    if not path.is_file():
        raise ValueError(f"{call}: there is no file {path}. Give a csv with columns {', '.join(columns)}.")
    lines = csv_lines(path, call)
    head = [name.strip() for name in next(lines, (0, []))[1]]
    missing = [name for name in columns if name not in head]
    if missing:
        raise ValueError(
            f"{call}: {path} must have a column {missing[0]!r}, got {head}. Name the columns in the first line, or say "
            "which one it is."
        )
    places = {name: head.index(name) for name in columns}
    found = [cells(call, path, number, len(head), places, line, may_be_empty) for number, line in lines]
    if not found:
        raise ValueError(f"{call}: {path} must have lines behind the names of its columns, got none.")
    return found


def cells(
    call: str,
    path: Path,
    number: int,
    width: int,
    places: Mapping[str, int],
    line: list[str],
    empty: Sequence[str],
) -> tuple[str, ...]:
    """The wanted cells of a line."""
    if len(line) != width:
        raise ValueError(
            f"{call}: {path}, line {number}: expected {width} cells, got {len(line)}. Put texts with commas in double "
            "quotes."
        )
    found = tuple(line[place].strip() for place in places.values())
    for name, cell in zip(places, found, strict=True):
        if not cell and name not in empty:
            raise ValueError(
                f"{call}: {path}, line {number}: {name} is empty. Fill it in, or leave the line out."
            )
    return found


def column_split(path: Path, rows: Sequence[tuple[str, ...]], column: str) -> dict[str, str]:
    """The split of every class by a column."""
    where: dict[str, str] = {}
    for _, name, kind in rows:
        if where.setdefault(name, kind) != kind:
            raise ValueError(
                f"{CALL}: a class must be in one split, but column {column!r} of {path} has {name!r} in "
                f"{where[name]!r} and in {kind!r}. Few-shot splits divide classes, not texts; leave split out."
            )
    return {name: SPELLINGS.get(kind, kind) for name, kind in where.items()}


def file_split(path: Path, fold: str) -> dict[str, str]:
    """``{class: split}`` from a JSON file, at a place in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{CALL}: split must be a column or a JSON file, but {path} cannot be read ({error})."
        ) from error
    for step in filter(None, fold.split("/")):
        if not isinstance(found, dict) or step not in found:
            known = ", ".join(map(repr, list(found)[:8])) if isinstance(found, dict) else "none"
            raise ValueError(
                f"{CALL}: fold must lead to a split in {path}, got {fold!r}; at {step!r} there is {known}."
            )
        found = found[step]
    if isinstance(found, dict) and all(isinstance(part, list) for part in found.values()):
        found = {name: kind for kind, part in found.items() for name in part}
    if not isinstance(found, dict) or not found or not all(isinstance(k, str) for k in found.values()):
        raise ValueError(
            f"{CALL}: {path} must hold {{class: split}} or {{split: [classes]}} at fold {fold!r}, got "
            f"{', '.join(found) if isinstance(found, dict) else type(found).__name__}. Give fold, as in "
            "'banking77/fold1'."
        )
    return {str(name): SPELLINGS.get(str(kind), str(kind)) for name, kind in found.items()}


def named_only(
    path: Path, texts: list[str], labels: list[str], where: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """The texts whose class has a split."""
    unknown = sorted(set(where) - set(labels))
    if unknown:
        raise ValueError(
            f"{CALL}: split names {len(unknown)} classes that {path} lacks, {unknown[0]!r} among them. Is it the "
            f"split of another data set? Splits are {', '.join(SPLITS)}."
        )
    kept = [i for i, name in enumerate(labels) if name in where]
    left = sorted({name for name in labels if name not in where})
    if left:
        tell(
            f"{len(labels) - len(kept):,} texts of classes without a split are left out: {', '.join(left[:5])}"
        )
    return [texts[i] for i in kept], [labels[i] for i in kept]
