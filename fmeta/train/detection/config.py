"""The options of a detection run that other recipes do not have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fmeta.train.config import Config, MaybePath, MaybeStr


@dataclass(frozen=True)
class DetectionTask:
    """A task is a few classes of objects: find them, from boxes in a few pictures of each."""

    data: MaybeStr = None
    """Folders to learn from beside generated scenes, separated by commas: annotations.json, with images.zip."""
    test: MaybeStr = None
    """Folders that the result is measured on beside scenes of unseen scripts, separated by commas."""
    detector: str = "fasterrcnn_mobilenet_v3_large_320_fpn"
    """One of torchvision's Faster R-CNNs, with its COCO weights; or mobilenet, a small one without."""
    backbone_weights: MaybePath = None
    """A file of ImageNet weights of MobileNetV2, for mobilenet, which is then taken in place of torchvision's."""
    ways: int = 3
    """Classes of a task."""
    shots: int = 5
    """Support pictures of a class."""
    queries: int = 2
    """Query pictures of a class."""
    batch: int = 4
    """Pictures of an inner step, and of a step of base training for each data set."""
    size: int = 320
    """Longer side of the pictures."""
    proposals: int = 64
    """Boxes of a picture that are classified."""
    channels: int = 96
    """Of mobilenet's feature pyramid."""
    head_width: int = 256
    """Features of mobilenet's box head."""
    width: float = 1.0
    """Factor of mobilenet's channels."""
    scenes: int = 600
    """Generated scenes to learn from."""
    scene_classes: int = 60
    """Classes of the generated scenes."""
    scene_size: int = 256
    """Height and width of the generated scenes, a multiple of 32."""
    base_steps: int = 600
    """Ordinary training steps before meta-training, on all classes together; 0 for none."""
    base_lr: float = 1e-3
    """Learning rate of Adam in them."""
    test_shots: int = 10
    """Support pictures of a class in the result."""


def sizes_of(config: Config[DetectionTask]) -> dict[str, Any]:
    """Of the tasks of a run."""
    task, inner = config.task, config.inner
    return {
        "ways": (min(2, task.ways), task.ways), "shots": task.shots, "queries": task.queries,
        "steps": max(inner.inner_steps, 1), "batch": task.batch,
    }  # fmt: skip
