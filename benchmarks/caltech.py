"""Caltech-101 with pre-trained MobileNetV2: what meta-learning its last blocks adds to its frozen features.

60 of the classes are divided into 48 to train on and 12 to choose on; the report is on the 16 others. Every method
sees the same test tasks, and differences are paired, task by task. Besides: what half files cost, whether a model
that is exported and read again predicts the same, and how long a meta-step takes with kept features.

`python -m benchmarks.caltech FOLDER --weights FILE --out benchmarks/reports/caltech.json`
"""

from __future__ import annotations

import csv
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import fmeta
from fmeta.data import Pools, embedded, image_folder
from fmeta.data.split import shuffled
from fmeta.train.evaluate import estimate

EAGER = fmeta.Plan(compile=False)
VALIDATION_SEED, TEST_SEED = 1_000_001, 1_000_002
HELD = 50
"""Held-out tasks side by side."""


@dataclass(frozen=True)
class Options:
    """Train, choose and report."""

    folder: tyro.conf.Positional[Path]
    """Folder of images.zip and index.csv."""
    weights: Path
    """State dict of torchvision's MobileNetV2 (made for colours of mean and deviation 0.5, eps 0.001)."""
    out: Path | None = None
    """File of the results."""
    learns: int = 1
    """Last blocks that are meta-learned."""
    algorithm: Literal["protonet", "metaoptnet"] = "protonet"
    distance: Literal["cosine", "euclidean"] = "cosine"
    """Of protonet; cosine starts from the nearest centroid of unit length."""
    shots: int = 1
    outer_steps: int = 200
    outer_lr: float = 3e-4
    tasks: int = 8
    size: int = 84
    test_tasks: int = 1_000
    seed: int = 0
    threads: int = 2


def main(options: Options) -> None:
    """All parts, a line each, and the file."""
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    pools = load(options)
    module = network(options)
    frozen = embedded(pools, module)
    say("frozen features kept", begin)
    found = centroids(frozen, options)
    cut = fmeta.last_blocks(dict(module.named_parameters()), options.learns)
    trunk, rest = fmeta.split(module, cut)
    near = embedded(pools, trunk)
    say(f"features in front of the last {options.learns} blocks kept", begin)
    learned, params = train(near, rest, options)
    found["meta-learned"] = learned
    report = summary(found, options)
    for name, row in report["accuracy"].items():
        print(f"{name}: {percent(row)}", flush=True)
    for name, row in report["meta_learned_minus"].items():
        print(f"  minus {name}: {percent(row)}", flush=True)
    report["files"] = files(module, params, pools, options, learned)
    report["meta_step"] = timing(pools, frozen, options)
    report |= {"seconds": round(time.perf_counter() - begin, 1), "options": plain(options)}
    report |= {
        "command": shlex.join(["python", "-m", "benchmarks.caltech", *(Path(a).name for a in sys.argv[1:])]),
        "torch": torch.__version__,
    }
    print(json.dumps({k: report[k] for k in ("files", "meta_step", "seconds")}, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def say(what: str, begin: float) -> None:
    print(f"[{time.perf_counter() - begin:.0f} s] {what}", flush=True)


def load(options: Options) -> Pools:
    """48 classes to train on, 12 to choose on, 16 to report on."""
    with (options.folder / "index.csv").open(newline="", encoding="utf-8") as file:
        split_of = {row["label"]: row["split"] for row in csv.DictReader(file)}
    known = [name for name, kind in split_of.items() if kind == "train"]
    chosen = set(shuffled(known, 0)[:12])
    held = {n: "test" if k != "train" else "val" if n in chosen else "train" for n, k in split_of.items()}
    return image_folder(options.folder / "images.zip", size=options.size, split=held)


def network(options: Options, weights: Path | None = None) -> Any:
    """The embedding."""
    half = (0.5, 0.5, 0.5)
    return fmeta.models.backbone(
        "mobilenet_v2", weights or options.weights, mean=half, std=half, norm_eps=1e-3
    )


def tasks_of(pool: Any, options: Options, tasks: int) -> Any:
    return fmeta.tasks.few_shot(pool, ways=5, shots=options.shots, queries=15, tasks=tasks)


def accuracy(
    algorithm: fmeta.Algorithm, meta: Any, pool: Any, options: Options, count: int, seed: int
) -> Tensor:
    """Of each held-out task, on features."""
    measure, sampler = fmeta.meta_eval(algorithm, EAGER), tasks_of(pool, options, HELD)
    values = [measure(meta, sampler(seed, i))["accuracy"].double() for i in range(-(-count // HELD))]
    return torch.cat(values)[:count]


def test(algorithm: fmeta.Algorithm, meta: Any, pool: Any, options: Options) -> Tensor:
    return accuracy(algorithm, meta, pool, options, options.test_tasks, TEST_SEED)


def as_they_are(params: Any, x: Tensor) -> Tensor:
    """The embedding of features."""
    return x


def final(apply: Any, params: Any, near: Any) -> Any:
    """A pool with what the learned blocks make of it; each picture is embedded once, whatever tasks it is in."""
    with torch.no_grad():
        return replace(near, x=torch.cat([apply(params, x) for x in near.x.split(256)]))


def centroids(frozen: Pools, options: Options) -> dict[str, Tensor]:
    """Nearest centroid on the frozen features, in SimpleShot's three ways."""
    ways = {
        "nearest centroid": fmeta.simpleshot(as_they_are, normalise=False, ways=5),
        "nearest centroid, unit length": fmeta.simpleshot(as_they_are, ways=5),
        "nearest centroid, centred, unit length": fmeta.simpleshot(
            as_they_are, mean=frozen.train.x.mean(0), ways=5
        ),
    }
    return {name: test(algorithm, {}, frozen.test, options) for name, algorithm in ways.items()}


def made(apply: Any, options: Options) -> fmeta.Algorithm:
    if options.algorithm == "metaoptnet":
        return fmeta.metaoptnet(apply, ways=5)
    return fmeta.protonet(apply, distance=options.distance, ways=5)


def train(near: Pools, rest: Any, options: Options) -> tuple[Tensor, Any]:
    """Meta-learn the rest; the best of the validations is tested. Returns its accuracies and its meta."""
    apply, params = fmeta.functionalize(rest)
    algorithm, judge = made(apply, options), made(as_they_are, options)
    outer = fmeta.adam(fmeta.schedules.cosine(options.outer_lr, options.outer_steps))
    state, step = fmeta.meta_init(algorithm, outer, params), fmeta.meta_step(algorithm, outer, EAGER)
    sampler, begin = tasks_of(near.train, options, options.tasks), time.perf_counter()
    best, kept = -math.inf, state.meta
    for k in range(options.outer_steps + 1):
        if k % max(options.outer_steps // 10, 1) == 0:
            val = final(apply, weights_of(state.meta), near.val)
            now = accuracy(judge, state.meta, val, options, 500, VALIDATION_SEED).mean().item()
            best, kept = (now, state.meta) if now > best else (best, kept)
            say(f"step {k}: validation {100 * now:.2f} %", begin)
        if k < options.outer_steps:
            state, _ = step(state, sampler(options.seed, k))
    return test(judge, kept, final(apply, weights_of(kept), near.test), options), kept


def weights_of(meta: Any) -> Any:
    """The weights among what is learned."""
    return meta.get("params", meta)


def summary(found: dict[str, Tensor], options: Options) -> dict[str, Any]:
    """Means, and paired differences, with 95 % intervals."""
    ours = found["meta-learned"]
    return {
        "what": f"5-way {options.shots}-shot, {len(ours)} tasks of 16 unseen classes",
        "accuracy": {name: estimate(values)._asdict() for name, values in found.items()},
        "meta_learned_minus": {
            n: estimate(ours - v)._asdict() for n, v in found.items() if n != "meta-learned"
        },
    }


def files(module: Any, meta: Any, pools: Pools, options: Options, expected: Tensor) -> dict[str, Any]:
    """The learned model as files: sizes, accuracy of each type, and whether it comes back to the bit."""
    whole = fmeta.weights.state_dict(module, weights_of(meta))
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("fp32", "fp16", "bf16"):
            path = Path(folder) / dtype
            fmeta.weights.save(path, whole, dtype=dtype)  # type: ignore[arg-type]
            again = network(options, as_float(path))
            trunk, rest = fmeta.split(
                again, fmeta.last_blocks(dict(again.named_parameters()), options.learns)
            )
            pool = final(*fmeta.functionalize(rest), embedded(pools.test, trunk))
            values = test(made(as_they_are, options), meta, pool, options)
            change = estimate(values - expected)
            rows[dtype] = {"bytes": path.stat().st_size, "accuracy": values.mean().item()}
            rows[dtype] |= {"minus the model itself": change._asdict()}
            if dtype == "fp32":
                own = weights_of(meta)
                same = all(torch.equal(x, own[name]) for name, x in fmeta.functionalize(rest)[1].items())
                rows[dtype]["identical"] = same and torch.equal(values, expected)
    return rows


def as_float(path: Path) -> Path:
    """The numbers of a half file as float32, in a file beside it."""
    beside = path.with_suffix(".safetensors")
    fmeta.weights.save(
        beside, {n: x.float() if x.is_floating_point() else x for n, x in fmeta.weights.read(path).items()}
    )
    return beside


def timing(pools: Pools, frozen: Pools, options: Options, repeats: int = 5) -> dict[str, Any]:
    """Milliseconds of a meta-step of ANIL, five inner steps: on kept features, and with the encoder run again."""
    half = (0.5, 0.5, 0.5)
    torch.manual_seed(options.seed)
    module = fmeta.models.backbone("mobilenet_v2", options.weights, 5, mean=half, std=half, norm_eps=1e-3)
    head = fmeta.models.head_name(module)
    whole, own = fmeta.freeze(*fmeta.functionalize(module), head)
    trunk, rest = fmeta.split(module, head)
    apply, params = fmeta.functionalize(rest)
    outer, sgd = fmeta.adam(1e-3), fmeta.sgd(0.05)
    cases = {
        "encoder again": (whole, own, pools, lambda x: x, EAGER),
        "encoder once a step, without gradient": (apply, params, pools, encoder(trunk), EAGER),
        "kept features": (apply, params, frozen, lambda x: x, EAGER),
        "kept features, compiled": (apply, params, frozen, lambda x: x, fmeta.Plan()),
    }
    grads, found = [], {}
    for name, (model, start, source, before, plan) in cases.items():
        algorithm = fmeta.anil(fmeta.losses.cross_entropy(model), sgd, steps=5, adapts=head)
        sampler = tasks_of(source.train, options, 2)
        inputs = lambda k, s=sampler, b=before: fmeta.Task(*(p._replace(x=b(p.x)) for p in s(0, k)))  # noqa: E731
        grads.append(fmeta.meta_grad(algorithm, plan)(start, inputs(0))[0])
        state, step = fmeta.meta_init(algorithm, outer, start), fmeta.meta_step(algorithm, outer, plan)
        times = []
        for k in range(repeats + 2):
            begin = time.perf_counter()
            state, _ = step(state, inputs(k))
            times.append(1e3 * (time.perf_counter() - begin))
        found[name] = {
            "median_ms": statistics.median(times[2:]),
            "range_ms": [min(times[2:]), max(times[2:])],
        }
    for other in grads[1:]:
        for name, g in grads[0].items():
            torch.testing.assert_close(other[name], g, rtol=0.0, atol=1e-3 * float(g.abs().max()))
    fastest = found["kept features"]["median_ms"]
    for row in found.values():
        row["times_kept_features"] = round(row["median_ms"] / fastest, 2)
    return {"what": "ANIL, 5 inner steps, 2 tasks, 5-way, gradients agree", **found}


def encoder(trunk: Any) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return trunk(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    return run


def percent(row: dict[str, float]) -> str:
    return f"{100 * row['mean']:.2f} ± {100 * row['interval']:.2f} %"


def plain(options: Options) -> dict[str, Any]:
    return {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items()}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
