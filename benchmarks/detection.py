"""Few-shot detection: meta-learned heads against TFA, from one base, on two sets of real pictures.

For each set, a detector on a frozen MobileNetV2 is trained on generated scenes and on the *other* set. From this
base, with the same seconds of one core each, heads are meta-learned by first-order MAML, and ordinary training of
the heads goes on, for TFA (arXiv 2003.06957). Then each adapts to draws of 5 and 10 pictures a class:

- ``meta``: all heads, from the meta-learned ones and the classes' prototypes;
- ``tfa``: the last layer, with linear or cosine scores, whichever is better in validation;
- ``fine_tuned``: all heads, as ``meta``, but from the base of TFA and random scores.

Rate and number of steps of each are chosen on validation draws of the set: support pictures from those that are
never drawn later, scores on pictures that are no test pictures. Average precision at an overlap of 0.5 on the test
pictures that show a class of the draw.

`python -m benchmarks.detection --data FOLDER --backbone-weights FILE --work FOLDER --only det_bccd`
`python -m benchmarks.detection --work FOLDER --summary benchmarks/reports/detection.json`
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor

import fmeta
from fmeta import tree
from fmeta.data import BoxPool, Featured, box_folder, glyphs, scenes
from fmeta.models import object_detector
from fmeta.models.detecting import Detection, detection
from fmeta.models.detector import merged_detector, split_detector
from fmeta.tasks.detection import batch_of, draw
from fmeta.tasks.detection import detection as episodes
from fmeta.tasks.seeding import generator
from fmeta.train import checkpoint, detection_plots
from fmeta.train.average_precision import average_precision
from fmeta.train.detecting import adapted_at, predictions, support_of
from fmeta.train.detection_baselines import fine_tuning
from fmeta.train.detection_config import DetectionTask
from fmeta.train.detection_data import (
    ONE_BY_ONE,
    base_params,
    base_training,
    behind_pyramid,
    built,
    make_module,
    with_features,
)

SETS = ("det_bccd", "det_cards")
HEADS = ("rpn", "roi_heads")
METHODS = ("meta", "tfa linear", "tfa cosine", "fine_tuned")
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}


@dataclass(frozen=True)
class Options:
    """Train, adapt, compare; every part that is done is kept in ``work`` and not done again."""

    work: Path
    """Folder of weights and results."""
    data: Path | None = None
    """Folder of det_bccd and det_cards."""
    backbone_weights: Path | None = None
    """ImageNet weights of MobileNetV2."""
    only: str | None = None
    """One of the sets; both if not given."""
    summary: Path | None = None
    """Write the results of all sets there, and do nothing else."""
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
    rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Rates to choose from."""
    batch: int = 4
    seed: int = 0


class Pools(NamedTuple):
    """Pictures of the set that is adapted to."""

    shown: Featured
    tuning: Featured
    """Support pictures of validation draws."""
    val: Featured
    test: Featured


class Learned(NamedTuple):
    """All that adaptation starts from."""

    loss_fn: Detection
    meta: Any
    base: Any


def main(options: Options) -> None:
    torch.set_num_threads(1)
    if options.summary:
        summarise(options)
        return
    for name in SETS if options.only is None else (options.only,):
        one_set(options, name)


def one_set(options: Options, name: str) -> None:
    """Everything for one set."""
    folder = options.work / name
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    task = DetectionTask(detector="mobilenet", backbone_weights=options.backbone_weights)
    assert options.data is not None
    other = next(one for one in SETS if one != name)
    drawn = glyphs().train
    sources = [
        scenes(drawn, count=options.scenes, classes=40, size=256, seed=options.seed),
        box_folder(options.data / other, size=task.size),
    ]
    base_file(options, task, sources, folder)
    module = built(task, checkpoint.read(folder / "base.safetensors")[0])
    pyramid, pyramid_params = split_detector(module, cut="body")
    behind = lambda pool: behind_pyramid(pyramid, pyramid_params, with_features(pyramid, pool))  # noqa: E731
    detector, _ = split_detector(module)
    loss_fn = detection(detector, proposals=task.proposals)
    learned = heads(options, folder, loss_fn, base_heads(folder), [behind(pool) for pool in sources])
    pools = target_pools(options.data / name, task.size, behind)
    chosen = settings(options, name, folder, pools, learned)
    results(options, name, folder, pools, learned, chosen)


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


def heads(options: Options, folder: Path, loss_fn: Detection, base: Any, sources: list[Featured]) -> Learned:
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
    return Learned(loss_fn, meta, checkpoint.load(folder / "tfa.safetensors", base)[0])


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
    sampler = episodes(
        sources, ways=(2, 3), shots=5, queries=2, tasks=len(sources), steps=4, batch=options.batch
    )
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


def target_pools(path: Path, size: int, behind: Callable[[BoxPool], Featured]) -> Pools:
    """Four disjoint parts: pictures to draw from, to tune on, to validate on, and the official test pictures."""
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
    return Pools(*(behind(pool) for pool in parts))


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
) -> tuple[dict[int, float], list[dict[str, Tensor]], float]:  # fmt: skip
    """AP50 after some numbers of steps, the last predictions, and seconds of one core for adaptation."""
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
    return found, looks, seconds


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
                found, _, _ = measured(
                    options, learned, how, rate, list(options.steps), pools.tuning, pools.val, kinds, shots,
                    1_000 + index,
                )  # fmt: skip
                for steps, value in found.items():
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
                    found, seen, seconds = measured(
                        options, learned, how, rate, [step], pools.shown, pools.test, kinds, shots, index
                    )
                    key = label if step else "before"
                    looks[key], row[key], row[f"{key}_seconds"] = seen, found[step], round(seconds, 1)
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


def summarise(options: Options) -> None:
    """Means, and paired differences to TFA and to fine-tuning, with 95 % intervals of Student's t over draws."""
    found: dict[str, Any] = {}
    for name in SETS:
        folder = options.work / name
        if not (folder / "draws.json").exists():
            continue
        draws = json.loads((folder / "draws.json").read_text())
        parts = {part: checkpoint.read(folder / f"{part}.safetensors")[1] for part in ("base", "meta", "tfa")}
        rows: dict[str, Any] = {}
        for shots in sorted({one["shots"] for one in draws}):
            mine = [one for one in draws if one["shots"] == shots]
            column = lambda key, mine=mine: [one[key] for one in mine]  # noqa: E731
            rows[str(shots)] = {key: interval(column(key)) for key in ("before", "meta", "tfa", "fine_tuned")}
            for key in ("tfa", "fine_tuned", "before"):
                pairs = zip(column("meta"), column(key), strict=True)
                rows[str(shots)][f"meta minus {key}"] = interval([a - b for a, b in pairs])
            rows[str(shots)]["seconds"] = max(column("meta_seconds"))
        found[name] = {
            "training": parts, "ap50": rows, "draws": draws,
            "validation": json.loads((folder / "settings.json").read_text()),
        }  # fmt: skip
    assert options.summary is not None
    options.summary.write_text(json.dumps(found, indent=2) + "\n")
    for name, one in found.items():
        for shots, row in one["ap50"].items():
            print(name, shots, row)


def interval(values: list[float]) -> dict[str, float]:
    """A mean over draws and the half-width of its interval."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    half = T95.get(len(values), 1.96) * spread / math.sqrt(len(values))
    return {"mean": round(statistics.fmean(values), 4), "interval_95": round(half, 4), "draws": len(values)}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
