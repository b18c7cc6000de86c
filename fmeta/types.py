"""All records and aliases that fmeta's layers share; no logic.

Everything here describes ONE task. The only leading axis that the library adds is ``task``, and it is
added in ``fmeta.parallel``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

Tree = Any
"""A pytree of tensors: nested dicts, tuples and NamedTuples. Empty state is ``()``, never None."""
Params = dict[str, Tensor]
"""Weights of a module, keyed and ordered like ``module.named_parameters()``."""
Metrics = dict[str, Tensor]
"""Named scalars of one task."""


class MetaLearningWarning(UserWarning):
    """A setting that has no effect, or a strategy that fell back to a slower one."""


class Batch(NamedTuple):
    """Examples of one task. ``x`` may be any pytree of tensors, a tokenised text say."""

    x: Tree  # leaves [shots, *feature]
    y: Tree  # [shots] for labels, [shots, *target] for regression


class Task(NamedTuple):
    """What an algorithm adapts on and what it is judged by; a batch of tasks adds a leading axis."""

    support: Batch
    query: Batch


class LossFn(Protocol):
    """The loss of one task on one batch: ``(params, batch) -> (scalar, metrics)``."""

    def __call__(self, params: Params, batch: Batch, /) -> tuple[Tensor, Metrics]: ...  # noqa: D102


class Transform(NamedTuple):
    """An optimiser, inner or outer, as two pure functions.

    ``init(params) -> state`` and ``update(grads, state, params) -> (updates, state)``; the caller adds the
    updates to the parameters. ``inner`` gives the same rule in the form that is safe to differentiate
    through (a root with a finite slope at zero); None where the rule is safe as it stands.
    """

    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
    inner: Callable[[], Transform] | None = None


class Adjoint(NamedTuple):
    """What part of the inner loop is differentiated, as data.

    ``last`` is the number of final inner steps whose gradients are differentiated again: None for all of
    them, 0 for none. Earlier gradients count as constants; the path through the carry stays.
    """

    last: int | None = None


class Adapted(NamedTuple):
    """What adaptation to one task returns."""

    params: Tree
    opt_state: Tree
    losses: Tensor  # [steps], the support loss before each update


class InnerLoop(NamedTuple):
    """Everything an engine must know of an algorithm, as pure functions of ONE task.

    ``k`` is the inner step as a tensor without dimensions, so that one kernel serves every step. Read what
    differs by step with it, ``rates.index_select(0, k[None])[0]`` (``rates[k]`` would read its value).
    """

    start: Callable[[Tree, Batch], Tree]
    """``(meta, support) -> params``: what adapts (all weights, a head, a context, prototypes)."""
    loss: Callable[[Tree, Tree, Batch, Tensor], tuple[Tensor, Metrics]]
    """``(params, meta, batch, k) -> (scalar, metrics)``: the support loss; may read meta."""
    inner: Callable[[Tree, Tensor], Transform]
    """``(meta, k) -> Transform``: may read meta (learned rates, a learned optimiser)."""
    outer: Callable[[Tree, Tree, Task], tuple[Tensor, Metrics]]
    """``(params, meta, task) -> (scalar, metrics)``: the objective of the outer loop."""
    steps: int
    weights: tuple[float, ...] | None = None
    """Weight of the objective after 0, 1, ... ``steps`` updates; None counts only the last."""
    adjoint: Adjoint = Adjoint()
    batches: Literal["whole", "per_step"] = "whole"
    """Whether each inner step sees the whole support set, or support leaves are ``[steps, shots, ...]``."""
    scale: float = 1.0
    """What the losses are multiplied by while they are differentiated; it is divided out again. A plan sets it
    (``precision="fp16"``), an algorithm never."""
    inner_radius: float = 0.0
    """How far uphill of the parameters, along the support gradient there, an inner step takes its gradient."""
    outer_radius: float = 0.0
    """How far uphill of meta, along the mean meta-gradient there, the meta-gradient is taken."""


class Algorithm(NamedTuple):
    """A meta-learning algorithm. All but ``init`` are about ONE task; ``inner_loop`` defines the rest."""

    init: Callable[[Params | None], Tree]
    """``(params) -> meta``."""
    inner_loop: InnerLoop
    adapt: Callable[[Tree, Batch], Adapted]
    """``(meta, support) -> Adapted``."""
    loss: Callable[[Tree, Task], tuple[Tensor, Metrics]]
    """``(meta, task) -> (objective, metrics)`` after adaptation: what the meta-gradient is of."""
    predict: Callable[[Tree, Batch | Adapted, Tree], Tree]
    """``(meta, support, x) -> outputs`` of the adapted model; an ``Adapted`` in place of the support set
    spares adapting again."""


class System(NamedTuple):
    """A process of many steps that parameters ``theta`` steer: training by a learned optimiser, say. Of ONE task.

    What is minimised is the mean of the losses of all steps.
    """

    start: Callable[[Tree, Tree], Tree]
    """``(theta, task) -> state``."""
    step: Callable[[Tree, Tree, Tree, Tensor], tuple[Tree, Tensor]]
    """``(theta, state, task, t) -> (state, loss)``; ``t``, how many steps came before, is a tensor ``[]``."""
    steps: int
    """The longest that a task goes on."""
    length: Callable[[Tree], Tensor] | None = None
    """``(task) -> []``: how many steps this task has, where they differ."""


class MetaState(NamedTuple):
    """What one outer step hands to the next."""

    meta: Tree
    opt_state: Tree
    step: Tensor  # [], int64
    carry: Tree = ()
    """What survives an outer step without a gradient: particles, per-step statistics, a loss scale."""


class Sampler(Protocol):
    """``(seed, step) -> Task`` with a leading task axis on every leaf; pure, so resuming needs no state."""

    def __call__(self, seed: int, step: int) -> Task: ...  # noqa: D102


@dataclass(frozen=True)
class Plan:
    """How a meta-step is run. It never changes what is computed.

    Attributes:
        engine: ``"adjoint"``, the backward loop written out (fast, frugal); ``"nested"``, gradients of
            gradients by torch.func (the definition that the others are tested against); ``"autograd"``,
            torch.autograd, for losses that torch.func refuses; it needs ``tasks="loop"``.
        tasks: ``"vmap"`` batches tasks of equal shapes; ``"loop"`` takes them one at a time, and then a batch
            of tasks may be a sequence of ``Task`` of different shapes.
        chunk_size: tasks run side by side; None for all of them; ``"auto"`` starts with all, halves when memory
            runs out and, compiled, times up to two smaller sizes where a call takes over 50 ms; the fastest is
            kept for such shapes, on disk too, and logged (``logging.getLogger("fmeta")``).
        compile: ``"auto"`` compiles training steps where that is possible and says once why not; True compiles
            everything, evaluation too, or raises; False nothing.
        remat: length of the blocks of inner steps that are recomputed in the backward loop, so that only
            ``steps / remat + remat`` carries are kept; None keeps all.
        precision: dtype of products and convolutions in the losses (``torch.autocast``): None for that of the
            parameters. Parameters, updates, losses and meta-gradients are float32 throughout (float64 ones are
            not lowered). ``"fp16"`` needs the adjoint engine, which scales losses by 1024 while they are
            differentiated; what overflows makes ``finite`` false. ``"tf32"`` lets a GPU round what it multiplies
            to 10 bits, and changes nothing elsewhere. This alone changes results beyond rounding
            in the parameters' dtype.
        mesh: a ``torch.distributed`` ``DeviceMesh``; tasks are sharded over its axis ``task`` (or its only axis),
            other axes take no part. Every rank calls with the same state and the same whole batch, computes
            its own tasks and gets the results of all: means over all tasks, metrics ``[task]`` and
            ``first_bad`` as one process has them, up to the order of summation. Any number of tasks will do.
        randomness: what a random operation (dropout) in a loss may do: refused; one mask a task; the same
            mask in every task. A random loss runs uncompiled. Rank 0's random state counts; on a mesh
            ``"different"`` needs a ``chunk_size`` (or ``tasks="loop"``), whose chunks are never parted.
    """

    engine: Literal["adjoint", "nested", "autograd"] = "adjoint"
    tasks: Literal["vmap", "loop"] = "vmap"
    chunk_size: int | Literal["auto"] | None = None
    compile: bool | Literal["auto"] = "auto"
    remat: int | None = None
    precision: Literal["tf32", "bf16", "fp16"] | None = None
    mesh: Any = None
    randomness: Literal["error", "different", "same"] = "error"


TaskBatch = Task | Sequence[Task]
"""Tasks stacked along a leading axis; with ``Plan(tasks="loop")`` also a sequence of them."""
