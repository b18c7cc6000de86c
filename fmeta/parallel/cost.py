"""What a recorded function costs, by its operations alone: flops, bytes moved, bytes alive at once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from fmeta.parallel.program import NOTHING, FlatKernel, Instruction, Register, reads

aten = torch.ops.aten
Like = dict[Any, tuple[torch.Size, torch.dtype]]
"""Shape and dtype of every value, by its key: a node of a graph, or a register."""

ALIASES = (aten._unsafe_view, aten._reshape_alias)
"""Operations that return their input's memory and do not say so in their schema."""
CREATES = (aten.full, aten.zeros, aten.ones, aten.scalar_tensor, aten.arange, aten.eye)
LIKE = (aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten._to_copy)


CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)


class Cost(NamedTuple):
    """One call of a function. ``peak`` counts what lives beside its inputs, its results included."""

    flops: int  # of matrix products and convolutions; a multiplication and an addition are two
    moved: int  # bytes that go in and out
    peak: int  # bytes


class Built(NamedTuple):
    """A compiled function of a list of tensors, the structure of its result, what a call costs, and who made it."""

    run: FlatKernel
    out_spec: Any
    cost: Cost
    maker: str
    into: Callable[[list[Tensor], Sequence[Tensor | None]], list[Tensor]] | None = None
    """``run`` with memory for the first results, where it can take it."""


class Operation(NamedTuple):
    """One call, on values known by keys; ``inside`` is the ``Cost`` of a call that is itself a function."""

    call: Any
    args: Any
    kwargs: dict[str, Any]
    reads: tuple[Hashable, ...]
    writes: tuple[Hashable, ...]
    inside: Cost | None = None


def bytes_of(like: tuple[torch.Size, torch.dtype]) -> int:
    """The size of a tensor like this."""
    return like[0].numel() * like[1].itemsize


def cost_of_graph(graph: fx.Graph) -> Cost:
    """The cost of a traced graph once inductor has fused what it fuses."""
    like: Like = {node: node.meta["like"] for node in graph.nodes if node.meta.get("like")}
    operations = list(graph_operations(graph))
    results = tuple(graph.output_node().all_input_nodes)
    inputs = [like[node] for node in graph.nodes if node.op == "placeholder" and node.users]
    moved = sum(map(bytes_of, [*inputs, *(like[node] for node in results)]))
    return Cost(flops_of(operations, like), moved, peak_of(operations, like, results, fused=True))


def graph_operations(graph: fx.Graph) -> Iterator[Operation]:
    """The calls of a graph; what is taken out of a tuple of results is written by the call that made it."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        items = [user for user in node.users if user.target is operator.getitem]
        writes = tuple(items) if node.meta.get("like") is None else (node,)
        yield Operation(node.target, node.args, node.kwargs, tuple(node.all_input_nodes), writes)


def recorded_operations(found: list[Instruction], inside: dict[Any, Cost]) -> Iterator[Operation]:
    """The calls of a recording; ``inside`` has the costs of its kernels."""
    for one in found:
        writes = tuple(number for number in one.outputs if number != NOTHING)
        yield Operation(one.call, one.args, one.kwargs, tuple(reads(one)), writes, inside.get(one.call))


def flops_of(operations: list[Operation], like: Like) -> int:
    """Flops of the products and convolutions, by torch's own formulas."""
    total = 0
    for one in operations:
        if one.call in CONVOLUTIONS and one.inside is None:
            total += convolution_flops(one, like)
            continue
        count = flop_registry.get(getattr(one.call, "_overloadpacket", None))
        if one.inside is not None:
            total += one.inside.flops
        elif count is not None:
            stand_in = lambda key: torch.empty(like[key][0], dtype=like[key][1], device="meta")  # noqa: E731
            args, kwargs = substitute(one.args, stand_in), substitute(one.kwargs, stand_in)
            total += int(count(*args, **kwargs, out_val=one.call(*args, **kwargs)))
    return total


def convolution_flops(one: Operation, like: Like) -> int:
    """Flops of a convolution or of its derivatives, each as many; torch counts gradients of groups as if of one."""
    backward = one.call == aten.convolution_backward.default
    keys = [arg.number if isinstance(arg, Register) else arg for arg in one.args[:3]]
    y, x, w = keys if backward else (one.writes[0], *keys[:2])
    transposed, mask = (one.args[7], one.args[10]) if backward else (one.args[6], [True])
    places = like[x if transposed else y][0]
    return 2 * places.numel() * like[w][0][1:].numel() * sum(mask[:2])


def substitute(args: Any, make: Callable[[Any], Tensor]) -> Any:
    """Arguments with a tensor in place of every key."""
    if isinstance(args, (fx.Node, Register)):
        return make(args.number if isinstance(args, Register) else args)
    if isinstance(args, dict):
        return {name: substitute(value, make) for name, value in args.items()}
    return [substitute(value, make) for value in args] if isinstance(args, (list, tuple)) else args


def moved_by(operations: list[Operation], like: Like) -> int:
    """Bytes that go in and out of every call; a view moves none."""
    moving = [one for one in operations if not is_alias(one)]
    return sum(bytes_of(like[key]) for one in moving for key in (*one.reads, *one.writes))


def is_alias(one: Operation) -> bool:
    """Whether the result is memory of the first input: a view of it, or the input changed in place."""
    schema = getattr(one.call, "_schema", None)
    if schema is None or not one.reads or not schema.returns:
        return False
    return schema.returns[0].alias_info is not None or one.call._overloadpacket in ALIASES


def is_pointwise(one: Operation) -> bool:
    """Whether inductor computes it where it is read, without memory of its own."""
    packet = getattr(one.call, "_overloadpacket", None)
    return torch.Tag.pointwise in getattr(one.call, "tags", ()) or packet in (*CREATES, *LIKE)


def fuses(one: Operation) -> bool:
    """Whether a call reads its inputs as they are computed."""
    return is_pointwise(one) or torch.Tag.reduction in getattr(one.call, "tags", ())


def materialised(operations: list[Operation], results: tuple[Hashable, ...], fused: bool) -> set[Hashable]:
    """The values that take memory: all, or where pointwise work is fused those that somebody needs whole."""
    needed = set(results)
    for one in reversed(operations):
        if is_alias(one):
            needed.update(one.reads[:1] if needed.intersection(one.writes) else ())
        elif not fused or not fuses(one):
            needed.update(one.reads)
    made = [one for one in operations if not is_alias(one)]
    return {key for one in made for key in one.writes if not fused or key in needed or not is_pointwise(one)}


def peak_of(
    operations: list[Operation], like: Like, results: tuple[Hashable, ...], fused: bool = False
) -> int:
    """The most bytes alive at one time beside the inputs, where every value dies at its last use.

    What is computed where it is read keeps alive what it is computed from.
    """
    real = materialised(operations, results, fused)
    memory: dict[Hashable, frozenset[Hashable]] = {}
    last: dict[Hashable, int] = {}
    for index, one in enumerate(operations):
        behind = frozenset[Hashable]().union(*(memory.get(key, frozenset()) for key in one.reads))
        first = memory.get(one.reads[0], frozenset()) if one.reads else frozenset()
        for key in one.writes:
            memory[key] = frozenset([key]) if key in real else first if is_alias(one) else behind
        last.update(dict.fromkeys((*behind, *one.writes), index))
    for key in results:
        last.update(dict.fromkeys(memory.get(key, ()), len(operations)))
    ends: dict[int, list[Hashable]] = {}
    for key, index in last.items():
        if key in real:
            ends.setdefault(index, []).append(key)
    now = peak = 0
    for index, one in enumerate(operations):
        born = sum(bytes_of(like[key]) for key in one.writes if key in real)
        dead = sum(bytes_of(like[key]) for key in ends.get(index, ()))
        in_place = min(born, dead) if fused and is_pointwise(one) else 0
        peak = max(peak, now - in_place + max(born, one.inside.peak if one.inside else 0))
        now += born - dead
    return peak
