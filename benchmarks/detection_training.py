"""Detectors that adaptation starts from: the base, its heads meta-learned, and its heads trained on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import fmeta
from fmeta.data import BoxPool, Featured
from fmeta.models import object_detector
from fmeta.models.detecting import Detection, detection
from fmeta.models.detector import merged_detector, split_detector
from fmeta.tasks.detection import detection as episodes
from fmeta.train import checkpoint
from fmeta.train.detection.config import DetectionTask
from fmeta.train.detection.data import (
    ONE_BY_ONE,
    base_params,
    base_training,
    behind_pyramid,
    built,
    make_module,
    with_features,
)

HEADS = ("rpn", "roi_heads")


@dataclass(frozen=True)
class Options:
    """Train, adapt, compare; every part that is done is kept in ``work`` and not done again."""

    work: Path
    """Folder of weights and results."""
    data: Path | None = None
    """Folder of det_bccd and det_cards."""
    backbone_weights: Path | None = None
    """ImageNet weights of MobileNetV2."""
    only: Literal["det_bccd", "det_cards", "scenes"] | None = None
    """One of the sets, or the one detector for both, which learned from generated scenes alone; all if not given."""
    summary: Path | None = None
    """Write the results of ``work`` there, beside those that the file holds, and do nothing else."""
    base_seconds: float = 150.0
    """Seconds of one core for the base."""
    more_seconds: float = 170.0
    """Seconds of one core for meta-training, and for going on with ordinary training."""
    scenes: int = 500
    draws: int = 5
    shots: tuple[int, ...] = (5, 10)
    tuning_shots: tuple[int, ...] = (10,)
    """Pictures a class of the validation draws, one draw each."""
    steps: tuple[int, ...] = (40, 100)
    """Steps of adaptation to choose from."""
    rates: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03)
    """Rates to choose from."""
    batch: int = 4
    seed: int = 0


class Learned(NamedTuple):
    """All that adaptation starts from."""

    loss_fn: Detection
    task: DetectionTask
    behind: Callable[[BoxPool], Featured]
    """Pictures with their features behind the base's pyramid."""
    meta: Any
    base: Any


def learned_from(options: Options, folder: Path, pools: list[BoxPool]) -> Learned:
    """The base of these pictures and both of its continuations, read where they were kept."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    task = task_of(options)
    base_file(options, task, pools, folder)
    module = built(task, checkpoint.read(folder / "base.safetensors")[0])
    pyramid, pyramid_params = split_detector(module, cut="body")
    behind = lambda pool: behind_pyramid(pyramid, pyramid_params, with_features(pyramid, pool))  # noqa: E731
    loss_fn = detection(split_detector(module)[0], proposals=task.proposals)
    meta, base = heads(options, folder, loss_fn, base_heads(folder), [behind(pool) for pool in pools])
    return Learned(loss_fn, task, behind, meta, base)


def task_of(options: Options) -> DetectionTask:
    """The small detector."""
    return DetectionTask(detector="mobilenet", backbone_weights=options.backbone_weights)


def base_file(options: Options, task: DetectionTask, pools: list[BoxPool], folder: Path) -> None:
    """Ordinary training of everything after the frozen body."""
    if (folder / "base.safetensors").exists():
        return
    module = make_module(task)
    detector, _ = split_detector(module, cut="body")
    sources = [with_features(detector, pool) for pool in pools]
    print(f"{folder.name}: features of {sum(len(pool.files) for pool in pools)} pictures", flush=True)
    params = base_params(module, sum(len(pool.names) for pool in pools))
    params, record = trained(options, detector, params, sources, options.base_seconds, lr=1e-3)
    checkpoint.save(folder / "base_heads.safetensors", params, record)
    checkpoint.save(folder / "base.safetensors", dict(merged_detector(detector, params).state_dict()), record)


def base_heads(folder: Path) -> dict[str, Tensor]:
    """The base's weights behind the pyramid."""
    found = checkpoint.read(folder / "base_heads.safetensors")[0]
    return {name: value for name, value in found.items() if not name.startswith("backbone.")}


def trained(
    options: Options, detector: Any, params: Any, sources: list[Featured], seconds: float, lr: float
) -> tuple[Any, dict[str, Any]]:
    """Ordinary training for so many seconds of this process; the first steps tell how many there will be."""
    losses: list[float] = []
    told = lambda step, loss: losses.append(loss)  # noqa: E731
    given: dict[str, Any] = {
        "lr": lr, "batch": options.batch, "seed": options.seed, "proposals": 64, "told": told,
    }  # fmt: skip
    clock: list[float] = []
    given["told"] = lambda step, loss: (told(step, loss), clock.append(time.process_time()))
    base_training(detector, params, sources, steps=8, **given)
    steps = max(8, int(seconds / ((clock[-1] - clock[0]) / 7)))  # the first step looks at the loss
    losses.clear()
    began, wall = time.process_time(), time.monotonic()
    late = lambda: time.process_time() - began > 1.3 * seconds  # noqa: E731
    params = base_training(detector, params, sources, steps=steps, until=late, **given)
    record = {
        "steps": len(losses), "cpu_seconds": round(time.process_time() - began, 1),
        "seconds": round(time.monotonic() - wall, 1),
        "loss": [round(statistics.fmean(losses[:20]), 3), round(statistics.fmean(losses[-20:]), 3)],
    }  # fmt: skip
    print(f"ordinary training: {record}", flush=True)
    return params, record


def heads(
    options: Options, folder: Path, loss_fn: Detection, base: Any, sources: list[Featured]
) -> tuple[Any, Any]:
    """The meta-learned heads, and those that ordinary training went on with."""
    algorithm = method(loss_fn, 0.01, 4)
    template = algorithm.init(object_detector(base))
    if not (folder / "tfa.safetensors").exists():
        params, record = trained(options, loss_fn.detector, base, sources, options.more_seconds, lr=5e-4)
        checkpoint.save(folder / "tfa.safetensors", params, record)
    if not (folder / "meta.safetensors").exists():
        meta, record = meta_trained(options, algorithm, object_detector(base), sources)
        checkpoint.save(folder / "meta.safetensors", meta, record)
    meta = checkpoint.load(folder / "meta.safetensors", template)[0]
    return meta, checkpoint.load(folder / "tfa.safetensors", base)[0]


def method(loss_fn: Detection, rate: float, steps: int) -> fmeta.Algorithm:
    """First-order MAML on all heads."""
    return fmeta.few_shot_detection(loss_fn, fmeta.sgd(rate, momentum=0.9), steps=steps, adapts=HEADS)


def meta_trained(
    options: Options, algorithm: fmeta.Algorithm, params: Any, sources: list[Featured]
) -> tuple[Any, dict[str, Any]]:
    """Meta-train for so many seconds of this process."""
    steps = 100_000
    rate: dict[str, int] = {"steps": steps}
    schedule = lambda count: 3e-4 * (1 - count / rate["steps"]).clamp(0.05, 1)  # noqa: E731
    outer = fmeta.chain(fmeta.clip_by_norm(10.0), fmeta.adam(schedule))
    sampler = episodes(sources, ways=(2, 3), shots=5, queries=2, tasks=2, steps=4, batch=options.batch)
    state = fmeta.meta_init(algorithm, outer, params)
    step = fmeta.meta_step(algorithm, outer, ONE_BY_ONE)
    losses: list[float] = []
    began, wall = time.process_time(), time.monotonic()
    spent = 0.0
    while spent < options.more_seconds:
        state, metrics = step(state, sampler(options.seed, len(losses)))
        losses.append(metrics["loss"].item())
        spent = time.process_time() - began
        if len(losses) >= 8:  # the first steps look at the loss of every shape
            rate["steps"] = max(len(losses) + 1, int(len(losses) * options.more_seconds / spent))
    record = {
        "outer_steps": len(losses), "cpu_seconds": round(spent, 1), "seconds": round(time.monotonic() - wall, 1),
        "loss": [round(statistics.fmean(losses[:20]), 3), round(statistics.fmean(losses[-20:]), 3)],
    }  # fmt: skip
    print(f"meta-training: {record}", flush=True)
    return state.meta, record
