"""One look at a loss before it is mapped and compiled, once for every combination of shapes.

The functions of one task run eagerly on the two tasks with the extreme labels, so that a user's mistake
shows as the error of a plain function call. Operations are recorded on the way: what torch would silently
differentiate wrongly is refused by name, random operations decide how the loss may be run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fmeta import tree
from fmeta.adapt import batch_of_step, with_metrics
from fmeta.functional import differentiable
from fmeta.linalg import WRONG_REVERSE_OVER_FORWARD
from fmeta.losses import checking_labels
from fmeta.norms import NATIVE_NORMS
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


def inspect(loop: InnerLoop, plan: Plan, meta: Tree, tasks: Task) -> Found:
    """Run one task's functions eagerly and check what they do."""
    record, captures = Record(), False
    meta = tree.map(own, meta)
    chosen = extreme_tasks(tasks)
    for task in chosen:
        versions = [(name, leaf, leaf._version) for name, leaf in tree.paths((meta, task))]
        with torch.random.fork_rng(), differentiable():
            with checking_labels():
                captures = evaluate(loop, meta, task) or captures
            with record, torch.no_grad():
                evaluate(loop, meta, task)
        for name, leaf, version in versions:
            if leaf._version != version:
                raise ValueError(
                    f"meta_grad: a loss must not change its inputs, got an in-place operation on a tensor of "
                    f"shape {tuple(leaf.shape)} ({name}). Write x = x + y instead of x += y."
                )
    refuse(plan, record)
    return Found(bool(record.random), captures, record.flops // len(chosen), record.bytes // len(chosen))


def evaluate(loop: InnerLoop, meta: Tree, task: Task) -> bool:
    """Call the functions of one task once, checking what they return; whether that has an autograd graph."""
    k = torch.zeros((), dtype=torch.int64, device=tree.device(meta, task))
    params = loop.start(meta, task.support)
    results: list[Tree] = [loop.outer(params, meta, task)]
    check_scalar("the query loss", results[0])
    if loop.steps:
        results.append(loop.loss(params, meta, batch_of_step(loop, task.support, 0), k))
        check_scalar("the support loss", results[1])
        rule = loop.inner(meta, k)
        results.append(rule.update(tree.zeros_like(params), rule.init(params), params))
    return any(leaf.requires_grad for leaf in tree.leaves(results))


def check_scalar(what: str, value: Any) -> None:
    """Refuse a loss that is not one floating number with a dict of metrics."""
    loss, metrics = (
        with_metrics(value) if not (isinstance(value, tuple) and len(value) != 2) else (None, None)
    )
    if not isinstance(loss, Tensor) or not isinstance(metrics, dict):
        raise TypeError(
            f"meta_grad: {what} must return (scalar, metrics), got {describe(value if loss is None else loss)}. "
            "Return `loss, {}` where there are no metrics."
        )
    if loss.shape != () or not loss.is_floating_point():
        raise ValueError(
            f"meta_grad: {what} must be a floating scalar, got shape {tuple(loss.shape)} of {loss.dtype}. "
            "Average over the examples, loss.mean() say."
        )
    for name, metric in metrics.items():
        if not isinstance(metric, Tensor) or metric.shape != ():
            raise ValueError(
                f"meta_grad: metric {name!r} must be a tensor without dimensions, got {describe(metric)}. "
                "A metric is one number a task."
            )


def describe(value: Any) -> str:
    """A value as an error message shows it."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple) else "")


def refuse(plan: Plan, record: Record) -> None:
    """Raise for what cannot be done right, or not under this plan."""
    if record.norms:
        raise NotImplementedError(
            f"meta_grad: the loss calls torch.ops.aten.{min(record.norms)}, whose second derivative torch gets "
            "wrong without a message. Call layer_norm or batch_norm of torch.nn.functional; fmeta rewrites those."
        )
    if record.mixed and plan.engine == "adjoint":
        raise NotImplementedError(
            f"meta_grad: the loss calls torch.ops.aten.{min(record.mixed)}, whose reverse-over-forward derivative "
            'torch gets wrong without a message, got engine="adjoint". Use Plan(engine="nested"), or '
            "torch.linalg.solve and slogdet, which fmeta rewrites."
        )
    if record.reads and plan.engine != "autograd":
        raise ValueError(
            "meta_grad: the loss reads the value of a tensor (.item(), bool(), or an `if` on a tensor), which "
            'cannot be batched over tasks. Use torch.where, or Plan(engine="autograd", tasks="loop").'
        )
    if record.random and plan.randomness == "error":
        raise ValueError(
            f"meta_grad: the loss calls the random operation {min(record.random)}, got Plan(randomness='error'). "
            "Call module.eval() before functionalize, or choose Plan(randomness='different') for one mask a "
            "task or 'same' for one mask in all of them."
        )


def extreme_tasks(tasks: Task) -> list[Task]:
    """The tasks with the largest and the smallest label of the query and support sets, each once."""
    chosen = {0}
    for batch in tasks:
        if isinstance(batch, Batch) and isinstance(batch.y, Tensor) and not batch.y.is_floating_point():
            labels = batch.y.flatten(1)
            if labels.shape[1]:
                chosen |= {int(labels.amax(1).argmax()), int(labels.amin(1).argmin())}
    return [tree.map(own, tree.select(tasks, index)) for index in sorted(chosen)]


def own(x: Tensor) -> Tensor:
    """A copy that a loss may spoil."""
    return x.detach().clone()
