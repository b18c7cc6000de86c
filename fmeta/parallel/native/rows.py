"""Kernels over rows that lie anywhere in memory: blocks of a model's parameters, read and written where they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fmeta import tree
from fmeta.parallel.native.axis import Axes, axes_of
from fmeta.parallel.native.build import native


@dataclass(eq=False)
class Rows:
    """Rows of so many float32 numbers, which stands for a tensor ``[rows, length]`` in a call of ``by_rows``."""

    places: Tensor  # [rows], int64: where each begins
    length: int
    owners: Sequence[Tensor]
    """Whose memory it is: it stays as long as this does."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the tensor."""
        return len(self.places), self.length

    @property
    def dtype(self) -> torch.dtype:
        """That of the numbers."""
        return torch.float32

    def data_ptr(self) -> int:
        """What a kernel is given: the table of places."""
        return self.places.data_ptr()

    def example(self) -> Tensor:
        """A tensor of this shape."""
        return torch.zeros(1, self.length).expand(self.shape)


def by_rows(
    fn: Callable[..., Any], axes: Axes, args: tuple[Any, ...], results: Collection[int] = ()
) -> Callable[[list[Any], list[Any]], list[Any]]:
    """``vmap(fn, axes)`` compiled for arguments like these, where a tensor with tasks may be ``Rows``.

    Args:
        fn: of one row, of float32 tensors.
        axes: 0 for arguments that have rows, None for others.
        args: trees of tensors and ``Rows``; calls take others of the same shapes and as many rows, or more or fewer.
        results: numbers of the results, as ``fn`` returns them one by one, that are written to ``Rows``. These may
            be an argument's, where each number depends on others of its own place alone.

    Returns:
        ``(leaves, into) -> results``: leaves as ``tree.leaves(args)``; ``into`` has memory for the first results,
        None for new.

    Raises:
        Unsupported: where only inductor can compile ``fn``.
    """
    leaves = tree.leaves(args)
    apart = {i for i, x in enumerate(leaves) if isinstance(x, Rows)}
    examples = tree.map(lambda x: x.example() if isinstance(x, Rows) else x, args)
    flat, spec = tree.flatten(examples)
    with torch.no_grad():
        built = native(
            vmap(fn, axes), flat, spec, axes_of(examples, axes), apart | {len(flat) + i for i in results}
        )
    return built.into  # type: ignore[return-value]
