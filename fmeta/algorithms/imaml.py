"""iMAML: adapt with a pull towards the initialisation; the meta-gradient needs the end of adaptation only.

``adapted = argmin L_t(params) + strength / 2 |params - meta|^2``;
``meta-gradient = mean_t (I + H_t / strength)^-1 grad L_t^query(adapted_t)``, with ``H_t`` that of ``L_t`` there.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.func import grad, jvp

from fmeta import tree
from fmeta.adapt import check_loop, from_loop, predictor, weights_as_meta
from fmeta.adjoint import first_order
from fmeta.implicit import SOLVERS, dot
from fmeta.losses import checked, reported, with_metrics
from fmeta.optim import as_inner
from fmeta.rates import number, positive
from fmeta.types import Algorithm, InnerLoop, LossFn, Metrics, Params, Task, Transform


def imaml(
    loss_fn: LossFn,
    inner: Transform,
    *,
    steps: int,
    strength: float = 2.0,
    solver: Literal["cg", "neumann", "identity"] = "cg",
    iterations: int = 5,
    damping: float = 0.0,
    query_loss: LossFn | None = None,
) -> Algorithm:
    """MAML with implicit gradients: learns an initialisation that adaptation stays near. Its meta is ``Params``.

    **Meta-gradient:** that of the minimum, as far as ``steps`` reach it and ``iterations`` solve; the way there
    is not differentiated. It is written as the gradient of ``<meta, v>`` with ``v`` constant, so every engine
    serves it.
    **Cost:** ``steps`` support gradients, one query gradient and ``iterations`` Hessian-vector products a task;
    memory does not depend on ``steps``.

    Args:
        loss_fn: ``(params, batch) -> (scalar, metrics)`` of one task.
        inner: inner optimiser; it minimises the support loss with the pull.
        steps: number of inner updates.
        strength: of the pull (the paper's lambda), above 0. Adaptation is unique where it exceeds the largest
            negative curvature of the loss.
        solver: ``"cg"``; ``"neumann"``, which needs ``strength`` above the largest curvature; ``"identity"``,
            no curvature at all.
        iterations: of the solver, at least 0.
        damping: at least 0; curvature then counts in the solve as if the pull were stronger by so much. Where
            ``strength`` does not exceed the negative curvature, the solve is of no minimum, and training with 0
            stalls; large values are first-order MAML with a pull. The authors' code has 10, their paper none.
        query_loss: the outer objective; the default is ``loss_fn``.

    References:
        Rajeswaran, Finn, Kakade, Levine, "Meta-learning with implicit gradients", 2019, arXiv 1909.04630,
        eqs. 3 and 6, algorithm 2.
    """
    check_loop("imaml", loss_fn, inner, steps, first_order())
    positive("imaml", "strength", strength)
    if solver not in SOLVERS:
        raise ValueError(f"imaml: solver must be one of {sorted(SOLVERS)}, got {solver!r}.")
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 0:
        raise ValueError(
            f"imaml: iterations must be a non-negative int, got {iterations!r}. The paper uses 5."
        )
    number("imaml", "damping", damping)
    inner, objective = as_inner(inner), query_loss or loss_fn

    def loss(params: Params, meta: Params, batch: Any, k: Tensor) -> tuple[Tensor, Metrics]:
        value, metrics = with_metrics(reported("imaml", checked("imaml", loss_fn(params, batch))))
        away = tree.map(lambda p, m: p - m, params, meta)
        return value + 0.5 * strength * tree.squared_norm(away), metrics

    def outer(params: Params, meta: Params, task: Task) -> tuple[Tensor, Metrics]:
        adapted = tree.detach(params)
        support = grad(lambda p: with_metrics(loss_fn(p, task.support))[0])

        def product(v: Params) -> Params:
            curved = jvp(support, (adapted,), (v,))[1]
            return tree.map(lambda x, h: x + h / (strength + damping), v, curved)

        value, metrics = reported("imaml", checked("imaml", objective(adapted, task.query), "the query loss"))
        slope = grad(lambda p: with_metrics(objective(p, task.query))[0])(adapted)
        direction = tree.detach(SOLVERS[solver](product, slope, iterations))
        return dot(meta, direction), {"loss": value.detach(), **tree.detach(metrics)}

    loop = InnerLoop(
        start=lambda meta, support: meta,
        loss=loss,
        inner=lambda meta, k: inner,
        outer=outer,
        steps=steps,
        adjoint=first_order(),
    )
    return from_loop(weights_as_meta("imaml"), loop, predictor(objective, lambda meta, params: params))
