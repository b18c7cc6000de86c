"""Adaptation as a file that torch alone can run: the graph of ``predict``, inner gradients written out.

``torch.export`` cannot follow torch.func's transforms, so the function is traced to plain operations first, as a
kernel is, and that graph is exported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmeta import tree
from fmeta.adapt import run
from fmeta.functional import differentiable
from fmeta.parallel.inspect import Record
from fmeta.parallel.trace import Traced, trace
from fmeta.types import Algorithm, Batch, Tree

CALL = "export"
RECORD = "fmeta.json"
"""The file's extra entry: shapes, and what the caller wants to know of it later."""


class Exported(NamedTuple):
    """A program of one task."""

    program: Any
    """``torch.export.ExportedProgram``: ``(support_x, support_y, query_x) -> outputs``."""
    operations: int
    """Calls of torch in it."""


def export_adaptation(
    algorithm: Algorithm,
    meta: Tree,
    support: Batch,
    x: Tree,
    file: str | Path | None = None,
    *,
    steps: int | None = None,
    before: Callable[[Tree], Tree] = lambda x: x,
    record: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a file that adapts to a support set and predicts, without fmeta's code.

    ``torch.export.load(file).module()(support_x, support_y, query_x)`` is ``algorithm.predict(meta, support, x)``,
    in any process that has torch. The meta-parameters are in the file. Shapes are fixed: as many support examples
    and queries as given here (labels differ freely).

    Args:
        algorithm: what adapts; its functions of one task.
        meta: learned parameters.
        support: a support set of one task, for its shapes.
        x: query inputs, for their shapes.
        file: where it goes, ``.pt2``; None writes nothing.
        steps: inner updates; as trained if None.
        before: comes before the algorithm, a frozen trunk say: ``support.x`` and ``x`` are what it takes.
        record: JSON values to keep in the file, under the extra entry ``fmeta.json``.

    Returns:
        The program, and how many operations it has.

    Raises:
        NotImplementedError: where the adaptation is not one fixed graph of torch's operations, saying why: it
            reads values, draws random numbers, or calls what cannot be traced.
    """

    def predict(support_x: Tree, support_y: Tensor, query_x: Tree) -> Tree:
        support = Batch(before(support_x), support_y)
        if steps is None:
            return algorithm.predict(meta, support, before(query_x))
        adapted = run(algorithm.inner_loop, meta, support, steps)
        return algorithm.predict(meta, adapted, before(query_x))

    inputs = (support.x, support.y, x)
    flat, spec = tree.flatten(inputs)
    try:
        with torch.no_grad(), Record() as seen, differentiable():
            predict(*inputs)  # one look: what a trace would take as constant is seen here alone
        refuse(seen)
        graph = trace(predict, flat, spec)
    except NotImplementedError:
        raise
    except Exception as error:
        raise NotImplementedError(
            f"{CALL}: the adaptation must be one graph of torch's operations, but tracing it failed "
            f"({first_line(error)}). Export the adapted model's weights instead."
        ) from error
    module = Standalone(graph, spec)
    with torch.no_grad():
        program = torch.export.export(module.eval(), inputs, strict=False)
    if file is not None:
        shapes = [[str(leaf.dtype).removeprefix("torch."), list(leaf.shape)] for leaf in flat]
        content = json.dumps({"inputs": shapes, **(record or {})})
        torch.export.save(program, file, extra_files={RECORD: content})
    return Exported(program, sum(node.op == "call_function" for node in graph.graph.graph.nodes))


class Standalone(nn.Module):
    """A traced graph with what it had captured as buffers."""

    def __init__(self, traced: Traced, spec: Any) -> None:
        """The graph takes flat arguments, then the captured tensors."""
        super().__init__()
        self.graph_module, self.out_spec, self.spec = traced.graph, traced.out_spec, spec
        for i, value in enumerate(traced.constants):
            self.register_buffer(f"constant_{i}", value.detach().clone())

    def forward(self, *inputs: Tree) -> Tree:  # noqa: D102
        constants = [getattr(self, name) for name, _ in self.named_buffers(recurse=False)]
        return tree.unflatten(self.graph_module(*tree.leaves(inputs), *constants), self.out_spec)


def refuse(record: Record) -> None:
    """Raise for what would not be the same graph for other values."""
    if record.reads:
        raise NotImplementedError(
            f"{CALL}: the adaptation must be one graph for all values, but it reads the value of a tensor. Use "
            "torch.where."
        )
    if record.random:
        raise NotImplementedError(
            f"{CALL}: the adaptation must draw no random numbers, but it calls {min(record.random)}. Call "
            "module.eval() before functionalize."
        )


def first_line(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
