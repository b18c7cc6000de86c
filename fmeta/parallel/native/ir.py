"""What graphs are lowered to: buffers, views of them, and statements that fill them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

Scope = Literal["shared", "task"]
NAMES = {
    torch.float32: "float", torch.float64: "double", torch.int64: "int64_t", torch.int32: "int32_t",
    torch.bool: "bool",
}  # fmt: skip


class Unsupported(Exception):
    """Why a graph is left to inductor."""


@dataclass(eq=False)
class Buffer:
    """Memory for the numbers of one task, or for numbers that all tasks share."""

    dtype: torch.dtype
    size: int
    scope: Scope
    level: int
    """A shared buffer is complete before the tasks' loop of this number; a task's is filled in it."""
    place: str = "scratch"
    """``scratch``, ``argument``, ``partial`` (sum of one thread) or ``persist`` (one for each task)."""
    changed: int = 0
    """How often it was written to in place."""


class View(NamedTuple):
    """Numbers of a buffer, in elements."""

    buffer: Buffer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the buffer."""
        return self.buffer.dtype


class Const(NamedTuple):
    """The same number everywhere; ``value`` may be C++ that depends on the number of tasks."""

    value: float | int | bool | str
    shape: tuple[int, ...]
    dtype: torch.dtype


Value = View | Const


class Indirect(NamedTuple):
    """A view whose dimension of ``stride`` and ``size`` is indexed by another operand; it has stride 0 in the view."""

    view: View
    stride: int
    size: int
    operand: int
    wraps: bool


class Address(NamedTuple):
    """A pointer to the number of a view, for functions that read others near it."""

    view: View


Operand = View | Const | Indirect | Address


@dataclass(eq=False)
class Map:
    """``out[i] = code(operands[i])`` for every index of ``shape``; a reduction where ``out`` has strides of 0."""

    out: View
    shape: tuple[int, ...]
    code: str
    """C++ with ``{0}``, ``{1}`` for operands and ``{d0}`` for the index of a dimension."""
    operands: Sequence[Operand]
    kind: str = "store"
    """``store``, or what to reduce by: ``sum``, ``max``, ``min``, ``all``, ``any``, ``prod``."""
    scatter: Indirect | None = None
    """Where to, in place of ``out``, by the operand that it names."""
    fresh: bool = True
    """Whether a reduction starts anew."""

    def shared_loop(self) -> bool:
        """Whether it may stand in one loop with other statements."""
        return self.scatter is None and (self.fresh or self.kind != "store") and not self.turns()

    def turns(self) -> tuple[int, int] | None:
        """Of a copy that transposes: the dimensions that are innermost in the source and in the result."""
        x: Operand | None = self.operands[0] if len(self.operands) == 1 else None
        if self.code != "{0}" or not isinstance(x, View) or self.kind != "store" or x.dtype != self.out.dtype:
            return None
        inner = [d for d, n in enumerate(self.shape) if n >= 8 and x.strides[d] == 1]
        outer = [d for d, n in enumerate(self.shape) if n >= 8 and self.out.strides[d] == 1]
        return (inner[0], outer[0]) if inner and outer and inner[0] != outer[0] else None

    def reads(self) -> list[Buffer]:
        """Buffers read."""
        views = [x.view if isinstance(x, (Indirect, Address)) else x for x in self.operands]
        found = [v.buffer for v in views if isinstance(v, View)]
        return found if self.fresh and self.scatter is None else [*found, self.out.buffer]

    def writes(self) -> list[Buffer]:
        """Buffers written."""
        return [self.out.buffer]


class Grid(NamedTuple):
    """Offsets of all points of a grid, row by row."""

    first: int
    sides: tuple[tuple[int, int], ...]
    """Points and step of every side."""

    @property
    def points(self) -> int:
        """How many."""
        return math.prod(n for n, _ in self.sides)


@dataclass(eq=False)
class Call:
    """A call of a template of ``runtime.h``; ``code`` has ``{0}`` for the pointers of views."""

    code: str
    outs: list[View]
    ins: list[View]
    tables: list[Grid] = field(default_factory=list)
    adds: bool = False

    def reads(self) -> list[Buffer]:
        """Buffers read."""
        return [v.buffer for v in self.ins] + ([v.buffer for v in self.outs] if self.adds else [])

    def writes(self) -> list[Buffer]:
        """Buffers written."""
        return [v.buffer for v in self.outs]


Statement = Map | Call


class Total(NamedTuple):
    """A sum over tasks: a part for each thread, and the whole."""

    partial: Buffer
    whole: Buffer
    kind: str


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of numbers in order."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


LONGEST = 400
"""Statements in a loop: a small network written out number by number, its numbers in registers."""


@dataclass(eq=False)
class Loop:
    """Statements on the same indices, or a single one of another kind."""

    statements: list[Statement]
    shape: tuple[int, ...] | None
    """None for one that nothing joins."""
    stored: set[Buffer] = field(default_factory=set)

    def takes(self, shape: tuple[int, ...] | None) -> bool:
        """Whether a statement on such indices may join."""
        return shape is not None and self.shape == shape and len(self.statements) < LONGEST


class Section(NamedTuple):
    """What is done once for all tasks, or for each, before or in the tasks' loop of a number."""

    scope: Scope
    level: int
    loops: list[Loop]
