"""Writing to a traced graph: operations whose results know their shape and dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


class Writer:
    """Adds operations to a graph, each with the shape and dtype of its result in ``meta["like"]``."""

    def __init__(self, graph: fx.Graph) -> None:
        """Operations go where the graph's insertion point is."""
        self.graph = graph

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """One operation with one result."""
        node = self.graph.call_function(op, args, kwargs)
        out = op(*fx.map_arg(args, stand_in), **kwargs)
        node.meta["like"] = (out.shape, out.dtype)
        return node


def stand_in(node: fx.Node) -> torch.Tensor:
    """A tensor without values like the result of a node."""
    shape, dtype = node.meta["like"]
    return torch.empty(shape, dtype=dtype, device="meta")
