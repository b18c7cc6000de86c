"""Pictures with boxes around objects: COCO annotations, a plain json of lists, and checks of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fmeta.data.annotations import Marked, check_known, checked, entries, read_json, sides
from fmeta.data.images import Source, open_source, read_images

STRIDE = 32  # heights and widths of canvases are multiples of it, as torchvision's detectors pad them


@dataclass(frozen=True, eq=False, repr=False)
class BoxPool:
    """Pictures of one canvas with their objects.

    Attributes:
        images: ``[n, 3, H, W]`` uint8; a picture fills the upper left part of its canvas, the rest is 0.
        sizes: height and width of each picture on the canvas, ``[n, 2]`` int64.
        boxes: ``[n, most, 4]`` float32, left, top, right and bottom in pixels of the canvas; padded with zeros.
        labels: class of each box, ``[n, most]`` int64 in ``1 .. classes``; 0 where there is no box.
        names: name of each class; label 1 is ``names[0]``.
        files: name of each picture.
        scales: pixels of the canvas for a pixel of the file, ``[n]``.
    """

    images: Tensor
    sizes: Tensor
    boxes: Tensor
    labels: Tensor
    names: tuple[str, ...]
    files: tuple[str, ...]
    scales: Tensor

    def rows(self, rows: Tensor) -> BoxPool:
        """The pool of some pictures."""
        tensors = {
            name: getattr(self, name)[rows] for name in ("images", "sizes", "boxes", "labels", "scales")
        }
        return replace(self, **tensors, files=tuple(self.files[row] for row in rows.tolist()))

    def holds(self) -> Tensor:
        """Whether a picture has an object of a class: ``[n, classes]`` booleans."""
        classes = torch.arange(1, len(self.names) + 1)
        return (self.labels[:, :, None] == classes).any(1)

    def __repr__(self) -> str:
        """Sizes, not contents."""
        shape, boxes = list(self.images.shape), int((self.labels > 0).sum())
        return f"BoxPool({len(self.names)} classes, {boxes} boxes, images=uint8{shape})"


def coco_boxes(
    annotations: str | Path, images: str | Path, *, size: int = 320, repair: bool = False
) -> BoxPool:
    """Read annotations in COCO's json format.

    Category numbers may have gaps: labels are 1, 2, ... in their order. Crowds (``iscrowd``) are left out.
    Pictures without a box stay, as pictures of background.

    Args:
        annotations: the json, with ``images``, ``annotations`` and ``categories``.
        images: a folder, or a zip, that holds the files.
        size: the longer side of every picture becomes so many pixels.
        repair: cut boxes at the edge of the picture and drop those without area, where an error is the default.

    Raises:
        ValueError: for a box outside of its picture or without area, a category or picture that is not
            listed, a file that is missing or has another size than the json says.
    """
    call, path = "coco_boxes", Path(annotations)
    content = read_json(call, path, ("images", "annotations", "categories"))
    listed = entries(call, path, content, "categories", ("id", "name"), "id")
    categories = sorted(listed, key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories, start=1)}
    found = {
        image["id"]: Marked(image["file_name"], image["width"], image["height"], [], [])
        for image in entries(call, path, content, "images", ("id", "file_name", "width", "height"), "id")
    }
    for entry in entries(call, path, content, "annotations", ("image_id", "category_id", "bbox")):
        if entry.get("iscrowd"):
            continue
        check_known(call, path, "image", entry["image_id"], found)
        check_known(call, path, "category", entry["category_id"], label_of)
        left, top, width, height = sides(call, entry["bbox"], found[entry["image_id"]].file)
        found[entry["image_id"]].boxes.append((left, top, left + width, top + height))
        found[entry["image_id"]].labels.append(label_of[entry["category_id"]])
    names = tuple(str(category["name"]) for category in categories)
    return box_pool(call, list(found.values()), names, Path(images), size, repair)


def box_folder(
    path: str | Path, *, split: str | None = None, size: int = 320, repair: bool = False
) -> BoxPool:
    """Read a folder of ``annotations.json`` and ``images.zip`` (or a folder ``images``).

    The json holds ``classes``, the first of which is the background, and ``images``, each with ``file, width,
    height, boxes, labels`` and, where there are splits, ``split``; boxes are left, top, right, bottom in pixels
    and labels count from 1. A json in COCO's format will do as well, without splits.

    Args:
        path: the folder.
        split: only pictures of this split; all by default.
        size, repair: as for ``coco_boxes``.

    Raises:
        ValueError: as ``coco_boxes``, and where no picture is of this split.
    """
    call, folder = "box_folder", Path(path)
    pictures = folder / "images" if (folder / "images").is_dir() else folder / "images.zip"
    content = read_json(call, folder / "annotations.json", ("images",))
    if "annotations" in content and split is None:
        return coco_boxes(folder / "annotations.json", pictures, size=size, repair=repair)
    if "classes" not in content:
        raise ValueError(
            f"{call}: {folder / 'annotations.json'} must list its classes, got {', '.join(sorted(content))}. "
            "Add 'classes', the first of which is the background; COCO's format has no splits."
        )
    marked = [
        Marked(*(image[name] for name in Marked._fields))
        for image in entries(call, folder / "annotations.json", content, "images", Marked._fields)
        if split is None or image.get("split") == split
    ]
    if not marked:
        splits = sorted({str(image.get("split")) for image in content["images"]})
        raise ValueError(
            f"{call}: {folder} must have pictures of split {split!r}, got {', '.join(splits) or 'none'}. "
            "Choose one of these, or leave split out."
        )
    return box_pool(call, marked, tuple(content["classes"][1:]), pictures, size, repair)


def box_pool(
    call: str, marked: Sequence[Marked], names: tuple[str, ...], images: Path, size: int, repair: bool
) -> BoxPool:
    """Check the boxes, read the files, and bring all to one canvas."""
    marked = [checked(call, one, names, repair) for one in marked]
    if not marked:
        raise ValueError(f"{call}: there must be pictures, got none. Check the annotations.")
    sides = torch.tensor([(one.height, one.width) for one in marked])
    ratios = size / sides.amax(1)
    sizes = (sides * ratios[:, None]).round().long().clamp_min(1)
    height, width = (-(-side // STRIDE) * STRIDE for side in sizes.amax(0).tolist())
    most = max(1, *(len(one.boxes) for one in marked))
    pixels = torch.zeros(len(marked), 3, height, width, dtype=torch.uint8)
    boxes, labels = torch.zeros(len(marked), most, 4), torch.zeros(len(marked), most, dtype=torch.int64)
    with open_source(images, call) as source:
        missing = sorted({one.file for one in marked} - set(source.files))
        if missing:
            raise ValueError(
                f"{call}: the annotations name {len(missing)} pictures that {images} does not hold, such as "
                f"{missing[0]}. Paths must be relative to it, with forward slashes."
            )
        for row, one in enumerate(marked):
            high, wide = sizes[row].tolist()
            pixels[row, :, :high, :wide] = _read(call, source, one, (wide, high))
            if one.boxes:
                factors = torch.tensor([wide / one.width, high / one.height] * 2)
                boxes[row, : len(one.boxes)] = torch.tensor(one.boxes) * factors
                labels[row, : len(one.boxes)] = torch.tensor(one.labels)
    return BoxPool(pixels, sizes, boxes, labels, names, tuple(one.file for one in marked), ratios)


def _read(call: str, source: Source, one: Marked, to: tuple[int, int]) -> Tensor:
    """One picture of this width and height, ``[3, H, W]``."""
    found = []

    def prepare(image: Image.Image) -> Image.Image:
        found.append(image.size)
        return image.convert("RGB").resize(to, Image.Resampling.BILINEAR)

    pixels = read_images(source, [one.file], prepare, call)[0]
    if found[0] != (one.width, one.height):
        raise ValueError(
            f"{call}: {one.file} must have {one.width} x {one.height} pixels, as its annotations say, got "
            f"{found[0][0]} x {found[0][1]}. Correct the annotations, boxes and all."
        )
    return pixels
