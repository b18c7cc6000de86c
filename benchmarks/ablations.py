"""Learned optimisers beside each other on the same trainings: `python -m benchmarks.ablations RUN RUN ...`.

The first run's tests are taken (its problems on unseen classes, wider and deeper networks, another activation, longer
trainings); differences to it are paired, training by training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fmeta import learned
from fmeta.train.evaluate import TEST_SEED, estimate
from fmeta.train.learning.recipe import finished, weights
from fmeta.train.learning.report import scored, tests_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--trainings", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    built = {run.name: finished(run) for run in options.runs}
    thetas = {run.name: weights(run, built[run.name], "best") for run in options.runs}
    first = built[options.runs[0].name]
    record: dict[str, Any] = {"trainings": options.trainings, "tests": {}}
    for test in tests_of(first):
        tasks = first.sample(test.problem, TEST_SEED, 0, options.trainings, test.steps)
        found = {
            name: scored(learned.curves(test.problem, one.rule, thetas[name], tasks, test.steps))
            for name, one in built.items()
        }
        whole = found[options.runs[0].name]
        print(
            f"\n{test.label}, {test.steps} steps   (final loss; mean over all steps; minus the first, paired)"
        )
        rows = record["tests"][test.label] = {}
        for name, one in found.items():
            numbers = {
                "final": estimate(one.final),
                "mean": estimate(one.mean),
                "minus_first": {
                    "final": estimate(one.final - whole.final),
                    "mean": estimate(one.mean - whole.mean),
                },
                "diverged": int(one.diverged.sum()),
            }
            rows[name] = numbers
            shown = "   ".join("{:.4f} ± {:.4f}".format(*numbers[key]) for key in ("final", "mean"))
            minus = "   ".join("{:+.4f} ± {:.4f}".format(*pair) for pair in numbers["minus_first"].values())
            print(f"  {name:<26} {shown}   {minus}   {numbers['diverged']} diverged", flush=True)
    if options.out:
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
