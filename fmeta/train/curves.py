"""Figures of scores: by number of inner steps, and the reliability diagram; for one run and for several."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from fmeta.calibration import Reliability
from fmeta.train.evaluate import Curve, adapts, calibration, estimates

QUIET = "#80868b"
FEW = 0.005
"""Share of the queries below which a bin of confidence says nothing."""


class Look(NamedTuple):
    """A curve and how it is drawn."""

    curve: Curve
    color: str
    label: str
    style: str = "-"
    width: float = 1.5
    marker: str = "o"


def metric_label(metric: str) -> str:
    """What an axis says."""
    return "query accuracy (%)" if metric == "accuracy" else "query mean squared error"


def step_figure(looks: Sequence[Look], metric: str, start: bool = False) -> Figure:
    """Scores with intervals by number of inner steps; beside them, for classification, the calibration error.

    ``start`` draws the first curve's score before adaptation as a line of its own.
    """
    calibrated = looks[0].curve.scores.reliability is not None
    figure = Figure(figsize=(9.6, 3.4) if calibrated else (7.6, 3.4))
    panels = figure.subplots(1, 2 if calibrated else 1, squeeze=False)[0]
    score_panel(panels[0], looks, metric)
    if start:
        value = scaled(looks[0].curve.scores.values[:, 0].mean(), metric)
        panels[0].axhline(value, color=QUIET, lw=1, ls=":", zorder=0, label="no adaptation")
    if calibrated:
        error_panel(panels[1], looks)
    for axes in panels:
        axes.set_xlabel("steps of adaptation")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def scaled(value: float | Tensor, metric: str) -> float:
    """A score as axes show it."""
    return float(value) * (100 if metric == "accuracy" else 1)


def score_panel(axes: Axes, looks: Sequence[Look], metric: str) -> None:
    """Means with intervals, errors on a logarithmic scale; a model without steps is a level line."""
    starts = [estimates(look.curve.scores.values)[0].mean for look in looks]
    top = 1.2 * max(filter(math.isfinite, starts), default=1.0) if metric == "loss" else math.inf
    for curve, color, label, style, width, marker in looks:
        found = estimates(curve.scores.values)
        kept = list(itertools.takewhile(lambda e: e.mean < top, found))  # one that diverges ends there
        low, mean, high = ([scaled(e.mean + s * e.interval, metric) for e in kept] for s in (-1, 0, 1))
        if not adapts(curve):
            axes.axhspan(low[0], high[0], color=color, alpha=0.12, lw=0)
            axes.axhline(mean[0], color=color, lw=width, ls=style, label=label)
            continue
        label += "" if len(kept) == len(found) else " (diverges)"
        steps = curve.steps[: len(kept)]
        axes.fill_between(steps, low, high, color=color, alpha=0.2 if marker else 0.1, lw=0)
        axes.plot(steps, mean, color=color, lw=width, ls=style, marker=marker, ms=3.5, label=label)
    axes.set_ylabel(metric_label(metric))
    if metric == "loss":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(top=top)


def error_panel(axes: Axes, looks: Sequence[Look]) -> None:
    """The expected calibration error."""
    for curve, color, _, style, width, marker in looks:
        errors = [100 * error for error in calibration(curve) or ()]
        if adapts(curve):
            axes.plot(curve.steps, errors, color=color, lw=width, ls=style, marker=marker, ms=3.5)
        else:
            axes.axhline(errors[0], color=color, lw=width, ls=style)
    axes.set_ylabel("calibration error, ECE (%)")
    axes.set_ylim(bottom=0)


def reliability_figure(looks: Sequence[Look], at: Sequence[int], title: str) -> Figure:
    """Accuracy by confidence, and how many queries of the first model have which confidence.

    ``at`` is the column of each curve that is shown.
    """
    figure = Figure(figsize=(6.6, 4.2))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    upper.plot([0, 100], [0, 100], color=QUIET, lw=1, ls=":", zorder=0, label="as right as it is sure")
    for look, column in zip(looks, at, strict=True):
        sums = binned(look.curve, column)
        kept = sums.examples > FEW * sums.examples.sum()
        confidence, correct = (
            (100 * x / sums.examples)[kept].numpy() for x in (sums.confidence, sums.correct)
        )
        label = f"{look.label}\nECE {100 * sums.error:.1f} %"
        upper.plot(confidence, correct, color=look.color, lw=look.width, marker="o", ms=4, label=label)
    first = binned(looks[0].curve, at[0])
    bins = len(first.examples)
    share, centres = 100 * first.examples / first.examples.sum(), (torch.arange(bins) + 0.5) * 100 / bins
    lower.bar(centres.numpy(), share.numpy(), width=92 / bins, color=looks[0].color, alpha=0.6, lw=0)
    upper.set(ylabel="queries classified right (%)", xlim=(0, 100), ylim=(0, 100))
    upper.set_title(title, loc="left")
    lower.set(xlabel="confidence (%)", ylabel="queries (%)")
    figure.legend(*upper.get_legend_handles_labels(), loc="outside right upper")
    return figure


def binned(curve: Curve, column: int) -> Reliability:
    """The bins of a classifier after one number of steps."""
    sums = curve.scores.reliability
    assert sums is not None
    return Reliability(*(x[column] for x in sums))
