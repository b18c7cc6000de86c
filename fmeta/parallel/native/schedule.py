"""The order of statements: those that visit the same indices share a loop; and where their results are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from fmeta.parallel.native import shapes
from fmeta.parallel.native.inline import ready
from fmeta.parallel.native.ir import (
    NAMES,
    Address,
    Buffer,
    Call,
    Indirect,
    Map,
    Scope,
    Statement,
    Total,
    View,
)
from fmeta.parallel.native.lower import Lowering

MOST = 48
"""Statements in a loop."""
BYTES = {"float": 4, "double": 8, "int64_t": 8, "int32_t": 4, "bool": 1}


@dataclass(eq=False)
class Loop:
    """Statements on the same indices, or a single one of another kind."""

    statements: list[Statement]
    shape: tuple[int, ...] | None
    """None for one that nothing joins."""
    stored: set[Buffer] = field(default_factory=set)

    def takes(self, shape: tuple[int, ...] | None) -> bool:
        """Whether a statement on such indices may join."""
        return shape is not None and self.shape == shape and len(self.statements) < MOST


class Section(NamedTuple):
    """What is done once for all tasks, or for each, before or in the tasks' loop of a number."""

    scope: Scope
    level: int
    loops: list[Loop]


class Plan(NamedTuple):
    """Sections in order, and bytes and places of memory."""

    sections: list[Section]
    places: dict[Buffer, int]
    shared_bytes: int
    task_bytes: int
    persist_bytes: int
    partial_bytes: int
    totals: list[Total]


def plan(low: Lowering) -> Plan:
    """Everything about a lowered graph but its text."""
    groups = needed(low, ready([s for (s,) in needed(low, [[s] for s in low.statements])]))
    live = [s for group in groups for s in group]
    top = max((s.writes()[0].level for s in live), default=0)
    sections = []
    for level in range(top + 1):
        for scope in ("shared", "task"):
            mine = [g for g in groups if (g[-1].writes()[0].scope, g[-1].writes()[0].level) == (scope, level)]
            sections.append(Section(scope, level, joined(mine)))
    keep(sections)
    used = {b for s in live for b in (*s.reads(), *s.writes())}
    totals = [t for t in low.totals if t.partial in used]
    places: dict[Buffer, int] = {}
    sizes = [
        laid((b for b in ordered(live) if b.place == "scratch" and b.scope == "shared"), places),
        packed(sections, places),
        laid((b for b in ordered(live) if b.place == "persist"), places),
        laid((t.partial for t in totals), places),
    ]
    shared = laid(
        (t.whole for t in totals if t.whole.place == "scratch" and t.whole not in places), places, sizes[0]
    )
    return Plan(sections, places, shared, sizes[1], sizes[2], sizes[3], totals)


def ordered(statements: list[Statement]) -> list[Buffer]:
    """Buffers written, each once."""
    return list(dict.fromkeys(b for s in statements for b in s.writes()))


def needed(low: Lowering, groups: list[list[Statement]]) -> list[list[Statement]]:
    """Statements that results depend on."""
    wanted = {b for b, _ in low.results}
    whole = {t.partial: t.whole for t in low.totals}
    found = []
    for group in reversed(groups):
        kept = []
        for s in reversed(group):
            if any(b in wanted or whole.get(b) in wanted for b in s.writes()):
                wanted.update(s.reads())
                kept.append(s)
        if kept:
            found.append(kept[::-1])
    return found[::-1]


def joined(groups: list[list[Statement]]) -> list[Loop]:
    """Put every group of statements into the first loop where it may be."""
    loops: list[Loop] = []
    wrote: dict[Buffer, int] = {}
    read: dict[Buffer, int] = {}
    by: dict[Buffer, Map] = {}
    for group in groups:
        last = group[-1]
        first, shape = 0, last.shape if isinstance(last, Map) and last.shared_loop() else None
        for s in group:
            for b in s.reads():
                if b in wrote:
                    direct = shape is not None and loops[wrote[b]].shape == shape and in_step(s, b, by.get(b))
                    first = max(first, wrote[b] + (not direct))
            for b in s.writes():
                first = max(first, wrote.get(b, -1) + 1, read.get(b, -1) + 1)
        at = next((i for i in range(first, len(loops)) if loops[i].takes(shape)), len(loops))
        if at == len(loops):
            loops.append(Loop([], shape))
        loops[at].statements += group
        for s in group:
            for b in s.reads():
                read[b] = max(read.get(b, -1), at)
            for b in s.writes():
                by.pop(b, None)
                if b not in wrote and isinstance(s, Map) and shape is not None and s.kind == "store":
                    by[b] = s
                wrote[b] = at
    return loops


def in_step(s: Statement, buffer: Buffer, source: Map | None) -> bool:
    """Whether a statement reads just the number that another one writes at the same index."""
    if source is None or isinstance(s, Call):
        return False
    for x in s.operands:
        view = x.view if isinstance(x, (Indirect, Address)) else x
        if isinstance(view, View) and view.buffer is buffer:
            if (
                isinstance(x, (Indirect, Address))
                or not shapes.same(view, source.out)
                or view.shape != s.shape
            ):
                return False
    return True


def keep(sections: list[Section]) -> None:
    """Note which results must be in memory: those that another loop reads."""
    homes: dict[Buffer, Loop] = {}
    for section in sections:
        for loop in section.loops:
            for s in loop.statements:
                for b in s.writes():
                    if (
                        b in homes
                        or b.place != "scratch"
                        or loop.shape is None
                        or isinstance(s, Call)
                        or s.kind != "store"
                    ):
                        (homes.get(b) or loop).stored.add(b)
                        loop.stored.add(b)
                    homes.setdefault(b, loop)
    for section in sections:
        for loop in section.loops:
            for s in loop.statements:
                for b in s.reads():
                    if b in homes and homes[b] is not loop:
                        homes[b].stored.add(b)


def bytes_of(b: Buffer) -> int:
    """Memory of a buffer, in whole cache lines and one vector more."""
    return (b.size * BYTES[NAMES[b.dtype]] + 127) // 64 * 64


def laid(buffers: Iterator[Buffer], places: dict[Buffer, int], start: int = 0) -> int:
    """One after the other."""
    for b in buffers:
        places[b] = start
        start += bytes_of(b)
    return start


def packed(sections: list[Section], places: dict[Buffer, int]) -> int:
    """Numbers of a task: memory is used again after its last reader. Returns the bytes."""
    top = 0
    for section in sections:
        if section.scope != "task":
            continue
        ends: dict[Buffer, int] = {}
        for i, loop in enumerate(section.loops):
            for s in loop.statements:
                ends.update(dict.fromkeys((*s.reads(), *s.writes()), i))
        free: list[tuple[int, int]] = [(0, 1 << 60)]
        alive: dict[Buffer, int] = {}
        for i, loop in enumerate(section.loops):
            for b in ordered(loop.statements):
                if b in loop.stored and b.place == "scratch" and b.scope == "task" and b not in places:
                    places[b] = taken(free, bytes_of(b))
                    alive[b] = bytes_of(b)
                    top = max(top, places[b] + bytes_of(b))
            for b in [b for b in alive if ends[b] <= i]:
                given_back(free, places[b], alive.pop(b))
    return top


def taken(free: list[tuple[int, int]], size: int) -> int:
    """The first free place of a size."""
    for i, (at, room) in enumerate(free):
        if room >= size:
            free[i : i + 1] = [(at + size, room - size)] if room > size else []
            return at
    raise AssertionError("taken: expected an endless last place, got none")


def given_back(free: list[tuple[int, int]], at: int, size: int) -> None:
    """A place is free again; neighbours are joined."""
    free.append((at, size))
    free.sort()
    joined_up: list[tuple[int, int]] = []
    for begin, room in free:
        if joined_up and joined_up[-1][0] + joined_up[-1][1] == begin:
            joined_up[-1] = (joined_up[-1][0], joined_up[-1][1] + room)
        else:
            joined_up.append((begin, room))
    free[:] = joined_up
