"""Gradients to hyperparameters: rates, weight decay, weights of examples, by the training that they steer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp

from fmeta import tree
from fmeta.adapt import check_loop, from_loop, run
from fmeta.adjoint import unroll
from fmeta.estimators.values import basis, check_floating
from fmeta.functional import differentiable
from fmeta.implicit import SOLVERS
from fmeta.meta import meta_grad
from fmeta.optim import as_inner, sgd
from fmeta.parallel import Unrolled, check_plan
from fmeta.types import Adjoint, Batch, InnerLoop, Metrics, Params, Plan, System, Task, Transform, Tree

Loss = Callable[[Params, Tree, Batch], Any]
"""``(params, hyper, batch) -> scalar``, or ``(scalar, metrics)``."""
METHODS = ("unroll", "forward", "implicit")


class Bilevel(NamedTuple):
    """Training, and what it is judged by, as functions of parameters and hyperparameters."""

    inner_loss: Loss
    outer_loss: Loss
    inner: Callable[[Tree], Transform]
    steps: int
    batches: Literal["whole", "per_step"]


def hypergrad(
    inner_loss: Loss,
    outer_loss: Loss,
    inner: Transform | Callable[[Tree], Transform],
    *,
    steps: int,
    method: Literal["unroll", "forward", "implicit"] = "unroll",
    solver: Literal["cg", "neumann", "identity"] = "cg",
    iterations: int = 20,
    scale: float = 1.0,
    adjoint: Adjoint = unroll(),
    batches: Literal["whole", "per_step"] = "whole",
    plan: Plan = Plan(),
) -> Callable[[Params, Tree, Task], tuple[Tree, Metrics]]:
    """The gradient of a validation loss to what steers training: ``(params, hyper, data) -> (grads, metrics)``.

    From ``params``, ``steps`` updates on ``data.support`` lead to ``trained``; ``grads`` is that of
    ``outer_loss(trained, hyper, data.query)`` to ``hyper``, any tree of tensors.

    **Gradient:** ``"unroll"`` and ``"forward"``: exact, of these very steps. ``"implicit"``: that of a minimum of
    ``inner_loss``, wherever it was reached from: ``d_outer/d_hyper - v . d^2 inner / d_params d_hyper`` with
    ``v = (d^2 inner / d_params^2)^-1 d_outer/d_params``; nothing of ``inner`` counts, so that it has no
    gradient to rates. **Cost:** ``"unroll"`` as MAML: three to five times the steps, parameters kept for
    each. ``"forward"``: a derivative of every step for each number in ``hyper``; memory does not grow with
    ``steps``. ``"implicit"``: the steps, and ``iterations`` Hessian-vector products.

    Args:
        inner_loss: ``(params, hyper, batch) -> scalar``, what training minimises; metrics beside it are ignored.
        outer_loss: the same for what is judged.
        inner: the optimiser, or a function of ``hyper`` that makes one (``lambda h: fmeta.sgd(h["lr"].exp())``).
        steps: of training; 0 with ``"implicit"`` where ``params`` are trained already.
        method: how.
        solver: of ``"implicit"``: conjugate gradients, Neumann's series, or ``"identity"``, which takes
            ``scale * d_outer/d_params`` for ``v`` (T1-T2).
        iterations: of the solver.
        scale: what the Hessian is multiplied by before the solver sees it; Neumann's series needs eigenvalues below 2
            then, so that a learning rate is a good choice. Conjugate gradients do not care.
        adjoint: of ``"unroll"``: ``fmeta.truncated(k)``, say.
        batches: ``"per_step"``: support leaves are ``[n, ...]``, a batch a step, from the first again after n; not for
            ``"implicit"``.
        plan: ``compile`` is read by ``"unroll"`` and ``"forward"``, ``remat`` by ``"unroll"``.

    Returns:
        A pure function. ``metrics`` holds ``loss`` (of ``outer_loss``) and ``finite``.

    Raises:
        ValueError: for an unknown method or solver, or no steps where the method needs them.

    Example:
        >>> import torch, fmeta
        >>> inner_loss = lambda w, h, b: ((w["w"] * b.x - b.y) ** 2).mean() + h["decay"] * (w["w"] ** 2).sum()
        >>> outer_loss = lambda w, h, b: ((w["w"] * b.x - b.y) ** 2).mean()
        >>> data = fmeta.Task(fmeta.Batch(torch.ones(1), torch.ones(1)), fmeta.Batch(torch.ones(1), torch.zeros(1)))
        >>> found = fmeta.hypergrad(inner_loss, outer_loss, fmeta.sgd(0.1), steps=50, method="implicit")
        >>> grads, metrics = found({"w": torch.zeros(())}, {"decay": torch.tensor(1.0)}, data)
        >>> round(grads["decay"].item(), 3)  # w = 1 / (1 + decay), so d w^2 / d decay = -2 / 8
        -0.25

    References:
        Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", 2017, arXiv 1703.01785;
        Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation", 2020, arXiv
        1911.02590, equation 3; Luketina et al., "Scalable gradient-based tuning of continuous regularization
        hyperparameters", 2016, arXiv 1511.06727.
    """
    make = (lambda hyper: inner) if isinstance(inner, Transform) else inner
    check_loop(
        "hypergrad", inner_loss, inner if isinstance(inner, Transform) else sgd(0.0), steps, adjoint, batches
    )
    check_plan(plan)
    if method not in METHODS or solver not in SOLVERS:
        raise ValueError(
            f"hypergrad: method must be among {', '.join(METHODS)} and solver among {', '.join(SOLVERS)}, got "
            f"{method!r} and {solver!r}."
        )
    check_functions(inner_loss, outer_loss, inner)
    if method == "implicit" and batches == "per_step":
        raise ValueError(
            "hypergrad: batches must be 'whole' for method='implicit', got 'per_step'. It is about the minimum of one "
            "loss: train beforehand, and pass the trained parameters with steps=0."
        )
    if steps == 0 and method != "implicit":
        raise ValueError(
            f"hypergrad: steps must be at least 1 for method={method!r}, got 0. Nothing is trained."
        )
    level = Bilevel(scalar(inner_loss), scalar(outer_loss), lambda h: as_inner(make(h)), steps, batches)
    if method == "unroll":
        found = by_unroll(level, adjoint, plan)
    elif method == "forward":
        found = by_forward_mode(level, plan)
    else:
        found = by_minimum(level, solver, iterations, scale)

    def call(params: Params, hyper: Tree, data: Task) -> tuple[Tree, Metrics]:
        check_floating("hypergrad", "params", params)
        check_floating("hypergrad", "hyper", hyper)
        return found(*map(tree.detach, (params, hyper, data)))

    return call


def check_functions(inner_loss: Any, outer_loss: Any, inner: Any) -> None:
    """Refuse what cannot be called."""
    for name, given in (("inner_loss", inner_loss), ("outer_loss", outer_loss), ("inner", inner)):
        if not callable(given) and not isinstance(given, Transform):
            raise TypeError(
                f"hypergrad: {name} must be a function{' or a Transform' if name == 'inner' else ''}, got "
                f"{type(given).__name__}. Losses are (params, hyper, batch) -> scalar; fmeta.sgd(0.1) is a Transform."
            )


def scalar(loss: Loss) -> Loss:
    """The loss alone."""
    return lambda *given: found[0] if isinstance(found := loss(*given), tuple) else found


def loop_of(level: Bilevel, adjoint: Adjoint) -> InnerLoop:
    """Training as an inner loop whose meta is ``{"params", "hyper"}``."""
    return InnerLoop(
        start=lambda meta, support: meta["params"],
        loss=lambda params, meta, batch, k: (level.inner_loss(params, meta["hyper"], batch), {}),
        inner=lambda meta, k: level.inner(meta["hyper"]),
        outer=lambda params, meta, task: (level.outer_loss(params, meta["hyper"], task.query), {}),
        steps=level.steps,
        adjoint=adjoint,
        batches=level.batches,
    )


def by_unroll(level: Bilevel, adjoint: Adjoint, plan: Plan) -> Callable[..., tuple[Tree, Metrics]]:
    """By the engine that meta-gradients have: one task."""
    algorithm = from_loop(lambda params: params, loop_of(level, adjoint), lambda meta, adapted, x: x)
    found = meta_grad(algorithm, plan)

    def call(params: Params, hyper: Tree, data: Task) -> tuple[Tree, Metrics]:
        one = tree.map(lambda leaf: leaf[None], data)
        grads, metrics = found({"params": params, "hyper": hyper}, one)
        return grads["hyper"], {"loss": metrics["loss"], "finite": metrics["finite"]}

    return call


def by_forward_mode(level: Bilevel, plan: Plan) -> Callable[..., tuple[Tree, Metrics]]:
    """Derivatives along every single hyperparameter, carried along with training."""

    def step(hyper: Tree, state: Tree, data: tuple[Params, Batch], t: Tensor) -> tuple[Tree, Tensor]:
        params, opt_state = state
        batch = data[1]
        if level.batches == "per_step":
            batch = tree.map(lambda leaf: leaf.index_select(0, t.reshape(1) % len(leaf))[0], batch)
        grads, loss = grad_and_value(lambda p: level.inner_loss(p, hyper, batch))(params)
        updates, opt_state = level.inner(hyper).update(grads, opt_state, params)
        return (tree.add(params, updates), opt_state), loss

    start = lambda hyper, data: (data[0], level.inner(hyper).init(data[0]))  # noqa: E731
    unrolled = Unrolled(System(start, step, level.steps), plan)

    def call(params: Params, hyper: Tree, data: Task) -> tuple[Tree, Metrics]:
        tasks = tree.map(lambda leaf: leaf[None], (params, data.support))
        directions = basis(hyper)
        state, slopes = unrolled.start(hyper, tasks), unrolled.start_slopes(hyper, directions, tasks)
        t = torch.zeros(1, dtype=torch.int64, device=tree.device(params))
        for _ in range(level.steps):
            state, _, slopes, _ = unrolled.push(hyper, directions, state, slopes, tasks, t, t + 1)
            t = t + 1
        trained = tree.select(state[0], 0)
        d_params, d_hyper, loss = slope_of(level, trained, hyper, data.query)
        pairs = zip(tree.leaves(slopes[0]), tree.leaves(d_params), strict=True)
        along = sum(
            (s[0].reshape(len(s[0]), -1).to(d.dtype) @ d.reshape(-1) for s, d in pairs),
            torch.zeros((), device=t.device),
        )
        leaves, spec = tree.flatten(hyper)
        parts = along.split([leaf.numel() for leaf in leaves])
        through = tree.unflatten(
            [p.reshape(x.shape).to(x.dtype) for p, x in zip(parts, leaves, strict=True)], spec
        )
        return finished(tree.add(d_hyper, through), loss)

    return call


def by_minimum(
    level: Bilevel, solver: str, iterations: int, scale: float
) -> Callable[..., tuple[Tree, Metrics]]:
    """By the implicit function theorem."""
    loop = loop_of(level, unroll())

    def call(params: Params, hyper: Tree, data: Task) -> tuple[Tree, Metrics]:
        with torch.no_grad(), differentiable():
            trained = run(loop, {"params": params, "hyper": hyper}, data.support).params
            d_params, d_hyper, loss = slope_of(level, trained, hyper, data.query)
            slope = lambda p, h: grad(level.inner_loss)(p, h, data.support)  # noqa: E731
            curved = lambda v: jvp(lambda p: slope(p, hyper), (trained,), (v,))[1]  # noqa: E731
            product = lambda v: tree.scale(curved(v), scale)  # noqa: E731
            v = SOLVERS[solver](product, tree.scale(d_params, scale), iterations)
            mixed = grad(lambda h: tree.dot(slope(trained, h), v))(hyper)
            return finished(tree.map(torch.sub, d_hyper, mixed), loss)

    return call


def slope_of(level: Bilevel, trained: Params, hyper: Tree, query: Batch) -> tuple[Params, Tree, Tensor]:
    """The outer loss, and its derivatives to both."""
    with torch.no_grad(), differentiable():
        both = grad_and_value(level.outer_loss, argnums=(0, 1))
        (d_params, d_hyper), loss = both(trained, hyper, query)
    return d_params, d_hyper, loss


def finished(grads: Tree, loss: Tensor) -> tuple[Tree, Metrics]:
    """Gradients with the metrics that every method returns."""
    return grads, {"loss": loss, "finite": tree.all_finite(grads) & torch.isfinite(loss)}
