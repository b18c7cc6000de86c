"""C++ of one loop nest: the order of its dimensions, what is loaded once, how reductions add up."""

from __future__ import annotations

import math
import re
from typing import Any

from fmeta.parallel.native.ir import Address, Const, Indirect, Loop, Map, View
from fmeta.parallel.native.known import Known
from fmeta.parallel.native.lower import FIRST
from fmeta.parallel.native.text import Text, local, number

WIDE = 32768
"""Numbers from which a loop that all tasks share is split among threads."""
ADD = {
    "sum": "{0} += {1};", "prod": "{0} *= {1};", "all": "{0} &= ({1} != 0);", "any": "{0} |= ({1} != 0);",
    "max": "{0} = fm_max({0}, {1});", "min": "{0} = fm_min({0}, {1});",
}  # fmt: skip
SIMD = {"sum": "+", "prod": "*", "all": "&", "any": "|"}


def strides_of(s: Map) -> list[tuple[int, ...]]:
    """Strides of everything that a statement touches."""
    found = [s.scatter.view.strides if s.scatter else s.out.strides]
    for x in s.operands:
        view = x.view if isinstance(x, (Indirect, Address)) else x
        if isinstance(view, View):
            found.append(view.strides)
    return found


class Nest:
    """One loop nest being written."""

    def __init__(self, text: Text, loop: Loop, wide: bool) -> None:
        """Find the order of dimensions."""
        self.text, self.loop, self.wide = text, loop, wide
        self.maps: list[Map] = loop.statements  # type: ignore[assignment]
        self.shape = self.maps[0].shape
        self.strides = [x for s in self.maps for x in strides_of(s)]
        self.reduces = [s for s in self.maps if s.kind != "store" and s.scatter is None]
        self.dims = self.order()
        self.loops = self.collapsed()
        self.loaded: dict[Any, str] = {}
        self.computed: dict[tuple[str, str], str] = {}
        self.known = Known()

    def order(self) -> list[int]:
        """Dimensions from the outermost to the innermost, which is the one with the most neighbours in memory."""
        dims = [d for d, n in enumerate(self.shape) if n > 1]
        if len(dims) < 2:
            return dims

        def cost(d: int) -> float:
            jumps = sum(4 * self.apart(x[d]) for x in self.strides)
            reduced = sum(1 for s in self.reduces if s.out.strides[d] == 0)
            return jumps + reduced + (6 if self.shape[d] < 4 else 0)

        inner = min(reversed(dims), key=cost)
        rest = [d for d in dims if d != inner]
        rest.sort(key=lambda d: -max(x[d] for x in self.strides))
        kept = [d for d in rest if not any(s.out.strides[d] == 0 for s in self.reduces)]
        return [*kept, *(d for d in rest if d not in kept), inner]

    @staticmethod
    def apart(stride: int) -> bool:
        """Whether neighbours in a dimension are not neighbours in memory."""
        return stride not in (0, 1)

    def collapsed(self) -> list[list[int]]:
        """Runs of dimensions that are one loop."""
        runs: list[list[int]] = []
        indexed = any("{d" in s.code for s in self.maps)
        for d in self.dims:
            before = runs[-1][-1] if runs else None
            flat = before is not None and all(x[before] == x[d] * self.shape[d] for x in self.strides)
            if flat and not indexed:
                runs[-1].append(d)
            else:
                runs.append([d])
        return runs

    def at(self, view: View) -> str:
        """The offset of the current number."""
        terms = [str(view.offset)] if view.offset else []
        for run in self.loops:
            stride = view.strides[run[-1]]
            if stride:
                terms.append(f"i{run[-1]}" if stride == 1 else f"i{run[-1]} * {stride}")
        return " + ".join(terms) or "0"

    def size(self, run: list[int]) -> int:
        """How often a loop runs."""
        return math.prod(self.shape[d] for d in run)

    def write(self) -> None:
        """The nest."""
        depth = {s: self.depth(s) for s in self.reduces}
        for s in self.reduces:
            if s.fresh and not self.anew(s):
                self.filled(s)
        total = math.prod(self.shape)
        serial = self.reduces or any(s.scatter for s in self.maps)
        for i, run in enumerate(self.loops):
            for s in self.reduces:
                if depth[s] == i:
                    self.text(f"{local(s.out.dtype)} {self.sum_of(s)} = {number(FIRST[s.kind])};")
            if i == 0 and self.wide and total >= WIDE and not serial:
                simd = " simd" if i == len(self.loops) - 1 else ""
                self.text(f"#pragma omp parallel for{simd} num_threads(threads) if(parallel: threads > 1)")
            elif i == len(self.loops) - 1:
                self.pragma(depth)
            name = f"i{run[-1]}"
            self.text(f"for (int {name} = 0; {name} < {self.size(run)}; {name}++) {{")
        inner = len(self.loops)
        for s in self.maps:
            self.statement(s, depth.get(s))
        for i in reversed(range(inner)):
            self.text("}")
            for s in self.reduces:
                if depth[s] == i:
                    self.finish(s)

    def depth(self, s: Map) -> int | None:
        """The loop from which on all are reduced, so that a sum need not be in memory; None if there is none."""
        kept = [i for i, run in enumerate(self.loops) if any(s.out.strides[d] for d in run)]
        first = kept[-1] + 1 if kept else 0
        return first if first < len(self.loops) else None

    def anew(self, s: Map) -> bool:
        """Whether the sums of a reduction come to memory once, and are the first that do."""
        depth = self.depth(s)
        reduced = [i for i, run in enumerate(self.loops) if not any(s.out.strides[d] for d in run)]
        return s.fresh and depth is not None and reduced == list(range(depth, len(self.loops)))

    def pragma(self, depth: dict[Map, int | None]) -> None:
        """What lets a compiler vectorise the innermost loop."""
        inside = [s for s in self.reduces if depth[s] is not None]
        if any(s.scatter for s in self.maps) or any(s.kind not in SIMD for s in inside):
            return
        if inside:
            clauses = " ".join(f"reduction({SIMD[s.kind]}:{self.sum_of(s)})" for s in inside)
            self.text(f"#pragma omp simd {clauses}")
        else:
            self.text("#pragma GCC ivdep")

    def sum_of(self, s: Map) -> str:
        """The name of a sum outside of memory."""
        return f"s{self.maps.index(s)}"

    def filled(self, s: Map) -> None:
        """A reduction in memory starts."""
        b = s.out.buffer
        self.text(f"for (int i = 0; i < {b.size}; i++) {self.text.name(b)}[i] = {number(FIRST[s.kind])};")

    def finish(self, s: Map) -> None:
        """A sum goes to memory."""
        place = f"{self.text.name(s.out.buffer)}[{self.at(s.out)}]"
        add = "{0} = {1};" if self.anew(s) else ADD[s.kind]
        self.text(add.format(place, self.sum_of(s)))

    def operand(self, x: Any, others: list[str]) -> str:
        """C++ for an operand."""
        if isinstance(x, Const):
            return number(x.value)
        if isinstance(x, Address):
            return f"({self.text.name(x.view.buffer)} + {self.at(x.view)})"
        if isinstance(x, Indirect):
            index = f"fm_index({others[x.operand]}, {x.size}, {str(x.wraps).lower()}, &bad)"
            return f"{self.text.name(x.view.buffer)}[{self.at(x.view)} + {index} * {x.stride}]"
        key = (x.buffer, *(self.at(x).split(" + ")))
        if key not in self.loaded:
            self.loaded[key] = f"v{len(self.loaded)}"
            self.text(
                f"const {local(x.dtype)} {self.loaded[key]} = {self.text.name(x.buffer)}[{self.at(x)}];"
            )
        return self.loaded[key]

    def statement(self, s: Map, depth: int | None) -> None:
        """One statement in the innermost loop."""
        operands: list[str] = []
        for x in s.operands:
            operands.append(self.operand(x, operands))
        code = re.sub(r"\{d(\d+)\}", lambda m: f"i{m[1]}" if self.shape[int(m[1])] > 1 else "0", s.code)
        code = re.sub(r"\{(\d+)\}", lambda m: operands[int(m[1])], code)
        kind = local(s.out.dtype)
        if s.scatter is not None:
            to = self.operand(s.scatter, operands)
            self.text(f"{to} = {code};" if s.kind == "store" else f"{to} += {code};")
        elif s.kind != "store":
            place = (
                self.sum_of(s) if depth is not None else f"{self.text.name(s.out.buffer)}[{self.at(s.out)}]"
            )
            self.text(ADD[s.kind].format(place, f"({kind})({code})"))
        else:
            name = self.computed.get((kind, code), f"v{len(self.loaded)}")
            self.loaded[s.out.buffer, *(self.at(s.out).split(" + "))] = name
            if (kind, code) not in self.computed:
                self.computed[kind, code] = name
                self.known.note(name, code)
                self.text(f"const {kind} {name} = {self.known.simpler(code)};")
            if s.out.buffer in self.loop.stored:
                self.text(f"{self.text.name(s.out.buffer)}[{self.at(s.out)}] = {name};")


def loop_text(text: Text, loop: Loop, wide: bool) -> tuple[int, int]:
    """Write a loop nest; returns how many numbers it goes through, and how many of them in its innermost loop."""
    text("{")
    first = loop.statements[0]
    total = inner = 0
    if isinstance(first, Map) and first.turns():
        transposed(text, first)
    else:
        nest = Nest(text, loop, wide)
        nest.write()
        total, inner = math.prod(nest.shape), nest.size(nest.loops[-1]) if nest.loops else 1
    text("}")
    return total, inner


def transposed(text: Text, s: Map) -> None:
    """A copy by the blocks of ``runtime.h``."""
    inner, outer = s.turns()  # type: ignore[misc]
    source: Any = s.operands[0]
    terms: tuple[list[str], list[str]] = ([str(source.offset)], [str(s.out.offset)])
    rest = [d for d, n in enumerate(s.shape) if n > 1 and d not in (inner, outer)]
    for d in rest:
        text(f"for (int i{d} = 0; i{d} < {s.shape[d]}; i{d}++) {{")
        for found, view in zip(terms, (source, s.out), strict=True):
            found.append(f"i{d} * {view.strides[d]}")
    sizes = s.shape[outer], s.shape[inner], source.strides[outer], s.out.strides[inner]
    places = [f"{text.name(v.buffer)} + {' + '.join(t)}" for v, t in zip((source, s.out), terms, strict=True)]
    m, n, ld, rs = sizes
    text(f"transpose({m}, {n}, {places[0]}, {ld}, {places[1]}, {rs});")
    text("}" * len(rest))
