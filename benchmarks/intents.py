"""Intents from a few sentences: an encoder trained on the intents of the other classes against the encoder as it came.

BANKING77 and CLINC150 in the five class splits of ProtAugment (Dopierre et al., 2021, arXiv 2105.12995). In each fold
a linear map behind the encoder (or its last layers) is trained on episodes of training classes, as a prototypical
network; validation classes choose the step. Test episodes are the same for all methods: class means of the frozen
encoder, logistic regression on its embeddings, and class means of the trained one. Intervals are 95 %, over the
episodes of all folds; differences are paired, episode by episode, and also given fold by fold.

`python -m benchmarks.intents $FMETA_DATA/text_intent --out benchmarks/reports/intents.json`
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import one_hot

import fmeta
from fmeta.data import Pool, class_pool, from_tensors, prepared_pool
from fmeta.data.text import file_split, read_texts
from fmeta.data.tokens import tokenise
from fmeta.tasks import few_shot, trimmed
from fmeta.train.config import MaybePath
from fmeta.train.text.config import TextTask
from fmeta.train.text.recipe import INSERTED, make_learner

VAL_SEED, TEST_SEED, BATCH = 1_000_001, 1_000_002, 50
PENALTIES = (0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Options:
    """Compare on both data sets and all folds."""

    folder: tyro.conf.Positional[Path]
    """Folder of banking77.csv, clinc150.csv and class_splits_protaugment.json."""
    out: MaybePath = None
    """File of the results; folds that are in it are not run again."""
    state: MaybePath = None
    """Folder of what is learned, a file a fold."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ("banking77", "clinc150")
    folds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (1, 2, 3, 4, 5)
    model: str = "minilm"
    learns: Literal["head", "last", "lora", "adapters"] = "head"
    layers: int = 1
    rank: int = 8
    ways: int = 20
    """Of training episodes."""
    shots: int = 2
    """Of training episodes."""
    queries: int = 5
    tasks: int = 4
    outer_steps: int = 150
    outer_lr: float = 3e-4
    val_interval: int = 50
    episodes: int = 600
    """Test episodes of each kind and fold."""
    regression: bool = True
    """Also logistic regression in 5-way episodes, at the penalty that is best on validation episodes."""
    seed: int = 0


def main(options: Options) -> None:
    """All folds: a line for each, and the file."""
    command = shlex.join(["python", "-m", "benchmarks.intents", *sys.argv[1:]])
    print(
        f"{command}\nseed {options.seed}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        flush=True,
    )
    found: dict[str, Any] = {"command": command, "options": plain(options), "folds": {}}
    begin, before = time.perf_counter(), 0.0
    if options.out is not None and options.out.exists():
        earlier = json.loads(options.out.read_text())
        found["folds"], before = earlier["folds"], earlier["wall_s"]
    if options.state is not None:
        options.state.mkdir(parents=True, exist_ok=True)
    for name in options.data:
        keys = [f"{name}/fold{fold}" for fold in options.folds]
        data = None if all(key in found["folds"] for key in keys) else load(name, options)
        for key in keys:
            if data is not None and key not in found["folds"]:
                found["folds"][key] = one_fold(data, key, options)
            print(line(key, found["folds"][key]), flush=True)
            found["summary"] = {n: summary(n, found["folds"]) for n in options.data}
            found["wall_s"] = round(before + time.perf_counter() - begin, 1)
            if options.out is not None:
                options.out.write_text(json.dumps(found) + "\n")
    for name in options.data:
        print("\n" + table(name, found["summary"][name]), flush=True)


def one_fold(data: Dataset, key: str, options: Options) -> dict[str, Any]:
    """Accuracies of every test episode by each method."""
    torch.manual_seed(options.seed)
    frozen, prepared = (from_tensors(x, data.y, split=data.folds[key]) for x in (data.frozen, data.prepared))
    kinds = settings(len(frozen.test.names))
    found: dict[str, Any] = {"scores": {label(kind): {} for kind in kinds}}
    for kind in kinds:
        found["scores"][label(kind)]["frozen"] = class_means(frozen.test, kind, options, TEST_SEED)
        if options.regression and kind[0] == 5:
            found["scores"][label(kind)]["regression"] = regression(frozen, kind, options)
    begin, cpu = time.perf_counter(), time.process_time()
    params, found["validation"] = train(prepared, data, options)
    found["train_s"], found["train_cpu_s"] = time.perf_counter() - begin, time.process_time() - cpu
    tuned = embedded(prepared.test, data, params)
    for kind in kinds:
        found["scores"][label(kind)]["trained"] = class_means(tuned, kind, options, TEST_SEED)
    if options.state is not None:
        file = options.state / f"{key.replace('/', '-')}.safetensors"
        save_file({n: p.contiguous() for n, p in params.items()}, file)
    return found


class Dataset(NamedTuple):
    """All sentences of a data set, as the frozen encoder and as its frozen part see them, and what learns."""

    frozen: Tensor  # [n, dim]
    prepared: Any
    y: Tensor
    folds: dict[str, dict[int, str]]
    """The split of every label in each fold."""
    apply: Any
    params: Any


def load(name: str, options: Options) -> Dataset:
    """Read a data set and let the frozen part see every sentence once, for all folds."""
    file = options.folder / "class_splits_protaugment.json"
    splits = {f"{name}/fold{f}": file_split(file, f"{name}/fold{f}") for f in options.folds}
    known = next(iter(splits.values()))
    rows = [
        r for r in read_texts(options.folder / f"{name}.csv", ("text", "label"), "intents") if r[1] in known
    ]
    names = tuple(sorted(known))
    y = torch.tensor([names.index(row[1]) for row in rows])
    task = TextTask(model=options.model, learns=options.learns, layers=options.layers, rank=options.rank)
    made = make_learner(task, torch.device("cpu"))
    apply, params = fmeta.functionalize(made.model(None))
    if options.learns in INSERTED:
        apply, params = fmeta.freeze(apply, params, INSERTED[options.learns])
    begin, cpu = time.perf_counter(), time.process_time()
    pool = class_pool(
        tokenise("intents", [row[0] for row in rows], made.tokenizer, task.max_length).x, y, names
    )
    prepared = kept(name, pool, made.prepare or (lambda x: x), options)
    frozen = prepared
    if options.learns != "head":
        frozen = prepared_pool(pool_of(pool, prepared), lambda x: apply(params, **x)).x
    print(
        f"{name}: {len(rows):,} sentences, {time.perf_counter() - begin:.0f} s, of CPU "
        f"{time.process_time() - cpu:.0f} s",
        flush=True,
    )
    folds = {key: {names.index(n): kind for n, kind in split.items()} for key, split in splits.items()}
    return Dataset(frozen, prepared, y, folds, apply, params)


def kept(name: str, pool: Pool, prepare: Any, options: Options) -> Any:
    """What the frozen part makes of all sentences; features are kept in the state folder."""
    file = None if options.state is None else options.state / f"{name}-features.safetensors"
    if options.learns != "head" or file is None:
        return prepared_pool(pool, prepare).x
    if not file.exists():
        save_file({"features": prepared_pool(pool, prepare).x}, file)
    return load_file(file)["features"]


def pool_of(pool: Pool, x: Any) -> Pool:
    """A pool with other examples."""
    return replace(pool, x=x)


def settings(classes: int) -> list[tuple[int, int]]:
    """Ways and shots of test episodes."""
    return [(ways, shots) for ways in (5, 15, classes) for shots in (1, 5)]


def label(kind: tuple[int, int]) -> str:
    """``5-way 1-shot``."""
    return f"{kind[0]}-way {kind[1]}-shot"


def train(pools: Any, data: Dataset, options: Options) -> tuple[Any, list[float]]:
    """A prototypical network on episodes of training classes; the best of its validations, and all of them."""
    ways = min(options.ways, len(pools.train.names))
    sampler = trimmed(
        few_shot(pools.train, ways=ways, shots=options.shots, queries=options.queries, tasks=options.tasks)
    )
    algorithm = fmeta.protonet(data.apply, ways=ways)
    outer = fmeta.adam(fmeta.schedules.cosine(options.outer_lr, options.outer_steps))
    state = fmeta.meta_init(algorithm, outer, data.params)
    step = fmeta.meta_step(algorithm, outer, fmeta.Plan(compile=False, chunk_size=1))

    def validate(params: Any) -> float:
        features = embedded(pools.val, data, params)
        return float(
            np.mean([np.mean(class_means(features, (5, s), options, VAL_SEED, 300)) for s in (1, 5)])
        )

    best, kept = validate(state.meta), state.meta
    seen = [best]
    for k in range(options.outer_steps):
        state, _ = step(state, sampler(options.seed, k))
        if (k + 1) % options.val_interval == 0:
            seen.append(validate(state.meta))
            best, kept = (seen[-1], state.meta) if seen[-1] > best else (best, kept)
    return kept, seen


def embedded(pool: Pool, data: Dataset, params: Any) -> Pool:
    """A pool of embeddings by what learns."""
    return prepared_pool(
        pool, lambda x: data.apply(params, **x) if isinstance(x, dict) else data.apply(params, x)
    )


def class_means(
    pool: Pool, kind: tuple[int, int], options: Options, seed: int, count: int | None = None
) -> list[float]:
    """Accuracy of nearest class means on every episode."""
    ways, shots = kind
    sampler = few_shot(pool, ways=ways, shots=shots, queries=5, tasks=BATCH)
    found: list[float] = []
    while len(found) < (count or options.episodes):
        support, query = sampler(seed, len(found))
        member = one_hot(support.y, ways).to(support.x.dtype)
        means = member.mT @ support.x / shots
        right = torch.cdist(query.x, means).argmin(-1) == query.y
        found += right.float().mean(1).tolist()
    return found[: count or options.episodes]


def regression(pools: Any, kind: tuple[int, int], options: Options) -> list[float]:
    """Accuracy of logistic regression on every episode."""
    penalty = max(PENALTIES, key=lambda c: np.mean(fits(pools.val, kind, c, VAL_SEED, BATCH)))
    return fits(pools.test, kind, penalty, TEST_SEED, options.episodes)


def fits(pool: Pool, kind: tuple[int, int], penalty: float, seed: int, count: int) -> list[float]:
    """Accuracy of a classifier fitted on every support set."""
    ways, shots = kind
    sampler, found = few_shot(pool, ways=ways, shots=shots, queries=5, tasks=BATCH), []
    while len(found) < count:
        support, query = sampler(seed, len(found))
        for a, b, x, y in zip(*(t.numpy() for t in (*support, *query)), strict=True):
            fit = LogisticRegression(C=penalty, max_iter=200).fit(a / np.sqrt(10), b)
            found.append(float(np.mean(fit.predict(x / np.sqrt(10)) == y)))
    return found[:count]


def estimate(values: Any) -> dict[str, float]:
    """Mean and half-width of the 95 % interval over episodes, in per cent."""
    values = 100 * np.asarray(values)
    return {
        "mean": float(values.mean()),
        "interval_95": float(1.96 * values.std(ddof=1) / math.sqrt(len(values))),
    }


def summary(name: str, folds: dict[str, Any]) -> dict[str, Any]:
    """Scores over the episodes of all folds, and the paired differences of the trained encoder."""
    mine = [fold["scores"] for key, fold in folds.items() if key.startswith(f"{name}/")]
    rows: dict[str, Any] = {}
    for setting in mine[0] if mine else ():
        values = {m: np.concatenate([f[setting][m] for f in mine]) for m in mine[0][setting]}
        others = [m for m in values if m != "trained"]
        rows[setting] = {
            "scores": {m: estimate(v) for m, v in values.items()},
            "trained_minus": {m: estimate(values["trained"] - values[m]) for m in others},
            "trained_minus_by_fold": {
                m: [float(100 * (np.mean(f[setting]["trained"]) - np.mean(f[setting][m]))) for f in mine]
                for m in others
            },
        }
    return {"folds": len(mine), "settings": rows}


def line(key: str, fold: dict[str, Any]) -> str:
    """A fold in a line."""
    parts = [
        f"{setting} " + ", ".join(f"{m} {100 * np.mean(v):.1f}" for m, v in scores.items())
        for setting, scores in fold["scores"].items()
    ]
    seen = " ".join(f"{100 * v:.1f}" for v in fold["validation"])
    return f"{key} (trained in {fold['train_s']:.0f} s; validation {seen}): " + "; ".join(parts)


def table(name: str, found: dict[str, Any]) -> str:
    """A data set as a table."""
    lines = [f"{name}, {found['folds']} folds"]
    for setting, row in found["settings"].items():
        show = lambda e: f"{e['mean']:.2f} ± {e['interval_95']:.2f}"  # noqa: E731
        parts = [f"{m} {show(e)}" for m, e in row["scores"].items()]
        for m, e in row["trained_minus"].items():
            folds = " ".join(f"{d:+.1f}" for d in row["trained_minus_by_fold"][m])
            parts.append(f"trained - {m} {show(e)} (folds {folds})")
        lines.append(f"  {setting}: " + "; ".join(parts))
    return "\n".join(lines)


def plain(options: Options) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
