"""A learned optimiser in a file: its weights, and what it was made with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from fmeta import tree, weights
from fmeta.learned.lstm import lstm
from fmeta.learned.meta_transformer import meta_transformer
from fmeta.learned.mlp import mlp
from fmeta.learned.optimizer import Optimizer
from fmeta.learned.rule import LearnedOptimizer
from fmeta.learned.schedule import schedule
from fmeta.types import Params, Transform
from fmeta.weights.files import read, record_of

RULES: dict[str, Callable[..., LearnedOptimizer]] = {
    "meta_transformer": meta_transformer,
    "mlp": mlp,
    "lstm": lstm,
    "schedule": schedule,
}
FILE = "optimizer.safetensors"
"""The name in a run folder."""


class Loaded(NamedTuple):
    """A learned optimiser with its weights."""

    rule: LearnedOptimizer
    theta: Params

    def __call__(self, steps: Tensor | float | None = None) -> Transform:
        """The optimiser as a ``Transform``; ``steps`` is the length of the training to come."""
        return self.rule(self.theta, steps)

    def optimizer(self, params: Any, *, steps: int | None = None, lr: float = 1.0) -> Optimizer:
        """The same as a ``torch.optim.Optimizer`` for an ordinary training loop; see ``fmeta.learned.Optimizer``."""
        return Optimizer(params, self.rule, self.theta, steps=steps, lr=lr)


def save(path: str | Path, rule: LearnedOptimizer, theta: Params) -> None:
    """Write a learned optimiser to a safetensors file that ``load`` reads.

    Args:
        path: the file.
        rule: what was trained.
        theta: its weights.

    Raises:
        ValueError: for weights of another architecture, or a rule of your own, which ``load`` could not make.

    Example:
        >>> import fmeta, tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "optimizer.safetensors"
        >>> rule = fmeta.learned.meta_transformer()
        >>> fmeta.learned.save(file, rule, rule.init(0))
        >>> fmeta.learned.load(file).rule.name
        'meta_transformer'
    """
    if rule.name not in RULES:
        raise ValueError(
            f"learned.save: rule must be one that load can make again ({', '.join(RULES)}), got {rule.name!r}. Save "
            "its weights with fmeta.weights.save."
        )
    rule(theta)  # refuses what does not fit
    weights.save(path, theta, record={"name": rule.name, "settings": rule.settings})


def load(path: str | Path) -> Loaded:
    """A learned optimiser from a file of ``save``, or from the run folder of ``fmeta train learned-optimizer``.

    Args:
        path: the file, or the folder.

    Raises:
        ValueError: if there is none, or it holds other weights.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    theta = read(file)
    try:
        record = record_of(file)
        rule = RULES[record["name"]](**record["settings"])
    except (SafetensorError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"learned.load: {file} must be a learned optimiser ({', '.join(RULES)}), got a file of other weights. "
            "Give what fmeta.learned.save or `fmeta train learned-optimizer` wrote."
        ) from error
    theta = {name: theta[name] for name in rule.shapes if name in theta} | theta
    with torch.no_grad():
        rule(theta)
    return Loaded(rule, tree.detach(theta))
