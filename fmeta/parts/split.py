"""A module cut in two: a trunk that nothing learned reaches, and the rest.

The trunk runs once for a picture, outside of every loop and derivative; the rest is what tasks adapt.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from fmeta.parts.select import Pattern, matches

SIZES = ("size", "dim", "numel", "shape", "device", "dtype", "ndim")


def split(module: nn.Module, learns: Pattern) -> tuple[nn.Module, nn.Module]:
    """Cut a module where its learned parameters begin: ``rest(trunk(x))`` is ``module(x)``.

    The trunk is everything that can be computed before any learned parameter is needed; run it once a picture
    (``fmeta.data.embedded`` keeps what it gives for a whole pool). The rest has the learned parameters under their
    own names; frozen ones behind the first learned one are in it too, with ``requires_grad=False``, so that
    ``functionalize(rest)`` gives the learned ones alone. The module itself is not changed.

    Where several tensors cross the cut, the trunk returns a tuple, which is what ``rest`` takes, whole or as
    several arguments.

    Args:
        module: any module that ``torch.fx`` can follow, in the mode (evaluation) that it shall have; parts without
            learned parameters are not looked into.
        learns: names of the parameters that are learned, see ``fmeta.select``: ``"fc"``,
            ``fmeta.last_blocks(params, 2)``, ``fmeta.norm_names(module)``, ``"*.lora_*"``.

    Raises:
        ValueError: if nothing is chosen, or the forward cannot be followed.

    >>> trunk, rest = split(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "2")
    >>> [name for name, _ in trunk.named_parameters()], [name for name, _ in rest.named_parameters()]
    (['0.weight', '0.bias'], ['2.weight', '2.bias'])
    """
    learned = set(matches(learns, [name for name, _ in module.named_parameters()]))
    module = copy.deepcopy(module)
    root = traced(module, learned)
    reached = set(depends(root.graph, learned))
    again = set(read_off(root.graph, reached))
    behind = [node for node in root.graph.nodes if node in reached | again]
    crossing = list(dict.fromkeys(n for node in behind for n in inputs(node, reached | again)))
    for node in list(crossing):
        others = set(crossing) - {node}
        chain = from_others(root, node, others)
        if others and chain is not None:
            again |= chain
            crossing.remove(node)
    trunk, rest = parts(root, reached | again, reached, crossing)
    for name, p in rest.named_parameters():
        if name not in learned:
            p.requires_grad = False
    known = set(module.modules())
    for part in (*trunk.modules(), *rest.modules()):
        part.training = part.training if part in known else module.training
    return trunk, rest


class Rest(fx.GraphModule):
    """Takes several arguments, or one tuple of them."""

    def __call__(self, *args: Any) -> Any:  # noqa: D102
        return super().__call__(*(args[0] if len(args) == 1 and isinstance(args[0], tuple) else args))


class Follower(fx.Tracer):
    """Looks into the parts that hold learned parameters, and into no others."""

    def __init__(self, learned: set[str]) -> None:
        """Names of what is learned."""
        super().__init__()
        self.learned = learned

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: D102
        inside = any(name.startswith(f"{module_qualified_name}.") for name in self.learned)
        single = not list(m.children()) and bool(list(m.parameters(recurse=False)))
        return not inside or single or super().is_leaf_module(m, module_qualified_name)


def traced(module: nn.Module, learned: set[str]) -> fx.GraphModule:
    """The module as a graph of its parts."""
    try:
        graph = Follower(learned).trace(module)
    except Exception as error:  # whatever a forward does on a stand-in for a tensor
        raise ValueError(
            f"split: the forward of {type(module).__name__} must be one that torch.fx can follow, but it failed "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). Write trunk and rest as two "
            "modules, nn.Sequential(trunk, rest) say."
        ) from error
    return fx.GraphModule(module, graph, type(module).__name__)


def depends(graph: fx.Graph, learned: set[str]) -> Iterator[fx.Node]:
    """Nodes that a learned parameter reaches, and the output."""
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        target = str(node.target)
        own = node.op in ("call_module", "get_attr") and any(
            name == target or name.startswith(f"{target}.") for name in learned
        )
        if own or node.op == "output" or any(n in reached for n in node.all_input_nodes):
            reached.add(node)
            yield node


def read_off(graph: fx.Graph, reached: set[fx.Node]) -> Iterator[fx.Node]:
    """Numbers that the rest reads off shapes in the trunk; it reads them again, since batches differ."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node not in reached and is_size(node) and any(u in reached or u in needed for u in node.users):
            needed.add(node)
            yield node


def from_others(root: fx.GraphModule, node: fx.Node, others: set[fx.Node]) -> set[fx.Node] | None:
    """The nodes that compute a node from others without any parameter; None where that cannot be done."""
    if node.op in ("placeholder", "get_attr") or has_parameters(root, node):
        return None
    chain = {node}
    for n in node.all_input_nodes:
        if n in others or n.op == "get_attr":
            continue
        before = from_others(root, n, others)
        if before is None:
            return None
        chain |= before
    return chain


def has_parameters(root: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a part of the module with numbers of its own."""
    if node.op != "call_module":
        return False
    part = root.get_submodule(str(node.target))
    return any(True for _ in part.parameters()) or any(True for _ in part.buffers())


def inputs(node: fx.Node, reached: set[fx.Node]) -> list[fx.Node]:
    """What a node of the rest takes from the trunk; constants of the module are in both."""
    return [n for n in node.all_input_nodes if n not in reached and n.op != "get_attr"]


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number that was read off a shape."""
    if node.op == "call_method" or (node.op == "call_function" and node.target is getattr):
        name = node.target if node.op == "call_method" else node.args[1]
        return name in SIZES
    plain = node.op == "call_function" and getattr(operator, getattr(node.target, "__name__", ""), None)
    return bool(plain) and bool(node.all_input_nodes) and all(map(is_size, node.all_input_nodes))


def parts(
    root: fx.GraphModule, behind: set[fx.Node], reached: set[fx.Node], crossing: list[fx.Node]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The two halves of a graph; what is behind the cut but not reached is in both."""
    first, second = fx.Graph(), fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in root.graph.nodes:
        if node not in reached and (node.op != "get_attr" or any(user not in reached for user in node.users)):
            known[node] = first.node_copy(node, lambda n: known[n])
    given = [known[node] for node in crossing]
    first.output(given[0] if len(given) == 1 else tuple(given))
    inside = {node: second.placeholder(f"features_{i}") for i, node in enumerate(crossing)}
    for node in root.graph.nodes:
        if node in behind or (node.op == "get_attr" and any(user in behind for user in node.users)):
            inside[node] = second.node_copy(node, lambda n: inside[n])
    name = type(root).__name__
    kind = Rest if len(crossing) > 1 else fx.GraphModule
    return fx.GraphModule(root, first, f"{name}Trunk"), kind(root, second, f"{name}Rest")
