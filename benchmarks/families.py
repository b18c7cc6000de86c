"""Real regression families: a meta-learned network against pooled linear, ridge and Gaussian process regression.

One family is one csv of ``task,x...,y`` in a folder; one task is one individual. Individuals are divided into
folds; each fold in turn is held out, and everything (weights, rates, penalties, kernels) is chosen on the others.
Of a held-out individual every method sees the same few points and is asked for others; the squared error, in
units of the family's variance, is averaged over draws, and individuals are what intervals are over.

`python -m benchmarks.families FOLDER --out benchmarks/reports/families.json`
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import LinearRegression, Ridge

import fmeta
from fmeta.data import Families, csv_families
from fmeta.tasks import regression
from fmeta.types import Batch

Fit = Callable[[Any, Any, Any], Any]
"""``(x, y, x_query) -> predictions``."""
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
KERNELS = [(a, r, n) for a in (0.3, 1.0, 3.0) for r in (0.3, 1.0, 3.0) for n in (0.03, 0.1, 0.3, 1.0)]


@dataclass(frozen=True)
class Options:
    """Compare on every family of a folder."""

    folder: tyro.conf.Positional[Path]
    """Folder of csv files."""
    out: Path | None = None
    """File of the results."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    """Families; all if not given."""
    shots: int = 5
    """Points that a method sees of a held-out individual."""
    folds: int = 5
    draws: int = 10
    """Random choices of these points for each individual."""
    most: int = 100
    """Individuals of a family, the first of a random order."""
    outer_steps: int = 3_000
    seed: int = 0


def main(options: Options) -> None:
    """All families: a line each, and the file."""
    rows = []
    for path in sorted(options.folder.glob("*.csv")):
        if not options.only or path.stem in options.only:
            rows.append(family(path, options))
            print(line(rows[-1]), flush=True)
            if options.out is not None:
                options.out.write_text(
                    json.dumps({"options": plain(options), "families": rows}, indent=1) + "\n"
                )


def family(path: Path, options: Options) -> dict[str, Any]:
    """Errors of all methods on one family."""
    begin, errors = time.perf_counter(), {}
    everyone = csv_families(path, split=(1.0, 0.0, 0.0)).train
    enough = [n for n, c in zip(everyone.names, everyone.counts.tolist(), strict=True) if c > options.shots]
    random = np.random.default_rng(options.seed)
    chosen = [enough[i] for i in random.permutation(len(enough))[: options.most]]
    for fold in range(options.folds):
        held = set(chosen[fold :: options.folds])
        rest = [n for n in chosen if n not in held]
        validation = set(rest[::5])
        kind = {n: "test" if n in held else ("val" if n in validation else "train") for n in chosen}
        found = csv_families(path, split={n: kind.get(n, "val") for n in everyone.names})
        used = found._replace(val=only(found.val, validation))
        for name, values in one_fold(used, options, fold).items():
            errors.setdefault(name, []).extend(values)
    return summary(path.stem, errors, time.perf_counter() - begin)


def only(family: Families, names: set[str]) -> Families:
    """Some individuals."""
    kept = [i for i, name in enumerate(family.names) if name in names]
    return family._replace(
        rows=family.rows[kept], counts=family.counts[kept], names=[family.names[i] for i in kept]
    )


def one_fold(found: Any, options: Options, fold: int) -> dict[str, list[float]]:
    """The mean error of each held-out individual, by method."""
    x, y = points(found.train)
    tuning = episodes(found.train, options, 1, 40)
    linear = LinearRegression().fit(x, y)
    ridge = best([ridge_with(p) for p in PENALTIES], tuning)
    process = best([process_with(*k) for k in KERNELS], tuning)
    network = meta_learned(found, options, fold)
    methods: dict[str, Fit] = {
        "pooled linear": lambda a, b, q: linear.predict(q), "ridge": ridge, "Gaussian process": process,
        "meta-learned": network,
    }  # fmt: skip
    held = episodes(found.test, options, options.draws)
    return {
        name: [float(np.mean([error(m, e) for e in task])) for task in held] for name, m in methods.items()
    }


def points(part: Families) -> tuple[Any, Any]:
    """All points of some individuals."""
    rows = torch.cat([part.rows[t, :n] for t, n in enumerate(part.counts.tolist())])
    return part.x[rows].numpy(), part.y[rows, 0].numpy()


def episodes(part: Families, options: Options, draws: int, most: int | None = None) -> list[list[Any]]:
    """For each individual some choices of support points; the others are asked for."""
    random = np.random.default_rng(options.seed + 1)
    found = []
    for t, count in enumerate(part.counts.tolist()[:most]):
        rows = part.rows[t, :count].numpy()
        orders = [rows[random.permutation(count)] for _ in range(draws)]
        x, y = part.x.numpy(), part.y[:, 0].numpy()
        cut = options.shots
        found.append([(x[o[:cut]], y[o[:cut]], x[o[cut:]], y[o[cut:]]) for o in orders])
    return found


def error(method: Fit, episode: Any) -> float:
    x, y, query, truth = episode
    return float(np.mean((method(x, y, query) - truth) ** 2))


def best(methods: list[Fit], tuning: list[list[Any]]) -> Fit:
    """The one with the smallest error on training individuals."""
    return min(methods, key=lambda m: np.mean([error(m, e) for task in tuning for e in task]))


def ridge_with(penalty: float) -> Fit:
    return lambda x, y, query: Ridge(alpha=penalty).fit(x, y).predict(query)


def process_with(amplitude: float, length: float, noise: float) -> Fit:
    kernel = ConstantKernel(amplitude) * RBF(length) + WhiteKernel(noise)
    return lambda x, y, query: GaussianProcessRegressor(kernel, optimizer=None).fit(x, y).predict(query)


def meta_learned(found: Any, options: Options, fold: int) -> Fit:
    """MAML with learned rates on training individuals; the best of its validations."""
    torch.manual_seed(options.seed + fold)
    apply, params = fmeta.functionalize(fmeta.models.mlp([found.train.x.shape[1], 40, 40, 1], torch.nn.Tanh))
    algorithm = fmeta.mamlpp(fmeta.losses.mse(apply), steps=5, lr=0.05)
    outer = fmeta.adamw(fmeta.schedules.cosine(2e-3, options.outer_steps), weight_decay=1e-2)
    queries = max(1, min(int(found.train.counts.min()), 12) - options.shots)
    sampler = regression(found.train, shots=options.shots, queries=queries, tasks=32)
    state, step = fmeta.meta_init(algorithm, outer, params), fmeta.meta_step(algorithm, outer)
    tuning = [e for task in episodes(found.val, options, 5) for e in task]
    least, kept = math.inf, state.meta
    for k in range(options.outer_steps):
        state, _ = step(state, sampler(options.seed, k))
        if (k + 1) % 250 == 0:
            now = float(np.mean([error(predictor(algorithm, state.meta), e) for e in tuning]))
            least, kept = (now, state.meta) if now < least else (least, kept)
    return predictor(algorithm, kept)


def predictor(algorithm: Any, meta: Any) -> Fit:
    """A meta-learned model as a method."""

    def predict(x: Any, y: Any, query: Any) -> Any:
        support = Batch(torch.from_numpy(x), torch.from_numpy(y)[:, None])
        adapted = algorithm.adapt(meta, support)
        return algorithm.predict(meta, adapted, torch.from_numpy(query))[:, 0].detach().numpy()

    return predict


def summary(name: str, errors: dict[str, list[float]], seconds: float) -> dict[str, Any]:
    """Means, and paired differences to the meta-learned network, with 95 % intervals over individuals."""
    ours = np.array(errors["meta-learned"])

    def estimate(values: Any) -> dict[str, float]:
        half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
        return {"mean": float(values.mean()), "interval_95": float(half)}

    return {
        "family": name,
        "individuals": len(ours),
        "errors": {m: estimate(np.array(v)) for m, v in errors.items()},
        "meta_learned_minus": {
            m: estimate(ours - np.array(v)) for m, v in errors.items() if m != "meta-learned"
        },
        "seconds": round(seconds, 1),
    }


def line(row: dict[str, Any]) -> str:
    """A family in a line."""
    show = lambda e: f"{e['mean']:.3f} ± {e['interval_95']:.3f}"  # noqa: E731
    parts = [f"{m} {show(e)}" for m, e in row["errors"].items()]
    parts += [f"- {m} {show(e)}" for m, e in row["meta_learned_minus"].items()]
    return f"{row['family']} ({row['individuals']}, {row['seconds']:.0f} s): " + "; ".join(parts)


def plain(options: Options) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
