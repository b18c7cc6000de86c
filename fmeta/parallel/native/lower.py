"""A graph of one task as statements. Views cost nothing, constants are folded, nothing is computed twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fmeta.parallel.native import shapes
from fmeta.parallel.native.axis import OneTask, Op, Times
from fmeta.parallel.native.ir import (
    NAMES,
    Address,
    Buffer,
    Const,
    Indirect,
    Map,
    Operand,
    Scope,
    Statement,
    Total,
    Unsupported,
    Value,
    View,
    contiguous,
)

FIRST = {"sum": 0, "prod": 1, "all": True, "any": False, "max": -math.inf, "min": math.inf}
"""What a reduction starts from."""


class Lowering:
    """Statements so far, and the value of every operation."""

    def __init__(self, graph: OneTask, rules: dict[str, Callable[[Lowering, Op], Any]]) -> None:
        """``rules`` lower operations by name."""
        self.graph, self.rules = graph, rules
        self.statements: list[Statement] = []
        self.totals: list[Total] = []
        self.values: dict[Op, Value] = {}
        self.known: dict[Any, Any] = {}
        self.flipped: set[Op] = set()  # matrices of which the transposed one is wanted
        self.arguments: list[Buffer] = []
        self.results: list[tuple[Buffer, View]] = []
        self.changing: set[Buffer] = set()  # memory that is written to in place, sooner or later
        self.relative: dict[Op, int] = {}
        """Indices into what all tasks have, as they are for the first task; and how many each task has."""
        self.flops: dict[Scope, int] = {"shared": 0, "task": 0}

    def run(self) -> Lowering:
        """Lower everything."""
        for op in self.graph.inputs:
            self.values[op] = self.argument(op)
        for op, number in self.graph.fills.items():
            self.values[op] = Const(number, op.shape, op.dtype)
        roots = shapes.changed_in_place(self.graph.ops)
        self.changing = {self.values[op].buffer for op in self.graph.inputs if op in roots}  # type: ignore[union-attr]
        wanted = shapes.needed(self.graph.ops, self.graph.outputs)
        self.flipped = shapes.flipped([op for op in self.graph.ops if op in wanted], self.graph.outputs)
        for op in self.graph.ops:
            if op in wanted:
                self.lower(op, roots)
        for op in self.graph.outputs:
            self.results.append(self.result(op))
        return self

    def lower(self, op: Op, roots: set[Op]) -> None:
        """One operation."""
        name = op.called
        if name == "":  # one of several results, set with the others
            if op not in self.values:
                raise Unsupported(f"a result of {op.args[0].target}")
            return
        if op.dtype not in NAMES:
            raise Unsupported(f"numbers of type {op.dtype}")
        if any(n == 0 for n in op.shape):
            raise Unsupported("an empty tensor")
        self.follow(op, name)
        if name not in self.rules:
            raise Unsupported(f"the operation {op.target}")
        value = self.rules[name](self, op)
        if isinstance(value, (View, Const)):
            self.values[op] = self.own(op, value, op in roots)
        for i, other in op.results.items():
            one = value[i]
            self.values[other] = one if name in shapes.VIEWS else self.own(other, one, other in roots)

    def own(self, op: Op, value: Value, changed: bool) -> Value:
        """A value, in memory of its own where torch's is its own and a later change in place would show."""
        inside = isinstance(value, View) and value.buffer in self.changing
        if (changed or inside) and op.called not in shapes.VIEWS and not shapes.writes(op.called):
            scope: Scope = (
                "shared" if op.axis is None else "task"
            )  # laid out as torch's most likely is, for views
            value = self.map("{0}", [value], op.shape, op.dtype, scope, object(), contiguous(op.shape))
        if changed and isinstance(value, View):
            self.changing.add(value.buffer)
        return value

    def follow(self, op: Op, name: str) -> None:
        """Indices of tasks one after the other may be added to others, and used as indices only."""
        given = {self.relative[x] for x in shapes.operands((op.args, op.kwargs)) if x in self.relative}
        if not given or name in ("index", "embedding", "embedding_dense_backward"):
            return
        if len(given) > 1 or name not in (*shapes.VIEWS, "add"):
            raise Unsupported("tasks numbered")
        self.relative[op] = given.pop()

    # -- values --

    def value(self, x: Any, like: Op | None = None) -> Value:
        """The value of an argument."""
        if isinstance(x, Op):
            return self.values[x]
        if isinstance(x, Times):
            code = f"({x.factor!r} / (double)T)" if x.inverse else f"({x.factor!r} * T)"
            return Const(code, (), torch.float64 if x.inverse or isinstance(x.factor, float) else torch.int64)
        dtype = {bool: torch.bool, int: torch.int64, float: torch.float64}.get(type(x))
        if dtype is None:
            raise Unsupported(f"an argument {x!r}")
        return Const(x, (), dtype)

    def argument(self, op: Op) -> Value:
        """A tensor that the kernel is given; its dimension of tasks is outermost in memory."""
        if op.dtype not in NAMES:
            raise Unsupported(f"numbers of type {op.dtype}")
        scope: Scope = "shared" if op.axis is None else "task"
        buffer = Buffer(op.dtype, math.prod(op.shape), scope, 0, "argument")
        self.arguments.append(buffer)
        return shapes.tasks_first(buffer, op.shape, op.axis)

    def result(self, op: Op) -> tuple[Buffer, View]:
        """The memory of a result, and the value as it is laid out there."""
        value, scope = self.values[op], "shared" if op.axis is None else "task"
        if isinstance(value, View):
            b = value.buffer
            own = b.place == "scratch" and b.scope == scope and b.size == math.prod(op.shape)
            whole = Buffer(op.dtype, b.size, b.scope, b.level)
            if own and shapes.same(value, shapes.tasks_first(whole, op.shape, op.axis)):
                b.place = "argument"
                return b, value
        if scope == "shared" and isinstance(value, View) and value.buffer.scope == "task":
            raise Unsupported("a result of one task where one of all was expected")
        buffer = Buffer(op.dtype, math.prod(op.shape), "task" if scope == "task" else "shared", 0, "argument")
        out = shapes.tasks_first(buffer, op.shape, op.axis)
        if isinstance(value, View):
            buffer.level = self.need(value, value.buffer.level).buffer.level
        self.statements.append(Map(out, op.shape, "{0}", [shapes.expand(value, op.shape)]))
        return buffer, out

    def need(self, view: View, level: int) -> View:
        """A view that is read in the loop of ``level``: of an earlier loop, it must outlive the task."""
        b = view.buffer
        if b.scope == "task" and b.level < level and b.place == "scratch":
            b.place = "persist"
        return view

    def place(self, values: Sequence[Value], scope: Scope = "shared") -> tuple[Scope, int]:
        """Where something that reads these values is computed."""
        views = [v for v in values if isinstance(v, View)]
        level = max((v.buffer.level for v in views), default=0)
        tasks = scope == "task" or any(v.buffer.scope == "task" for v in views)
        for view in views:
            self.need(view, level)
        return ("task" if tasks else "shared"), level

    def count(self, flops: int, values: Sequence[Value]) -> None:
        """Note what a product costs."""
        self.flops[self.place(values)[0]] += flops

    # -- statements --

    def map(
        self,
        code: str,
        operands: Sequence[Operand],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        scope: Scope = "shared",
        key: Any = None,
        strides: tuple[int, ...] | None = None,
    ) -> View:
        """A new value computed number by number; what is the same along a dimension is computed once for it."""
        given = [self.over(x, shape) for x in operands]
        if code != "{0}" and strides is None and "{d" not in code:
            narrow = shapes.varying(given, shape)
            if narrow != shape:
                cut = [shapes.narrowed(x, narrow) for x in given]
                return shapes.expand(self.map(code, cut, narrow, dtype, scope, key), shape)  # type: ignore[return-value]
        name = ("map", code, tuple(map(shapes.identity, given)), shape, dtype, scope, strides, key)
        if name not in self.known:
            views = [x.view if isinstance(x, (Indirect, Address)) else x for x in given]
            buffer = Buffer(dtype, math.prod(shape), *self.place(views, scope))
            strides = strides or shapes.laid_out_like(shape, views)
            if code != "{0}":  # what lies across the result is turned first
                given = [self.turned(x, shape, strides) for x in given]
            self.known[name] = View(buffer, shape, strides)
            self.statements.append(Map(self.known[name], shape, code, given))
        return self.known[name]

    def over(self, x: Any, shape: tuple[int, ...]) -> Any:
        """An operand stretched over a shape."""
        return x if isinstance(x, (Indirect, Address)) else shapes.expand(x, shape)

    def turned(self, x: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """An operand laid out like the result."""
        whole = isinstance(x, View) and all(s for n, s in zip(shape, x.strides, strict=True) if n > 1)
        if not whole or not Map(View(x.buffer, shape, strides), shape, "{0}", [x]).turns():
            return x
        return self.copied(x, strides)

    def reduce(
        self, kind: str, code: str, operands: Sequence[Operand], shape: tuple[int, ...],
        dims: Sequence[int], dtype: torch.dtype, tasks: bool, strides: tuple[int, ...] | None = None,
    ) -> View:  # fmt: skip
        """Reduce over dimensions, which stay as ones; with ``tasks`` over all tasks too."""
        given = [self.over(x, shape) for x in operands]
        kept = tuple(1 if d in dims else n for d, n in enumerate(shape))
        seen = tuple(map(shapes.identity, given))
        name = ("reduce", kind, code, seen, shape, tuple(dims), dtype, tasks, strides)
        if name in self.known:
            return self.known[name]
        views = [x.view if isinstance(x, (Indirect, Address)) else x for x in given]
        scope, level = self.place(views, "task" if tasks else "shared")
        strides = strides or shapes.laid_out_like(kept, [shapes.narrowed(v, kept) for v in views])
        out, result = self.target(kind, kept, strides, dtype, scope, level, tasks)
        across = tuple(0 if d in dims else s for d, s in enumerate(out.strides))
        within = out._replace(shape=shape, strides=across)
        self.statements.append(Map(within, shape, code, given, kind, fresh=not tasks))
        self.known[name] = result
        return result

    def target(
        self, kind: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, scope: Scope,
        level: int, tasks: bool,
    ) -> tuple[View, View]:  # fmt: skip
        """What a task writes to, and where the result is found: the same, unless it is a sum over tasks."""
        size = math.prod(shape)
        if not tasks:
            out = View(Buffer(dtype, size, scope, level), shape, strides)
            return out, out
        part, whole = Buffer(dtype, size, "task", level, "partial"), Buffer(dtype, size, "shared", level + 1)
        self.totals.append(Total(part, whole, kind))
        return View(part, shape, strides), View(whole, shape, strides)

    def copied(self, value: Value, strides: tuple[int, ...] | None = None) -> View:
        """The same numbers in memory of their own."""
        return self.map("{0}", [value], value.shape, value.dtype, strides=strides or contiguous(value.shape))
