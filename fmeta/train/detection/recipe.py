"""The command behind ``fmeta train detection``: base training, meta-training of the heads, the result."""

from __future__ import annotations

import shlex
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fmeta
from fmeta.data.boxes import BoxPool
from fmeta.data.featured import Featured
from fmeta.models.detector import merged_detector, split_detector
from fmeta.parallel import ALONE, launched
from fmeta.tasks.detection import batch_of, detection, draw
from fmeta.tasks.seeding import generator
from fmeta.train import checkpoint, folder
from fmeta.train.config import Config
from fmeta.train.detection import plots as detection_plots
from fmeta.train.detection.adapting import (
    BASE,
    Learned,
    adapt_heads,
    check_algorithm,
    heads_of,
    load_detector,
    make_algorithm,
    predictions,
    support_of,
)
from fmeta.train.detection.average_precision import Precision, average_precision, load
from fmeta.train.detection.config import DetectionTask, sizes_of
from fmeta.train.detection.data import (
    ONE_BY_ONE,
    Sources,
    base_params,
    base_training,
    behind_pyramid,
    built,
    digest,
    folders,
    halves,
    load_sources,
    make_module,
    read_test,
    where_to_cut,
    with_features,
)
from fmeta.train.device import pick_device
from fmeta.train.evaluate import TEST_SEED, VALIDATION_SEED, Held
from fmeta.train.experiment import Experiment, make_outer
from fmeta.train.family import Family
from fmeta.train.options import check
from fmeta.train.run import divergence, run
from fmeta.train.terminal import format_seconds, progress_bar, say


def train(config: Config[DetectionTask], command: str) -> int:
    """Train or continue a detection run, and test it; returns the exit code.

    Args:
        config: the complete config.
        command: the command line, to be written down.

    Raises:
        ValueError: as for every recipe; for pictures with wrong boxes and weights of another architecture.
        ImportError: without pycocotools, before anything is trained.
    """
    check(config)
    load()
    if launched().size > 1:
        raise ValueError(
            f"train: detection runs in one process, got {launched().size}. Start it without torchrun."
        )
    if config.machine.threads:
        torch.set_num_threads(config.machine.threads)
    if pick_device(config.machine.device).type != "cpu":
        say("detection runs on the CPU: features are read from the disk")
    if config.start is not None:
        raise ValueError(
            f"train: --start is for recipes other than detection, got {config.start}. A detector's heads belong to the "
            "base that its own run trained; --resume continues that run."
        )
    pools = load_sources(config.task)
    check_before(config, pools)
    path = folder.check_resumable(config) if config.resume else folder.create(config, command)
    folder.check_data(config, lambda: digest(pools.train + pools.val))
    folder.write_config(path, config, command)
    try:
        make_base(path, config, pools.train)
    except KeyboardInterrupt:
        return stopped(path, "Stopped in base training, which starts anew")
    experiment = build(path, config, pools.train, pools.val)
    outcome = run(path, experiment)
    if outcome.reason == "diverged":
        raise ValueError(divergence(path, outcome.progress))
    if outcome.reason == "interrupted":
        return stopped(path, "Stopped and saved")
    say(f"{outcome.progress.step:,} outer steps in {format_seconds(outcome.progress.wall_s)}.")
    return report(path, command)


def stopped(path: Path, how: str) -> int:
    """Say how to go on; returns the exit code."""
    say(f"{how}. Continue with:\n  {shlex.join(['fmeta', 'train', 'detection', '--resume', str(path)])}")
    return 130


def check_before(config: Config[DetectionTask], pools: Sources) -> None:
    """Refuse at once what would fail after the base is trained: algorithm, test folders, too few pictures.

    Raises:
        ValueError: naming what.
    """
    check_algorithm(config)
    for test in folders(config.task.test):
        read_test(test, config.task)
    for name, found in (("training", pools.train), ("validation", pools.val)):
        for index, pool in enumerate(found):
            try:
                detection([Featured(pool, {})], tasks=1, **sizes_of(config))
            except ValueError as error:
                where = folders(config.task.data)[index - 1] if index else "generated scenes (--scenes)"
                raise ValueError(f"train: pictures for {name}, of {where}: {error}") from error


def make_base(path: Path, config: Config[DetectionTask], pools: list[BoxPool]) -> None:
    """Train all classes of all pools together, unless the run folder has that already."""
    if (path / BASE).exists():
        return
    task, seed = config.task, config.outer.seed
    torch.manual_seed(seed)
    module = make_module(task)
    if task.base_steps:
        detector, _ = split_detector(module, cut=where_to_cut(module))
        began = time.monotonic()
        sources = [with_features(detector, pool) for pool in pools]
        count, seconds = sum(len(pool.files) for pool in pools), format_seconds(time.monotonic() - began)
        say(f"features of {count:,} pictures in {seconds}")
        params = base_params(module, sum(len(pool.names) for pool in pools))
        with progress_bar("base", task.base_steps) as bar:

            def told(step: int, loss: float) -> None:
                bar.stepped(step)
                bar.show({"loss": loss})

            params = base_training(
                detector, params, sources, steps=task.base_steps, lr=task.base_lr, batch=task.batch, seed=seed,
                proposals=task.proposals, told=told,
            )  # fmt: skip
        module = merged_detector(detector, params)
    checkpoint.save(path / BASE, dict(module.state_dict()), {"steps": task.base_steps})


def features_of(path: Path, config: Config[DetectionTask], pool: BoxPool) -> Featured:
    """Features behind the pyramid of a run's base."""
    module = built(config.task, checkpoint.read(path / BASE)[0])
    if not hasattr(module.backbone, "fpn"):
        return with_features(split_detector(module)[0], pool)
    detector, params = split_detector(module, cut="body")
    return behind_pyramid(detector, params, with_features(detector, pool))


def build(path: Path, config: Config[DetectionTask], train: list[BoxPool], val: list[BoxPool]) -> Experiment:
    """What the training loop runs; validation tasks take as many steps as training tasks."""
    task, inner = config.task, config.inner
    _, loss_fn, params = heads_of(path, config)
    algorithm = make_algorithm(loss_fn, config)
    sizes = sizes_of(config)
    learns = detection([features_of(path, config, pool) for pool in train], tasks=config.outer.tasks, **sizes)
    held = detection([features_of(path, config, pool) for pool in val], tasks=1, **sizes)
    family = Family(
        model=lambda outputs: torch.nn.Identity(),
        outputs=task.ways,
        train_outputs=task.ways,
        loss=lambda apply: loss_fn,
        metric="loss",
        adapts=None,
        train=learns,  # type: ignore[arg-type]
        val=held,  # type: ignore[arg-type]
        test=held,  # type: ignore[arg-type]
        pooled=held,  # type: ignore[arg-type]
        pooled_outputs=task.ways,
        data=lambda: digest(train + val),
    )
    return Experiment(
        config=replace(config, inner=replace(inner, test_steps=inner.inner_steps)),
        family=family,
        algorithm=algorithm,
        phases=((0, algorithm),),
        outer=fmeta.chain(fmeta.clip_by_norm(10.0), make_outer(config.outer)),
        params=params,
        plan=ONE_BY_ONE,
        device=torch.device("cpu"),
        val=Held(family.val, VALIDATION_SEED, config.report.val_tasks),
        test=Held(family.test, TEST_SEED, config.report.test_tasks),
        processes=ALONE,
    )


def report(path: Path, command: str, name: str = "best") -> int:
    """Adapt to draws of unseen classes and of the config's test folders; write results.json and pictures."""
    learned = load_detector(path, name)
    config = learned.config
    sets = {"scenes": halves(load_sources(config.task).test[0])}
    sets |= {test.name: read_test(test, config.task) for test in folders(config.task.test)}
    found: dict[str, Any] = {}
    for label, pools in sets.items():
        shown, asked = (features_of(path, config, pool) for pool in pools)
        found[label] = tested(path, learned, label, shown, asked)
    record = {
        "recipe": "detection", "algorithm": config.inner.algorithm, "command": command, "checkpoint": name,
        "steps": config.inner.test_steps, "versions": folder.versions(), "sets": found,
    }  # fmt: skip
    folder.write_json(path / "results.json", record)
    say(f"\nnumbers and pictures: {path}")
    return 0


def tested(path: Path, learned: Learned, label: str, shown: Featured, asked: Featured) -> dict[str, Any]:
    """Precision before and after adaptation, over draws of support pictures; the first draw is drawn."""
    config, classes = learned.config, len(shown.pool.names)
    most = min(classes, config.task.ways) if label == "scenes" else classes
    scores: dict[str, list[Precision]] = {"before": [], "after": []}
    for index in range(config.report.test_tasks):
        random = generator(TEST_SEED, index)
        kinds = torch.randperm(classes, generator=random)[:most].sort().values + 1
        rows, _ = draw(shown.pool.holds(), kinds, config.task.test_shots, 0, random)
        support = support_of(shown, kinds, rows, config.inner.test_steps, config.task.batch, index)
        query = torch.arange(len(asked.pool.files))
        query = query[asked.pool.holds()[:, kinds - 1].any(1)]
        y, looks = batch_of(asked, kinds, query).y, {}
        for name, steps in (("before", 0), ("after", config.inner.test_steps)):
            adapted = adapt_heads(learned.algorithm, learned.meta, support, steps)
            looks[name] = predictions(learned.algorithm, learned.meta, adapted, asked, query)
            scores[name].append(average_precision(looks[name], y, len(kinds)))
        if index == 0:
            names = [asked.pool.names[kind - 1] for kind in kinds.tolist()]
            detection_plots.draw(path / f"detections_{label}.png", asked.pool.rows(query), y, looks, names)
    means = {name: statistics.fmean(one.ap50 for one in values) for name, values in scores.items()}
    say(f"{label}: AP50 {100 * means['before']:.1f} before and {100 * means['after']:.1f} after adaptation")
    return {
        name: {"ap50": means[name], "draws": [one._asdict() for one in values]}
        for name, values in scores.items()
    }
