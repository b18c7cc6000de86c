"""Convolutions as matrix products, where these are faster.

Weights that differ from task to task make vmap write one convolution with a group for every task, which
libraries run slowly, and small convolutions of any kind cost a library more than the work. Here the patches of
the input are laid out as rows, ``[task, rows, taps]`` with a row for every image and output position and a
column for every kernel position and channel, and the convolution and both its derivatives are one batched
product each. Images are channels last throughout; what lays them out fuses with what computes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import fx

from fmeta.parallel.graphs import Writer

aten = torch.ops.aten
Kind = Literal["output", "input", "weight"]
"""Of the convolution itself, and of its derivatives to the input and the weight."""
LARGEST = 2**28
"""Bytes of patches above which a convolution stays as it is."""


class Geometry(NamedTuple):
    """A convolution in two dimensions without dilation; groups, of tasks or a module's own, are ``tasks``."""

    tasks: int
    shots: int
    size: tuple[int, int]  # of the input
    channels: int  # of a group
    filters: int  # of a group
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def positions(self) -> tuple[int, int]:
        """Height and width of the output."""
        sizes = zip(self.size, self.padding, self.kernel, self.stride, strict=True)
        h, w = ((n + 2 * p - k) // s + 1 for n, p, k, s in sizes)
        return h, w

    @property
    def rows(self) -> int:
        """Rows of the products."""
        return self.shots * math.prod(self.positions)

    @property
    def taps(self) -> int:
        """Columns of the patches."""
        return math.prod(self.kernel) * self.channels


def geometry(x: fx.Node, w: fx.Node, settings: Any) -> Geometry | None:
    """The geometry of a convolution; None where it cannot be written as products here."""
    stride, padding, dilation, transposed, _, groups = settings
    (shape, dtype), (weights, _) = x.meta["like"], w.meta["like"]
    if len(shape) != 4 or transposed or any(d != 1 for d in dilation):
        return None
    two = lambda v: (v[0], v[-1])  # noqa: E731
    found = Geometry(
        groups, shape[0], (shape[2], shape[3]), shape[1] // groups,
        weights[0] // groups, (weights[2], weights[3]), two(stride), two(padding),
    )  # fmt: skip
    return found if found.tasks * found.rows * found.taps * dtype.itemsize <= LARGEST else None


def by_task(write: Writer, x: fx.Node, g: Geometry, channels: int, size: tuple[int, int]) -> fx.Node:
    """``[shots, task * channels, h, w] -> [task, shots, h, w, channels]``."""
    x = write(aten.reshape.default, x, [g.shots, g.tasks, channels, *size])
    return write(aten.permute.default, x, [1, 0, 3, 4, 2])


def from_task(write: Writer, x: fx.Node, g: Geometry, channels: int, size: tuple[int, int]) -> fx.Node:
    """``[task, shots, h, w, channels] -> [shots, task * channels, h, w]``."""
    x = write(aten.permute.default, x, [1, 0, 4, 2, 3])
    return write(aten.reshape.default, x, [g.shots, g.tasks * channels, *size])


def laid_out(write: Writer, x: fx.Node, tasks: int, rows: int, columns: int) -> fx.Node:
    """A copy in the order of x's dimensions, as ``[tasks, rows, columns]``.

    As a stride over memory, and not as a view, which inductor would compute with divisions for every element.
    """
    x = write(aten.clone.default, x, memory_format=torch.contiguous_format)
    return write(aten.as_strided.default, x, [tasks, rows, columns], [rows * columns, columns, 1], 0)


def patches(write: Writer, x: fx.Node, g: Geometry) -> fx.Node:
    """``[task, rows, taps]``: the inputs of every output position, kernel position by kernel position."""
    (ph, pw), (kh, kw), (sh, sw) = g.padding, g.kernel, g.stride
    x = write(aten.constant_pad_nd.default, by_task(write, x, g, g.channels, g.size), [0, 0, pw, pw, ph, ph])
    x = write(aten.unfold.default, write(aten.unfold.default, x, 2, kh, sh), 3, kw, sw)
    return laid_out(write, write(aten.permute.default, x, [0, 1, 2, 3, 5, 6, 4]), g.tasks, g.rows, g.taps)


def filters(write: Writer, w: fx.Node, g: Geometry) -> fx.Node:
    """``[task, filters, taps]``."""
    w = write(aten.reshape.default, w, [g.tasks, g.filters, g.channels, *g.kernel])
    return laid_out(write, write(aten.permute.default, w, [0, 1, 3, 4, 2]), g.tasks, g.filters, g.taps)


def outputs(write: Writer, y: fx.Node, g: Geometry) -> fx.Node:
    """``[task, rows, filters]`` of something like the output."""
    return laid_out(write, by_task(write, y, g, g.filters, g.positions), g.tasks, g.rows, g.filters)


def output(write: Writer, x: fx.Node, w: fx.Node, g: Geometry) -> fx.Node:
    """The convolution."""
    y = write(aten.bmm.default, patches(write, x, g), write(aten.transpose.int, filters(write, w, g), 1, 2))
    y = write(aten.reshape.default, y, [g.tasks, g.shots, *g.positions, g.filters])
    return from_task(write, y, g, g.filters, g.positions)


def weight_gradient(write: Writer, ct: fx.Node, x: fx.Node, g: Geometry) -> fx.Node:
    """The derivative to the weight."""
    d = write(aten.bmm.default, write(aten.transpose.int, outputs(write, ct, g), 1, 2), patches(write, x, g))
    d = write(aten.reshape.default, d, [g.tasks, g.filters, *g.kernel, g.channels])
    d = write(aten.permute.default, d, [0, 1, 4, 2, 3])
    return write(aten.reshape.default, d, [g.tasks * g.filters, g.channels, *g.kernel])


def input_gradient(write: Writer, ct: fx.Node, w: fx.Node, g: Geometry) -> fx.Node:
    """The derivative to the input: patches added where they came from.

    An input at ``stride * q + r`` is in the patches of positions ``q - m`` at the kernel positions
    ``r + m * stride``, so every remainder r has a sum of its own and nothing is scattered.
    """
    d = write(aten.bmm.default, outputs(write, ct, g), filters(write, w, g))
    d = write(aten.reshape.default, d, [g.tasks, g.shots, *g.positions, *g.kernel, g.channels])
    (kh, kw), (sh, sw), (oh, ow), (ph, pw) = g.kernel, g.stride, g.positions, g.padding
    high, wide = (kh - 1) // sh, (kw - 1) // sw  # how many positions a patch reaches back

    def remainder(i: int, j: int) -> fx.Node:
        total: fx.Node | None = None
        for m, a in enumerate(range(i, kh, sh)):
            for n, b in enumerate(range(j, kw, sw)):
                part = write(aten.select.int, write(aten.select.int, d, 4, a), 4, b)
                part = write(aten.constant_pad_nd.default, part, [0, 0, n, wide - n, m, high - m])
                total = part if total is None else write(aten.add.Tensor, total, part)
        if total is None:  # a stride beyond the kernel leaves these inputs out
            shape = [g.tasks, g.shots, oh + high, ow + wide, g.channels]
            total = write(aten.new_zeros.default, d, shape)
        return total

    every = write(aten.stack.default, [remainder(i, j) for i in range(sh) for j in range(sw)], 3)
    every = write(aten.reshape.default, every, [g.tasks, g.shots, oh + high, sh, sw, ow + wide, g.channels])
    every = write(aten.permute.default, every, [0, 1, 2, 3, 5, 4, 6])
    height, width = (oh + high) * sh, (ow + wide) * sw
    d = write(aten.reshape.default, every, [g.tasks, g.shots, height, width, g.channels])
    crop = [0, 0, -pw, g.size[1] + pw - width, -ph, g.size[0] + ph - height]
    return from_task(write, write(aten.constant_pad_nd.default, d, crop), g, g.channels, g.size)


Wanted = Callable[[Kind, Geometry, torch.dtype], bool]


def as_products(graph: fx.Graph, wanted: Wanted) -> tuple[int, int]:
    """Rewrite the convolutions that are ``wanted`` as products; how many became products, and how many stayed."""
    found = [rewritten(graph, node, wanted) for node in list(graph.nodes) if node.target in REWRITES]
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # the memory behind it may now be in another order
    return sum(one for one, _ in found), sum(other for _, other in found)


def rewritten(graph: fx.Graph, node: fx.Node, wanted: Wanted) -> tuple[int, int]:
    """Rewrite the results of one node."""
    with graph.inserting_before(node):
        return REWRITES[node.target](Writer(graph), node, wanted)


def rewrite_output(write: Writer, node: fx.Node, wanted: Wanted) -> tuple[int, int]:
    """A convolution; a bias is added to the product."""
    arguments: Any = node.args
    x, w, bias, *settings = arguments
    g = geometry(x, w, settings)
    if g is None or not wanted("output", g, x.meta["like"][1]):
        return 0, 1
    y = output(write, x, w, g)
    if bias is not None:
        y = write(aten.add.Tensor, y, write(aten.reshape.default, bias, [1, -1, 1, 1]))
    node.replace_all_uses_with(y)
    return 1, 0


def rewrite_gradients(write: Writer, node: fx.Node, wanted: Wanted) -> tuple[int, int]:
    """The derivatives of a convolution, each of which may become a product or stay."""
    arguments: Any = node.args
    ct, x, w, _, *settings = arguments[:-1]
    g, dtype = geometry(x, w, settings), x.meta["like"][1]
    done = 0
    for item in list(node.users):
        index: Any = item.args[1]
        if index == 2 and g is not None:
            item.replace_all_uses_with(write(aten.sum.dim_IntList, ct, [0, 2, 3]))
        elif g is not None and index == 0 and wanted("input", g, dtype):
            item.replace_all_uses_with(input_gradient(write, ct, w, g))
        elif g is not None and index == 1 and wanted("weight", g, dtype):
            item.replace_all_uses_with(weight_gradient(write, ct, x, g))
        else:
            continue
        done += int(index != 2)
        write.graph.erase_node(item)
    left = {item.args[1] for item in node.users}
    node.args = (*node.args[:-1], [index in left for index in range(3)])
    return done, len(left)


REWRITES: dict[Any, Callable[[Writer, fx.Node, Wanted], tuple[int, int]]] = {
    aten.convolution.default: rewrite_output,
    aten.convolution_backward.default: rewrite_gradients,
}
