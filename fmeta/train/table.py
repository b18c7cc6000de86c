"""Results as text, at most 100 columns wide: a block of lines for each model, a line for each number of steps."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fmeta.train.baselines import RATES, SCOPES, FineTuned
from fmeta.train.evaluate import Compared, Curve, Estimate, adapts, calibration, estimates, gains, paired

ROWS = (0, 1, 3, 5, 10)
"""Numbers of steps that the table shows if none are asked for; results.json has all."""
LARGE = 1e6
"""A mean from which some task has diverged."""
WIDTH = 100


class Block(NamedTuple):
    """The lines of one model."""

    curve: Curve
    difference: Tensor | None
    """Paired, ``[tasks, steps]``; None for the model that the others are compared with."""


def table(
    recipe: str, compared: Compared, shown: Sequence[int], tuned: dict[str, FineTuned], trained: str
) -> str:
    """Mean, 95 % interval and calibration after each number of steps, the baselines, and paired differences.

    Args:
        recipe: the run's.
        compared: its scores.
        shown: the numbers of steps to show.
        tuned: how the baselines were fine-tuned, by the names of their curves.
        trained: how long the pre-trained one was trained, in words.
    """
    learned = compared.learned
    blocks = [Block(learned, None)]
    for curve in compared.baselines.values():
        blocks.append(Block(curve, -paired(curve, learned, learned.steps[-1])))
    lines = aligned(rows(blocks, compared.metric, shown, f"{learned.name} minus it"))
    found = [heading(recipe, compared.metric, len(learned.scores.values)), "", *lines, ""]
    differ = len(blocks) > 1 or adapts(learned)
    said = notes(compared.metric, differ, list(compared.baselines), trained)
    return "\n".join([*found, *said, *choices(tuned, shown)])


def heading(recipe: str, metric: str, tasks: int) -> str:
    """What the numbers are."""
    what = "accuracy in %" if metric == "accuracy" else "mean squared error"
    return f"{recipe}: {what} on {tasks:,} unseen tasks, by steps of adaptation\n(mean ± 95 % interval over tasks)"


def rows(blocks: Sequence[Block], metric: str, shown: Sequence[int], difference: str) -> list[list[str]]:
    """Cells of the table, the titles first; an empty line parts the models, and no column is empty."""
    score = {"accuracy": "accuracy", "loss": "error"}[metric]
    titles = ["", "steps", score, "ECE", "minus 0 steps", difference]
    found = [row for block in blocks for row in [[""] * len(titles), *block_rows(block, metric, shown)]][1:]
    kept = [i for i, column in enumerate(zip(*found, strict=True)) if any(column)]
    return [[row[i] for i in kept] for row in [titles, *found]]


def block_rows(block: Block, metric: str, shown: Sequence[int]) -> list[list[str]]:
    """Cells of one model: name, steps, score, calibration, what adaptation gains, and the paired difference."""
    curve, errors = block.curve, calibration(block.curve)
    at = [i for i, k in enumerate(curve.steps) if k in shown or not adapts(curve)]
    empty = [""] * len(at)
    gained = written(estimates(gains(curve)), at, metric, signed=True)
    columns = [
        [curve.name, *empty[1:]],
        [str(curve.steps[i]) if adapts(curve) else "-" for i in at],
        written(estimates(curve.scores.values), at, metric),
        [f"{100 * errors[i]:.1f}" for i in at] if errors else empty,
        [text if curve.steps[i] else "" for i, text in zip(at, gained, strict=True)],
        empty if block.difference is None else written(estimates(block.difference), at, metric, signed=True),
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def written(found: Sequence[Estimate], shown: Sequence[int], metric: str, signed: bool = False) -> list[str]:
    """Estimates as ``97.1 ± 0.4``, accuracies in per cent; where a task diverged, that."""
    factor, digits = (100, 1) if metric == "accuracy" else (1, 3)
    sign = "+" if signed else ""

    def one(e: Estimate) -> str:
        if not abs(e.mean) < LARGE:
            return "diverged"
        return f"{factor * e.mean:{sign}.{digits}f} ± {factor * e.interval:.{digits}f}"

    return [one(found[i]) for i in shown]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with a rule below the titles: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "   ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def notes(metric: str, differ: bool, names: Sequence[str], trained: str) -> list[str]:
    """What the columns are, differences where there are any, and the baselines of these names."""
    classes = metric == "accuracy"
    said = [("Higher" if classes else "Lower") + " is better."]
    said[0] += " Differences are of the same tasks." if differ else ""
    if classes:
        said.append("ECE: expected calibration error in %, of all queries in 15 bins of confidence.")
    if "frozen_encoder" in names:
        said.append("Frozen encoder: as it came, a label being the mean of its sentences' embeddings.")
    if "from_scratch" in names:
        head = ", with a new head that is drawn at random" if classes else ""
        said.append(
            "From scratch starts from random weights, fine-tuned from a model trained for "
            f"{trained} on all training tasks together{head}. Both take gradient steps on the support set, of all "
            "weights or of the head, at the rate that does best on validation tasks "
            f"({len(RATES) * len(SCOPES)} settings, chosen for each number of steps)."
        )
    if "no_meta_learning_zero_head" in names:
        said.append(
            "Zero head is the latter with a head of zeros, which the first step turns into a nearest-mean classifier."
        )
    return [line for text in said for line in textwrap.wrap(text, WIDTH)]


def choices(tuned: dict[str, FineTuned], shown: Sequence[int]) -> list[str]:
    """What was chosen on validation tasks: a line for each baseline, settings with the steps they are for."""
    lines: list[str] = []
    for name, one in tuned.items():
        groups: list[tuple[str, list[str]]] = []
        for k, setting in zip(one.steps, one.settings, strict=True):
            if k == 0 or k not in shown:  # before the first step all of them are the same
                continue
            text = f"{setting.scope} at {setting.rate:g}"
            if not groups or groups[-1][0] != text:
                groups.append((text, []))
            groups[-1][1].append(str(k))
        said = ", ".join(f"{text} ({', '.join(steps)})" for text, steps in groups)
        if said:
            said = f"Chosen for {name} (steps): {said}"
            lines += textwrap.wrap(said, WIDTH, subsequent_indent="  ")
    return lines
