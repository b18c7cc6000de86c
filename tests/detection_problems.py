"""A detector of a few channels, and pictures of 64 pixels, for the tests of detection."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import fmeta
from fmeta import Plan
from fmeta.data import BoxPool, Featured, from_tensors, scenes
from fmeta.models import object_detector
from fmeta.models.detecting import Detection
from fmeta.models.detector import Detector
from fmeta.types import Params

LOOP = Plan(engine="autograd", tasks="loop")
HEAD = "roi_heads.box_predictor"


@cache
def characters() -> Any:
    """Shapes in place of characters, which take seconds to draw: bars and crosses of 8 kinds."""
    x = torch.zeros(8, 4, 1, 28, 28, dtype=torch.uint8)
    for kind in range(8):
        x[kind, :, :, 6:22, 4 + 3 * kind : 7 + 3 * kind] = 255
        x[kind, :, :, 4 + 2 * kind : 8 + 2 * kind, 4:24] = 255
    return from_tensors(x.flatten(0, 1), torch.arange(8).repeat_interleave(4), split=(1, 0, 0)).train


def tiny_scenes(count: int = 16, classes: int = 3, seed: int = 0) -> BoxPool:
    return scenes(characters(), count=count, classes=classes, size=64, kinds=2, objects=(1, 3), seed=seed)


def tiny_module(classes: int = 2, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"channels": 4, "hidden": 8, "size": 64, "proposals": 6, "width": 0.1}
    module = fmeta.models.mobilenet_detector(classes, **{**sizes, **options})
    for weight in module.rpn.head.parameters():  # so that proposals differ
        torch.nn.init.normal_(weight, std=0.1)
    module.backbone.train()
    for layer in module.modules():  # running statistics that keep numbers away from zero
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        module.backbone(module.transform.normalize(tiny_scenes(8).images / 255))
    return module.eval().double()


def tiny_detector(cut: Any = "backbone", classes: int = 2) -> tuple[Detector, Params]:
    return fmeta.models.split_detector(tiny_module(classes), cut=cut)


def with_features(detector: Detector, pool: BoxPool) -> Featured:
    """Features in memory, in double precision."""
    features = detector.features(pool.images.double() / 255, pool.sizes)
    return Featured(pool, features)


class Doubled(Featured):
    """Features as they are, so that finite differences and references are exact."""

    def maps(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: level[rows] for name, level in self.features.items()}


def problem(cut: Any = "backbone") -> tuple[Detection, Params, Featured]:
    """A loss, the heads of an object detector, and pictures of three classes."""
    detector, params = tiny_detector(cut)
    pool = tiny_scenes()
    source = with_features(detector, pool)
    source = Doubled(replace(pool, boxes=pool.boxes.double()), source.features)
    return fmeta.models.detection(detector), object_detector(params), source


def write_folder(path: Path, count: int = 6, **changes: Any) -> Path:
    """A folder of pictures with one box each, classes in turn; ``changes`` go to the first entry."""
    (path / "images").mkdir(parents=True)
    entries = []
    for index in range(count):
        name = f"{index}.png"
        picture = Image.new("RGB", (80, 40), (20 * index % 100, 0, 0))
        picture.paste(((255, 255, 0), (0, 0, 255))[index % 2], (10, 10, 30, 30))
        picture.save(path / "images" / name)
        entries.append(
            {
                "file": name, "width": 80, "height": 40, "boxes": [[10, 10, 30, 30]], "labels": [1 + index % 2],
                "split": "test" if index % 3 == 2 else "train",
            }
        )  # fmt: skip
    entries[0] |= changes
    content = {"classes": ["__background__", "a", "b"], "images": entries}
    (path / "annotations.json").write_text(json.dumps(content))
    return path


def as_coco(folder: Path) -> dict[str, Any]:
    """The content of such a folder in COCO's format, with gaps in the category numbers."""
    content = json.loads((folder / "annotations.json").read_text())
    found: dict[str, Any] = {
        "images": [], "annotations": [], "categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}]
    }  # fmt: skip
    for number, image in enumerate(content["images"], start=100):
        size = {"width": image["width"], "height": image["height"]}
        found["images"].append({"id": number, "file_name": image["file"], **size})
        for (left, top, right, bottom), label in zip(image["boxes"], image["labels"], strict=True):
            box = [left, top, right - left, bottom - top]
            found["annotations"].append({"image_id": number, "category_id": {1: 3, 2: 7}[label], "bbox": box})
    return found
