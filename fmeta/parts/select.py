"""Choosing parameters by name: which adapt, which are meta-learned, which a rate belongs to."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

Pattern = str | Sequence[str] | Callable[[str], bool]
"""A glob on dotted names, several of them in order, or a test of a name."""

T = TypeVar("T")


def select(params: Mapping[str, T], pattern: Pattern) -> dict[str, T]:
    """Entries of ``params`` whose name matches ``pattern`` (see `matches`), in the order of ``params``.

    >>> select({"body.weight": 1, "head.weight": 2, "head.bias": 3}, "head")
    {'head.weight': 2, 'head.bias': 3}
    """
    return {name: params[name] for name in matches(pattern, params)}


def matches(pattern: Pattern, names: Iterable[str]) -> list[str]:
    """Names that a pattern selects, in the order of ``names``.

    Args:
        pattern: a glob, where ``*`` also crosses dots and the name of a module stands for all of its
            parameters: ``"head"`` selects ``head.weight`` and ``head.bias``. ``"!norm"`` excludes. A sequence
            applies its patterns in order; one that starts with an exclusion starts from all names. Or a
            function from name to bool.
        names: what to choose from.

    Raises:
        ValueError: if nothing is selected, or one of the patterns matches no name at all.

    >>> matches(["!*.bias"], ["conv.weight", "conv.bias"])
    ['conv.weight']
    """
    names = list(names)
    if callable(pattern):
        chosen = {name for name in names if pattern(name)}
    else:
        chosen = _apply_in_order([pattern] if isinstance(pattern, str) else list(pattern), names)
    if not chosen:
        raise ValueError(f"select: {pattern!r} selects no parameter. The names are {_listed(names)}.")
    return [name for name in names if name in chosen]


# torch.compile takes the result as a constant instead of tracing it: names are known while it traces. This is
# what torch.compiler.assume_constant_result sets; calling that would import dynamo, which takes seconds.
matches._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _apply_in_order(patterns: list[str], names: list[str]) -> set[str]:
    chosen: set[str] = set(names) if patterns and patterns[0].startswith("!") else set()
    for pattern in patterns:
        glob = pattern.removeprefix("!")
        hits = {name for name in names if fnmatchcase(name, glob) or fnmatchcase(name, f"{glob}.*")}
        if not hits:
            raise ValueError(
                f"select: {pattern!r} matches no parameter.{_suggestion(glob, names)} "
                f"The names are {_listed(names)}."
            )
        chosen = chosen - hits if pattern.startswith("!") else chosen | hits
    return chosen


def _suggestion(glob: str, names: list[str]) -> str:
    prefixes = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
    close = difflib.get_close_matches(glob, sorted(prefixes | set(names)), n=3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _listed(names: list[str], limit: int = 20) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest if names else "none at all"
