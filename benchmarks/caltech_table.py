"""Every algorithm on Caltech-101, from random weights: `python -m benchmarks.caltech_table FOLDER --out OUT`.

One network (four strided convolutions of 32 filters, pictures of 42 pixels), 48 training classes, 12 for
validation and 16 for test, 5 ways; every algorithm is trained for the same wall time, after a step that builds
its kernels, then all are tested on the same tasks; MAML and FOMAML once more beside models without meta-learning
of the same network. A run that is in the folder already is not trained again.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from tempfile import TemporaryDirectory

from fmeta.train.cli import main as fmeta

STEPLESS = "protonet matchingnet r2d2 lrd2 metaoptnet".split()
ALGORITHMS = (
    "maml fomaml anil boil reptile metasgd mamlpp sharpmaml metacurvature imaml protomaml learned".split()
    + STEPLESS
)
OWN = {
    "reptile": (
        "--inner-lr 0.1 --inner-steps 5 --train-shots 10 --minibatches "
        "--outer-optimizer sgd --outer-lr 1.0 --test-steps 10"
    ).split(),
    "imaml": "--inner-lr 0.4 --inner-steps 5 --strength 0.1 --damping 5 --solver-iterations 1".split(),
    "anil": ["--inner-lr", "0.5"],
    "learned": ["--inner-lr", "0.01"],
    **{name: ["--train-ways", "15"] for name in STEPLESS},
}


def write_index(folder: Path, out: Path) -> Path:
    """The folder's own validation classes are tested on; every fifth of its training classes validates."""
    rows = list(csv.DictReader((folder / "index.csv").open()))
    labels = sorted({row["label"] for row in rows if row["split"] == "train"})
    held = set(labels[::5])
    for row in rows:
        row["split"] = "test" if row["split"] != "train" else "val" if row["label"] in held else "train"
    out.mkdir(parents=True, exist_ok=True)
    path = out / "index.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file", "label", "split"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, help="images.zip and index.csv with the columns file, label, split"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1.5)
    parser.add_argument("--test-tasks", type=int, default=600)
    parser.add_argument("--baseline-steps", type=int, default=2_000)
    options = parser.parse_args()
    index = write_index(options.folder, options.out)
    shared = [
        *("--root", options.folder / "images.zip", "--index", index, "--size", 42, "--channels", 32),
        *("--pool", "stride", "--no-flatten", "--shots", options.shots, "--queries", 5, "--tasks", 8),
        *("--inner-lr", 0.1, "--inner-steps", 3, "--test-steps", 3, "--schedule", "constant", "--threads", 1),
        *("--outer-lr", 2e-3, "--minutes", options.minutes, "--no-baselines"),
        *("--val-interval", 200, "--val-tasks", 100, "--test-tasks", 100),
    ]
    runs = []
    for name in ALGORITHMS:
        run = options.out / f"{name}_{options.shots}"
        if not (run / "results.json").exists():
            train = ["train", "images", "--algorithm", name, *map(str, shared), *OWN.get(name, [])]
            with TemporaryDirectory() as first:  # builds the kernels, which the clock is not to count
                fmeta([*train, "--outer-steps", "1", "--out", str(Path(first) / name)])
            fmeta([*train, "--outer-steps", "100000", "--out", str(run)])
        if (run / "results.json").exists():
            runs.append(str(run))
    shown = ["--steps", "3,10", "--tasks", str(options.test_tasks), "--out"]
    code = fmeta(["compare", *runs, *shown, str(options.out / f"table_{options.shots}")])
    few = [
        *runs[:2],
        "--baselines",
        "--baseline-steps",
        str(options.baseline_steps),
    ]  # which have them in common
    raise SystemExit(
        code or fmeta(["compare", *few, *shown, str(options.out / f"baselines_{options.shots}")])
    )


if __name__ == "__main__":
    main()
