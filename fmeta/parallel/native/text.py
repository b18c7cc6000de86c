"""Pieces of C++."""

from __future__ import annotations

import math
from typing import Any

from fmeta.parallel.native.ir import NAMES, Buffer


class Text:
    """Lines, and names for buffers."""

    def __init__(self) -> None:
        """Empty."""
        self.lines: list[str] = []
        self.names: dict[Buffer, str] = {}

    def __call__(self, line: str) -> None:
        """Add a line."""
        self.lines.append(line)

    def name(self, b: Buffer) -> str:
        """The name of a buffer."""
        return self.names.setdefault(b, f"b{len(self.names)}")

    def whole(self) -> str:
        """All lines."""
        return "\n".join(self.lines) + "\n"


def number(value: Any) -> str:
    """A number in C++."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, float):
        if math.isnan(value):
            return "NAN"
        if math.isinf(value):
            return "INFINITY" if value > 0 else "(-INFINITY)"
    return f"INT64_C({value})" if isinstance(value, int) and abs(value) > 2**31 - 1 else repr(value)


def local(dtype: Any) -> str:
    """The type of a number outside of memory."""
    return "int" if NAMES[dtype] == "bool" else NAMES[dtype]
