"""``estimate``: a gradient of a system by an estimator; ``estimate_step``: an outer step that takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import tree
from fmeta.estimators.values import Course, Estimator, check_floating
from fmeta.meta import check_outer
from fmeta.parallel import Unrolled, check_plan
from fmeta.types import MetaState, Metrics, Plan, System, Transform, Tree


class Estimate(NamedTuple):
    """A system under an estimator."""

    begin: Callable[..., Any]
    """``(theta, tasks, seed=0) -> carry``: what the first call takes."""
    run: Callable[..., tuple[Tree, Any, Metrics]]
    """``(theta, carry, tasks, seed=None) -> (grads, carry, metrics)``."""

    def __call__(
        self, theta: Tree, carry: Any, tasks: Tree, seed: int | None = None
    ) -> tuple[Tree, Any, Metrics]:
        """The mean gradient over tasks of one call's steps, and where the tasks are then."""
        return self.run(theta, carry, tasks, seed)


def estimate(
    system: System,
    estimator: Estimator,
    plan: Plan = Plan(),
    *,
    each: Callable[[Tree], Tree] | None = None,
) -> Estimate:
    """The gradient of the mean loss of a system's steps: ``(theta, carry, tasks, seed) -> (grads, carry, metrics)``.

    The mean is over ``system.steps``: a task that ends earlier counts by its length.

    Without truncation a call takes all steps of ``tasks`` and carries nothing on. With it, a call takes the next window
    of the tasks in the carry; those that are over make room for new ones out of ``tasks``. At ``begin`` courses
    end at random times, so that later ones are spread over all their steps.

    Args:
        system: what is unrolled, of one task.
        estimator: ``fmeta.bptt()``, ``forward_mode()``, ``es(...)`` or ``pes(...)``.
        plan: ``compile`` is read.
        each: changes the gradient of every task before the mean (of every pair, for ``es`` and ``pes``), leaves
            ``[task, ...]``: `fmeta.unit_norm`, say.

    Returns:
        An ``Estimate``. Tasks are a tree with a leading axis; ``seed`` draws the perturbations of
        ``es`` and ``pes``: a new one at every call. Metrics are
        ``loss`` (the mean over tasks and steps), ``finite``, and ``over`` (the part of the tasks that ended
        in this call).

    Example:
        >>> import torch, fmeta
        >>> system = fmeta.System(
        ...     start=lambda theta, task: task,
        ...     step=lambda theta, x, task, t: (0.5 * x + theta, (x + theta - 1) ** 2),
        ...     steps=3,
        ... )
        >>> found = fmeta.estimate(system, fmeta.bptt(), fmeta.Plan(compile=False))
        >>> tasks = torch.zeros(2)
        >>> grads, carry, metrics = found(torch.tensor(0.5), found.begin(torch.tensor(0.5), tasks), tasks)
        >>> round(grads.item(), 4)
        0.0833
    """
    check_plan(plan)
    unrolled, whole = Unrolled(system, plan), estimator.truncation is None
    steps = min(estimator.truncation or system.steps, system.steps)
    copied = lambda tasks: tree.map(lambda x: x.repeat_interleave(estimator.copies, 0), tasks)  # noqa: E731

    def fresh(theta: Tree, tasks: Tree) -> Course:
        state, memory = estimator.begin(unrolled, theta, tasks)
        end = unrolled.lengths(tasks)
        return Course(tasks, state, torch.zeros_like(end), end, memory)

    def begin(theta: Tree, tasks: Tree, seed: int = 0) -> Any:
        if whole:
            return ()
        course = fresh(theta, copied(tasks))
        part = torch.rand(course.end.shape, generator=torch.Generator().manual_seed(seed)).to(
            course.end.device
        )
        return course._replace(end=(part * course.end).long() + 1)

    def run(theta: Tree, carry: Any, tasks: Tree, seed: int | None = None) -> tuple[Tree, Any, Metrics]:
        check_seed(estimator, seed)
        check_floating("estimate", "theta", theta)
        tasks = copied(tasks)
        course = fresh(theta, tasks) if whole else carry
        if not isinstance(course, Course):
            raise TypeError(
                f"estimate: carry must be what begin(theta, tasks, seed) returned, got {type(carry).__name__}. "
                f"{estimator.name} goes on where the last window ended."
            )
        window = estimator.run(unrolled, theta, course, steps, torch.Generator().manual_seed(seed or 0))
        ended = window.course.t >= window.course.end
        grads = window.grads if each is None else each(window.grads)
        grads = tree.map(lambda g: g.mean(0), grads)
        metrics = {
            "loss": window.loss.mean(),
            "finite": tree.all_finite(grads) & torch.isfinite(window.loss).all(),
            "over": ended.float().mean(),
        }
        after = () if whole else renewed(window.course, fresh(theta, tasks), ended)
        return grads, after, metrics

    return Estimate(begin, run)


def check_seed(estimator: Estimator, seed: int | None) -> None:
    """Refuse perturbations that nobody chose."""
    if seed is None and estimator.random:
        raise ValueError(
            f"estimate: {estimator.name} needs a seed, another one at every call, got none. The same "
            "perturbations in every window would bias it."
        )


def renewed(course: Course, fresh: Course, ended: Tensor) -> Course:
    """The courses, of which those that ended begin anew."""
    choose = lambda old, new: torch.where(ended.reshape(-1, *[1] * (old.ndim - 1)), new, old)  # noqa: E731
    return tree.map(choose, course, fresh)


def unit_norm(grads: Tree) -> Tree:
    """Every task's gradient divided by its norm, ``[task, ...]``; what is zero or not finite counts as zero."""
    square = lambda g: (g * g).reshape(len(g), -1).sum(1)  # noqa: E731
    norm = torch.stack([square(g) for g in tree.leaves(grads)]).sum(0).sqrt()
    fine = torch.isfinite(norm) & (norm > 0)
    factor = torch.where(fine, 1 / norm, 0.0)
    wide = lambda x, g: x.reshape(-1, *[1] * (g.ndim - 1))  # noqa: E731
    return tree.map(lambda g: torch.where(wide(fine, g), g * wide(factor, g), 0.0), grads)


def estimate_init(
    system: System, estimator: Estimator, outer: Transform, theta: Tree, tasks: Tree, seed: int = 0
) -> MetaState:
    """The state before the first ``estimate_step``; its ``carry`` holds the tasks under way.

    Args:
        system: what is unrolled.
        estimator: how its gradient is found.
        outer: the outer optimiser.
        theta: the first weights.
        tasks: the first tasks.
        seed: of the times at which the first courses end.
    """
    check_outer("estimate_init", outer)
    carry = estimate(system, estimator, Plan(compile=False)).begin(theta, tasks, seed)
    step = torch.zeros((), dtype=torch.int64, device=tree.device(theta))
    return MetaState(theta, outer.init(theta), step, carry)


def estimate_step(
    system: System,
    estimator: Estimator,
    outer: Transform,
    plan: Plan = Plan(),
    *,
    each: Callable[[Tree], Tree] | None = None,
) -> Callable[[MetaState, Tree, int], tuple[MetaState, Metrics]]:
    """One outer step by an estimated gradient: ``(state, tasks, seed) -> (state, metrics)``.

    As ``meta_step``: where a number is not finite, weights and optimiser stay as they are, and ``finite`` is false; the
    tasks in the carry then begin anew. Arguments as for ``estimate``.
    """
    check_outer("estimate_step", outer)
    found = estimate(system, estimator, plan, each=each)

    def step(state: MetaState, tasks: Tree, seed: int) -> tuple[MetaState, Metrics]:
        grads, carry, metrics = found(state.meta, state.carry, tasks, seed)
        updates, opt_state = outer.update(grads, state.opt_state, state.meta)
        fine = metrics["finite"]
        meta = tree.where(fine, tree.add(state.meta, updates), state.meta)
        opt_state = tree.where(fine, opt_state, state.opt_state)
        if not found_finite(fine):
            carry = found.begin(state.meta, tasks, seed)
        return MetaState(meta, opt_state, state.step + 1, carry), metrics

    return step


def found_finite(fine: Tensor) -> bool:
    """The value of a flag, read once an outer step."""
    return bool(fine)
