"""Checks that the samplers share."""

from __future__ import annotations


def check_counts(call: str, **counts: int) -> None:
    """Every keyword must be a positive int."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{call}: {name} must be a positive int, got {value!r}. Pass 1 or more.")
