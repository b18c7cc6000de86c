"""Few-shot detection: meta-learned heads against TFA, from one base, on two sets of real pictures.

For each set, a detector on a frozen MobileNetV2 is trained on generated scenes and on the *other* set; a third,
``scenes``, on generated scenes alone, and this one adapts to both sets. From each base, with the same seconds of
one core each, heads are meta-learned by first-order MAML, and ordinary training of the heads goes on, for TFA
(arXiv 2003.06957). Then each adapts to draws of 5 and 10 pictures a class:

- ``meta``: all heads, from the meta-learned ones and the classes' prototypes;
- ``tfa``: the last layer, with linear or cosine scores, whichever is better in validation;
- ``fine_tuned``: all heads, as ``meta``, but from the base of TFA and random scores.

Rate and number of steps of each are chosen on validation draws of the set: support pictures from those that are
never drawn later, scores on pictures that are no test pictures. Average precision at an overlap of 0.5 on the test
pictures that show a class of the draw. What ``meta`` adapted is besides written as fp32, fp16 and bf16 files, and
what torchvision's module finds with the numbers of each is scored.

`python -m benchmarks.detection --data FOLDER --backbone-weights FILE --work FOLDER --only scenes`
`python -m benchmarks.detection --work FOLDER --summary benchmarks/reports/detection.json`
"""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import torch
import tyro

from benchmarks.detection_draws import results, settings, target_pools
from benchmarks.detection_training import Options, learned_from, task_of
from fmeta.data import box_folder, glyphs, scenes
from fmeta.train import checkpoint

SETS = ("det_bccd", "det_cards")
DETECTORS = (*SETS, "scenes")
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}


def main(options: Options) -> None:
    torch.set_num_threads(1)
    if options.summary:
        summarise(options)
        return
    for name in DETECTORS if options.only is None else (options.only,):
        trained_and_tested(options, name)


def trained_and_tested(options: Options, name: str) -> None:
    """One detector and the set, or both sets, that it adapts to."""
    assert options.data is not None
    folder = options.work / name
    pools = [scenes(glyphs().train, count=options.scenes, classes=40, size=256, seed=options.seed)]
    others = [other for other in SETS if other != name and name in SETS]
    pools += [box_folder(options.data / other, size=task_of(options).size) for other in others]
    learned = learned_from(options, folder, pools)
    for target in targets(name):
        inside = folder if target == name else folder / target
        inside.mkdir(exist_ok=True)
        pools_of = target_pools(options.data / target, learned)
        chosen = settings(options, target, inside, pools_of, learned)
        results(options, target, inside, pools_of, learned, chosen)


def targets(name: str) -> tuple[str, ...]:
    """The sets that a detector adapts to."""
    return (name,) if name in SETS else SETS


def summarise(options: Options) -> None:
    """Means, and paired differences to TFA and to fine-tuning, with 95 % intervals of Student's t over draws."""
    assert options.summary is not None
    kept = options.summary.exists()
    found: dict[str, Any] = json.loads(options.summary.read_text()) if kept else {}
    places = [(name, name) for name in SETS] + [(f"scenes/{name}", "scenes") for name in SETS]
    for name, detector in places:
        folder = options.work / name
        if not (folder / "draws.json").exists():
            continue
        draws = json.loads((folder / "draws.json").read_text())
        source = options.work / detector
        parts = {part: checkpoint.read(source / f"{part}.safetensors")[1] for part in ("base", "meta", "tfa")}
        rows: dict[str, Any] = {}
        for shots in sorted({one["shots"] for one in draws}):
            mine = [one for one in draws if one["shots"] == shots]
            column = lambda key, mine=mine: [one[key] for one in mine]  # noqa: E731
            rows[str(shots)] = {key: interval(column(key)) for key in ("before", "meta", "tfa", "fine_tuned")}
            for key in ("tfa", "fine_tuned", "before"):
                pairs = zip(column("meta"), column(key), strict=True)
                rows[str(shots)][f"meta minus {key}"] = interval([a - b for a, b in pairs])
            rows[str(shots)]["seconds"] = max(column("meta_seconds"))
            if all("files" in one for one in mine):
                for dtype in ("fp16", "bf16"):
                    changes = [one["files"][dtype] - one["files"]["fp32"] for one in mine]
                    rows[str(shots)][f"{dtype} file minus fp32"] = interval(changes)
        found[name] = {
            "training": parts, "ap50": rows, "draws": draws,
            "validation": json.loads((folder / "settings.json").read_text()),
        }  # fmt: skip
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
