"""The runs of a comparison before they are tested: whether they have the same tasks, which baselines they share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fmeta import tree
from fmeta.train import baselines, folder
from fmeta.train.config import Config
from fmeta.train.experiment import Experiment, build
from fmeta.train.options import located
from fmeta.train.report import baseline_steps, headline_steps, steps_measured, stored_baseline
from fmeta.train.text.config import TextTask
from fmeta.types import Tree

TRAINING = ("train_ways", "train_shots", "learns", "layers", "rank", "model", "pooling", "max_length")
"""Options of a task that its test tasks do not depend on, or not in what is asked."""
PLACES = ("root", "index", "data", "splits", "download")
"""Options of a task that say where its data is."""


class Run(NamedTuple):
    """A run to be tested, and what is known of it before that."""

    path: Path
    config: Config[Any]
    name: str
    steps: list[int]
    """All numbers of steps that its own curve would have."""
    headline: int
    baselines: dict[str, Any]
    """What determines each of its baselines: runs for which that is the same share one."""
    trained: int
    has_stored: bool


def looked_at(
    paths: Sequence[Path], tasks: int, root: Path | None, with_baselines: bool, baseline_steps: int | None
) -> list[Run]:
    """Build every run once, refuse those with other test tasks, and keep what the comparison is planned by."""
    configs = [folder.read_config(path) for path in paths]
    runs: list[Run] = []
    first = ""
    for path, config, name in zip(paths, configs, labels(paths, configs), strict=True):
        task = located(config.task, root)
        numbers = replace(
            config.report,
            test_tasks=tasks,
            baseline_steps=baseline_steps or config.report.baseline_steps,
        )
        config = replace(config, task=task, report=numbers)
        if config.recipe != configs[0].recipe:
            raise unlike(path, paths[0], ["recipe"])
        experiment = build(config)
        held = identity(experiment)
        first = first or held
        if held != first:
            ours, theirs = asdict(config.task), asdict(configs[0].task)
            differ = [n for n in ours if n not in PLACES + TRAINING and ours[n] != theirs.get(n)]
            raise unlike(path, paths[0], differ or ["the data itself"])
        runs.append(planned(path, experiment, name, with_baselines))
    return runs


def identity(experiment: Experiment) -> str:
    """What is the same for runs with the same test tasks."""
    test, task = experiment.test, experiment.config.task
    if not isinstance(task, TextTask):
        return fingerprint(test.sampler(test.seed, 0))
    # what a text run sees of a sentence depends on what of the encoder learns; which sentences they are does not
    files = [path.read_bytes() for path in (task.data, task.splits) if path is not None]
    names = (task.text_column, task.label_column, task.fold, task.shares, task.ways, task.shots)
    asked = task.test_queries or task.queries
    digest = hashlib.sha256(repr((names, asked, test.seed)).encode())
    for content in files:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def unlike(path: Path, first: Path, names: list[str]) -> ValueError:
    """What is said of a run whose test tasks are not those of the first."""
    return ValueError(
        f"compare: runs must have the same test tasks, but {path} differs from {first} in {', '.join(names)}. "
        "Compare runs of one recipe and one kind of task."
    )


def planned(path: Path, experiment: Experiment, name: str, with_baselines: bool) -> Run:
    """A run that has been looked at."""
    run = Run(
        path, experiment.config, name, steps_measured(experiment), headline_steps(experiment), {}, 0, False
    )
    if not with_baselines:
        return run
    trained = baseline_steps(path, experiment)
    stored = stored_baseline(path, experiment, trained) is not None
    return run._replace(baselines=origins(experiment, trained), trained=trained, has_stored=stored)


def origins(experiment: Experiment, trained: int) -> dict[str, Any]:
    """What determines each baseline of a run, to be compared with that of another run."""
    config, family = experiment.config, experiment.family
    validation = fingerprint(experiment.val.sampler(experiment.val.seed, 0)), experiment.val.tasks
    found: dict[str, Any] = {}
    for name in baselines.names(experiment):
        one = baselines.BASELINES[name]
        if one.pretrained:
            weights = baselines.pooled_model(experiment)[1]
            batch = family.pooled(config.outer.seed, 0)
            found[name] = (
                fingerprint((weights, batch)),
                replace(baselines.outer_of(config), outer_steps=trained),
                validation,
            )
        else:
            _, meta = baselines.fine_tuning(experiment, one, None)
            found[name] = (fingerprint(meta(baselines.Setting("all weights", 0.0))), validation)
    return found


def fingerprint(values: Tree) -> str:
    """A short text that is the same for the same tensors."""
    digest = hashlib.sha256()
    for name, leaf in tree.paths(values):
        digest.update(f"{name} {tuple(leaf.shape)} {leaf.dtype}".encode())
        digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def owned(runs: Sequence[Run]) -> dict[tuple[str, Any], Run]:
    """The run that each baseline is measured for: one that has it stored, else the first."""
    owners: dict[tuple[str, Any], Run] = {}
    for run in sorted(runs, key=lambda run: not run.has_stored):
        for name, origin in run.baselines.items():
            owners.setdefault((name, origin), run)
    return owners


def labels(paths: Sequence[Path], configs: Sequence[Config[Any]]) -> list[str]:
    """The algorithms, or the folders where two runs have the same, or where these are called the same, the paths."""
    names = [config.inner.algorithm for config in configs]
    folders = [path.name for path in paths]
    found = [name if names.count(name) == 1 else folder for name, folder in zip(names, folders, strict=True)]
    return [name if found.count(name) == 1 else str(path) for name, path in zip(found, paths, strict=True)]
