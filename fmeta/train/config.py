"""What a run is made of, as frozen dataclasses; the command line and its help are generated from them.

A recipe is a function that returns a ``Config``. The text under each field is the help that is printed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

import tyro

AlgorithmName = Literal[
    "maml", "fomaml", "anil", "boil", "reptile", "metasgd", "mamlpp", "sharpmaml", "metacurvature", "cavia", "imaml",
    "learned", "protomaml", "protonet", "matchingnet", "r2d2", "lrd2", "metaoptnet",
]  # fmt: skip
TaskT = TypeVar("TaskT")
MaybeInt = Annotated[int | None, tyro.conf.arg(metavar="INT")]
MaybeFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]
MaybeStr = Annotated[str | None, tyro.conf.arg(metavar="STR")]
MaybeCompile = Annotated[Literal["auto", "on", "off"] | None, tyro.conf.arg(metavar="{auto,on,off}")]
MaybePrecision = Annotated[Literal["bf16", "fp16"] | None, tyro.conf.arg(metavar="{bf16,fp16}")]
MaybePath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
MaybeColour = Annotated[tuple[float, float, float] | None, tyro.conf.arg(metavar="R G B")]


@dataclass(frozen=True)
class SinusoidTask:
    """A task is a sine wave: amplitude from [0.1, 5], phase from [0, pi], x from [-5, 5]."""

    shots: int = 10
    """Support points of a training task."""
    queries: int = 10
    """Query points of a training task."""
    test_shots: int = 5
    """Support points of a validation or test task."""
    test_queries: int = 100
    """Query points of a validation or test task."""
    hidden: tuple[int, ...] = (40, 40)
    """Widths of the hidden layers of the model."""


@dataclass(frozen=True)
class Inner:
    """How the model adapts to one task."""

    algorithm: AlgorithmName = "maml"
    """What is meta-learned:
    maml, the initial weights, by the exact gradient;
    fomaml, the same, by the first-order gradient;
    anil, the same, but only the head adapts;
    boil, the same, but all except the head adapts;
    reptile, weights close to those that all tasks end with;
    metasgd, the initial weights and a rate for each;
    mamlpp, the initial weights and a rate for each parameter tensor and step;
    sharpmaml, the initial weights, where the loss is flat around them and around those that adapted;
    metacurvature, the initial weights and matrices that turn the inner gradient;
    cavia, weights that a few context parameters steer, which alone adapt (sinusoid only);
    imaml, weights that adaptation stays near, by the implicit gradient;
    learned, an optimiser (meta_transformer), for initial weights that stay as they were drawn;
    protomaml, an embedding, whose head starts from the class means of the shots;
    protonet, an embedding in which a class is the mean of its shots (no inner steps);
    matchingnet, r2d2, lrd2, metaoptnet, the same, by attention over single shots, by ridge or logistic regression or
    a support vector machine."""
    inner_lr: float = 0.01
    """Learning rate of adaptation (where metasgd, mamlpp and learned start)."""
    strength: float = 2.0
    """Of imaml's pull towards the initial weights."""
    damping: float = 0.0
    """Of imaml's solver: curvature counts as if the pull were stronger by so much."""
    solver_iterations: int = 5
    """Of imaml's solver, conjugate gradients: each is a product with the Hessian, as dear as two inner steps."""
    context: int = 5
    """Context parameters of cavia's model."""
    inner_optimizer: Literal["sgd", "adam"] = "sgd"
    """Who takes the inner steps: gradient descent, or Adam without momentum, as Reptile's experiments have it.
    maml, fomaml, anil, boil, reptile, imaml and protomaml read it."""
    minibatches: bool = False
    """Each inner step of reptile's training takes its own part of a task's support examples, drawn at random: with 5
    ways, --train-shots 10 and 5 steps 10 examples. In validation and test all of them are in every step."""
    first_order: bool = False
    """Take inner gradients as constants in the meta-gradient. metasgd, mamlpp and protomaml read it."""
    annealing: bool = False
    """The rest of mamlpp's recipe: at first the loss after every inner step counts and gradients are first-order,
    and each step has weights of its own for the norms."""
    radius: float = 5e-4
    """How far sharpmaml looks uphill, in the inner and the outer loop."""
    inner_steps: int = 1
    """Gradient steps while meta-training."""
    test_steps: int = 10
    """Gradient steps in validation and in the result, whose curve goes up to 10 at least."""
    stop_below: MaybeFloat = None
    """A task takes no more steps once its support loss is this low."""
    stop_patience: MaybeInt = None
    """A task takes no more steps after so many without a lower support loss."""


@dataclass(frozen=True)
class Outer:
    """How the model is meta-trained."""

    tasks: int = 25
    """Tasks of a training step."""
    outer_steps: int = 10_000
    """Training steps in all."""
    outer_lr: float = 1e-3
    """Learning rate over the training steps."""
    outer_optimizer: Literal["adam", "sgd"] = "adam"
    """Who takes them. With sgd, --outer-lr of reptile is the share of the way to the adapted weights, at most 1."""
    schedule: Literal["constant", "cooldown", "cosine"] = "cosine"
    """The outer rate stays; falls to zero in the last tenth of the steps; or falls all the way as a cosine."""
    seed: int = 0
    """Seed of initial weights and training tasks; held-out tasks are the same for all seeds."""


@dataclass(frozen=True)
class Stop:
    """When training ends before its last step."""

    target: MaybeFloat = None
    """Stop when validation reaches this: an accuracy in [0, 1], or a mean squared error."""
    patience: MaybeInt = None
    """Stop after this many validations without a better one."""
    minutes: MaybeFloat = None
    """Stop after this much wall time of training, resumed runs counted together."""
    max_bad_steps: int = 10
    """Stop with an error after so many non-finite steps in a row; such a step changes nothing."""


@dataclass(frozen=True)
class Report:
    """What is measured, how often, and against what."""

    log_interval: int = 100
    """Training steps between two lines of metrics."""
    val_interval: int = 1_000
    """Training steps between validations, and between saves of the last checkpoint; 0: at the end only."""
    val_tasks: int = 200
    """Validation tasks, the same ones every time; they choose the best checkpoint."""
    test_tasks: int = 1_000
    """Test tasks of the result: 600 or more for intervals that mean something."""
    baselines: bool = True
    """Also train a model on all training tasks together, to fine-tune on the test tasks and compare with."""
    baseline_steps: MaybeInt = None
    """Training steps of that baseline; as many as the run itself took if not given."""


@dataclass(frozen=True)
class Machine:
    """Where and how it runs. None of this changes what is computed, but for rounding."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:1, ...; auto takes a GPU if there is one."""
    compile: Literal["auto", "on", "off"] = "auto"
    """on: compiled kernels, slow at the first step, then several times faster; auto: where they can be."""
    precision: MaybePrecision = None
    """bf16 or fp16: products and convolutions in half precision, weights and updates in float32; results then
    differ by more than rounding. float32 if not given."""
    threads: MaybeInt = None
    """CPU threads; torch's own choice if not given."""


@dataclass(frozen=True)
class Config(Generic[TaskT]):
    """Everything that determines a run."""

    recipe: tyro.conf.Suppress[str]
    task: TaskT
    inner: Inner = Inner()
    outer: Outer = Outer()
    stop: Stop = Stop()
    report: Report = Report()
    machine: Machine = Machine()
    out: MaybePath = None
    """Run folder; runs/RECIPE-DATE-TIME if not given."""
    start: MaybePath = None
    """Run folder whose best weights training starts from, in place of drawn ones: a run of the same model and
    algorithm, on other tasks or for longer. Steps and rates begin anew."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue the run in --out where it stopped, bit for bit. --resume RUN says both."""
