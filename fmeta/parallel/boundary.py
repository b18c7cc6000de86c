"""Checks and messages at the public boundary: plans, batches of tasks, and torch.func's own errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import tree
from fmeta.parallel.mesh import check_mesh
from fmeta.parallel.precision import check_precision
from fmeta.types import Algorithm, InnerLoop, Plan, Task, Tree

READS = (
    "the loss reads the value of a tensor, which cannot be batched over tasks. Use torch.where, or "
    'Plan(engine="autograd", tasks="loop").'
)
# What torch says, and what a user can do about it.
ADVICE = (
    (
        "in randomness error mode",
        "the loss calls a random operation, got Plan(randomness='error'). Choose 'different' or 'same'.",
    ),
    (".item()", READS),
    ("Cannot access data pointer", READS),  # .tolist(), .numpy()
    (
        "data-dependent control flow",
        "the loss branches on the value of a tensor, which cannot be batched over tasks. Use torch.where, or "
        'Plan(engine="autograd", tasks="loop").',
    ),
    (
        "dynamic shape",
        "the loss uses an operation whose shape depends on values (a boolean mask as an index, nonzero), which "
        'cannot be batched over tasks. Use torch.where, or Plan(engine="autograd", tasks="loop").',
    ),
    (
        "out of bounds",
        "the loss looks up an index that is out of bounds. Labels must be in 0..ways-1, tokens in the vocabulary.",
    ),
    (
        "saved tensor hooks",
        "the loss uses torch.utils.checkpoint, which torch.func refuses. Leave it out: fmeta recomputes by itself.",
    ),
    (
        "setup_context",
        "the loss uses an operation (an autograd.Function) that torch.func refuses. Use "
        'Plan(engine="autograd", tasks="loop").',
    ),
    (
        "mutate a captured Tensor",
        "the loss writes to a captured tensor in place. Return the new value, or use fmeta.functionalize(module).",
    ),
    (
        "not batched",
        "the loss writes to a captured tensor in place. Return the new value, or use fmeta.functionalize(module).",
    ),
)


@contextlib.contextmanager
def translated(call: str) -> Iterator[None]:
    """Put torch.func's messages into the user's terms, once, with the original chained."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        for fragment, advice in ADVICE:
            if fragment in str(error):
                raise ValueError(f"{call}: {advice}") from error
        raise


def check_plan(plan: Plan) -> None:
    """Refuse a plan with unknown or contradictory settings."""
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan: expected an fmeta.Plan, got {type(plan).__name__}. Write Plan(chunk_size=8), say."
        )
    choices: dict[str, tuple[Any, ...]] = {
        "engine": ("adjoint", "nested", "autograd"),
        "tasks": ("vmap", "loop"),
        "compile": ("auto", True, False),
        "randomness": ("error", "different", "same"),
    }
    for name, allowed in choices.items():
        if getattr(plan, name) not in allowed:
            raise ValueError(f"Plan: {name} must be one of {allowed}, got {getattr(plan, name)!r}.")
    for name in ("chunk_size", "remat"):
        value = getattr(plan, name)
        if value is None or (name == "chunk_size" and value == "auto"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"Plan: {name} must be a positive int or None, got {value!r}.")
    if plan.engine == "autograd" and plan.tasks == "vmap":
        raise ValueError(
            'Plan: engine="autograd" takes tasks one at a time, got tasks="vmap". Set tasks="loop".'
        )
    if plan.engine == "autograd" and plan.compile is True:
        raise ValueError('Plan: engine="autograd" is never compiled, got compile=True. Use compile="auto".')
    if plan.remat is not None and plan.engine != "adjoint":
        raise ValueError(f'Plan: remat belongs to engine="adjoint", got engine={plan.engine!r}.')
    check_precision(plan)
    check_mesh(plan)


def check_algorithm(call: str, algorithm: Any) -> InnerLoop:
    """The inner loop of an algorithm, or a TypeError."""
    if not isinstance(algorithm, Algorithm):
        raise TypeError(
            f"{call}: algorithm must be an Algorithm, got {type(algorithm).__name__}. Make one with "
            "fmeta.maml(loss_fn, inner, steps=1), say."
        )
    return algorithm.inner_loop


def check_tasks(call: str, tasks: Any, plan: Plan) -> list[Task]:
    """The task batch as a list of stacked batches: one, or with ``tasks="loop"`` one for each task."""
    if isinstance(tasks, Task):
        count = count_tasks(call, tasks)
        if plan.tasks == "vmap":
            return [tasks]
        return [tree.map(lambda leaf, i=i: leaf[i : i + 1], tasks) for i in range(count)]
    if isinstance(tasks, Sequence) and tasks and all(isinstance(task, Task) for task in tasks):
        if plan.tasks == "vmap":
            raise ValueError(
                f"{call}: a sequence of {len(tasks)} tasks needs one shape or a loop, got Plan(tasks='vmap'). "
                "Stack them into one Task, or set Plan(tasks='loop')."
            )
        return [tree.map(lambda leaf: leaf[None], task) for task in tasks]
    raise TypeError(
        f"{call}: tasks must be a Task of stacked batches, got {type(tasks).__name__}"
        f"{' of length 0' if isinstance(tasks, Sequence) and not tasks else ''}. "
        "Write Task(support=Batch(x, y), query=Batch(x, y)) with a leading task axis."
    )


def count_tasks(call: str, tasks: Task) -> int:
    """The number of tasks, which every leaf must agree on."""
    counts: dict[str, int] = {}
    for name, leaf in tree.paths(tasks):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{call}: tasks.{name} must be a tensor, got {type(leaf).__name__}.")
        if leaf.dim() == 0:
            raise ValueError(f"{call}: tasks.{name} must have a leading task axis, got a scalar.")
        counts[name] = leaf.shape[0]
    if not counts:
        raise ValueError(f"{call}: tasks hold no tensors.")
    (first, count), *rest = counts.items()
    for name, other in rest:
        if other != count:
            raise ValueError(
                f"{call}: tasks.{first} has {count} tasks but tasks.{name} has {other} in dim 0. "
                "Every leaf needs the same leading task axis."
            )
    if count == 0:
        raise ValueError(f"{call}: expected at least one task, got 0. Sample with tasks=1 or more.")
    return count


def check_meta(call: str, meta: Tree, learns: bool) -> None:
    """Refuse meta-parameters that are not tensors, and none at all where they are to be learned."""
    for name, leaf in tree.paths(meta):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{call}: meta must be a tree of tensors, got {type(leaf).__name__} at {name or 'the top'!r}. "
                "Use fmeta.meta_init(algorithm, outer, params).meta."
            )
    if learns and not any(leaf.is_floating_point() for leaf in tree.leaves(meta)):
        raise ValueError(
            f"{call}: meta holds no floating tensor, so nothing is meta-learned. functionalize leaves out "
            "parameters with requires_grad=False: unfreeze some, or use meta_eval."
        )


def check_engine(call: str, plan: Plan) -> None:
    """Refuse torch.autograd inside of torch.func, which would take what it is told to differentiate as constant."""
    if plan.engine == "autograd" and torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(
            f'{call}: engine="autograd" cannot run inside of the caller\'s own torch.func transform. Use '
            'Plan(engine="adjoint"), or torch.autograd outside.'
        )


def inside_transform(*trees: Tree) -> bool:
    """Whether the caller is differentiating, batching or compiling this very call."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tree.leaves(trees))


def signature(*trees: Tree) -> Any:
    """What a look at a loss is remembered by: structure, shapes, dtypes and devices."""
    flat, spec = tree.flatten(trees)
    return spec, *((x.shape, x.dtype, x.device) for x in flat)
