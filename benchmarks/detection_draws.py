"""Adaptation to draws of a few pictures a class: settings chosen in validation, then all draws of the test."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fmeta
from benchmarks.detection_training import HEADS, Learned, Options, method
from fmeta import tree, weights
from fmeta.data import BoxPool, Featured, box_folder
from fmeta.models.detector import GeneralizedRCNN, merged_detector
from fmeta.tasks.detection import batch_of, draw
from fmeta.tasks.seeding import generator
from fmeta.train import checkpoint
from fmeta.train.detection import plots as detection_plots
from fmeta.train.detection.adapting import adapted_at, predictions, support_of
from fmeta.train.detection.average_precision import average_precision
from fmeta.train.detection.baselines import fine_tuning

METHODS = ("meta", "tfa linear", "tfa cosine", "fine_tuned")


class Measured(NamedTuple):
    """AP50 after some numbers of steps; predictions and weights after the last; seconds of one core of adapting."""

    ap50: dict[int, float]
    looks: list[dict[str, Tensor]]
    adapted: fmeta.Adapted
    seconds: float


class Pools(NamedTuple):
    """Pictures of the set that is adapted to."""

    shown: Featured
    tuning: Featured
    """Support pictures of validation draws."""
    val: Featured
    test: Featured


def target_pools(path: Path, learned: Learned) -> Pools:
    """Four disjoint parts: pictures to draw from, to tune on, to validate on, and the official test pictures."""
    size = learned.task.size
    shown, test = (box_folder(path, split=split, size=size) for split in ("train", "test"))
    content = json.loads((path / "annotations.json").read_text())
    rows = torch.randperm(len(shown.files), generator=generator(77, 0))
    if any(image["split"] == "val" for image in content["images"]):
        val = box_folder(path, split="val", size=size)
        val = val.rows(torch.arange(len(val.files))[::2])
    else:
        val, rows = shown.rows(rows[:50]), rows[50:]
    cut = len(rows) // 3
    parts = shown.rows(rows[cut:]), shown.rows(rows[:cut]), val, test
    return Pools(*(learned.behind(pool) for pool in parts))


def kinds_of(name: str, pool: BoxPool, index: int) -> Tensor:
    """Classes of a draw: all three or two blood cells in turn, three cards."""
    random = generator(4, index)
    count = 3 if name == "det_cards" or index % 2 == 0 else 2
    return torch.randperm(len(pool.names), generator=random)[:count].sort().values + 1


def start_of(learned: Learned, how: str, rate: float, ways: int, seed: int) -> tuple[fmeta.Algorithm, Any]:
    """A method's algorithm and what it starts from."""
    if how == "meta":
        return method(learned.loss_fn, rate, 1), learned.meta
    adapts: Any = HEADS if how == "fine_tuned" else "roi_heads.box_predictor"
    scores: Any = "cosine" if how == "tfa cosine" else "linear"
    inner = fmeta.sgd(rate, momentum=0.9)
    return fine_tuning(
        learned.loss_fn, learned.base, inner, ways=ways, seed=seed, scores=scores, adapts=adapts
    )


def measured(
    options: Options, learned: Learned, how: str, rate: float, at: list[int],
    shown: Featured, asked: Featured, kinds: Tensor, shots: int, seed: int,
) -> Measured:  # fmt: skip
    """Adapt to one draw."""
    random = generator(5 + seed, shots)
    rows, _ = draw(shown.pool.holds(), kinds, shots, 0, random)
    algorithm, meta = start_of(learned, how, rate, len(kinds), seed)
    query = torch.where(asked.pool.holds()[:, kinds - 1].any(1))[0]
    y = batch_of(asked, kinds, query).y
    found, looks = {}, []
    support = support_of(shown, kinds, rows, max(at), options.batch, seed)
    began = time.process_time()
    reached = adapted_at(algorithm, meta, support, at)
    seconds = time.process_time() - began
    for steps, adapted in reached.items():
        finite = all(bool(torch.isfinite(leaf).all()) for leaf in tree.leaves(adapted.params))
        looks = predictions(algorithm, meta, adapted, asked, query) if finite else []
        found[steps] = average_precision(looks, y, len(kinds)).ap50 if finite else 0.0
    return Measured(found, looks, reached[max(at)], seconds)


def files(
    learned: Learned, adapted: fmeta.Adapted, folder: Path, asked: Featured, kinds: Tensor
) -> dict[str, float]:
    """AP50 of an adapted detector read from files of three types, as torchvision's own module, and their MB."""
    module = merged_detector(learned.loss_fn.detector, {**learned.meta["params"], **adapted.params})
    query = torch.where(asked.pool.holds()[:, kinds - 1].any(1))[0]
    y = batch_of(asked, kinds, query).y
    found: dict[str, float] = {}
    for dtype in ("fp32", "fp16", "bf16"):
        path = folder / f"adapted_{dtype}.safetensors"
        checkpoint.save(path, weights.in_dtype(module.state_dict(), dtype), {})
        module.load_state_dict(checkpoint.read(path)[0])
        looks = [found_in(module, asked.pool, row) for row in query.tolist()]
        found[dtype] = average_precision(looks, y, len(kinds)).ap50
        found[f"{dtype}_mb"] = round(path.stat().st_size / 1e6, 2)
    return found


def found_in(module: GeneralizedRCNN, pool: BoxPool, row: int) -> dict[str, Tensor]:
    """What torchvision's module finds in one picture, from its pixels."""
    height, width = pool.sizes[row].tolist()
    with torch.no_grad():
        return dict(module([pool.images[row, :, :height, :width] / 255])[0])


def settings(options: Options, name: str, folder: Path, pools: Pools, learned: Learned) -> dict[str, Any]:
    """The best rate and number of steps of each method in validation."""
    path = folder / "settings.json"
    grid: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for how in METHODS:
        for rate in options.rates:
            key = f"{how} {rate}"
            if key in grid:
                continue
            scores: dict[str, list[float]] = {str(steps): [] for steps in options.steps}
            for index, shots in enumerate(options.tuning_shots):
                kinds = kinds_of(name, pools.tuning.pool, index)
                found = measured(
                    options, learned, how, rate, list(options.steps), pools.tuning, pools.val, kinds, shots,
                    1_000 + index,
                )  # fmt: skip
                for steps, value in found.ap50.items():
                    scores[str(steps)].append(value)
            grid[key] = {steps: statistics.fmean(values) for steps, values in scores.items()}
            path.write_text(json.dumps(grid, indent=2) + "\n")
            print(f"{name} validation {key}: {grid[key]}", flush=True)
    chosen = {}
    for how in METHODS:
        tried = [
            (value, rate, int(steps))
            for rate in options.rates
            for steps, value in grid[f"{how} {rate}"].items()
        ]
        chosen[how] = max(tried, key=lambda one: (one[0], -one[1]))
    print(f"{name} chosen: {chosen}", flush=True)
    return chosen


def results(
    options: Options, name: str, folder: Path, pools: Pools, learned: Learned, chosen: dict[str, Any]
) -> None:
    """All draws of both numbers of pictures."""
    path = folder / "draws.json"
    done: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    tfa = max(("tfa linear", "tfa cosine"), key=lambda how: chosen[how][0])
    for index in range(options.draws):
        for shots in options.shots:
            if any((one["draw"], one["shots"]) == (index, shots) for one in done):
                continue
            kinds = kinds_of(name, pools.shown.pool, index)
            row: dict[str, Any] = {"draw": index, "shots": shots, "tfa_scores": tfa.split()[1]}
            row["classes"] = [pools.shown.pool.names[kind - 1] for kind in kinds.tolist()]
            looks: dict[str, Any] = {}
            for label, how in (("meta", "meta"), ("tfa", tfa), ("fine_tuned", "fine_tuned")):
                _, rate, steps = chosen[how]
                for step in [0, steps] if label == "meta" else [steps]:
                    found = measured(
                        options, learned, how, rate, [step], pools.shown, pools.test, kinds, shots, index
                    )
                    key = label if step else "before"
                    looks[key], row[key] = found.looks, found.ap50[step]
                    row[f"{key}_seconds"] = round(found.seconds, 1)
                    if key == "meta":
                        row["files"] = files(learned, found.adapted, folder, pools.test, kinds)
            done.append(row)
            path.write_text(json.dumps(done, indent=2) + "\n")
            print(f"{name} {row}", flush=True)
            if index == 0 and shots == options.shots[-1]:
                picture(folder, pools.test, kinds, looks, row["classes"])


def picture(folder: Path, test: Featured, kinds: Tensor, looks: dict[str, Any], names: list[str]) -> None:
    """Test pictures with what is found before and after adaptation, and by TFA."""
    query = torch.where(test.pool.holds()[:, kinds - 1].any(1))[0]
    titles = {"before": "meta-learned, before", "meta": "after adaptation", "tfa": "TFA"}
    found = {title: looks[key] for key, title in titles.items() if looks[key]}
    path = folder / f"{folder.name}.png"
    detection_plots.draw(path, test.pool.rows(query), batch_of(test, kinds, query).y, found, names)
