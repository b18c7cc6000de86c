"""Pictures of a run: time against tasks, time against inner steps, memory against inner steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.results import Row

COLOURS = {
    "fmeta": "#1f5fa8", "fmeta-step": "#7fa8d6", "loop": "#9aa0a6", "higher": "#c9a227", "torchopt": "#8e6bb0",
    "vmap": "#d9772b", "jax": "#188038", "jax-scan": "#7cb342", "nested": "#d9772b", "remat": "#188038",
}  # fmt: skip
STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
}

Points = dict[str, list[tuple[float, float]]]


def draw(folder: Path, rows: list[Row]) -> list[Path]:
    """The plots that the rows have points for; returns their paths."""
    waves = [
        row for row in rows if row.suite == "speed" and row.cell.startswith("sinusoid") and "ms" in row.result
    ]
    memory = [row for row in rows if row.suite == "memory" and "mib" in row.result]
    steps, tasks = most_common(waves, "steps", prefer=10), most_common(waves, "tasks", prefer=100)
    milliseconds: Callable[[Row], float] = lambda row: row.result["ms"]["median"]  # noqa: E731
    figures = {
        "time_vs_tasks": curves(
            points([r for r in waves if r.config["steps"] == steps], "tasks", milliseconds),
            "tasks", "ms a meta-gradient", f"Sinusoid MLP 40-40, {steps} inner steps",
        ),
        "time_vs_steps": curves(
            points([r for r in waves if r.config["tasks"] == tasks], "steps", milliseconds),
            "inner steps", "ms a meta-gradient", f"Sinusoid MLP 40-40, {tasks} tasks",
        ),
        "memory_vs_steps": curves(
            points(memory, "steps", lambda row: row.result["mib"]),
            "inner steps", "MiB added by one meta-gradient", "conv4, uncompiled",
        ),
    }  # fmt: skip
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
    return paths


def most_common(rows: list[Row], key: str, prefer: int) -> int:
    """The preferred value where the rows have it, else the one that most rows have."""
    values = [row.config[key] for row in rows]
    return prefer if prefer in values or not values else max(set(values), key=values.count)


def points(rows: list[Row], key: str, value: Callable[[Row], float]) -> Points:
    """The curve of each contender."""
    found: Points = defaultdict(list)
    for row in rows:
        found[row.who].append((row.config[key], value(row)))
    return {who: sorted(pairs) for who, pairs in found.items()}


def curves(lines: Points, xlabel: str, ylabel: str, title: str) -> Figure | None:
    """A figure with logarithmic axes; None where there is nothing to compare along the axis."""
    if len({x for pairs in lines.values() for x, _ in pairs}) < 2:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6, 4))
        axes = figure.subplots()
        for who, pairs in lines.items():
            style = {"color": COLOURS.get(who, "#202124"), "linewidth": 2.2 if who == "fmeta" else 1.3}
            axes.plot(*zip(*pairs, strict=True), marker="o", markersize=4, label=who, **style)
        axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
        ticks = sorted({pair[0] for pairs in lines.values() for pair in pairs})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    return figure
