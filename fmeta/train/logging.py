"""Metrics of a run: one JSON object a line in ``metrics.jsonl``, and the same as TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch.utils.tensorboard import SummaryWriter

from fmeta.train.checkpoint import finite_or_none, write_atomic

FILE = "metrics.jsonl"
Kind = Literal["train", "validation"]


class Writer(NamedTuple):
    """Where metrics go: ``write(kind, step, numbers)``, and ``close()`` at the end."""

    write: Callable[[Kind, int, dict[str, float]], None]
    close: Callable[[], None]


SILENT = Writer(lambda kind, step, numbers: None, lambda: None)
"""For a process that leaves the metrics to another."""


def open_metrics(folder: Path, step: int = 0) -> Writer:
    """Continue the metrics of a run folder behind ``step``; lines of later steps, which a resumed run
    computes again, are dropped.

    Args:
        folder: the run folder.
        step: the step that the run stands at; 0 for a new one.
    """
    path = folder / FILE
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    lines = path.open("a", encoding="utf-8")
    events = SummaryWriter(str(folder / "events"), purge_step=step + 1 if step else None)

    def write(kind: Kind, step: int, numbers: dict[str, float]) -> None:
        line = {"step": step, "kind": kind} | {name: finite_or_none(value) for name, value in numbers.items()}
        lines.write(json.dumps(line) + "\n")
        lines.flush()
        for name, value in numbers.items():
            events.add_scalar(f"{kind}/{name}", value, step)

    def close() -> None:
        lines.close()
        events.close()

    return Writer(write, close)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics, in order; a last line that was cut short is left out."""
    path = folder / FILE
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines[:-1]]
