"""One table of algorithms on tiny smooth problems: every row goes through every contract test.

A new algorithm is a new row here. ``exact`` says that its meta-gradient is the derivative of
``Algorithm.loss`` (checked by finite differences); ``reference`` is its written definition as a plain loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import custom_loops
import problems
import pytest
import torch
from helpers import random_like
from problems import LOSS, WAYS, Problem, network, squared_error, with_metrics
from reference import inner, metric, networks, prototypes, rules, stopping
from reference.loops import Episode, Loss, maml, meta_gradient, metasgd, reptile
from torch import Tensor, nn

import fmeta
from fmeta import Algorithm, Transform

Reference = Callable[[Any, Sequence[Episode]], tuple[Any, Tensor]]
Inner = tuple[Transform, rules.Rule]


class Case(NamedTuple):
    """One row: see the module's docstring."""

    name: str
    make: Callable[[], Problem]
    exact: bool
    reference: Reference
    compiled: bool = False
    """Whether the compile tests run it too; every kernel costs seconds."""
    tolerance: float | None = None


def maml_row(
    name: str,
    inner: Inner,
    steps: int,
    *,
    compiled: bool = False,
    query_loss: Loss | None = None,
    last: int | None = None,
    adapts: str | None = None,
    weights: tuple[float, ...] | None = None,
    per_step: bool = False,
    factory: Callable[..., Algorithm] = fmeta.maml,
) -> Case:
    """A row of ``maml``, or of ``anil``, whose options are given once for fmeta and its reference."""
    options: dict[str, Any] = {}
    if last is not None:
        options["adjoint"] = fmeta.first_order() if last == 0 else fmeta.truncated(last)
    if adapts is not None:
        options["adapts"] = adapts
    if weights is not None:
        options["weights"] = weights
    if per_step:
        options["batches"] = "per_step"
    if query_loss is not None:
        options["query_loss"] = with_metrics(query_loss)

    def make() -> Problem:
        algorithm = factory(LOSS, inner[0], steps=steps, **options)
        return Problem(algorithm, network(), problems.regression_tasks(steps if per_step else None))

    names = None if adapts is None else [name for name in network() if name.startswith(adapts)]
    objective = maml(
        squared_error, inner[1], steps,
        query_loss=query_loss, adapts=names, last=last, weights=weights, per_step=per_step,
    )  # fmt: skip
    final = maml(squared_error, inner[1], steps, query_loss=query_loss, adapts=names, per_step=per_step)

    def reference(meta: Any, tasks: Sequence[Episode]) -> tuple[Any, Tensor]:
        """What is reported as the loss is that after the last update, whatever else is in the objective."""
        return meta_gradient(objective, meta, tasks)[0], meta_gradient(final, meta, tasks)[1]

    return Case(name, make, last is None, reference, compiled)


def model_row(
    name: str, module: Callable[[], nn.Module], feature: Sequence[int], steps: int = 2, compiled: bool = False
) -> Case:
    """MAML on a classifier made of torch layers."""

    def make() -> Problem:
        apply, params, _ = problems.model_problem(module())
        algorithm = fmeta.maml(fmeta.losses.cross_entropy(apply), fmeta.sgd(0.3), steps=steps)
        return Problem(algorithm, params, problems.classification_tasks(*feature))

    def reference(meta: Any, tasks: Sequence[Episode]) -> tuple[Any, Tensor]:
        objective = maml(problems.model_problem(module()).loss, rules.sgd(0.3), steps)
        return meta_gradient(objective, meta, tasks)

    return Case(name, make, exact=True, reference=reference, compiled=compiled)


def metasgd_row(name: str, last: int | None = None) -> Case:
    """Rates that differ from weight to weight."""

    def make() -> Problem:
        adjoint = fmeta.unroll() if last is None else fmeta.truncated(last)
        algorithm = fmeta.metasgd(LOSS, steps=3, adjoint=adjoint)
        rates = {key: 0.2 + 0.05 * random_like(value, len(key)) for key, value in network().items()}
        return Problem(algorithm, {"params": network(), "lr": rates}, problems.regression_tasks())

    objective = metasgd(squared_error, 3, last=last)
    return Case(name, make, last is None, lambda meta, tasks: meta_gradient(objective, meta, tasks))


def reptile_row(name: str, inner: Inner) -> Case:
    def make() -> Problem:
        algorithm = fmeta.reptile(LOSS, inner[0], steps=3)
        return Problem(algorithm, network(), problems.regression_tasks())

    def reference(meta: Any, tasks: Sequence[Episode]) -> tuple[Any, Tensor]:
        return reptile(squared_error, inner[1], 3, meta, tasks)

    return Case(name, make, exact=False, reference=reference)


def protonet_row(distance: str, scale: float = 1.0, compiled: bool = False) -> Case:
    def make() -> Problem:
        algorithm = fmeta.protonet(networks.mlp, distance=distance, ways=WAYS)
        return Problem(algorithm, network(), problems.classification_tasks(2))

    objective = prototypes.protonet(networks.mlp, WAYS, distance, scale)
    reference: Reference = lambda meta, tasks: meta_gradient(objective, meta, tasks)  # noqa: E731
    return Case(f"protonet {distance}", make, exact=True, reference=reference, compiled=compiled)


def stopping_row(name: str, **when: float) -> Case:
    """MAML, whose tasks stop after different numbers of updates."""

    def make() -> Problem:
        algorithm = fmeta.early_stopping(fmeta.maml(LOSS, PLAIN[0], steps=3), **when)  # type: ignore[arg-type]
        return Problem(algorithm, network(), problems.regression_tasks())

    objective = stopping.maml(squared_error, PLAIN[1], 3, **when)
    return Case(name, make, True, lambda meta, tasks: meta_gradient(objective, meta, tasks))


def boil_row(name: str, keeps: str, weights: Callable[[], Any] = network) -> Case:
    def make() -> Problem:
        algorithm = fmeta.boil(LOSS, PLAIN[0], steps=3, keeps=keeps)
        return Problem(algorithm, weights(), problems.regression_tasks())

    objective = maml(squared_error, PLAIN[1], 3, adapts=[n for n in weights() if not n.startswith(keeps)])
    return Case(name, make, True, lambda meta, tasks: meta_gradient(objective, meta, tasks))


def cavia_row(name: str) -> Case:
    def make() -> Problem:
        algorithm = fmeta.cavia(with_metrics(problems.context_error), fmeta.sgd(0.5), steps=3)
        return Problem(algorithm, problems.context_network(), problems.regression_tasks())

    objective = inner.context(problems.context_error, 0.5, 3, "context")
    return Case(name, make, True, lambda meta, tasks: meta_gradient(objective, meta, tasks))


def mamlpp_row(
    name: str,
    weights: tuple[float, ...] | None = None,
    last: int | None = None,
    per_step: str | None = None,
    adapts: str | None = None,
    compiled: bool = False,
) -> Case:
    """Rates, and with ``per_step`` parameters, that differ from step to step."""

    def make() -> Problem:
        adjoint = fmeta.unroll() if last is None else fmeta.truncated(last)
        algorithm = fmeta.mamlpp(
            LOSS, steps=3, weights=weights, adjoint=adjoint, per_step=per_step, adapts=adapts
        )
        meta = algorithm.init(network())
        meta["lr"] = {key: 0.1 + 0.05 * random_like(rates, len(key)) for key, rates in meta["lr"].items()}
        if per_step is not None:
            tables = meta["per_step"].items()
            meta["per_step"] = {key: table + 0.3 * random_like(table, len(key)) for key, table in tables}
        return Problem(algorithm, meta, problems.regression_tasks())

    moving = list(make().meta["lr"])
    objective, final = (inner.step_rates(squared_error, 3, w, last, moving) for w in (weights, None))

    def reference(meta: Any, tasks: Sequence[Episode]) -> tuple[Any, Tensor]:
        return meta_gradient(objective, meta, tasks)[0], meta_gradient(final, meta, tasks)[1]

    return Case(name, make, last is None, reference, compiled)


def sharpmaml_row(
    name: str, inner_radius: float, outer_radius: float, last: int | None = None, compiled: bool = False
) -> Case:
    """Radii so large that going uphill changes the gradient by more than a tenth."""

    def make() -> Problem:
        adjoint = fmeta.unroll() if last is None else fmeta.truncated(last)
        algorithm = fmeta.sharpmaml(
            LOSS, PLAIN[0], steps=3, inner_radius=inner_radius, outer_radius=outer_radius, adjoint=adjoint
        )
        return Problem(algorithm, network(), problems.regression_tasks())

    lower = maml(squared_error, PLAIN[1], 3)
    if inner_radius:
        lower = inner.sharp(squared_error, 0.2, 3, inner_radius, last)

    def reference(meta: Any, tasks: Sequence[Episode]) -> tuple[Any, Tensor]:
        if outer_radius:
            return inner.sharp_outside(lower, outer_radius, meta, tasks)
        return meta_gradient(lower, meta, tasks)

    return Case(name, make, last is None and not outer_radius, reference, compiled)


def metacurvature_row(name: str) -> Case:
    """Matrices that are far from identities and from symmetric ones."""

    def make() -> Problem:
        algorithm = fmeta.metacurvature(LOSS, steps=2, lr=0.2)
        meta = algorithm.init(network())
        curvature = {
            key: {side: matrix + 0.3 * random_like(matrix, len(key + side)) for side, matrix in sides.items()}
            for key, sides in meta["curvature"].items()
        }
        return Problem(algorithm, {**meta, "curvature": curvature}, problems.regression_tasks())

    objective = inner.curvature(squared_error, 0.2, 2)
    return Case(name, make, True, lambda meta, tasks: meta_gradient(objective, meta, tasks))


def blended(theta: Any, steps: float | None = None) -> fmeta.Transform:
    """A learned optimiser of two numbers: what counts of the gradient, and of its running sum."""

    def update(grads: Any, sums: Any, params: Any) -> tuple[Any, Any]:
        sums = {key: 0.5 * sums[key] + g for key, g in grads.items()}
        return {key: -theta["a"] * g - theta["b"] * sums[key] for key, g in grads.items()}, sums

    return fmeta.Transform(lambda params: {key: torch.zeros_like(p) for key, p in params.items()}, update)


def learned_update_row(name: str, last: int | None = None, adapts: str | None = None, **options: Any) -> Case:
    numbers = {key: torch.tensor(value, dtype=torch.float64) for key, value in (("a", 0.2), ("b", 0.1))}

    class Blended:
        init = staticmethod(lambda seed: numbers)
        __call__ = staticmethod(blended)

    def make() -> Problem:
        adjoint = fmeta.unroll() if last is None else fmeta.truncated(last)
        algorithm = fmeta.learned_update(LOSS, Blended(), steps=3, adjoint=adjoint, adapts=adapts, **options)
        return Problem(algorithm, algorithm.init(network()), problems.regression_tasks())

    objective = inner.blended(squared_error, 3, options.get("learns_start", True), last, adapts)
    return Case(
        name,
        make,
        last is None and options.get("learns_start", True),
        lambda meta, tasks: meta_gradient(objective, meta, tasks),
    )


def protomaml_row(name: str, steps: int) -> Case:
    def make() -> Problem:
        algorithm = fmeta.protomaml(networks.mlp, fmeta.sgd(0.1), steps=steps, ways=WAYS)
        return Problem(algorithm, network(), problems.classification_tasks(2))

    nll = problems.negative_log_likelihood
    objective = inner.proto_head(networks.mlp, nll, 0.1, steps, WAYS)
    return Case(name, make, True, lambda meta, tasks: meta_gradient(objective, meta, tasks))


def imaml_row(
    name: str, solver: str, iterations: int, solve: Callable[[Tensor, Tensor], Tensor], damping: float = 0.0
) -> Case:
    def make() -> Problem:
        algorithm = fmeta.imaml(
            LOSS,
            fmeta.sgd(0.2),
            steps=3,
            strength=2.0,
            solver=solver,
            iterations=iterations,  # type: ignore[arg-type]
            damping=damping,
        )
        return Problem(algorithm, network(), problems.regression_tasks())

    def reference(meta: Any, tasks: Sequence[Episode]) -> tuple[Any, Tensor]:
        return inner.implicit(squared_error, 0.2, 3, 2.0, solve, meta, tasks)

    return Case(name, make, exact=False, reference=reference, tolerance=1e-9)


def fitted_row(
    name: str,
    make_algorithm: Callable[[], Algorithm],
    meta: Callable[[], Any],
    objective: Any,
    compiled: bool = False,
) -> Case:
    """An algorithm without steps, on classification."""

    def make() -> Problem:
        return Problem(make_algorithm(), meta(), problems.classification_tasks(2))

    return Case(name, make, True, lambda meta, tasks: meta_gradient(objective, meta, tasks), compiled)


def numbers_of(*names: str) -> Any:
    """The meta of a solver: an embedding and its own numbers."""
    numbers = {"log_ridge": -0.5, "scale": 1.5, "bias": 0.1}
    return {"params": network(), **{name: torch.tensor(numbers[name]).double() for name in names}}


def relation_meta() -> Any:
    return {"embedding": network(), "relation": networks.mlp_weights([2 * WAYS, 4, 1], problems.generator(9))}


def solved(H: Tensor, g: Tensor) -> Tensor:
    return torch.linalg.solve(torch.eye(len(g)).double() + H, g)


def summed(H: Tensor, g: Tensor) -> Tensor:
    """Three terms of Neumann's series after the first."""
    return g - H @ g + H @ H @ g - H @ H @ H @ g


def custom_row(name: str) -> Case:
    """An algorithm of the tests' own, written as an ``InnerLoop``."""
    make, objective = custom_loops.OBJECTIVES[name]
    return Case(name, make, True, lambda meta, tasks: meta_gradient(objective, meta, tasks))


def exponential(k: Any) -> Any:
    """A schedule, of a Python int or of a tensor; its values are exact in float32 too."""
    return 0.25 * 0.5**k


MEAN = torch.tensor([0.1, -0.2, 0.3]).double()
LIMIT = 1.15  # some gradients of the problem are longer, some are not
RATES = {"body0.weight": 0.1, "body0.bias": 0.4, "head.weight": 0.2, "head.bias": 0.3}
ADAM = dict(eps_root=1e-2)  # a root with a moderate slope, so that finite differences are accurate

# Every inner rule in fmeta's form and in the reference's
PLAIN = fmeta.sgd(0.2), rules.sgd(0.2)
MOMENTUM = fmeta.sgd(0.1, momentum=0.9), rules.sgd(0.1, 0.9)
NESTEROV = fmeta.sgd(0.1, momentum=0.9, nesterov=True), rules.sgd(0.1, 0.9, True)
DECAYED = fmeta.sgd(0.2, momentum=0.5, weight_decay=0.1), rules.sgd(0.2, 0.5, weight_decay=0.1)
SCHEDULED = fmeta.sgd(exponential), rules.sgd(exponential)
CLIP = fmeta.clip_by_norm(LIMIT, eps=0.0, eps_root=0.0)
CLIPPED = fmeta.chain(CLIP, fmeta.sgd(0.2)), rules.clipped(rules.sgd(0.2), LIMIT)
PER_PARAMETER = fmeta.sgd(RATES), rules.sgd(RATES)
ANCHORED = custom_loops.anchored(0.2, 0.5), rules.anchored(0.2, 0.5)
ADAPTIVE = fmeta.adam(0.1, **ADAM), rules.adam(0.1, **ADAM)

CASES = (
    maml_row("maml 1 step", PLAIN, 1),
    maml_row("maml 3 steps", PLAIN, 3, compiled=True),
    maml_row("maml without steps", PLAIN, 0),
    maml_row("maml momentum inside", MOMENTUM, 3),
    maml_row("maml nesterov inside", NESTEROV, 3),
    maml_row("maml weight decay inside", DECAYED, 3),
    maml_row("maml schedule inside", SCHEDULED, 3),
    maml_row("maml clip inside", CLIPPED, 3),
    maml_row("maml rate a parameter", PER_PARAMETER, 3),
    maml_row("maml anchored inside", ANCHORED, 3),
    maml_row("maml adam inside", ADAPTIVE, 3),
    maml_row("maml batch a step", PLAIN, 3, per_step=True),
    maml_row("maml adapts the body", PLAIN, 3, adapts="body0"),
    maml_row("maml multi-step loss", PLAIN, 3, weights=(0.1, 0.0, 0.3, 0.6)),
    maml_row("maml other query loss", PLAIN, 2, query_loss=problems.log_cosh_error),
    maml_row("maml first order", PLAIN, 3, last=0),
    maml_row("maml first order, momentum and decay", DECAYED, 3, last=0),
    maml_row("maml first order, adapts the body", PLAIN, 3, last=0, adapts="body0"),
    maml_row("maml truncated", MOMENTUM, 3, last=1),
    maml_row("maml truncated, multi-step loss", PLAIN, 3, last=2, weights=(0.1, 0.2, 0.3, 0.4)),
    maml_row("anil", PLAIN, 3, adapts="head", factory=fmeta.anil),
    maml_row("anil first order", PLAIN, 3, adapts="head", last=0, factory=fmeta.anil),
    metasgd_row("metasgd"),
    metasgd_row("metasgd first order", last=0),
    reptile_row("reptile", MOMENTUM),
    reptile_row("reptile adam inside", ADAPTIVE),
    stopping_row("maml stopped early", below=0.9),
    stopping_row("maml stopped by patience", patience=1, min_delta=0.12),
    boil_row("boil", "head"),
    boil_row("boil warp layers", "warp0", problems.warp_network),
    cavia_row("cavia"),
    mamlpp_row("mamlpp"),
    mamlpp_row("mamlpp multi-step loss", weights=(0.0, 0.2, 0.3, 0.5)),
    mamlpp_row("mamlpp first order", last=0),
    mamlpp_row("mamlpp biases a step", per_step="*.bias", compiled=True),
    mamlpp_row("mamlpp biases a step, multi-step loss", (0.1, 0.2, 0.3, 0.4), per_step="*.bias"),
    mamlpp_row("mamlpp biases a step, first order", last=0, per_step="*.bias"),
    mamlpp_row("mamlpp biases a step, truncated", (0.1, 0.0, 0.3, 0.6), last=1, per_step="*.bias"),
    mamlpp_row("mamlpp head a step, adapts one weight", per_step="head", adapts="body0.weight"),
    sharpmaml_row("sharpmaml low", 0.3, 0.0, compiled=True),
    sharpmaml_row("sharpmaml low, first order", 0.3, 0.0, last=0),
    sharpmaml_row("sharpmaml low, truncated", 0.3, 0.0, last=2),
    sharpmaml_row("sharpmaml up", 0.0, 0.3),
    sharpmaml_row("sharpmaml both", 0.3, 0.3, compiled=True),
    metacurvature_row("metacurvature"),
    learned_update_row("learned_update"),
    learned_update_row("learned_update first order", last=0),
    learned_update_row("learned_update, the start stays", learns_start=False),
    learned_update_row("learned_update, the start stays, adapts the head", learns_start=False, adapts="head"),
    protomaml_row("protomaml", 2),
    protomaml_row("protomaml without steps", 0),
    imaml_row("imaml cg", "cg", 40, solved),
    imaml_row("imaml cg damped", "cg", 40, lambda H, g: solved(H * 2 / (2 + 3), g), damping=3.0),
    imaml_row("imaml neumann", "neumann", 3, summed),
    imaml_row("imaml identity", "identity", 0, lambda H, g: g),
    fitted_row(
        "matchingnet",
        lambda: fmeta.matchingnet(networks.mlp, scale=3.0, ways=WAYS),
        network,
        metric.matching(networks.mlp, WAYS, 3.0),
    ),
    fitted_row(
        "relationnet",
        lambda: fmeta.relationnet(networks.mlp, networks.mlp, ways=WAYS),
        relation_meta,
        metric.relation(networks.mlp, networks.mlp, WAYS),
    ),
    fitted_row(
        "r2d2",
        lambda: fmeta.r2d2(networks.mlp, ways=WAYS),
        lambda: numbers_of("log_ridge", "scale", "bias"),
        metric.ridge(networks.mlp, WAYS),
        compiled=True,
    ),
    fitted_row(
        "lrd2",
        lambda: fmeta.lrd2(networks.mlp, iterations=3, ways=WAYS),
        lambda: numbers_of("log_ridge", "scale"),
        metric.logistic(networks.mlp, WAYS, 3),
        compiled=True,
    ),
    fitted_row(
        "metaoptnet",
        lambda: fmeta.metaoptnet(networks.mlp, C=1.0, iterations=6, ways=WAYS),
        lambda: numbers_of("scale"),
        metric.machine(networks.mlp, WAYS, 1.0, 6),
        compiled=True,
    ),
    fitted_row(
        "simpleshot",
        lambda: fmeta.simpleshot(networks.mlp, mean=MEAN, ways=WAYS),
        network,
        metric.centroid(networks.mlp, WAYS, MEAN),
    ),
    protonet_row("euclidean", compiled=True),
    protonet_row("cosine", scale=10.0),
    model_row("maml BatchNorm", problems.batchnorm_model, [2]),
    model_row("maml LayerNorm", problems.layernorm_model, [2]),
    model_row("maml convolution", problems.conv_model, [1, 4, 4]),
    model_row("maml convolution 1 step", problems.conv_model, [1, 4, 4], steps=1, compiled=True),
    *(custom_row(name) for name in custom_loops.OBJECTIVES),
)
NAMES = [case.name for case in CASES]


def each(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Run a test once for each of these rows, under their names."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def case_named(name: str) -> Case:
    return CASES[NAMES.index(name)]


def named_with(*parts: str) -> list[str]:
    """Names of the rows in which any of the parts occurs; at least one row for each part."""
    missing = [part for part in parts if not any(part in name for name in NAMES)]
    assert not missing, f"no case is called {missing}"
    return [name for name in NAMES if any(part in name for part in parts)]
