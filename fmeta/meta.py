"""The outer loop as pure functions: ``meta_init``, ``meta_grad``, ``meta_step`` and ``meta_eval``.

Each takes what is fixed (an algorithm, an optimiser, a plan) and returns a function of what changes (the
state, the tasks). Keep the returned function: it remembers its compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import tree
from fmeta.parallel import Explanation, Runner, check_algorithm, check_plan, explain_loop
from fmeta.types import Algorithm, MetaState, Metrics, Params, Plan, TaskBatch, Transform, Tree


def meta_init(algorithm: Algorithm, outer: Transform, params: Params | None = None) -> MetaState:
    """The state before the first outer step.

    Args:
        algorithm: what ``fmeta.maml`` or another factory returned.
        outer: the outer optimiser.
        params: initial weights, as ``functionalize`` returns them; None where meta is not model weights.

    Example:
        >>> import fmeta
        >>> apply, params = fmeta.functionalize(fmeta.models.mlp([1, 8, 1]))
        >>> algorithm = fmeta.maml(fmeta.losses.mse(apply), fmeta.sgd(0.01), steps=1)
        >>> fmeta.meta_init(algorithm, fmeta.adam(1e-3), params).step
        tensor(0)
    """
    check_algorithm("meta_init", algorithm)
    check_outer("meta_init", outer)
    meta = algorithm.init(params)
    step = torch.zeros((), dtype=torch.int64, device=tree.device(meta))
    return MetaState(meta, outer.init(meta), step)


def meta_grad(algorithm: Algorithm, plan: Plan = Plan()) -> Callable[[Tree, TaskBatch], tuple[Tree, Metrics]]:
    """The meta-gradient: returns ``(meta, tasks) -> (grads, metrics)``, means over tasks.

    Args:
        algorithm: what is differentiated, and what of it counts as constant (its adjoint).
        plan: how it is run; never changes what is computed.

    Returns:
        A pure function. ``grads`` is a tree like meta. ``metrics`` holds ``loss`` (mean query loss), what the
        loss reports (``accuracy``), ``finite`` (a boolean: every number in the gradients is finite) and
        ``first_bad`` (``[2]``: the task and the inner step where a number first was not finite, the number
        of inner steps for the query loss; -1, -1 if there is none).

    Raises:
        ValueError: for tasks whose leading axes differ, a loss that is not a scalar, reads values or is
            random under ``randomness="error"``, labels out of range.
    """
    runner = make_runner("meta_grad", algorithm, plan)
    summarised = runner.once("summary", summary)

    def gradient(meta: Tree, tasks: TaskBatch) -> tuple[Tree, Metrics]:
        grads, report = runner.gradient("meta_grad", meta, tasks)
        return grads, summarised(grads, *report)

    return runner.replayed("meta_grad", gradient)


def meta_step(
    algorithm: Algorithm, outer: Transform, plan: Plan = Plan()
) -> Callable[[MetaState, TaskBatch], tuple[MetaState, Metrics]]:
    """One outer step: returns ``(state, tasks) -> (state, metrics)``.

    ``meta + outer.update(meta_grad(meta, tasks))``. Where a number is not finite, the state comes back
    unchanged and ``metrics["finite"]`` is false; see ``meta_grad`` for the metrics.

    Args:
        algorithm: the algorithm.
        outer: the outer optimiser, the same that ``meta_init`` was given.
        plan: how it is run.

    Example:
        >>> import fmeta
        >>> apply, params = fmeta.functionalize(fmeta.models.mlp([1, 8, 1]))
        >>> algorithm = fmeta.maml(fmeta.losses.mse(apply), fmeta.sgd(0.01), steps=1)
        >>> outer = fmeta.adam(1e-3)
        >>> step = fmeta.meta_step(algorithm, outer, fmeta.Plan(compile=False))
        >>> sampler = fmeta.tasks.sinusoid(tasks=4, shots=5, queries=5)
        >>> state, metrics = step(fmeta.meta_init(algorithm, outer, params), sampler(0, 0))
        >>> int(state.step), sorted(metrics)
        (1, ['finite', 'first_bad', 'loss'])
    """
    check_outer("meta_step", outer)
    runner = make_runner("meta_step", algorithm, plan)

    def finish(state: MetaState, grads: Tree, metrics: Metrics, ok: Tensor) -> tuple[MetaState, Metrics]:
        result = summary(grads, metrics, ok)
        updates, opt_state = outer.update(grads, state.opt_state, state.meta)
        after = MetaState(tree.add(state.meta, updates), opt_state, state.step + 1, state.carry)
        return tree.where(result["finite"], after, state), result

    finished = runner.once("update", finish)

    def whole(state: MetaState, tasks: TaskBatch) -> tuple[MetaState, Metrics]:
        if not isinstance(state, MetaState):
            raise TypeError(
                f"meta_step: state must be a MetaState, got {type(state).__name__}. "
                "Start with fmeta.meta_init(algorithm, outer, params)."
            )
        grads, report = runner.gradient("meta_step", state.meta, tasks)
        return finished(state, grads, *report)

    return runner.replayed("meta_step", whole)


def meta_eval(
    algorithm: Algorithm, plan: Plan = Plan(), steps: int | Sequence[int] | None = None
) -> Callable[[Tree, TaskBatch], Metrics]:
    """Adapt to every task and measure on its query set: returns ``(meta, tasks) -> metrics``.

    Args:
        algorithm: the algorithm.
        plan: how it is run.
        steps: number of inner steps; the default is what was trained. Beyond that, the last learned rate
            repeats. A sequence measures along the way.

    Returns:
        A function whose metrics are ``[task]``, or ``[task, len(steps)]`` for a sequence.
    """
    runner = make_runner("meta_eval", algorithm, plan)
    at = check_steps("meta_eval", algorithm, steps)

    def evaluate(meta: Tree, tasks: TaskBatch) -> Metrics:
        found = runner.metrics("meta_eval", meta, tasks, at)
        return found if isinstance(steps, Sequence) else {name: value[:, 0] for name, value in found.items()}

    return runner.replayed("meta_eval", evaluate)


def explain(algorithm: Algorithm, plan: Plan, meta: Tree, tasks: TaskBatch) -> Explanation:
    """What ``meta_grad(algorithm, plan)`` does with such tasks, and what that costs, found by running it.

    Args:
        algorithm: the algorithm.
        plan: how it is run.
        meta: what ``meta_grad`` is called with; only shapes matter.
        tasks: a batch of tasks like those to come.

    Returns:
        A record of the choices (compiled or why not, chunks, kernels), times, flops, bytes and predicted
        memory, of this rank's share of the tasks where the plan has a mesh; ``print`` shows it as a table.

    Raises:
        ValueError, TypeError: as ``meta_grad`` does; inside the caller's own grad, vmap or torch.compile.

    Example:
        >>> import fmeta
        >>> apply, params = fmeta.functionalize(fmeta.models.mlp([1, 8, 1]))
        >>> algorithm = fmeta.maml(fmeta.losses.mse(apply), fmeta.sgd(0.01), steps=2)
        >>> tasks = fmeta.tasks.sinusoid(tasks=4, shots=5, queries=5)(0, 0)
        >>> print(fmeta.explain(algorithm, fmeta.Plan(compile=False), params, tasks))
        engine         adjoint, tasks by vmap
        compiled       no: the plan says compile=False
        chunks         1 of 4 tasks
        remat          none: 2 carries kept, 400 B each
        ranks          1
        time           ... ms a meta-gradient
        flops          ...
        bytes moved    ...
        peak memory    ... predicted, beside meta and tasks
        operations     ...
    """
    check_plan(plan)
    return explain_loop(check_algorithm("explain", algorithm), plan, meta, tasks)


def summary(grads: Tree, metrics: Metrics, ok: Tensor) -> Metrics:
    """Means over tasks, and what was not finite first. ``ok`` is ``[steps + 1, task]``."""
    bad = ~ok.flatten()
    first = bad.long().argmax()
    place = torch.stack([first % ok.shape[1], first // ok.shape[1]])
    return {
        **{
            name: value.float().mean() if not value.is_floating_point() else value.mean()
            for name, value in metrics.items()
        },
        "finite": ok.all() & tree.all_finite(grads),
        "first_bad": torch.where(bad.any(), place, -1),
    }


def make_runner(call: str, algorithm: Any, plan: Any, shaped: bool = False) -> Runner:
    """The machinery behind one of the functions above."""
    check_plan(plan)
    return Runner(check_algorithm(call, algorithm), plan, shaped)


def check_steps(call: str, algorithm: Algorithm, steps: Any) -> tuple[int, ...]:
    """The numbers of inner steps to stop at; refuses what is none."""
    at = (algorithm.inner_loop.steps,) if steps is None else steps
    at = (at,) if isinstance(at, int) else tuple(at)
    if not at or not all(type(k) is int and k >= 0 for k in at):
        raise ValueError(
            f"{call}: steps must be non-negative ints, got {steps!r}. Write steps=[0, 1, 5], say."
        )
    return at


def check_outer(call: str, outer: Any) -> None:
    """Refuse an outer optimiser of a wrong kind."""
    if not isinstance(outer, Transform):
        raise TypeError(
            f"{call}: outer must be a Transform, got {type(outer).__name__}. Use fmeta.adam(1e-3), say."
        )
