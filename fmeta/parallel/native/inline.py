"""Statements made ready for loops: no dimensions of one, and cheap numbers computed again where they are read.

A number that is made of one other number of the same place (and of numbers that do not vary there) costs as much to
read as that other one. So it is computed where it is wanted, and need not be kept.
"""

from __future__ import annotations

import re
from typing import Any

from fmeta.parallel.native import shapes
from fmeta.parallel.native.ir import Address, Buffer, Const, Indirect, Map, Operand, Statement, View

WORDS = r"float|double|int64_t|int|bool|fm_max|fm_min|fm_abs"
CHEAP = re.compile(rf"^(?:[\s()+\-*<>=!?:&|,]|\{{\d\}}|\d+(?:\.\d+)?(?:e-?\d+)?|{WORDS})*$")
"""Code that takes a cycle or two."""
MOST = 6
"""Operations in a row that are computed again."""


def ready(statements: list[Statement]) -> list[list[Statement]]:
    """The same statements, squeezed, each after what it computes again: these share a loop."""
    writers: dict[Buffer, Map | None] = {}
    found: list[list[Statement]] = []
    for s in statements:
        again: list[Statement] = []
        if isinstance(s, Map):
            s = squeezed(s)
            home = s.out.buffer.scope, s.out.buffer.level
            if s.shared_loop():
                s.operands = [recomputed(x, s.shape, home, writers, again, MOST) for x in s.operands]
        found.append([*again, s])
        for b in s.writes():
            writers[b] = s if b not in writers and isinstance(s, Map) and cheap(s) else None
    return found


def cheap(s: Map) -> bool:
    """Whether a statement is better computed again than kept."""
    if (
        not all(isinstance(x, (View, Const)) for x in s.operands)
        or not CHEAP.match(s.code)
        or s.code == "{0}"
    ):
        return False
    views = [x for x in s.operands if isinstance(x, View)]
    whole = s.out.buffer.size == shapes.size(s.shape) and varies(s.out)
    steady = not any(x.buffer.changed for x in [s.out, *views])
    plain = s.kind == "store" and s.scatter is None and s.fresh
    return whole and steady and plain and sum(map(varies, views)) == 1


def varies(x: View) -> bool:
    """Whether a view has another number at every index."""
    return all(stride for n, stride in zip(x.shape, x.strides, strict=True) if n > 1)


def recomputed(
    x: Operand,
    shape: tuple[int, ...],
    home: tuple[str, int],
    writers: dict[Buffer, Map | None],
    again: list[Statement],
    most: int,
) -> Operand:
    """An operand, or a number of the loop itself in its place."""
    if not isinstance(x, View) or most == 0:
        return x
    source = writers.get(x.buffer)
    if source is None or x.shape != shape or source.shape != shape or not shapes.same(x, source.out):
        return x
    b = x.buffer
    if (b.scope, b.level) != home:
        return x
    copy = Buffer(b.dtype, b.size, b.scope, b.level)
    operands = [recomputed(o, shape, home, writers, again, most - 1) for o in source.operands]
    again.append(Map(source.out._replace(buffer=copy), shape, source.code, operands))
    return x._replace(buffer=copy)


def squeezed(s: Map) -> Map:
    """Without dimensions of one."""
    kept = [d for d, n in enumerate(s.shape) if n > 1]
    if len(kept) == len(s.shape):
        return s

    def cut(view: View) -> View:
        return View(
            view.buffer, tuple(view.shape[d] for d in kept), tuple(view.strides[d] for d in kept), view.offset
        )

    def one(x: Any) -> Any:
        if isinstance(x, (Indirect, Address)):
            return x._replace(view=cut(x.view))
        return cut(x) if isinstance(x, View) else x

    places = {d: i for i, d in enumerate(kept)}
    code = re.sub(
        r"\{d(\d+)\}", lambda m: f"{{d{places[int(m[1])]}}}" if int(m[1]) in places else "0", s.code
    )
    scatter = one(s.scatter) if s.scatter else None
    shape = tuple(s.shape[d] for d in kept)
    return Map(
        s.out if scatter else cut(s.out), shape, code, [one(x) for x in s.operands], s.kind, scatter, s.fresh
    )
