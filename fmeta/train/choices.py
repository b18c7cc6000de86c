"""The algorithms that ``--algorithm`` names, made for a recipe's model and loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import fmeta
from fmeta.annealing import Phase
from fmeta.train.config import Inner
from fmeta.types import Adjoint, Algorithm, LossFn, Transform


class Given(NamedTuple):
    """What an algorithm is made from."""

    apply: Callable[..., Any]
    loss: LossFn
    inner: Inner
    outputs: int
    adapts: tuple[str, ...] | None
    phase: Phase | None = None
    """Where mamlpp's annealing stands."""
    trains: bool = False
    """Whether it is for training tasks."""

    def optimizer(self) -> Transform:
        """The inner optimiser."""
        rate = self.inner.inner_lr
        return fmeta.sgd(rate) if self.inner.inner_optimizer == "sgd" else fmeta.adam(rate, b1=0.0)

    def adjoint(self) -> Adjoint:
        """What part of the inner loop is differentiated."""
        if self.phase is not None:
            return self.phase.adjoint
        return fmeta.first_order() if self.inner.first_order else fmeta.unroll()


WEIGHTS: dict[str, Callable[[Given], Algorithm]] = {
    "maml": lambda g: fmeta.maml(g.loss, g.optimizer(), steps=g.inner.inner_steps, adapts=g.adapts),
    "fomaml": lambda g: fmeta.maml(
        g.loss,
        g.optimizer(),
        steps=g.inner.inner_steps,
        adapts=g.adapts,
        adjoint=fmeta.first_order(),
    ),
    "anil": lambda g: fmeta.anil(g.loss, g.optimizer(), steps=g.inner.inner_steps),
    "boil": lambda g: fmeta.boil(g.loss, g.optimizer(), steps=g.inner.inner_steps, keeps=["head", *norms(g)]),
    "reptile": lambda g: fmeta.reptile(
        g.loss,
        g.optimizer(),
        steps=g.inner.inner_steps,
        batches="per_step" if g.trains and g.inner.minibatches else "whole",
    ),
    "metasgd": lambda g: fmeta.metasgd(
        g.loss, steps=g.inner.inner_steps, lr=g.inner.inner_lr, adapts=g.adapts, adjoint=g.adjoint()
    ),
    "mamlpp": lambda g: fmeta.mamlpp(
        g.loss,
        steps=g.inner.inner_steps,
        lr=g.inner.inner_lr,
        adapts=g.adapts,
        adjoint=g.adjoint(),
        weights=g.phase.weights if g.phase else None,
        per_step=(norms(g) or None) if g.inner.annealing else None,
    ),
    "sharpmaml": lambda g: fmeta.sharpmaml(
        g.loss,
        g.optimizer(),
        steps=g.inner.inner_steps,
        inner_radius=g.inner.radius,
        outer_radius=g.inner.radius,
        adapts=g.adapts,
    ),
    "metacurvature": lambda g: fmeta.metacurvature(
        g.loss, steps=g.inner.inner_steps, lr=g.inner.inner_lr, adapts=g.adapts
    ),
    "cavia": lambda g: fmeta.cavia(g.loss, g.optimizer(), steps=g.inner.inner_steps),
    "learned": lambda g: fmeta.learned_update(
        g.loss,
        fmeta.learned.meta_transformer(lr=g.inner.inner_lr),
        steps=g.inner.inner_steps,
        learns_start=False,
        adapts=g.adapts,
        adjoint=g.adjoint(),
    ),
    "imaml": lambda g: fmeta.imaml(
        g.loss,
        g.optimizer(),
        steps=g.inner.inner_steps,
        strength=g.inner.strength,
        iterations=g.inner.solver_iterations,
        damping=g.inner.damping,
    ),
}
"""Those that adapt a model with its head."""
EMBEDDINGS: dict[str, Callable[[Given], Algorithm]] = {
    "protonet": lambda g: fmeta.protonet(g.apply, ways=g.outputs),
    "matchingnet": lambda g: fmeta.matchingnet(g.apply, ways=g.outputs),
    "r2d2": lambda g: fmeta.r2d2(g.apply, ways=g.outputs),
    "lrd2": lambda g: fmeta.lrd2(g.apply, ways=g.outputs),
    "metaoptnet": lambda g: fmeta.metaoptnet(g.apply, ways=g.outputs),
    "protomaml": lambda g: fmeta.protomaml(
        g.apply,
        g.optimizer(),
        steps=g.inner.inner_steps,
        ways=g.outputs,
        adapts=g.adapts,
        adjoint=g.adjoint(),
    ),
}
"""Those that classify by an embedding, and make a head of their own."""
STEPLESS = ("protonet", "matchingnet", "r2d2", "lrd2", "metaoptnet")
"""Those without inner steps."""


def norms(given: Given) -> list[str]:
    """Patterns of what never adapts: the recipe's exclusions."""
    return [pattern.removeprefix("!") for pattern in given.adapts or () if pattern.startswith("!")]


def make_algorithm(given: Given, metric: str, has_context: bool) -> Algorithm:
    """The algorithm by its name on the command line.

    Raises:
        ValueError: for one that needs classes, or a model with context parameters, in a recipe without.
    """
    name = given.inner.algorithm
    if name in EMBEDDINGS and metric != "accuracy":
        raise ValueError(f"train: {name} needs classes, got a regression recipe. Choose another --algorithm.")
    if name == "cavia" and not has_context:
        raise ValueError(
            "train: cavia needs a model with context parameters, which only the sinusoid recipe has. Choose "
            "another --algorithm."
        )
    algorithm, inner = (EMBEDDINGS | WEIGHTS)[name](given), given.inner
    if inner.stop_below is None and inner.stop_patience is None:
        return algorithm
    return fmeta.early_stopping(algorithm, below=inner.stop_below, patience=inner.stop_patience)
