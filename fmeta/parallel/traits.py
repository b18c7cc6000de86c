"""What an inner loop reads, found by handing it a value that may not be touched.

An engine saves work by it: a start that ignores the support set keeps the weights of step 0 shared by all
tasks, and a loss that ignores meta has no mixed derivative. Nobody has to declare it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from fmeta import tree
from fmeta.adapt import inner_step, support_gradient
from fmeta.types import InnerLoop, Task, Tree


class Traits(NamedTuple):
    """Which arguments the functions of an ``InnerLoop`` read; the defaults assume the worst."""

    start_reads_support: bool = True
    loss_reads_meta: bool = True
    inner_reads_meta: bool = True
    outer_reads_meta: bool = True
    update_is_a_shift: bool = False  # params + something that depends on the gradient alone; no state

    @property
    def step_reads_meta(self) -> bool:
        """Whether an inner step has a derivative to meta of its own."""
        return self.loss_reads_meta or self.inner_reads_meta


class Touched(Exception):
    """A function read the value that it was watched with."""


class Watched:
    """Stands for a value that a function may receive, measure and pass on, but not read."""

    def __init__(self, like: Tensor | None = None) -> None:
        """Answers for the shape, dtype and device of a tensor that it stands for."""
        object.__setattr__(self, "like", like)

    def __getattr__(self, name: str) -> Any:
        """Metadata is not a value."""
        like = object.__getattribute__(self, "like")
        if like is not None and name in ("shape", "dtype", "device", "ndim"):
            return getattr(like, name)
        raise Touched

    def refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Every way of looking inside ends here."""
        raise Touched

    __getitem__ = __iter__ = __len__ = __bool__ = __call__ = refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __neg__ = refuse


def reads(fn: Callable[[Any], Any], like: Tree | None = None) -> bool:
    """Whether ``fn`` looks at its argument, a tree like ``like``. Any failure counts as a look: the safe answer."""
    try:
        result = fn(Watched() if like is None else tree.map(Watched, like))
    except Exception:
        return True
    return any(isinstance(leaf, Watched) for leaf in tree.leaves(result))


def probe(loop: InnerLoop, meta: Tree, task: Task, k: Tensor) -> Traits:
    """Find the traits of a loop on one task; costs about two losses and one gradient of it."""
    params = loop.start(meta, task.support)
    start_reads_support = reads(lambda support: loop.start(meta, support))
    outer_reads_meta = reads(lambda m: loop.outer(params, m, task))
    if loop.steps == 0:
        return Traits(start_reads_support, False, False, outer_reads_meta)
    batch = task.support if loop.batches == "whole" else tree.select(task.support, 0)
    loss_reads_meta = reads(lambda m: loop.loss(params, m, batch, k))
    state = loop.inner(meta, k).init(params)
    grads, _ = support_gradient(loop, params, meta, batch, k)
    inner_reads_meta = reads(lambda m: inner_step(loop, k, grads, params, state, m))
    update = loop.inner(meta, k).update
    shift = (
        not inner_reads_meta
        and not tree.leaves(state)
        and not reads(lambda p: update(grads, state, p), params)
    )
    return Traits(start_reads_support, loss_reads_meta, inner_reads_meta, outer_reads_meta, shift)
