"""Four ways to adapt to a few examples on the same tasks: `python -m benchmarks.approaches --out FOLDER`.

Unsupervised meta-learning (MAML on UMTRA's tasks, no labels), a learned optimiser (meta_transformer, from
initial weights that stay as they were drawn), a meta-learned initialisation (MAML), and no meta-learning (from
scratch; one model of all training classes, fine-tuned): one network, one number of outer steps, the same number
of adaptation steps, the same test tasks. A run that is in the folder already is not trained again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fmeta.train.cli import main as fmeta

APPROACHES = {
    "maml": ["--queries", "5"],
    "unsupervised": ["--no-labels", "--queries", "1", "--outer-lr", "1e-3"],
    "learned_optimizer": ["--algorithm", "learned", "--queries", "5", "--inner-lr", "0.01"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="glyphs", choices=["glyphs", "omniglot"])
    parser.add_argument("--out", type=Path, default=Path("approaches"))
    parser.add_argument("--outer-steps", type=int, default=2_000)
    parser.add_argument("--inner-steps", type=int, default=3)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--test-tasks", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shared = [
        *("--outer-steps", options.outer_steps, "--tasks", options.tasks, "--seed", options.seed),
        *(
            "--inner-steps",
            options.inner_steps,
            "--test-steps",
            options.inner_steps,
            "--shots",
            options.shots,
        ),
        *("--channels", 32, "--test-queries", 5, "--val-interval", 500, "--no-baselines", "--threads", 1),
    ]
    runs = []
    for name, own in APPROACHES.items():
        run = options.out / name
        runs.append(str(run))
        if (run / "results.json").exists():
            continue
        fresh = ["train", options.recipe, *map(str, shared), *own, "--out", str(run)]
        code = fmeta(
            ["train", options.recipe, "--resume", str(run)] if (run / "config.json").exists() else fresh
        )
        if code:
            raise SystemExit(code)
    steps = ",".join(str(k) for k in sorted({1, options.inner_steps}))
    shown = ["--steps", steps, "--tasks", str(options.test_tasks), "--out", str(options.out / "comparison")]
    raise SystemExit(fmeta(["compare", *runs, "--baselines", *shown]))


if __name__ == "__main__":
    main()
