"""The options of a run that learns an optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import tyro

from fmeta.train.config import Config, Inner, MaybePath


@dataclass(frozen=True)
class LearningTask:
    """A task is a whole training of a small network; what is learned is the optimiser that does it."""

    optimizer: Literal["meta_transformer", "policy", "schedule", "mlp", "lstm"] = "meta_transformer"
    """What is learned:
    meta_transformer, a transformer over parameter tensors and a policy for each parameter, beside Adam;
    policy, the same without its transformer;
    schedule, the same without its policy: step sizes alone;
    mlp, a network for each parameter; lstm, a recurrent one."""
    start_lr: float = 3e-3
    """Step size at the start; the first three of the optimisers are Adam at this rate before they learn."""
    problems: str = "relu,tanh,deep"
    """What is trained, separated by commas: relu, tanh, deep, wide and gelu are fully connected networks on small
    pictures, conv a convolutional one, text a transformer on bytes; quadratics; rosenbrock."""
    data: Literal["glyphs", "omniglot", "digits"] = "glyphs"
    """The pictures: characters drawn from fonts; the Omniglot data set; scikit-learn's handwritten digits."""
    root: MaybePath = None
    """Folder of Omniglot; else $FMETA_DATA/omniglot or fmeta's cache."""
    classes: int = 20
    """Classes of a task; digits has 10, of which 5 at most can be taken."""
    batch: int = 32
    """Examples of a step."""
    shortest: int = 50
    """Steps of the shortest training."""
    longest: int = 200
    """Steps of the longest training; lengths between the two are equally likely on a logarithmic scale."""
    estimator: Literal["bptt", "pes", "es"] = "bptt"
    """How the gradient to the optimiser's weights is found: by backpropagation through the steps, or by perturbations,
    persistent (pes) or of whole trainings (es)."""
    truncation: int = 100
    """Steps between two updates of the optimiser's weights; 0 for whole trainings."""
    std: float = 0.01
    """Size of the perturbations of pes and es."""


@dataclass(frozen=True)
class LearningConfig(Config[LearningTask]):
    """A config without what other recipes say of their inner loop."""

    inner: tyro.conf.Suppress[Inner] = field(default_factory=Inner)
