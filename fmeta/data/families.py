"""Families of regression tasks from a csv of ``task,x...,y``: one task is one individual, measured several times."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fmeta.data.lines import csv_lines
from fmeta.data.pool import SPLITS
from fmeta.data.split import ClassSplit, assign_splits

CALL = "csv_families"


class Families(NamedTuple):
    """The tasks of one split. ``rows[t, : counts[t]]`` are the points of task ``t``."""

    x: Tensor  # [points, inputs], float32, standardised
    y: Tensor  # [points, 1]
    rows: Tensor  # [tasks, most], int64
    counts: Tensor  # [tasks], int64
    names: list[str]


class FamilySplit(NamedTuple):
    """Tasks divided by individual, and how numbers were standardised."""

    train: Families
    val: Families
    test: Families
    mean: Tensor  # [inputs + 1], the target last
    scale: Tensor


def csv_families(path: Path | str, *, split: ClassSplit = (0.6, 0.2, 0.2), seed: int = 0) -> FamilySplit:
    """Read a csv with a column ``task``, a column ``y`` and the inputs between them, and divide its tasks.

    Inputs and target are standardised by the mean and deviation of the points of training tasks.

    Args:
        path: the file; its first line names the columns.
        split: shares of tasks for training, validation and test, or ``{task: "train" | "val" | "test"}``.
        seed: of the division.

    Raises:
        ValueError: without such columns, for a cell that is missing or no finite number (with its line), and for
            fewer than three tasks.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "heights.csv"
        >>> _ = file.write_text("task,age,y\\n" + "".join(f"child{i},{i + 2},{80 + i}\\n" for i in range(5)))
        >>> csv_families(file).train.x.shape
        torch.Size([5, 1])
    """
    path = Path(path)
    tasks, values = read(path)
    order = list(dict.fromkeys(tasks))
    if len(order) < 3:
        raise ValueError(f"{CALL}: at least 3 tasks are needed, got {len(order)} in {path}.")
    points = torch.tensor(values, dtype=torch.float64)
    where: dict[str, list[int]] = {name: [] for name in order}
    for row, name in enumerate(tasks):
        where[name].append(row)
    found = assign_splits(order, split, seed, CALL)
    parts = [[name for name in order if found[name] == kind] for kind in SPLITS]
    if not parts[0]:
        raise ValueError(f"{CALL}: some tasks must be for training, got none of {len(order)}. Change split.")
    fitted = points[[row for name in parts[0] for row in where[name]]]
    mean, scale = fitted.mean(0), fitted.std(0, correction=min(1, len(fitted) - 1))
    scale = torch.where(
        scale > 1e-9 * fitted.abs().amax(0), scale, 1.0
    )  # what training does not vary stays as it is
    numbers = ((points - mean) / scale).float()

    def part(chosen: list[str]) -> Families:
        counts = torch.tensor([len(where[name]) for name in chosen], dtype=torch.int64)
        rows = torch.zeros(len(chosen), int(counts.max()) if len(chosen) else 0, dtype=torch.int64)
        for task, name in enumerate(chosen):
            rows[task, : len(where[name])] = torch.tensor(where[name])
        return Families(numbers[:, :-1], numbers[:, -1:], rows, counts, chosen)

    train, val, test = map(part, parts)
    return FamilySplit(train, val, test, mean.float(), scale.float())


def read(path: Path) -> tuple[list[str], list[list[float]]]:
    """The task of each line, and its numbers with the target last."""
    if not path.is_file():
        raise ValueError(
            f"{CALL}: there is no file {path}. Give the path of a csv with columns task, x..., y."
        )
    lines = csv_lines(path, CALL)
    head = [name.strip() for name in next(lines, (0, []))[1]]
    inputs = [name for name in head if name not in ("task", "y")]
    if head.count("task") != 1 or head.count("y") != 1 or not inputs:
        raise ValueError(
            f"{CALL}: {path} must have a column task, a column y and inputs, got {head}. Name them in the first line."
        )
    columns = [head.index(name) for name in (*inputs, "y")]
    tasks, values = [], []
    for number, line in lines:
        if len(line) != len(head):
            raise ValueError(f"{CALL}: {path}, line {number}: expected {len(head)} cells, got {len(line)}.")
        tasks.append(line[head.index("task")].strip())
        if not tasks[-1]:
            raise ValueError(f"{CALL}: {path}, line {number}: the name of the task is missing.")
        values.append([cell(path, number, head[i], line[i]) for i in columns])
    return tasks, values


def cell(path: Path, line: int, column: str, text: str) -> float:
    """The number in a cell."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"{CALL}: {path}, line {line}: {column} must be a finite number, got {text!r}. Fill it in, or leave "
            "the line out."
        )
    return value
