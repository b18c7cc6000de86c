"""Losses of one task on one batch, as records that an algorithm is built from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmeta.calibration import Reliability as Reliability
from fmeta.calibration import calibration_error as calibration_error
from fmeta.calibration import reliability as reliability
from fmeta.functional import check_apply
from fmeta.functional.purity import under_compilation
from fmeta.types import Batch, LossFn, Metrics, Params, Tree


def cross_entropy(apply: Callable[..., Any], *, label_smoothing: float = 0.0) -> LossFn:
    """Mean cross-entropy of logits and class labels; metrics hold ``accuracy``.

    ``loss = mean_i(-log softmax(apply(params, x_i))[y_i])``

    Args:
        apply: ``(params, *inputs) -> logits`` of shape ``[shots, ways]``, or a record with a field
            ``logits``. The inputs are ``batch.x``: a tensor as the one argument, a tuple as positional
            arguments, a dict (a tokenised text) as keyword arguments.
        label_smoothing: weight of the uniform distribution in the target, in [0, 1); as in torch.

    Raises:
        TypeError: if labels are not integers, or for a module in the place of ``apply``.
        ValueError: if a label is not in ``0..ways-1``. This is looked at once, in the first call outside of
            any transform and compiler; samplers look always.

    >>> loss_fn = cross_entropy(lambda params, x: x @ params["w"])
    >>> loss, metrics = loss_fn({"w": torch.eye(2)}, Batch(torch.eye(2), torch.tensor([0, 1])))
    >>> round(loss.item(), 4), metrics["accuracy"].item()
    (0.3133, 1.0)
    """
    check_apply("cross_entropy", apply)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"cross_entropy: label_smoothing must be in [0, 1), got {label_smoothing}.")
    return CrossEntropy(apply, label_smoothing)


def mse(apply: Callable[..., Any]) -> LossFn:
    """Mean squared error ``mean((apply(params, x) - y) ** 2)``; inputs are passed as in `cross_entropy`.

    Raises:
        TypeError: for a module in the place of ``apply``.
        ValueError: if outputs and targets differ in shape; they are never broadcast.
    """
    check_apply("mse", apply)
    return MeanSquaredError(apply)


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """What `cross_entropy` returns."""

    apply: Callable[..., Any]
    label_smoothing: float = 0.0
    _seen: set[str] = field(default_factory=set, init=False, repr=False)

    def __call__(self, params: Params, batch: Batch, /) -> tuple[Tensor, Metrics]:
        """``(params, batch) -> (loss, {"accuracy": ...})``."""
        labels = batch.y
        check_integers("cross_entropy", labels)
        logits = _at_least_float32(outputs(self.apply, params, batch.x))
        if ("labels" not in self._seen or _always.get()) and _is_plain(labels):
            _check_range("cross_entropy", labels, logits.shape[1])
            self._seen.add("labels")
        loss = F.cross_entropy(logits, labels.long(), label_smoothing=self.label_smoothing)
        return loss, {"accuracy": (logits.detach().argmax(1) == labels).float().mean()}


@dataclass(frozen=True, eq=False)
class MeanSquaredError:
    """What `mse` returns."""

    apply: Callable[..., Any]

    def __call__(self, params: Params, batch: Batch, /) -> tuple[Tensor, Metrics]:
        """``(params, batch) -> (loss, {})``."""
        predicted = _at_least_float32(outputs(self.apply, params, batch.x))
        if predicted.shape != batch.y.shape:
            raise ValueError(
                f"mse: outputs and targets must have one shape, got {tuple(predicted.shape)} and "
                f"{tuple(batch.y.shape)}. Reshape the targets, for example y[:, None]."
            )
        return (predicted - batch.y.to(predicted.dtype)).square().mean(), {}


def with_metrics(value: Any) -> tuple[Tensor, Metrics]:
    """What a loss returned, as ``(scalar, metrics)``; a bare scalar has no metrics."""
    return value if isinstance(value, tuple) else (value, {})


def reported(call: str, value: Any) -> tuple[Tensor, Metrics]:
    """`with_metrics` of a user's own loss, none of whose metrics may hide the query loss."""
    value = with_metrics(value)
    if any(isinstance(part, dict) and "loss" in part for part in value):
        raise ValueError(
            f"{call}: a metric must not be named 'loss', got one. The query loss is reported by that name; use "
            "another."
        )
    return value


def checked(call: str, value: Any, what: str = "the loss") -> tuple[Tensor, Metrics]:
    """`with_metrics` of what is one floating number, alone or with a dict of metrics; else an error."""
    wrong = fault(value)
    if wrong:
        kind, text = wrong
        raise kind(f"{call}: {what} {text}")
    return with_metrics(value)


def fault(value: Any) -> tuple[type[Exception], str] | None:
    """What is wrong with what a loss returned; depends on shapes only."""
    loss, metrics = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
    if not isinstance(loss, Tensor) or not isinstance(metrics, dict):
        got = _describe(metrics if isinstance(loss, Tensor) else loss)
        return TypeError, (
            f"must return (scalar, metrics), got {got}. Return `loss, {{}}` where there are no metrics."
        )
    if loss.shape != () or not loss.is_floating_point():
        return ValueError, (
            f"must be a floating scalar, got shape {tuple(loss.shape)} of {loss.dtype}. Average over the "
            "examples, loss.mean() say."
        )
    for name, metric in metrics.items():
        if not isinstance(metric, Tensor) or metric.shape != ():
            return ValueError, (
                f"must report one number a task: metric {name!r} must be a tensor without dimensions, got "
                f"{_describe(metric)}. Write metric.mean(), say."
            )
    return None


def _describe(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple) else "")


def outputs(apply: Callable[..., Any], params: Params, x: Tree) -> Tensor:
    """Call a model on the inputs of a batch: a dict by keyword, a tuple by position, a tensor as it is.

    Where the model returns a record with a field ``logits``, that field is the output.
    """
    if isinstance(x, Mapping):
        returned = apply(params, **x)
    elif isinstance(x, tuple | list):
        returned = apply(params, *x)
    else:
        returned = apply(params, x)
    return getattr(returned, "logits", returned)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


_always: ContextVar[bool] = ContextVar("check labels in every plain call", default=False)


@contextlib.contextmanager
def checking_labels() -> Iterator[None]:
    """Check the range of labels in every plain call, not in the first one only."""
    token = _always.set(True)
    try:
        yield
    finally:
        _always.reset(token)


def _is_plain(tensor: Tensor) -> bool:
    """Whether values may be read: no transform, tracing or compilation is under way."""
    return not (
        under_compilation()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or tensor.is_meta
        or not tensor.numel()
    )


def check_integers(call: str, labels: Tensor) -> None:
    """Refuse labels that are no class numbers."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{call}: labels must be integers, got {labels.dtype}. Pass labels.long().")


def check_occur(call: str, labels: Tensor, support: Tensor, ways: int) -> None:
    """While labels are checked: refuse those out of range, and classes that the support set lacks."""
    if not (_always.get() and _is_plain(labels) and _is_plain(support)):
        return
    for found in (support, labels):
        _check_range(call, found, ways)
    absent = labels[~torch.isin(labels, support)]
    if absent.numel():
        raise ValueError(
            f"{call}: every class of the query set needs an example in the support set, got none of class "
            f"{absent[0].item()}. Sample both from the same classes."
        )


def _check_range(call: str, labels: Tensor, ways: int) -> None:
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= ways:
        raise ValueError(
            f"{call}: labels must be in 0..{ways - 1} for {ways} outputs, got "
            f"{low if low < 0 else high}. Relabel the classes of a task from 0, or widen the head."
        )
