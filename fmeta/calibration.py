"""Whether a classifier is right as often as it says: examples binned by confidence, and one number of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reliability(NamedTuple):
    """Sums over the examples in each bin of confidence, ``[..., bins]``; those of two sets of examples add up."""

    examples: Tensor
    confidence: Tensor
    correct: Tensor

    @property
    def error(self) -> Tensor:
        """The expected calibration error, ``[...]``, in [0, 1]; NaN where there are no examples."""
        # examples / n * |correct / examples - confidence / examples|, where the bin's own number cancels
        return (self.correct - self.confidence).abs().sum(-1) / self.examples.sum(-1)


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Bin examples by confidence, the largest softmax probability: what a reliability diagram shows.

    Bin ``m`` of ``1 .. bins`` holds the examples whose confidence is in ``((m - 1) / bins, m / bins]``.

    Args:
        logits: ``[..., n, ways]``; leading dimensions, tasks say, are kept apart.
        labels: class numbers, ``[..., n]``.
        bins: number of bins of equal width, at least 1.

    Returns:
        ``Reliability(examples, confidence, correct)``, each ``[..., bins]`` and without derivative: how many
        examples are in a bin, the sum of their confidences, and how many of them are classified right.

    Raises:
        ValueError: for fewer than one bin, or labels of another shape than the logits'.
    """
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 1:
        raise ValueError(f"reliability: bins must be an int of at least 1, got {bins!r}. The paper takes 15.")
    if logits.dim() < 2 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"reliability: logits must be [..., n, ways] and labels [..., n], got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}. Give one label for each row of logits."
        )
    logits = logits.detach()
    scores = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    confidence, said = scores.softmax(-1).max(-1)
    inner_edges = torch.linspace(0, 1, bins + 1, dtype=scores.dtype, device=scores.device)[1:-1]
    place = torch.bucketize(confidence, inner_edges)
    member = (place[..., None] == torch.arange(bins, device=place.device)).to(scores.dtype)  # [..., n, bins]
    correct = (said == labels).to(scores.dtype)
    return Reliability(
        member.sum(-2), (confidence[..., None] * member).sum(-2), (correct[..., None] * member).sum(-2)
    )


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Expected calibration error: how far confidence is from accuracy, on average over the examples.

    ``sum_m(examples_m / n * |accuracy_m - confidence_m|)`` over bins of confidence; see `reliability`, whose sums
    also give the error of several batches together.

    Args:
        logits: ``[..., n, ways]``; leading dimensions are kept apart.
        labels: class numbers, ``[..., n]``.
        bins: number of bins of equal width. The error depends on it: compare at the same number only.

    Returns:
        ``[...]``, in [0, 1], without derivative.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[3.0, 0.0], [3.0, 0.0]])  # 95 % sure of class 0, twice
        >>> round(calibration_error(logits, torch.tensor([0, 1])).item(), 3)
        0.453

    References:
        Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", 2017, arXiv 1706.04599,
        eq. 3; 15 bins as in its table 1.
    """
    return reliability(logits, labels, bins).error
