"""Whole runs that take a second: configs, stand-ins for data, and what tests look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fmeta.data import Pools, from_tensors
from fmeta.train.config import Config, Inner, Machine, Outer, Report, SinusoidTask
from fmeta.train.logging import read_metrics
from fmeta.train.loop import Hooks
from fmeta.train.pictures.config import FewShotTask


def tiny_sinusoid(out: Path, **outer: Any) -> Config[SinusoidTask]:
    return Config(
        recipe="sinusoid",
        task=SinusoidTask(shots=3, queries=3, test_shots=2, test_queries=4, hidden=(6,)),
        inner=Inner(inner_lr=0.01, inner_steps=1, test_steps=2),
        outer=Outer(**{"tasks": 4, "outer_steps": 6, "outer_lr": 0.01} | outer),
        report=Report(log_interval=2, val_interval=3, val_tasks=6, test_tasks=10),
        machine=Machine(device="cpu", compile="off"),
        out=out,
    )


def tiny_few_shot(out: Path, algorithm: Any = "maml") -> Config[FewShotTask]:
    return Config(
        recipe="glyphs",
        task=FewShotTask(ways=3, shots=1, queries=2, channels=4),
        inner=Inner(algorithm=algorithm, inner_lr=0.1, test_steps=2),
        outer=Outer(tasks=2, outer_steps=3),
        report=Report(log_interval=2, val_interval=2, val_tasks=4, test_tasks=5),
        machine=Machine(device="cpu", compile="off"),
        out=out,
    )


def losses(path: Path) -> list[tuple[int, str, float]]:
    return [(line["step"], line["kind"], line["loss"]) for line in read_metrics(path)]


class Seen:
    """What the loop told."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.values: list[tuple[int, float, bool]] = []
        self.saves: list[tuple[str, int, float]] = []
        self.steps: list[int] = []
        self.starts: list[float] = []
        self.hooks = Hooks(
            log=lambda step, numbers: self.lines.append((step, numbers)),
            validated=lambda step, value, best: self.values.append((step, value, best)),
            save=lambda name, state, progress: self.saves.append((name, progress.step, state.meta.item())),
            stepped=self.steps.append,
            started=self.starts.append,
            interrupted=lambda: stop_at is not None and bool(self.steps) and self.steps[-1] >= stop_at,
        )


def random_pictures() -> Pools:
    """Random pictures in place of a data set: 30 classes of 6, each around a pattern of its own."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(30, 1, 1, 16, 16, generator=generator)
    noise = torch.rand(30, 6, 1, 16, 16, generator=generator)
    x = (0.7 * patterns + 0.3 * noise).flatten(0, 1)
    return from_tensors(x, torch.arange(30).repeat_interleave(6), split=(0.4, 0.3, 0.3))
