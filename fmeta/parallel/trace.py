"""A function of tensors as a flat ATen graph, the form that kernels are compiled from.

The function runs once, on copies of its arguments, under a recorder that sits below vmap, grad and jvp.
(``make_fx`` does the same in more general ways and takes about ten times as long, which is most of a warm
start.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fmeta import tree
from fmeta.functional import differentiable
from fmeta.parallel.program import NOTHING, Instruction, Recorder, Register


class Traced(NamedTuple):
    """A graph whose inputs are the flat arguments and then the tensors that the function had captured."""

    graph: fx.GraphModule
    out_spec: Any
    constants: list[Tensor]


def trace(
    fn: Callable[..., Any],
    flat: list[Tensor],
    spec: Any,
    simpler: dict[Any, Callable[..., Any]] | None = None,
) -> Traced:
    """Record ``fn`` on tensors like ``flat``.

    Captured tensors (buffers, a user's rate tensor) become inputs, so that they stay references and a
    change of their values is seen.
    """
    # A recorder takes two inputs that are one object for a single register, so every example is a copy.
    examples = [own_copy(x) for x in flat]
    with torch.no_grad(), Recorder(examples, simpler) as recorder, differentiable():
        result = fn(*tree.unflatten(examples, spec))
    leaves, out_spec = tree.flatten(result)
    constants = dict(recorder.captured)
    for leaf in leaves:
        if leaf not in recorder.registers:  # returned as it was captured
            constants[recorder.register(leaf)] = leaf
    graph, nodes = fx.Graph(), {}
    for number in [*range(recorder.inputs), *constants]:
        nodes[number] = graph.placeholder(f"input_{number}")
        nodes[number].meta["like"] = recorder.like[number]
    write(graph, nodes, recorder)
    graph.output([nodes[recorder.registers[leaf]] for leaf in leaves])
    graph.eliminate_dead_code()
    return Traced(fx.GraphModule({}, graph), out_spec, list(constants.values()))


def own_copy(x: Tensor) -> Tensor:
    """A copy that shares nothing with the original."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def write(graph: fx.Graph, nodes: dict[int, fx.Node], recorder: Recorder) -> None:
    """Add the recorded operations to a graph, each value computed once."""
    once = not any(one.call._schema.is_mutable for one in recorder.instructions)  # type: ignore[attr-defined]
    seen: dict[Hashable, fx.Node] = {}
    for one in recorder.instructions:
        args, kwargs = with_nodes(one.args, nodes), with_nodes(one.kwargs, nodes)
        key = (one.call, frozen(args), frozen(kwargs)) if once and not is_random(one) else object()
        if key not in seen:
            seen[key] = graph.call_function(one.call, args, kwargs)
            seen[key].meta["like"] = recorder.like[one.outputs[0]] if len(one.outputs) == 1 else None
        for index, number in enumerate(one.outputs):
            if number != NOTHING:
                nodes[number] = seen[key] if is_single(one) else item(graph, seen, seen[key], index)
                nodes[number].meta["like"] = recorder.like[number]


def item(graph: fx.Graph, seen: dict[Hashable, fx.Node], node: fx.Node, index: int) -> fx.Node:
    """One of several results of a node."""
    key = (operator.getitem, node, index)
    if key not in seen:
        seen[key] = graph.call_function(operator.getitem, (node, index))
    return seen[key]


def is_single(one: Instruction) -> bool:
    """Whether an operation returns a tensor, and not a tuple or list."""
    returns = one.call._schema.returns  # type: ignore[attr-defined]
    return len(returns) == 1 and isinstance(returns[0].type, torch.TensorType)


def is_random(one: Instruction) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in one.call.tags  # type: ignore[attr-defined]


def with_nodes(args: Any, nodes: dict[int, fx.Node]) -> Any:
    """Recorded arguments with nodes in place of registers."""
    if isinstance(args, Register):
        return nodes[args.number]
    if isinstance(args, dict):
        return {name: with_nodes(value, nodes) for name, value in args.items()}
    return type(args)([with_nodes(x, nodes) for x in args]) if isinstance(args, (list, tuple)) else args


def frozen(args: Any) -> Hashable:
    """Arguments as a key; 1, 1.0 and True are different."""
    if isinstance(args, dict):
        return tuple((name, frozen(value)) for name, value in sorted(args.items()))
    if isinstance(args, (list, tuple)):
        return tuple(map(frozen, args))
    return type(args), (args.hex() if isinstance(args, float) else args)
