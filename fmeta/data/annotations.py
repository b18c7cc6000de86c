"""What files say of boxes in pictures: read, and checked entry by entry."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SLACK = 0.5  # pixels by which rounding may put a box beyond the edge


class Marked(NamedTuple):
    """One picture as a file says: boxes in its own pixels, labels from 1."""

    file: str
    width: int
    height: int
    boxes: list[Any]
    labels: list[int]


def read_json(call: str, path: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """A json file with these entries."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{call}: {path} must be a json file, but {error}. Check the path.") from error
    lacking = [name for name in wanted if not isinstance(content, dict) or name not in content]
    if lacking:
        raise ValueError(f"{call}: {path} must hold {', '.join(wanted)}, but {lacking[0]!r} is missing.")
    return content


def entries(
    call: str, path: Path, content: Mapping[str, Any], kind: str, keys: Sequence[str], unlike: str = ""
) -> list[dict[str, Any]]:
    """The entries of a list of a json file, each of which has these keys, and another ``unlike`` than all others."""
    found = content[kind]
    seen: set[Any] = set()
    for index, entry in enumerate(found if isinstance(found, list) else [found]):
        lacking = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if lacking:
            raise ValueError(
                f"{call}: every entry of {kind!r} in {path} must have {', '.join(keys)}, but number {index + 1} has no "
                f"{lacking[0]!r}."
            )
        for name in (name for name in ("width", "height") if name in keys):
            if not isinstance(entry[name], (int, float)) or not entry[name] > 0:
                raise ValueError(
                    f"{call}: {name} must be a number above 0, got {entry[name]!r} in number {index + 1} of {kind!r} "
                    f"in {path}."
                )
        number = entry[unlike] if unlike else index
        if not isinstance(number, (int, str)) or type(number) is not type(next(iter(seen), number)):
            raise ValueError(
                f"{call}: every {unlike} in {kind!r} of {path} must be a whole number, or every one a text, got "
                f"{number!r}."
            )
        if number in seen:
            raise ValueError(f"{call}: {unlike} must be unique in {kind!r} of {path}, got {number!r} twice.")
        seen.add(number)
    return list(found)


def sides(call: str, box: Any, file: str) -> tuple[float, float, float, float]:
    """The four numbers of a box."""
    numbers = isinstance(box, (list, tuple)) and all(
        isinstance(side, (int, float)) and not isinstance(side, bool) and math.isfinite(side) for side in box
    )
    if not numbers or len(box) != 4:
        raise ValueError(f"{call}: a box must be four finite numbers, got {box!r} in {file}.")
    return box[0], box[1], box[2], box[3]


def check_known(call: str, path: Path, kind: str, number: Any, known: Mapping[Any, Any]) -> None:
    """Refuse an annotation of what is not listed."""
    if number not in known:
        raise ValueError(
            f"{call}: every annotation needs a listed {kind}, but {path} has one of {kind} {number}. List it, or "
            "remove the annotation."
        )


def checked(call: str, one: Marked, names: tuple[str, ...], repair: bool) -> Marked:
    """The picture with valid boxes only, or an error that names the box."""
    if len(one.boxes) != len(one.labels):
        raise ValueError(
            f"{call}: every box needs a label, got {len(one.boxes)} boxes and {len(one.labels)} labels for {one.file}."
        )
    boxes, labels = [], []
    for box, label in zip(one.boxes, one.labels, strict=True):
        if not isinstance(label, int) or not 1 <= label <= len(names):
            raise ValueError(
                f"{call}: labels must be in 1 .. {len(names)} for {len(names)} classes, got {label!r} in {one.file}. "
                "0 is the background; list every class."
            )
        left, top, right, bottom = sides(call, box, one.file)
        inside = min(left, top) >= -SLACK and right <= one.width + SLACK and bottom <= one.height + SLACK
        if not inside and not repair:
            raise ValueError(
                f"{call}: boxes must lie inside of their picture, got {list(box)} in {one.file} of {one.width} x "
                f"{one.height} pixels. Correct it; in Python, repair=True cuts such boxes."
            )
        left, right = (min(max(side, 0), one.width) for side in (left, right))
        top, bottom = (min(max(side, 0), one.height) for side in (top, bottom))
        if left < right and top < bottom:
            boxes.append((left, top, right, bottom))
            labels.append(label)
        elif not repair:
            raise ValueError(
                f"{call}: boxes must have an area, got {list(box)} in {one.file}. Correct it; in Python, "
                "repair=True drops such boxes."
            )
    return one._replace(boxes=boxes, labels=labels)
