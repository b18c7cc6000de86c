"""The order of statements: those that visit the same indices share a loop."""

from __future__ import annotations

from typing import NamedTuple

from fmeta.parallel.native import shapes
from fmeta.parallel.native.inline import ready
from fmeta.parallel.native.ir import Buffer, Call, Loop, Map, Section, Statement, Total, View
from fmeta.parallel.native.lower import Lowering
from fmeta.parallel.native.memory import in_step, laid, ordered, packed


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
    parts: dict[Buffer, list[View]] = {}
    for group in groups:
        last = group[-1]
        first, shape = 0, last.shape if isinstance(last, Map) and last.shared_loop() else None
        for s in group:
            for b in s.reads():
                if b in wrote:
                    direct = shape is not None and loops[wrote[b]].shape == shape and in_step(s, b, by.get(b))
                    first = max(first, wrote[b] + (not direct))
            for b in s.writes():
                beside = apart(s, parts.get(b, []))
                first = max(first, -1 if beside else wrote.get(b, -1) + 1, read.get(b, -1) + 1)
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
                wrote[b] = max(at, wrote.get(b, at))
                parts.setdefault(b, []).extend(v for v in outs(s) if v.buffer is b)
    return loops


def outs(s: Statement) -> list[View]:
    """Where a statement writes."""
    if isinstance(s, Call):
        return s.outs
    whole = View(s.out.buffer, (s.out.buffer.size,), (1,))
    return [s.out if s.scatter is None else whole]


def apart(s: Statement, others: list[View]) -> bool:
    """Whether a statement writes to other places than all of these, so that the order does not matter."""
    if not isinstance(s, Map) or s.kind != "store" or s.scatter is not None or not s.fresh:
        return False
    first, last = shapes.reach(s.out)
    return all(last < low or first > high for low, high in map(shapes.reach, others))


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
