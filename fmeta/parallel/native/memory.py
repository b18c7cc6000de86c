"""Where numbers are kept: memory of a task is used again after its last reader, or by it."""

from __future__ import annotations

from collections.abc import Iterator

from fmeta.parallel.native import shapes
from fmeta.parallel.native.ir import (
    NAMES,
    Address,
    Buffer,
    Call,
    Indirect,
    Loop,
    Map,
    Section,
    Statement,
    View,
)

BYTES = {"float": 4, "double": 8, "int64_t": 8, "int32_t": 4, "bool": 1}


def ordered(statements: list[Statement]) -> list[Buffer]:
    """Buffers written, each once."""
    return list(dict.fromkeys(b for s in statements for b in s.writes()))


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
                    old = next((o for o in alive if ends[o] == i and inherits(loop, o, b)), None)
                    alive[b] = alive.pop(old) if old else bytes_of(b)
                    places[b] = places[old] if old else taken(free, bytes_of(b))
                    top = max(top, places[b] + bytes_of(b))
            for b in [b for b in alive if ends[b] <= i]:
                given_back(free, places[b], alive.pop(b))
    return top


def inherits(loop: Loop, old: Buffer, new: Buffer) -> bool:
    """Whether a loop may write a tensor over one that it is the last to read: number by number, each read before."""
    if loop.shape is None or old.size != new.size or old.dtype.itemsize != new.dtype.itemsize:
        return False
    writers = [i for i, s in enumerate(loop.statements) if new in s.writes()]
    readers = [i for i, s in enumerate(loop.statements) if old in s.reads()]
    writer = loop.statements[writers[0]]
    if len(writers) > 1 or readers[-1] > writers[0] or not isinstance(writer, Map) or writer.kind != "store":
        return False
    if any(old in s.writes() for s in loop.statements) or shapes.size(writer.shape) != new.size:
        return False
    return all(in_step(loop.statements[i], old, writer) for i in readers)


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
