"""Adaptation that stops by itself, task by task, inside the batched loop.

A task that has stopped takes no more updates: its later steps are no-ops. What is learned from is exact, since
the gradient of a no-op is that of the identity, and the decision itself has no derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta import tree
from fmeta.adapt import objective, run
from fmeta.losses import with_metrics
from fmeta.rates import number
from fmeta.types import Adapted, Algorithm, Batch, Metrics, Task, Transform, Tree


def early_stopping(
    algorithm: Algorithm, *, below: float | None = None, patience: int | None = None, min_delta: float = 0.0
) -> Algorithm:
    """The same algorithm, whose inner loop stops a task by its own support loss.

    Before update ``k`` the support loss ``L_k`` is known, for its gradient is. The task stops, for good, where
    ``L_k <= below``, or where ``patience`` losses in a row were not lower than the lowest before them by more than
    ``min_delta``. Then ``params_k+1 = params_k``, the optimiser's state too. The metrics gain ``steps``, the
    number of updates that a task took. Learns what the algorithm learns; its meta is the same.

    **Meta-gradient:** as that of the algorithm, of the updates that were taken.
    **Cost:** as the algorithm's: a stopped task is computed on, for its neighbours in the batch go on.

    Args:
        algorithm: one with inner steps.
        below: stop at a support loss this low.
        patience: stop after so many losses without a better one.
        min_delta: how much lower a loss must be to count as better.

    Raises:
        ValueError: without a condition, or for one out of range, or an algorithm without inner steps.

    Example:
        >>> import torch, fmeta
        >>> loss_fn = lambda params, batch: (((params["w"] - batch.y) ** 2).mean(), {})
        >>> algorithm = early_stopping(fmeta.maml(loss_fn, fmeta.sgd(0.25), steps=5), below=0.1)
        >>> algorithm.adapt({"w": torch.zeros(())}, fmeta.Batch(torch.ones(1), torch.ones(1))).params["w"]
        tensor(0.7500)
    """
    loop = algorithm.inner_loop
    _check(below, patience, min_delta, loop.steps)

    def start(meta: Tree, support: Batch) -> dict[str, Any]:
        params = loop.start(meta, support)
        zero = next(x.new_zeros(()) for x in tree.leaves(params) if x.is_floating_point())
        return {"params": params, "loss": zero, "steps": zero}

    def loss(params: Any, meta: Tree, batch: Batch, k: Tensor) -> tuple[Tensor, Metrics]:
        value, metrics = with_metrics(loop.loss(params["params"], meta, batch, k))
        # The derivative to this parameter, which stays zero, tells the optimiser the loss.
        return value + params["loss"] * value.detach(), metrics

    def inner(meta: Tree, k: Tensor) -> Transform:
        return until(loop.inner(meta, k), below, patience, min_delta)

    def outer(params: Any, meta: Tree, task: Task) -> tuple[Tensor, Metrics]:
        value, metrics = with_metrics(loop.outer(params["params"], meta, task))
        return value, {**metrics, "steps": params["steps"].detach()}

    stopping = loop._replace(start=start, loss=loss, inner=inner, outer=outer)

    def adapt(meta: Tree, support: Batch) -> Adapted:
        return unwrapped(run(stopping, meta, support))

    def predict(meta: Tree, support: Batch | Adapted, x: Tree) -> Tree:
        adapted = support if isinstance(support, Adapted) else adapt(meta, support)
        return algorithm.predict(meta, unwrapped(adapted), x)

    return Algorithm(
        algorithm.init, stopping, adapt, lambda meta, task: objective(stopping, meta, task)[:2], predict
    )


def unwrapped(adapted: Adapted) -> Adapted:
    """What the algorithm itself would return, from what the loop carries; that stays as it is."""
    params, state = adapted.params, adapted.opt_state
    if isinstance(params, dict) and set(params) == {"params", "loss", "steps"}:
        return Adapted(params["params"], state["inner"] if state else state, adapted.losses)
    return adapted


def until(inner: Transform, below: float | None, patience: int | None, min_delta: float) -> Transform:
    """An inner optimiser of ``{"params", "loss", "steps"}`` that does nothing once its task has stopped."""

    def init(params: Any) -> dict[str, Any]:
        best = torch.full_like(params["loss"], torch.inf)
        count = torch.zeros_like(best, dtype=torch.int64)
        return {"inner": inner.init(params["params"]), "best": best, "stale": count, "stopped": count > 0}

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        value = grads["loss"].detach()
        better = value < state["best"] - min_delta
        stale = torch.where(better, 0, state["stale"] + 1)
        stopped = state["stopped"]
        if below is not None:
            stopped = stopped | (value <= below)
        if patience is not None:
            stopped = stopped | (stale >= patience)
        updates, after = inner.update(grads["params"], state["inner"], params["params"])
        updates = tree.map(lambda x: torch.where(stopped, torch.zeros_like(x), x), updates)
        moved = {"params": updates, "loss": torch.zeros_like(value), "steps": (~stopped).to(value.dtype)}
        best = torch.where(better, value, state["best"])
        after = tree.where(stopped, state["inner"], after)
        return moved, {"inner": after, "best": best, "stale": stale, "stopped": stopped}

    return Transform(init, update)


def _check(below: float | None, patience: int | None, min_delta: float, steps: int) -> None:
    if below is None and patience is None:
        raise ValueError("early_stopping: below or patience must say when a task stops, got neither.")
    if below is not None:
        number("early_stopping", "below", below)
    number("early_stopping", "min_delta", min_delta)
    if patience is not None and (not isinstance(patience, int) or isinstance(patience, bool) or patience < 1):
        raise ValueError(f"early_stopping: patience must be a positive int or None, got {patience!r}.")
    if steps < 1:
        raise ValueError(
            f"early_stopping: algorithm must take inner steps, got one of {steps}. There is nothing to stop."
        )
