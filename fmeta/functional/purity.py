"""Finding out that a module's forward leaves something behind, and saying what."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PARTS = ("_parameters", "_buffers", "_modules")


class Seen(NamedTuple):
    """An attribute as it was: the object, what it contained, and how often it had been written to."""

    value: Any
    contents: tuple[Any, ...]
    version: int


State = dict[str, Seen]


def version(tensor: Tensor) -> int:
    """How often a tensor had been written to; torch.inference_mode does not count, so there always 0."""
    return 0 if tensor.is_inference() else tensor._version


def snapshot(module: nn.Module) -> State:
    """Everything that the module and its children hold, by dotted name."""
    return {
        f"{prefix}.{name}" if prefix else name: _see(value)
        for prefix, child in module.named_modules()
        for name, value in _attributes(child)
    }


def changed(before: State, after: State) -> list[str]:
    """Names that were added, removed, reassigned or written to between two snapshots."""
    names = [*before, *(name for name in after if name not in before)]
    return [name for name in names if not _same(before.get(name), after.get(name))]


def refuse_changes(before: State, after: State) -> None:
    """Raise for a forward that is not a pure function, naming the attributes it changed."""
    names = changed(before, after)
    if names:
        listed = ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(
            f"functionalize: forward must not change the module, but it changed {listed}. Return the new "
            "value instead, or take it as an argument; in an evaluation, module.eval() may turn this off."
        )


def refuse_in_place(module: nn.Module, error: RuntimeError) -> None:
    """Raise a readable error for torch.func's complaint that a captured tensor was written to."""
    text = str(error)
    if not any(sign in text for sign in ("in-place", "inplace", "doesn't match the broadcast shape")):
        return
    owner = _innermost_module(error.__traceback__)
    name = next((name for name, child in module.named_modules() if child is owner), "")
    place = f"{type(owner or module).__name__}{f' at {name!r}' if name else ''}"
    raise ValueError(
        f"functionalize: forward of {place} writes in place to a tensor that the transform must not change, "
        "a buffer or an input. Compute a new tensor instead; in an evaluation, module.eval() may help."
    ) from error


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for part in PARTS:
        yield from getattr(module, part).items()
    yield from ((name, value) for name, value in vars(module).items() if name not in PARTS)


def _see(value: Any) -> Seen:
    contents: tuple[Any, ...] = ()
    if isinstance(value, list | tuple | set):
        contents = tuple(value)
    elif isinstance(value, dict):
        contents = (*value.keys(), *value.values())
    return Seen(value, contents, version(value) if isinstance(value, Tensor) else 0)


def _same(a: Seen | None, b: Seen | None) -> bool:
    if a is None or b is None or a.value is not b.value or a.version != b.version:
        return False
    return len(a.contents) == len(b.contents) and all(
        x is y for x, y in zip(a.contents, b.contents, strict=True)
    )


def _innermost_module(traceback: TracebackType | None) -> nn.Module | None:
    found = None
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found = owner
        traceback = traceback.tb_next
    return found


def under_compilation() -> bool:
    """Whether torch.compile is tracing this call: all that the layers below ``parallel`` ask about how they are run."""
    return torch.compiler.is_compiling()
