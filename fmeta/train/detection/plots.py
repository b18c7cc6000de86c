"""Pictures of detections beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from fmeta.data.boxes import BoxPool
from fmeta.train.plots import STYLE

COLOURS = ("#d9772b", "#1f5fa8", "#188038", "#a142f4", "#c9a227", "#d93025", "#129eaf", "#9aa0a6")
SHOWN = 0.5
"""Score from which a detection is drawn."""


def draw(
    path: Path,
    pool: BoxPool,
    y: Mapping[str, Tensor],
    found: Mapping[str, Sequence[Mapping[str, Tensor]]],
    names: Sequence[str],
    count: int = 4,
) -> None:
    """Draw pictures of a pool, a line each: the truth, then what each detector finds.

    Args:
        path: the PNG file.
        pool: the pictures.
        y: true boxes and labels, as tasks have them.
        found: detections of every picture, by the name of the detector.
        names: name of each class; label 1 is ``names[0]``.
        count: pictures, evenly spaced.
    """
    rows = [index * len(pool.files) // count for index in range(min(count, len(pool.files)))]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.9 * (1 + len(found)), 2.4 * len(rows) + 0.4))
        grid = figure.subplots(len(rows), 1 + len(found), squeeze=False)
        for line, row in zip(grid, rows, strict=True):
            height, width = pool.sizes[row].tolist()
            for axes in line:
                axes.imshow(pool.images[row, :, :height, :width].permute(1, 2, 0).numpy())
                axes.set_axis_off()
            mark(line[0], y["boxes"][row], y["labels"][row])
            for axes, predictions in zip(line[1:], found.values(), strict=True):
                one = predictions[row]
                sure = one["scores"] >= SHOWN
                mark(axes, one["boxes"][sure], one["labels"][sure])
        for axes, title in zip(grid[0], ["truth", *found], strict=True):
            axes.set_title(title)
        handles = [
            Rectangle((0, 0), 1, 1, fill=False, edgecolor=COLOURS[index % len(COLOURS)], label=name)
            for index, name in enumerate(names)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 6))
        figure.savefig(path)


def mark(axes: Axes, boxes: Tensor, labels: Tensor) -> None:
    """Draw boxes in the colours of their classes."""
    for (left, top, right, bottom), label in zip(boxes.tolist(), labels.tolist(), strict=True):
        if label:
            colour = COLOURS[(label - 1) % len(COLOURS)]
            place = Rectangle((left, top), right - left, bottom - top, fill=False, lw=1.1, edgecolor=colour)
            axes.add_patch(place)
