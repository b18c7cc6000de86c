"""A traced graph with the task axis found: what it does to one task, whatever their number.

The function is traced with two tasks and with three. What differs between the traces is proportional to their
number, so every shape and every size among the arguments is known as a multiple of it, and what is left is the
graph of one task.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fmeta import tree
from fmeta.parallel.native.ir import Unsupported
from fmeta.parallel.trace import Traced, trace

FEW, MORE = 2, 3
Axes = tuple[int | None, ...]
"""For every argument of a function the dimension of tasks in its leaves; None where it has none."""


class Times(NamedTuple):
    """A number that is a multiple of the number of tasks, or a share of it."""

    factor: float | int
    inverse: bool = False


@dataclass(eq=False)
class Op:
    """An operation on the numbers of one task. The dimension ``axis`` would hold all tasks, outermost in it."""

    name: str
    target: Any
    args: Any
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    axis: int | None
    dtype: torch.dtype
    results: dict[int, Op] = field(default_factory=dict)
    """Of an operation with several results."""
    users: int = 0

    @property
    def called(self) -> str:
        """``mul`` for ``aten.mul.Tensor``; nothing for the choice of one of several results."""
        schema = getattr(self.target, "_schema", None)
        return schema.name.split("::")[-1] if schema else ""


class OneTask(NamedTuple):
    """Graph of one task; constants are inputs after the arguments, or numbers that fill them."""

    ops: list[Op]
    inputs: list[Op]
    outputs: list[Op]
    fills: dict[Op, float]
    constants: list[Tensor]
    out_spec: Any


def examples(flat: list[Tensor], axes: list[int | None], count: int) -> list[Tensor]:
    """Arguments like these with ``count`` tasks."""
    found = []
    for x, axis in zip(flat, axes, strict=True):
        if axis is not None:
            rows = torch.arange(count, device=x.device) % x.shape[axis]
            x = x.index_select(axis, rows)
        found.append(x)
    return found


def one_task(fn: Callable[..., Any], flat: list[Tensor], spec: Any, axes: list[int | None]) -> OneTask:
    """Trace ``fn`` and find the graph of one task."""
    from fmeta.parallel.native.decompositions import table

    traces = [trace(fn, examples(flat, axes, n), spec, table()) for n in (FEW, MORE)]
    return Reader(*traces).read(len(flat))


class Reader:
    """Walks two traces of one function side by side."""

    def __init__(self, few: Traced, more: Traced) -> None:
        """Both must be the same operations in the same order."""
        self.few, self.more = few, more
        self.pairs = list(zip(few.graph.graph.nodes, more.graph.graph.nodes, strict=False))
        same = [(a.op == b.op and a.target == b.target) or a.op == "placeholder" for a, b in self.pairs]
        if len(few.graph.graph.nodes) != len(more.graph.graph.nodes) or not all(same):
            raise Unsupported("what is computed depends on the number of tasks")
        self.found: dict[fx.Node, Op] = {}

    def read(self, arguments: int) -> OneTask:
        """The graph of one task."""
        ops: list[Op] = []
        inputs: list[Op] = []
        outputs: list[Op] = []
        fills: dict[Op, float] = {}
        constants: list[Tensor] = []
        for a, b in self.pairs:
            if a.op == "output":
                outputs = [self.found[node] for node in a.args[0]]
                break
            args, kwargs = self.arguments(a.args, b.args), self.arguments(a.kwargs, b.kwargs)
            op = self.op(a, b, args, kwargs)
            if a.op != "placeholder":
                ops.append(op)
                continue
            if len(inputs) + len(fills) >= arguments:  # a tensor that the function had captured
                index = len(inputs) + len(fills) - arguments
                one, other = self.few.constants[index], self.more.constants[index]
                if one is not other and (one.shape != other.shape or not torch.equal(one, other)):
                    fills[op] = filled(one, other)
                    continue
                constants.append(one)
            inputs.append(op)
        return OneTask(ops, inputs, outputs, fills, constants, self.few.out_spec)

    def op(self, a: fx.Node, b: fx.Node, args: Any, kwargs: Any) -> Op:
        """One operation, and its place among the results of another."""
        like, other = a.meta.get("like"), b.meta.get("like")
        shape, axis = of_one_task(like[0], other[0]) if like and other else ((), None)
        op = Op(a.name, a.target, args, kwargs, shape, axis, like[1] if like else torch.float32)
        if a.op == "call_function" and getattr(a.target, "__name__", "") == "getitem":
            args[0].results[args[1]] = op
        self.found[a] = op
        return op

    def arguments(self, a: Any, b: Any) -> Any:
        """Arguments of the two traces as one."""
        if isinstance(a, fx.Node):
            self.found[a].users += 1
            return self.found[a]
        if isinstance(a, dict):
            return {name: self.arguments(value, b[name]) for name, value in a.items()}
        if isinstance(a, (list, tuple)):
            return [self.arguments(x, y) for x, y in zip(a, b, strict=True)]
        if isinstance(a, (int, float)) and not isinstance(a, bool) and a != b and not (a != a and b != b):
            return proportional(a, b)  # both may be NaN
        return a


def proportional(a: float, b: float) -> Times:
    """A number that grows or falls with the number of tasks."""
    if math.isclose(a * MORE, b * FEW, rel_tol=1e-12):
        return Times(a // FEW if isinstance(a, int) else a / FEW)
    if math.isclose(a * FEW, b * MORE, rel_tol=1e-12):
        return Times(a * FEW, inverse=True)
    raise Unsupported(f"a number that is {a} with two tasks and {b} with three")


def of_one_task(few: torch.Size, more: torch.Size) -> tuple[tuple[int, ...], int | None]:
    """A shape for one task, and the dimension of tasks."""
    differs = [d for d, (a, b) in enumerate(zip(few, more, strict=True)) if a != b]
    if len(differs) > 1 or any(few[d] % FEW or few[d] // FEW * MORE != more[d] for d in differs):
        raise Unsupported(f"a shape {tuple(few)} that has the tasks in more than one dimension")
    shape = tuple(n // FEW if d in differs else n for d, n in enumerate(few))
    return shape, (differs[0] if differs else None)


def filled(one: Tensor, other: Tensor) -> float:
    """The number that fills both tensors."""
    values = torch.cat([one.flatten(), other.flatten()]).unique()
    if values.numel() != 1:
        raise Unsupported("a captured tensor that depends on the number of tasks")
    return values.tolist()[0]


def axes_of(args: Any, axes: Axes | None) -> list[int | None]:
    """The dimension of tasks for every leaf."""
    if axes is None:
        return [None for _ in tree.leaves(args)]
    return [axis for arg, axis in zip(args, axes, strict=True) for _ in tree.leaves(arg)]
