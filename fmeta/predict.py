"""What the adapted models say of the query sets: ``meta_predict``, run as ``meta_eval`` is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import tree
from fmeta.meta import check_steps, make_runner
from fmeta.parallel import check_algorithm
from fmeta.types import Adapted, Algorithm, Metrics, Plan, Task, TaskBatch, Tree


def meta_predict(
    algorithm: Algorithm, plan: Plan = Plan(), steps: int | Sequence[int] | None = None
) -> Callable[[Tree, TaskBatch], Tensor]:
    """Adapt to every task and predict its query set: returns ``(meta, tasks) -> outputs``.

    ``algorithm.predict(meta, support, query.x)`` of all tasks, run as ``meta_eval`` is. Query labels are not
    looked at.

    Args:
        algorithm: the algorithm; its loss must carry its model, as those of ``fmeta.losses`` do.
        plan: how it is run.
        steps: see ``meta_eval``.

    Returns:
        A function whose outputs are ``[task, queries, ...]``, or ``[task, len(steps), queries, ...]`` for a
        sequence.

    Raises:
        TypeError: if the model returns anything but one tensor.
        ValueError: as ``meta_eval`` does; for a loss without its model; for tasks of unlike query sets.

    Example:
        >>> import fmeta
        >>> apply, params = fmeta.functionalize(fmeta.models.mlp([1, 8, 1]))
        >>> algorithm = fmeta.maml(fmeta.losses.mse(apply), fmeta.sgd(0.01), steps=1)
        >>> tasks = fmeta.tasks.sinusoid(tasks=4, shots=5, queries=7)(0, 0)
        >>> tuple(fmeta.meta_predict(algorithm, steps=[0, 1, 3])(params, tasks).shape)
        (4, 3, 7, 1)
    """
    check_algorithm("meta_predict", algorithm)

    def outer(params: Tree, meta: Tree, task: Task) -> tuple[Tensor, Metrics]:
        found = algorithm.predict(meta, Adapted(params, (), torch.zeros(0)), task.query.x)
        check_output(found)
        return found.new_zeros((), dtype=torch.float32), {"outputs": found}

    predicting = algorithm._replace(inner_loop=algorithm.inner_loop._replace(outer=outer))
    runner = make_runner("meta_predict", predicting, plan, shaped=True)
    at = check_steps("meta_predict", algorithm, steps)

    def predict(meta: Tree, tasks: TaskBatch) -> Tensor:
        check_alike(tasks)
        found = runner.metrics("meta_predict", meta, tasks, at)["outputs"]
        return found if isinstance(steps, Sequence) else found[:, 0]

    return runner.replayed("meta_predict", predict)


def check_output(found: Any) -> None:
    """Refuse a model's output that cannot be stacked over steps."""
    if not isinstance(found, Tensor):
        raise TypeError(
            f"meta_predict: the model must return one tensor, got {type(found).__name__}. Call algorithm.predict "
            "for one task, or let apply return a part of it."
        )


def check_alike(tasks: Any) -> None:
    """Refuse a sequence of tasks whose outputs would not stack."""
    if isinstance(tasks, Task) or not isinstance(tasks, Sequence):
        return
    shapes = {
        tuple(leaf.shape for leaf in tree.leaves(task.query.x)) for task in tasks if isinstance(task, Task)
    }
    if len(shapes) > 1:
        raise ValueError(
            f"meta_predict: query sets must have one shape, got {len(shapes)}. Call it for one task at a time."
        )
