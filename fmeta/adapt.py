"""The inner step, the loop over it for one task, and the record that algorithms are made of.

Every engine and every algorithm uses ``inner_step``; ``trajectory`` is the loop as one would write it on a
blackboard, and the definition that compiled engines are tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value

from fmeta import tree
from fmeta.adjoint import differentiates, unroll
from fmeta.losses import checked, outputs, with_metrics
from fmeta.optim import as_inner
from fmeta.types import Adapted, Adjoint, Algorithm, Batch, InnerLoop, LossFn, Params, Task, Transform, Tree
from fmeta.uphill import Gradient, from_uphill


class Point(NamedTuple):
    """Where an inner loop stands after some number of updates."""

    params: Tree
    opt_state: Tree
    loss: Tensor | None  # support loss before the update that led here; None at the start


def inner_step(
    loop: InnerLoop, k: Tensor, grads: Tree, params: Tree, state: Tree, meta: Tree
) -> tuple[Tree, Tree]:
    """One update of one task: ``params + updates`` and the new optimiser state."""
    updates, state = loop.inner(meta, k).update(grads, state, params)
    return tree.add(params, updates), state


@from_uphill
def support_gradient(
    loop: InnerLoop, params: Tree, meta: Tree, batch: Batch, k: Tensor
) -> tuple[Tree, Tensor]:
    """Gradient and value of the support loss of one task at inner step ``k``."""
    value = lambda p: with_metrics(loop.loss(p, meta, batch, k))[0]  # noqa: E731
    if loop.scale == 1.0:
        return grad_and_value(value)(params)
    return tree.map(lambda x: x / loop.scale, grad_and_value(lambda p: loop.scale * value(p))(params))


def batch_of_step(loop: InnerLoop, support: Batch, k: int, dim: int = 0) -> Batch:
    """The support examples that inner step ``k`` sees; per-step batches start again when they run out."""
    if loop.batches == "whole":
        return support
    return tree.map(lambda leaf: leaf.select(dim, k % leaf.shape[dim]), support)


def last_trained(loop: InnerLoop, k: int) -> int:
    """The step whose learned rate and statistics step ``k`` uses: beyond the trained steps the last repeats."""
    return min(k, max(loop.steps - 1, 0))


def trajectory(
    loop: InnerLoop,
    meta: Tree,
    support: Batch,
    steps: int | None = None,
    gradient: Gradient = support_gradient,
) -> Iterator[Point]:
    """Yield the inner loop of one task after 0, 1, ... ``steps`` updates."""
    steps = loop.steps if steps is None else steps
    index = torch.arange(max(loop.steps, 1), device=tree.device(meta, support))
    params = loop.start(meta, support)
    state = loop.inner(meta, index[0]).init(params)
    yield Point(params, state, None)
    for k in range(steps):
        now = index[last_trained(loop, k)]
        grads, loss = gradient(loop, params, meta, batch_of_step(loop, support, k), now)
        if not differentiates(loop.adjoint, k, steps):
            grads = tree.detach(grads)
        params, state = inner_step(loop, now, grads, params, state, meta)
        yield Point(params, state, loss)


def run(loop: InnerLoop, meta: Tree, support: Batch, steps: int | None = None) -> Adapted:
    """Adapt to one task and keep only the end and the losses on the way."""
    losses: list[Tensor] = []
    for point in trajectory(loop, meta, support, steps):
        losses += [] if point.loss is None else [point.loss]
    stacked = torch.stack(losses) if losses else torch.zeros(0, device=tree.device(meta, support))
    return Adapted(point.params, point.opt_state, stacked)


def adapt(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    inner: Transform,
    *,
    steps: int,
    adjoint: Adjoint = unroll(),
) -> Adapted:
    """Adapt parameters to one batch: ``steps`` times ``params + inner.update(grad(loss_fn)(params, batch))``.

    Pure and differentiable: take ``torch.func.grad`` of anything made from the result, ``vmap`` it over
    tasks, seeds or rates.

    **Meta-gradient:** exact under the default ``adjoint``; see ``first_order`` and ``truncated``.
    **Cost:** ``steps`` gradients of the loss. Differentiated as it stands it keeps every step's activations;
    ``meta_grad`` does not.

    Args:
        loss_fn: ``(params, batch) -> (scalar, metrics)``.
        params: what adapts, a dict of tensors.
        batch: the support set, leaves ``[shots, ...]``.
        inner: the inner optimiser; its root is made safe to differentiate (``eps_root``).
        steps: number of updates, at least 0.
        adjoint: what part is differentiated.

    Returns:
        ``Adapted(params, opt_state, losses)`` with ``losses`` of shape ``[steps]``, each before its update.

    Example:
        >>> import torch, fmeta
        >>> loss_fn = lambda params, batch: (((params["w"] * batch.x - batch.y) ** 2).mean(), {})
        >>> batch = fmeta.Batch(torch.ones(4), torch.full((4,), 2.0))
        >>> adapted = fmeta.adapt(loss_fn, {"w": torch.zeros(())}, batch, fmeta.sgd(0.25), steps=2)
        >>> round(adapted.params["w"].item(), 3)
        1.5
    """
    check_loop("adapt", loss_fn, inner, steps, adjoint)
    inner = as_inner(inner)
    loop = InnerLoop(
        start=lambda meta, support: meta,
        loss=lambda params, meta, batch, k: checked("adapt", loss_fn(params, batch)),
        inner=lambda meta, k: inner,
        outer=lambda params, meta, task: checked("adapt", loss_fn(params, task.query)),
        steps=steps,
        adjoint=adjoint,
    )
    return run(loop, params, batch)


def check_loop(call: str, loss_fn: Any, inner: Any, steps: Any, adjoint: Any, batches: Any = "whole") -> None:
    """Refuse wrong hyperparameters when an algorithm is made, not at its thousandth step."""
    if not callable(loss_fn):
        raise TypeError(
            f"{call}: loss_fn must be a callable (params, batch) -> (scalar, metrics), got "
            f"{type(loss_fn).__name__}. fmeta.losses has ready ones."
        )
    if not isinstance(inner, Transform):
        raise TypeError(
            f"{call}: inner must be a Transform, got {type(inner).__name__}. Use fmeta.sgd(lr), another "
            "of fmeta.optim, or a learned optimiser that was called: loaded(steps=5)."
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(
            f"{call}: steps must be a non-negative int, got {steps!r}. Use steps=0 to train without adaptation."
        )
    if not isinstance(adjoint, Adjoint):
        raise TypeError(
            f"{call}: adjoint must be an Adjoint, got {type(adjoint).__name__}. Use fmeta.unroll(), "
            "fmeta.first_order() or fmeta.truncated(k)."
        )
    if batches not in ("whole", "per_step"):
        raise ValueError(
            f"{call}: batches must be 'whole' or 'per_step', got {batches!r}. With 'per_step', support leaves are "
            "[steps, shots, ...]."
        )


def predictor(loss_fn: Any, merge: Callable[[Tree, Tree], Params]) -> Callable[[Tree, Adapted, Tree], Tree]:
    """``(meta, adapted, x) -> outputs`` from the model that a loss of ``fmeta.losses`` carries."""

    def predict(meta: Tree, adapted: Adapted, x: Tree) -> Tree:
        apply = getattr(loss_fn, "apply", None)
        if apply is None:
            raise ValueError(
                "predict: the loss must carry its model, got a bare function. Build it with "
                "fmeta.losses.cross_entropy(apply) or fmeta.losses.mse(apply)."
            )
        return outputs(apply, merge(meta, adapted.params), x)

    return predict


def weights_as_meta(call: str) -> Callable[[Params | None], Params]:
    """The ``init`` of an algorithm whose meta is the weights of a model."""

    def init(params: Params | None) -> Params:
        if not isinstance(params, dict) or not all(isinstance(p, Tensor) for p in params.values()):
            raise TypeError(
                f"{call}: params must be a dict of tensors, got {type(params).__name__}. "
                "Use `apply, params = fmeta.functionalize(module)`."
            )
        return tree.detach(params)

    return init


def from_loop(
    init: Callable[[Params | None], Tree],
    loop: InnerLoop,
    predict: Callable[[Tree, Adapted, Tree], Tree],
) -> Algorithm:
    """The whole record of an algorithm, from what defines it."""

    def adapted(meta: Tree, support: Batch | Adapted) -> Adapted:
        return support if isinstance(support, Adapted) else run(loop, meta, support)

    return Algorithm(
        init=init,
        inner_loop=loop,
        adapt=lambda meta, support: run(loop, meta, support),
        loss=lambda meta, task: objective(loop, meta, task)[:2],
        predict=lambda meta, support, x: predict(meta, adapted(meta, support), x),
    )


def objective(
    loop: InnerLoop, meta: Tree, task: Task, gradient: Gradient = support_gradient
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """What the outer loop minimises for one task: the weighted query losses along the inner loop.

    Returns:
        The objective, the metrics after the last update, and ``[steps + 1]`` booleans: whether each inner
        step, and last the query loss, was finite.
    """
    weights = outer_weights(loop)
    terms, finite = [], []
    for k, point in enumerate(trajectory(loop, meta, task.support, gradient=gradient)):
        if point.loss is not None:
            finite.append(torch.isfinite(point.loss) & tree.all_finite(point.params))
        if weights[k]:
            value, metrics = with_metrics(loop.outer(point.params, meta, task))
            terms.append(weights[k] * value)
            metrics = {"loss": value, **metrics}
    finite.append(torch.isfinite(value))
    return sum(terms[1:], terms[0]), metrics, torch.stack(finite)


def outer_weights(loop: InnerLoop) -> tuple[float, ...]:
    """Weight of the query loss after 0, 1, ... ``steps`` updates."""
    return (0.0,) * loop.steps + (1.0,) if loop.weights is None else loop.weights
