"""The command ``fmeta export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fmeta.train.config import MaybeInt, MaybePath


@dataclass(frozen=True)
class ExportCommand:
    """Write what a run has learned to one file: a program that needs torch alone, or weights."""

    run: tyro.conf.Positional[Path]
    """A run folder."""
    file: tyro.conf.Positional[Path]
    """Where it goes: .pt2 for a program, .safetensors for weights."""
    what: Literal["program", "meta", "adapted"] = "program"
    """program: adapts and predicts without fmeta; meta: the learned weights; adapted: the model for --support."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of weights. Half files keep batch norm's statistics and rates in fp32; for meta the loss is measured."""
    support: MaybePath = None
    """A folder of pictures, a folder a class, to adapt to (for adapted), or to take sizes from (for a program)."""
    queries: MaybeInt = None
    """Inputs that a program predicts at once; as many as a test task has if not given."""
    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint."""
    root: MaybePath = None
    """Folder of the data set (of texts its csv), if it is not where it was in training."""


def export_command(asked: ExportCommand) -> int:
    """``fmeta export``; returns the exit code."""
    from fmeta.train.exporting import export  # late, so that help comes without delay

    options = {name: value for name, value in vars(asked).items() if name not in ("run", "file")}
    export(asked.run, asked.file, **options)
    return 0
