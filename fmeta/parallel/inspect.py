"""One look at a loss before it is mapped and compiled, once for every combination of shapes.

The functions of one task run eagerly on the two tasks with the extreme labels, so that a user's mistake
shows as the error of a plain function call. Operations are recorded on the way: what torch would silently
differentiate wrongly is refused by name, random operations decide how the loss may be run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fmeta import tree
from fmeta.adapt import batch_of_step
from fmeta.functional import differentiable
from fmeta.functional.linalg import WRONG_REVERSE_OVER_FORWARD
from fmeta.functional.norms import NATIVE_NORMS
from fmeta.functional.purity import version
from fmeta.losses import checked, checking_labels, fault, with_metrics
from fmeta.types import Batch, InnerLoop, Plan, Task, Tree


class Record(TorchDispatchMode):
    """Names of the operations under it that are random, read values, or have derivatives not to be trusted."""

    def __init__(self) -> None:
        """Nothing seen so far."""
        super().__init__()
        self.random: set[str] = set()
        self.norms: set[str] = set()
        self.reads: set[str] = set()
        self.mixed: set[str] = set()
        self.flops = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operation and run it."""
        name = func._schema.name.removeprefix("aten::")
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random.add(name)
        if name in NATIVE_NORMS:
            self.norms.add(name)
        if name in WRONG_REVERSE_OVER_FORWARD:
            self.mixed.add(name)
        if name == "_local_scalar_dense":
            self.reads.add(name)
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.flops += count(*args, **(kwargs or {}), out_val=out) if count else 0
        self.bytes += sum(leaf.nbytes for leaf in tree.leaves(out) if isinstance(leaf, Tensor))
        return out


class Found(NamedTuple):
    """What a look at a loss tells about how it may be run."""

    random: bool
    captures: bool  # something the caller differentiates reaches the loop through a closure
    flops: int = 0  # of matrix products and convolutions, in one support loss and one query loss of one task
    bytes: int = 0  # of all that these compute


def inspect(call: str, loop: InnerLoop, plan: Plan, meta: Tree, tasks: Task, shaped: bool = False) -> Found:
    """Run one task's functions eagerly and check what they do; ``shaped`` metrics may have dimensions."""
    record, captures = Record(), False
    check_steps(call, loop, tasks)
    meta = tree.map(own, meta)
    chosen = extreme_tasks(tasks)
    for task in chosen:
        versions = [(name, leaf, version(leaf)) for name, leaf in tree.paths((meta, task))]
        with torch.random.fork_rng(), differentiable():
            with checking_labels(), explained(call, meta, task):
                captures = evaluate(call, loop, meta, task, shaped) or captures
            with record, torch.no_grad():
                evaluate(call, loop, meta, task, shaped)
        for name, leaf, before in versions:
            if version(leaf) != before:
                raise ValueError(
                    f"{call}: a loss must not change its inputs, got an in-place operation on a tensor of "
                    f"shape {tuple(leaf.shape)} ({name}). Write x = x + y instead of x += y."
                )
    refuse(call, plan, record)
    return Found(bool(record.random), captures, record.flops // len(chosen), record.bytes // len(chosen))


def evaluate(call: str, loop: InnerLoop, meta: Tree, task: Task, shaped: bool) -> bool:
    """Call the functions of one task once, checking what they return; whether that has an autograd graph."""
    k = torch.zeros((), dtype=torch.int64, device=tree.device(meta, task))
    params = loop.start(meta, task.support)
    outer = loop.outer(params, meta, task)
    losses: dict[str, Any] = {"the query loss": outer[0] if shaped else outer}
    results: list[Tree] = [losses, outer]
    if loop.steps:
        losses["the support loss"] = loop.loss(params, meta, batch_of_step(loop, task.support, 0), k)
        rule = loop.inner(meta, k)
        results.append(rule.update(tree.zeros_like(params), rule.init(params), params))
    wrong = [what for what, value in losses.items() if fault(value)]
    for what in wrong[:1]:
        checked(call, losses[what], what if len(wrong) < len(losses) else "the loss")
    for name in with_metrics(losses["the query loss"])[1]:
        if name in SUMMARY:
            raise ValueError(
                f"{call}: a metric must not be named {name!r}, got one. fmeta reports by that name whether "
                "numbers are finite; use another."
            )
    return any(leaf.requires_grad for leaf in tree.leaves(results))


SUMMARY = ("finite", "first_bad")
"""What ``meta_grad`` reports beside the metrics of a loss."""


def check_steps(call: str, loop: InnerLoop, tasks: Task) -> None:
    """Refuse a support set of one batch where every inner step is to have its own."""
    support, query = tree.paths(tasks.support), tree.paths(tasks.query)
    alike = [(name, leaf.dim()) for name, leaf in support] == [(name, leaf.dim()) for name, leaf in query]
    if loop.batches == "per_step" and support and alike:
        name, leaf = support[0]
        raise ValueError(
            f"{call}: batches='per_step' takes support leaves [task, steps, shots, ...], got support.{name} of "
            f"shape {tuple(leaf.shape)}, without a dimension more than query.{name}. Stack a batch for each "
            "step, or use batches='whole'."
        )


@contextlib.contextmanager
def explained(call: str, meta: Tree, task: Task) -> Iterator[None]:
    """Where a loss fails on a task whose shapes or types are no task's, say so; any other error passes."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        reason = odd_shapes(task) or ("type" in str(error) and odd_types(meta, task)) or None
        if reason is None:
            raise
        raise ValueError(f"{call}: the loss failed ({error}) on {reason}") from error


def odd_shapes(task: Task) -> str | None:
    """What is unusual about the shapes of one task, and what to do; None if nothing is."""
    for name, leaf in tree.paths(task):
        if leaf.dim() == 0:
            return (
                f"a task in which {name} is a single number. Every leaf of tasks needs a leading task axis and "
                "then one for its examples; for a single task, tasks.support.x[None] say."
            )
    for part, batch in zip(task._fields, task, strict=True):
        y = batch.y
        if isinstance(y, Tensor) and y.dim() == 1 and not y.is_floating_point():
            sizes = {len(leaf) for leaf in tree.leaves(batch.x)}
            if sizes and len(y) not in sizes:
                return (
                    f"a task whose {part}.x has {max(sizes)} examples but {part}.y has {len(y)}. Give every "
                    "example one label."
                )
    return None


def odd_types(meta: Tree, task: Task) -> str | None:
    """The first leaf of a task in a floating-point type that nothing of meta has; None if there is none."""
    known = {
        leaf.dtype for leaf in tree.leaves(meta) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    for name, leaf in tree.paths(task):
        if known and leaf.is_floating_point() and leaf.dtype not in known:
            own = str(min(known, key=str)).removeprefix("torch.")
            return (
                f"a task in which {name} is {str(leaf.dtype).removeprefix('torch.')}, where meta is {own}. Give both "
                f"one type, by {name}.to(torch.{own}) say."
            )
    return None


def refuse(call: str, plan: Plan, record: Record) -> None:
    """Raise for what cannot be done right, or not under this plan."""
    if record.norms:
        raise NotImplementedError(
            f"{call}: the loss calls torch.ops.aten.{min(record.norms)}, whose second derivative torch gets "
            "wrong without a message. Call layer_norm or batch_norm of torch.nn.functional; fmeta rewrites those."
        )
    if record.mixed and plan.engine == "adjoint":
        raise NotImplementedError(
            f"{call}: the loss calls torch.ops.aten.{min(record.mixed)}, whose reverse-over-forward derivative "
            'torch gets wrong without a message, got engine="adjoint". Use Plan(engine="nested"), or '
            "torch.linalg.solve and slogdet, which fmeta rewrites."
        )
    if record.reads and plan.engine != "autograd":
        raise ValueError(
            f"{call}: the loss reads the value of a tensor (.item(), bool(), or an `if` on a tensor), which "
            'cannot be batched over tasks. Use torch.where, or Plan(engine="autograd", tasks="loop").'
        )
    if record.random and plan.randomness == "error":
        raise ValueError(
            f"{call}: the loss calls the random operation {min(record.random)}, got Plan(randomness='error'). "
            "Call module.eval() before functionalize, or choose Plan(randomness='different') for one mask a "
            "task or 'same' for one mask in all of them."
        )


def extreme_tasks(tasks: Task) -> list[Task]:
    """The tasks with the largest and the smallest label of the query and support sets, each once."""
    chosen = {0}
    for batch in tasks:
        if isinstance(batch, Batch) and isinstance(batch.y, Tensor) and not batch.y.is_floating_point():
            labels = batch.y.reshape(len(batch.y), -1)
            if labels.shape[1] and labels.dtype != torch.bool:
                chosen |= {int(labels.amax(1).argmax()), int(labels.amin(1).argmin())}
    return [tree.map(own, tree.select(tasks, index)) for index in sorted(chosen)]


def own(x: Tensor) -> Tensor:
    """A copy that a loss may spoil."""
    return x.detach().clone()
