"""Plain containers of tensors taken apart and put together quickly: what a replayed call does beside its kernels.

The same leaves in the same order as ``fmeta.tree`` gives, in a tenth of the time; other containers than dicts, lists,
tuples and named tuples are left to it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor, nn

LEAF = None
Form = Hashable


class Other(Exception):
    """A container that is not a plain one."""


def taken_apart(x: Any, leaves: list[Tensor]) -> Form:
    """Append the tensors of a tree; returns what is left of it, a key. Raises ``Other``."""
    kind = type(x)
    if kind is Tensor or kind is nn.Parameter:
        leaves.append(x)
        return LEAF
    if kind is dict:
        return dict, tuple(x), tuple([taken_apart(value, leaves) for value in x.values()])
    if kind is tuple or kind is list or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        return kind, tuple([taken_apart(value, leaves) for value in x])
    raise Other


def form_of(x: Any) -> tuple[list[Tensor], Form] | None:
    """Tensors and form of a tree; None where it is not made of plain containers."""
    leaves: list[Tensor] = []
    try:
        return leaves, taken_apart(x, leaves)
    except Other:
        return None


def put_together(form: Any, values: Iterator[Any]) -> Any:
    """A tree of a form, with these leaves."""
    if form is LEAF:
        return next(values)
    if form[0] is dict:
        return {key: put_together(part, values) for key, part in zip(form[1], form[2], strict=True)}
    parts = [put_together(part, values) for part in form[1]]
    return form[0](parts) if form[0] in (tuple, list) else form[0](*parts)
