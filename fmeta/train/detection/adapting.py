"""A meta-learned detector in use: loading it from its run folder, and adapting it to new classes.

A run folder holds ``base.safetensors``, all weights after base training, beside the files of every run; the
checkpoints ``best`` and ``last`` hold the heads that are meta-learned. No data set is needed to use a run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fmeta
from fmeta import tree, weights
from fmeta.adapt import trajectory
from fmeta.data.boxes import BoxPool, coco_boxes
from fmeta.data.featured import Featured, featured
from fmeta.models.detecting import Detection, detection
from fmeta.models.detector import Detector, merged_detector, split_detector
from fmeta.models.new_classes import object_detector
from fmeta.tasks.detection import batch_of, rounds
from fmeta.tasks.seeding import generator
from fmeta.train import checkpoint, folder
from fmeta.train.config import Config
from fmeta.train.detection import plots as detection_plots
from fmeta.train.detection.data import built
from fmeta.types import Adapted, Algorithm, Batch, InnerLoop, Params, Tree
from fmeta.weights import Dtype

BASE = "base.safetensors"
CHUNK = 8
"""Pictures that are looked at together in prediction."""
SHOWN = 4
"""Pictures that are drawn."""
LAST_LAYER = "roi_heads.box_predictor"


class Learned(NamedTuple):
    """A detector that was meta-learned: what adapts to new classes."""

    detector: Detector
    algorithm: Algorithm
    meta: Tree
    config: Config[Any]


def check_algorithm(config: Config[Any]) -> None:
    """Refuse an algorithm that detection does not have."""
    if config.inner.algorithm not in ("fomaml", "maml", "anil", "reptile"):
        raise ValueError(
            f"train: detection takes --algorithm fomaml, maml, anil or reptile, got {config.inner.algorithm}."
        )


def make_algorithm(loss_fn: Detection, config: Config[Any]) -> Algorithm:
    """The algorithm that a config names.

    Raises:
        ValueError: for one that detection does not have.
    """
    check_algorithm(config)
    inner, options = config.inner, {}
    if inner.algorithm == "anil":
        options = {"adapts": LAST_LAYER, "adjoint": fmeta.unroll()}
    elif inner.algorithm == "maml":
        options = {"adjoint": fmeta.unroll()}
    elif inner.algorithm == "reptile":
        options = {"objective": "reptile"}
    rule = fmeta.adam(inner.inner_lr, b1=0.0) if inner.inner_optimizer == "adam" else None
    rule = rule or fmeta.sgd(inner.inner_lr, momentum=0.9)
    return fmeta.few_shot_detection(loss_fn, rule, steps=inner.inner_steps, **options)  # type: ignore[arg-type]


def plain_gradient(loop: InnerLoop, params: Tree, meta: Tree, batch: Batch, k: Tensor) -> tuple[Tree, Tensor]:
    """Gradient of the support loss by torch.autograd, not to be differentiated again."""
    with torch.enable_grad():
        inputs = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
        loss, _ = loop.loss(inputs, meta, batch, k)
        leaves, spec = tree.flatten(inputs)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return tree.unflatten(list(grads), spec), loss.detach()


def adapt_heads(algorithm: Algorithm, meta: Tree, support: Batch, steps: int) -> Adapted:
    """Adapt to a support set; one step's activations are kept at a time.

    Args:
        algorithm: from ``few_shot_detection`` or a baseline.
        meta: what it starts from.
        support: pictures, with ``x["order"]`` for steps that see some of them.
        steps: number of steps.
    """
    return adapted_at(algorithm, meta, support, [steps])[steps]


def adapted_at(algorithm: Algorithm, meta: Tree, support: Batch, at: Sequence[int]) -> dict[int, Adapted]:
    """`adapt_heads` once, and how it stands after each of these numbers of steps."""
    loop = algorithm.inner_loop._replace(steps=max(1, *at))
    losses: list[Tensor] = []
    found: dict[int, Adapted] = {}
    with torch.no_grad():
        for steps, point in enumerate(trajectory(loop, meta, support, max(at), plain_gradient)):
            losses += [] if point.loss is None else [point.loss]
            if steps in at:
                stacked = torch.stack(losses) if losses else torch.zeros(0)
                found[steps] = Adapted(point.params, point.opt_state, stacked)
    return found


def predictions(
    algorithm: Algorithm, meta: Tree, adapted: Adapted, source: Featured, rows: Tensor
) -> list[dict[str, Tensor]]:
    """What an adapted detector finds in pictures of a pool, some at a time."""
    found: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for part in rows.split(CHUNK):
            x = {"features": source.maps(part), "sizes": source.pool.sizes[part]}
            found += algorithm.predict(meta, adapted, x)
    return found


def load_detector(path: Path, name: str = "best") -> Learned:
    """The meta-learned detector of a run folder; needs no data.

    Raises:
        ValueError: if there is no detection run, or no such checkpoint.
    """
    config = folder.read_config(path)
    if config.recipe != "detection":
        raise ValueError(f"load: {path} must be a run of detection, got one of {config.recipe}.")
    detector, loss_fn, params = heads_of(path, config)
    algorithm = make_algorithm(loss_fn, config)
    template = fmeta.meta_init(algorithm, fmeta.adam(0.0), params).meta
    found, record = checkpoint.read(path / f"{name}.safetensors")
    prefix = "" if record.get("meta_only") else "meta."
    wanted = {f"{prefix}{key}": leaf for key, leaf in tree.paths(template)}
    missing = [key for key in wanted if key not in found or found[key].shape != wanted[key].shape]
    if missing:
        raise ValueError(
            f"load: {path / name}.safetensors is of another architecture: {missing[0]} is missing or of another "
            "shape. Use the checkpoint that belongs to this run."
        )
    meta = tree.unflatten([found[key] for key in wanted], tree.flatten(template)[1])
    return Learned(detector, algorithm, meta, config)


def heads_of(path: Path, config: Config[Any]) -> tuple[Detector, Detection, Params]:
    """The detector after base training, cut behind its pyramid: its loss, and the heads of an object detector."""
    found = checkpoint.read(path / BASE)[0]
    detector, params = split_detector(built(config.task, found))
    return detector, detection(detector, proposals=config.task.proposals), object_detector(params)


def adapt_detector(
    run: str | Path | Learned,
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    steps: int | None = None,
    repair: bool = False,
    dtype: Dtype = "fp32",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Adapt a meta-learned detector to pictures with boxes, and keep the detector of their classes.

    Args:
        run: a run folder, or what ``load_detector`` returned.
        annotations: a json in COCO's format.
        images: the folder, or zip, of the pictures.
        out: folder of ``detector.safetensors``, torchvision's names and one row of scores for each class after the
            background's, of ``adapted.json``, and of a picture of what it finds before and after.
        steps: steps of adaptation; the config's ``test_steps`` if not given.
        repair: as in ``coco_boxes``.
        dtype: of the file: ``"fp32"``, ``"fp16"`` or ``"bf16"``; batch norm's statistics stay float32.
        say: told what goes on.

    Returns:
        What is in ``adapted.json``: classes, steps, seconds, and the loss before and after.
    """
    learned = run if isinstance(run, Learned) else load_detector(Path(run))
    config, began = learned.config, time.monotonic()
    pool = coco_boxes(annotations, images, size=config.task.size, repair=repair)
    source = in_memory(learned.detector, pool)
    steps = config.inner.test_steps if steps is None else steps
    check_support(pool, steps)
    seen = torch.where(pool.holds().any(1))[0]
    say(f"adapting to {len(seen)} pictures of {', '.join(pool.names)}: {steps} steps")
    support = support_of(source, torch.arange(1, len(pool.names) + 1), seen, steps, config.task.batch)
    reached = adapted_at(learned.algorithm, learned.meta, support, [0, steps])
    adapted = reached[steps]
    module = merged_detector(learned.detector, {**learned.meta["params"], **adapted.params})
    path = Path(out)
    path.mkdir(parents=True, exist_ok=True)
    facts = {
        "classes": list(pool.names),
        "pictures": len(seen),
        "steps": steps,
        "dtype": dtype,
        "seconds": round(time.monotonic() - began, 1),
        "loss": [round(loss, 4) for loss in adapted.losses[[0, -1]].tolist()] if steps else [],
    }
    tensors = weights.in_dtype(module.state_dict(), dtype)
    checkpoint.save(path / "detector.safetensors", tensors, facts)
    rows = seen[:SHOWN]
    looks = {
        f"after {count} steps": predictions(learned.algorithm, learned.meta, one, source, rows)
        for count, one in reached.items()
    }
    shown = pool.rows(rows)
    truth = {"boxes": shown.boxes, "labels": shown.labels}
    detection_plots.draw(path / "adapted.png", shown, truth, looks, pool.names, SHOWN)
    (path / "adapted.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def check_support(pool: BoxPool, steps: int) -> None:
    """Refuse classes without a box, and less than no step."""
    if steps < 0:
        raise ValueError(f"adapt_detector: steps must be at least 0, got {steps}.")
    absent = [name for name, shown in zip(pool.names, pool.holds().any(0).tolist(), strict=True) if not shown]
    if absent:
        raise ValueError(
            f"adapt_detector: every class needs a box, got none of {absent[0]!r}. Add one, or leave the class out."
        )


def in_memory(detector: Detector, pool: BoxPool) -> Featured:
    """Features of a few pictures, not kept on disk."""
    return featured(pool, lambda rows: detector.features(pool.images[rows], pool.sizes[rows]), {}, keep=False)


def support_of(
    source: Featured, classes: Tensor, rows: Tensor, steps: int, batch: int, seed: int = 0
) -> Batch:
    """A support set with the pictures that each step sees."""
    x, y = batch_of(source, classes, rows)
    return Batch({**x, "order": rounds(len(rows), max(steps, 1), batch, generator(seed, 0))}, y)
