"""What a detection run learns from: its detector, its pictures with cached features, and its base training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import fmeta
from fmeta.data.annotations import read_json
from fmeta.data.boxes import BoxPool, box_folder
from fmeta.data.featured import Featured, featured
from fmeta.data.glyphs import glyphs
from fmeta.data.pool import classes_digest
from fmeta.data.scenes import scenes
from fmeta.models.detecting import detection
from fmeta.models.detector import Detector, GeneralizedRCNN, split_detector
from fmeta.models.new_classes import BOXES, SCORES
from fmeta.models.rcnn import faster_rcnn, mobilenet_detector, with_norms_of
from fmeta.tasks.detection import pictures
from fmeta.train.detection.config import DetectionTask
from fmeta.types import Params, Plan

ONE_BY_ONE = Plan(engine="autograd", tasks="loop")
"""Shapes depend on values, and RoI align refuses torch.func."""


class Sources(NamedTuple):
    """Pools by what they are for."""

    train: list[BoxPool]
    val: list[BoxPool]
    test: list[BoxPool]


def digest(pools: Iterable[BoxPool]) -> str:
    """A checksum of the classes of pools and of how many pictures each pool has."""
    return classes_digest((pool.names, [len(pool.files)]) for pool in pools)


def make_module(task: DetectionTask) -> GeneralizedRCNN:
    """The detector of a config, with the weights that it starts from."""
    if task.backbone_weights is not None or task.detector == "mobilenet":
        return make_mobilenet(task, 1, task.backbone_weights)
    return faster_rcnn(task.detector)


def make_mobilenet(task: DetectionTask, classes: int, weights: Path | None) -> GeneralizedRCNN:
    """The small detector of a config."""
    sizes = {name: getattr(task, name) for name in ("channels", "size", "proposals", "width")}
    return mobilenet_detector(classes, weights=weights, hidden=task.head_width, **sizes)


def built(task: DetectionTask, weights: Mapping[str, Tensor]) -> GeneralizedRCNN:
    """The detector of a config with weights of a run, of as many classes as these have rows."""
    classes = len(weights[f"{SCORES}.bias"]) - 1
    if task.backbone_weights is not None or task.detector == "mobilenet":
        module: GeneralizedRCNN = make_mobilenet(task, classes, None)
    else:
        module = faster_rcnn(task.detector, weights=None, num_classes=classes + 1)
        # the first of torchvision's detectors has weights of a time when this was 0
        eps = 0.0 if task.detector == "fasterrcnn_resnet50_fpn" else 1e-5
        module = with_norms_of(module, weights, eps=eps)
    module.load_state_dict(dict(weights))
    return module


def load_sources(task: DetectionTask) -> Sources:
    """Generated scenes of disjoint scripts, and the folders of the config.

    Pictures of a folder that are marked as ``train`` train; in a folder without marks all do.
    """
    drawn = glyphs()
    size = task.scene_size
    make = lambda pool, share, seed: scenes(  # noqa: E731
        pool,
        count=max(1, round(task.scenes * share)),
        classes=max(task.ways, round(task.scene_classes * share)),
        size=size,
        kinds=min(3, task.ways),
        seed=seed,
    )
    train = [make(drawn.train, 1.0, 0)]
    train += [box_folder(path, split=split_of(path, "train"), size=task.size) for path in folders(task.data)]
    return Sources(train, [make(drawn.val, 0.25, 1)], [make(drawn.test, 0.25, 2)])


def folders(given: str | None) -> list[Path]:
    """Folders of an option, separated by commas."""
    return [Path(part.strip()) for part in (given or "").split(",") if part.strip()]


def split_of(path: Path, wanted: str) -> str | None:
    """The split of this name, if a folder's annotations have splits at all."""
    content = read_json("box_folder", path / "annotations.json", ("images",))
    return wanted if any("split" in image for image in content["images"]) else None


def with_features(detector: Detector, pool: BoxPool) -> Featured:
    """The pictures of a pool with what the frozen part says of them."""
    backbone = detector.module.backbone
    frozen = backbone.body if detector.cut == "body" else backbone
    weights = {f"{detector.cut}.{name}": value for name, value in frozen.state_dict().items()}
    return featured(pool, lambda rows: detector.features(pool.images[rows], pool.sizes[rows]), weights)


def behind_pyramid(detector: Detector, params: Params, source: Featured) -> Featured:
    """The same pictures behind the pyramid: what a detector cut after its whole backbone starts from."""
    backbone = detector.module.backbone
    weights = {f"body.{name}": value for name, value in backbone.body.state_dict().items()}
    weights |= {name: value for name, value in params.items() if name.startswith("backbone.")}
    with torch.no_grad():
        return featured(source.pool, lambda rows: detector.pyramid(params, source.maps(rows)), weights)


def where_to_cut(module: GeneralizedRCNN) -> Literal["backbone", "body"]:
    """Before the feature pyramid, if there is one."""
    return "body" if hasattr(module.backbone, "fpn") else "backbone"


def base_params(module: GeneralizedRCNN, classes: int) -> Params:
    """Heads for so many classes with one set of boxes, to be trained; the scores are drawn anew."""
    _, params = split_detector(module, cut=where_to_cut(module))
    width = params[f"{SCORES}.weight"].shape[1]
    boxes = {name: params[name][-4:].clone() for name in (f"{BOXES}.weight", f"{BOXES}.bias")}
    scores = {
        f"{SCORES}.weight": 0.01 * torch.randn(classes + 1, width),
        f"{SCORES}.bias": torch.zeros(classes + 1),
    }
    return {**params, **scores, **boxes}


def base_training(
    detector: Detector,
    params: Params,
    sources: Sequence[Featured],
    *,
    steps: int,
    lr: float,
    batch: int,
    seed: int,
    proposals: int,
    told: Callable[[int, float], None] = lambda step, loss: None,
    until: Callable[[], bool] = lambda: False,
) -> Params:
    """Train a detector of all classes of all sources in the ordinary way, with Adam.

    Args:
        detector: its cut says what is trained.
        params: its weights, with rows for the classes of all sources.
        sources: a batch of each in every step.
        steps: steps; the rate falls to zero as a cosine over them.
        lr: rate of Adam.
        batch: pictures of each source.
        seed: of the pictures.
        proposals: boxes of a picture that the second head sees.
        told: called with the step and its loss.
        until: whether to stop early.
    """
    loss_fn = detection(detector, proposals=proposals)
    algorithm = fmeta.maml(loss_fn, fmeta.sgd(0.0), steps=0)
    outer = fmeta.chain(fmeta.clip_by_norm(10.0), fmeta.adam(fmeta.schedules.cosine(lr, steps)))
    state = fmeta.meta_init(algorithm, outer, params)
    step, sampler = fmeta.meta_step(algorithm, outer, ONE_BY_ONE), pictures(sources, count=batch)
    for index in range(steps):
        state, metrics = step(state, sampler(seed, index))
        told(index + 1, metrics["loss"].item())
        if until():
            break
    return state.meta


def read_test(path: Path, task: DetectionTask) -> tuple[BoxPool, BoxPool]:
    """Training and test pictures of a folder; the halves of one without splits."""
    if split_of(path, "test") is None:
        return halves(box_folder(path, size=task.size))
    return box_folder(path, split="train", size=task.size), box_folder(path, split="test", size=task.size)


def halves(pool: BoxPool) -> tuple[BoxPool, BoxPool]:
    """Every second picture of a pool, and the others."""
    rows = torch.arange(len(pool.files))
    return pool.rows(rows[::2]), pool.rows(rows[1::2])
