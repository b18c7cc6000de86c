"""What the numbers of a loop are known to be, from the text that computes them."""

from __future__ import annotations

import math
import re

NUMBER = r"\(\((?:float|double)\)(\d[\d.]*(?:e[+-]?\d+)?)\)"
"""A constant that is not negative."""
SQUARE = re.compile(r"^\((v\d+) \* \1\)$")
SCALED = re.compile(rf"^\((v\d+) \* {NUMBER}\)$")
SHIFTED = re.compile(rf"^\((v\d+) \+ {NUMBER}\)$")
ROOT = re.compile(r"^fm_rsqrt\((v\d+)\)$")
NORMAL = 1.2e-38
"""Positive numbers from here on are not denormal in single precision."""


class Known:
    """The least that each number of a loop can be, where it has such a bound and is not NaN."""

    def __init__(self) -> None:
        """Nothing is known."""
        self.least: dict[str, float] = {}

    def note(self, name: str, code: str) -> None:
        """``name`` is computed by ``code``."""
        least = self.of(code)
        if least is not None:
            self.least[name] = least

    def of(self, code: str) -> float | None:
        """The least that code gives."""
        if SQUARE.match(code):
            return 0.0
        for pattern, join in ((SCALED, lambda a, b: a * b), (SHIFTED, lambda a, b: a + b)):
            found = pattern.match(code)
            if found and found[1] in self.least:
                return join(self.least[found[1]], float(found[2]))
        return None

    def simpler(self, code: str) -> str:
        """Code that does the same, and no more than these numbers need."""
        found = ROOT.match(code)
        if found and self.least.get(found[1], -math.inf) >= NORMAL:
            return f"fm_rsqrt_normal({found[1]})"
        return code
