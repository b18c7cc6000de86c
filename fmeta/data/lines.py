"""Lines of csv files, with errors that name the file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path


def csv_lines(path: Path, call: str) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of every line of a csv in UTF-8 that is not blank.

    Raises:
        ValueError: for another encoding, and for quotes that are not closed or stand inside of a cell.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{call}: {path} must be a csv in UTF-8, but {error}. Save it as such.") from error
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        begin = lines.line_num + 1
        try:
            line = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{call}: {path}, line {begin}: {error}. Close every double quote, and write those inside of a text "
                "twice."
            ) from error
        if any(cell.strip() for cell in line):
            yield lines.line_num, line
