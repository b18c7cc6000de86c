"""C++ for scheduled statements."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from fmeta.parallel.native.ir import NAMES, Buffer, Call, Grid, Loop, Section
from fmeta.parallel.native.loops import loop_text
from fmeta.parallel.native.lower import FIRST, Lowering
from fmeta.parallel.native.schedule import plan
from fmeta.parallel.native.text import Text, number

HEAD, SOLVERS = '#include "runtime.h"\n', '#include "solvers.h"\n'
LONG = '#if defined(__AVX512F__)\n#pragma GCC target("prefer-vector-width=512")\n#endif\n'
"""gcc takes vectors of 256 bits unless told otherwise."""
LANES, MANY = 16, 128
"""Numbers of the longest vector; loops of so many that the rest of the last vector does not count."""
COMBINE = {
    "sum": "a + b", "prod": "a * b", "all": "(a && b)", "any": "(a || b)", "max": "fm_max(a, b)", "min": "fm_min(a, b)",
}  # fmt: skip


class Emitter:
    """Writes ``int kernel(void** p, int64_t T, int threads)``, 1: an index out of bounds, 2: no memory."""

    def __init__(self, low: Lowering, apart: Collection[int] = ()) -> None:
        """Arguments are the inputs, then the results; those ``apart`` are tables of the places of each task."""
        self.low, self.plan, self.apart = low, plan(low), apart
        self.tables: dict[Grid, str] = {}
        self.body = Text()
        self.loops: list[tuple[int, int]] = []

    def text(self) -> str:
        """The whole file."""
        out, p = self.body, self.plan
        out('extern "C" int kernel(void** p, int64_t T, int threads) {')
        out("int bad = 0; (void)bad;")
        if p.shared_bytes:
            out(f"char* const shared = fm_scratch({p.shared_bytes}, 0);")
            out("if (!shared) return 2;")
        if p.persist_bytes:
            out(f"char* const persist = (char*)aligned_alloc(64, T * {p.persist_bytes});")
            out("if (!persist) return 2;")
        for section in p.sections:
            if section.scope == "shared":
                self.shared(section)
            else:
                self.tasks(section)
        if p.persist_bytes:
            out("free(persist);")
        out("return bad;")
        out("}")
        tables = "".join(table(name, grid) for grid, name in self.tables.items())
        return LONG * self.even() + HEAD + SOLVERS * self.solves() + tables + out.whole()

    def even(self) -> bool:
        """Whether nearly all loops are whole long vectors; others would leave a rest that goes number by number."""
        whole = sum(total for total, inner in self.loops if inner % LANES == 0 or inner >= MANY)
        return whole > 0.9 * sum(total for total, _ in self.loops)

    def solves(self) -> bool:
        """Whether a system of equations is solved, or a matrix factored."""
        calls = [s for s in self.low.statements if isinstance(s, Call)]
        return any(s.code.startswith("fm_") for s in calls)

    def shared(self, section: Section) -> None:
        """What is computed once."""
        if section.loops:
            self.body("{")
            self.pointers(section)
            for loop in section.loops:
                self.loop(loop, wide=True)
            self.body("}")

    def tasks(self, section: Section) -> None:
        """What is computed for every task, and the sums over them."""
        if not section.loops:
            return
        out, p = self.body, self.plan
        totals = [t for t in p.totals if t.partial.level == section.level]
        if totals:
            out(f"char* const parts{section.level} = (char*)aligned_alloc(64, threads * {p.partial_bytes});")
            out(f"if (!parts{section.level}) return 2;")
            out("int used = 1;")
        out("#pragma omp parallel num_threads(threads) if(threads > 1) reduction(|:bad)")
        out("{")
        out("const int n = fm_threads(), me = fm_thread();")
        if p.task_bytes:
            out(f"char* const own = fm_scratch({p.task_bytes}, 1);")
            out("if (!own) bad |= 2;")
        if totals:
            out(f"char* const part = parts{section.level} + me * {p.partial_bytes};")
            out("if (me == 0) used = n;")
        for t in totals:
            start = f"({NAMES[t.partial.dtype]}){number(FIRST[t.kind])}"
            out(f"fm_fill(part + {p.places[t.partial]}, {t.partial.size}, {start});")
        out("for (int64_t t = T * me / n; t < T * (me + 1) / n && bad < 2; t++) {")
        self.pointers(section)
        for loop in section.loops:
            self.loop(loop, wide=False)
        out("}")
        out("}")
        for t in totals:
            parts = f"parts{section.level} + {p.places[t.partial]}, {p.partial_bytes}, used"
            join = f"[](auto a, auto b) {{ return {COMBINE[t.kind]}; }}"
            out(f"fm_total({self.pointer(t.whole)}, {t.whole.size}, {parts}, {join});")
        if totals:
            out(f"free(parts{section.level});")

    def pointers(self, section: Section) -> None:
        """The memory of every buffer that a section touches."""
        for b in used(section):
            name = NAMES[b.dtype]
            if self.in_memory(b):
                self.body(f"{name}* const {self.name(b)} = {self.pointer(b)};")

    def in_memory(self, b: Buffer) -> bool:
        """Whether a buffer is ever stored."""
        return b.place != "scratch" or b in self.plan.places

    def pointer(self, b: Buffer) -> str:
        """C++ for the address of a buffer."""
        name, at = NAMES[b.dtype], self.plan.places.get(b, 0)
        if b.place == "argument":
            if self.index(b) in self.apart:
                return f"(({name}**)p[{self.index(b)}])[t]"
            base = f"({name}*)p[{self.index(b)}]"
            return f"{base} + t * {b.size}" if b.scope == "task" else base
        if b.place == "partial":
            return f"({name}*)(part + {at})"
        if b.place == "persist":
            return f"({name}*)(persist + t * {self.plan.persist_bytes} + {at})"
        return f"({name}*)({'own' if b.scope == 'task' else 'shared'} + {at})"

    def index(self, b: Buffer) -> int:
        """The number of an argument of the kernel."""
        if b in self.low.arguments:
            return self.low.arguments.index(b)
        return len(self.low.arguments) + [r for r, _ in self.low.results].index(b)

    def name(self, b: Buffer) -> str:
        """The name of a buffer."""
        return self.body.name(b)

    def loop(self, loop: Loop, wide: bool) -> None:
        """A loop, or a call."""
        first = loop.statements[0]
        if isinstance(first, Call):
            self.body(self.call(first))
        else:
            self.loops.append(loop_text(self.body, loop, wide))

    def call(self, call: Call) -> str:
        """A call of a template."""
        code = call.code
        named = [*zip("abc", call.ins, strict=False), *zip(("out", "out1"), call.outs, strict=False)]
        for key, view in named:
            code = code.replace(f"{{{key}}}", f"({self.name(view.buffer)} + {view.offset})")
        for i, numbers in enumerate(call.tables):
            code = code.replace(f"{{t{i}}}", self.tables.setdefault(numbers, f"t{len(self.tables)}"))
        return code


def table(name: str, grid: Grid) -> str:
    """C++ for the points of a grid."""
    sides = ", ".join(f"{n}, {step}" for n, step in grid.sides) or "0"
    return (
        f"static const int {name}s[] = {{{sides}}};\n"
        f"static const int* const {name} = fm_grid({grid.first}, {len(grid.sides)}, {name}s);\n"
    )


def used(section: Section) -> Iterator[Buffer]:
    """Buffers that a section touches, each once."""
    yield from dict.fromkeys(
        b for loop in section.loops for s in loop.statements for b in (*s.reads(), *s.writes())
    )
