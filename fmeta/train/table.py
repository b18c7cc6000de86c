"""The result as text: scores by number of inner steps, beside the baselines."""

from __future__ import annotations

from collections.abc import Sequence

from fmeta.train.baselines import RATES, SCOPES
from fmeta.train.evaluate import Compared, Estimate, adapts, differences, estimates
from fmeta.train.experiment import Experiment

ROWS = (0, 1, 2, 3, 5, 10)
"""Numbers of steps that the table shows; results.json has all."""
LARGE = 1e6
"""A mean from which some task has diverged."""
SHORT = {
    "no_adaptation": "0 steps",
    "no_meta_learning": "fine-tuned",
    "no_meta_learning_zero_head": "zero head",
    "frozen_encoder": "frozen",
}
"""The baselines' names in the table."""


def table(experiment: Experiment, compared: Compared, trained: int) -> str:
    """Mean and 95 % interval after each number of steps, the baselines, and the paired differences.

    Args:
        experiment: the run.
        compared: its scores.
        trained: training steps of the baselines.
    """
    rows, name = {*ROWS, experiment.config.inner.test_steps}, experiment.config.inner.algorithm
    shown = [i for i, step in enumerate(compared.steps) if step in rows]
    columns = {"steps": [str(compared.steps[i]) for i in shown]}
    columns[name] = written(estimates(compared.learned), shown, compared.metric)
    for baseline, values in compared.baselines.items():
        columns[SHORT[baseline]] = written(estimates(values), shown, compared.metric)
    for baseline, found in differences(compared).items():
        columns[f"{name} - {SHORT[baseline]}"] = written(found, shown, compared.metric, signed=True)
    lines = [heading(experiment, compared), "", *aligned(columns), "", *notes(compared, trained)]
    return "\n".join(lines)


def heading(experiment: Experiment, compared: Compared) -> str:
    """What the numbers are."""
    what = "accuracy in %" if compared.metric == "accuracy" else "mean squared error"
    return (
        f"{experiment.config.recipe}: {what} on {len(compared.learned):,} unseen tasks, by steps of adaptation\n"
        "(mean ± 95 % interval over tasks)"
    )


def written(found: Sequence[Estimate], shown: Sequence[int], metric: str, signed: bool = False) -> list[str]:
    """Estimates as ``97.1 ± 0.4``, accuracies in per cent; where a task diverged, that."""
    factor, digits = (100, 1) if metric == "accuracy" else (1, 3)
    sign = "+" if signed else ""

    def one(e: Estimate) -> str:
        if not abs(e.mean) < LARGE:
            return "diverged"
        return f"{factor * e.mean:{sign}.{digits}f} ± {factor * e.interval:.{digits}f}"

    return [one(found[i]) for i in shown]


def aligned(columns: dict[str, list[str]]) -> list[str]:
    """Columns as lines, aligned to the right."""
    widths = [max(len(name), *map(len, cells)) for name, cells in columns.items()]
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    lines = ["   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def notes(compared: Compared, trained: int) -> list[str]:
    """What the baselines are."""
    better = "higher" if compared.metric == "accuracy" else "lower"
    said = [f"Differences are of the same tasks; {better} is better."]
    if adapts(compared):
        said.append("No adaptation is the line of 0 steps.")
    if "frozen_encoder" in compared.baselines:
        said.append("Frozen: the encoder as it came, a label being the mean of its sentences' embeddings.")
    if "no_meta_learning" in compared.baselines:
        said.append(
            f"No meta-learning is fine-tuned: a model trained for {trained:,} steps on all training tasks together,\n"
            "then gradient descent on the support set; of all weights or the head, at the rate that does best on\n"
            f"validation tasks ({len(RATES) * len(SCOPES)} settings, chosen for each number of steps)."
        )
    if "no_meta_learning_zero_head" in compared.baselines:
        said.append(
            "Its new head is drawn at random. Zero head: the same with a head of zeros, which the first step turns\n"
            "into a nearest-mean classifier."
        )
    return said
