"""The head of a task's own classes, made from a detector that knows objects and background only.

The class of an object is what its features say beyond being an object. With ``w, b`` the object's row, ``p_c``
the mean feature of class ``c`` in the support set, ``m`` the mean of these, ``q_c = p_c - m`` and ``v`` the mean of
``|h - m|^2`` over the features ``h`` of the support set, every class counted alike, but at least a hundredth of the
mean of ``|h|^2``::

    logit_c(h) = w h + b + strength * (q_c (h - m) - |q_c|^2 / 2) / v - log(ways)

which is an ordinary linear layer. Where all classes are alike, the probability of being an object stays.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmeta.types import Batch, Params

PREDICTOR = "roi_heads.box_predictor"
SCORES = f"{PREDICTOR}.cls_score"
FLOOR = 1e-2
"""Least spread that counts, as a part of the mean square: features that hardly differ say nothing of classes."""
BOXES = f"{PREDICTOR}.bbox_pred"


def object_detector(params: Params) -> Params:
    """A detector of classes as one of objects: mean rows of all classes, one set of boxes.

    Args:
        params: heads for any number of classes, as ``split_detector`` returns them.
    """
    found = dict(params)
    for kind in ("weight", "bias"):
        scores, boxes = params[f"{SCORES}.{kind}"], params[f"{BOXES}.{kind}"]
        found[f"{SCORES}.{kind}"] = torch.stack([scores[0], scores[1:].mean(0)])
        if len(boxes) > 4:
            found[f"{BOXES}.{kind}"] = boxes.unflatten(0, (-1, 4))[1:].mean(0)
    return found


def class_rows(params: Params, ways: int) -> Params:
    """Scores of ``ways`` classes that all start as the object's."""
    rows = torch.tensor([0] + [1] * ways, device=params[f"{SCORES}.bias"].device)
    found = {name: params[name].index_select(0, rows) for name in (f"{SCORES}.weight", f"{SCORES}.bias")}
    shift = torch.full_like(found[f"{SCORES}.bias"], -math.log(ways)).index_fill(0, rows[:1], 0.0)
    return found | {f"{SCORES}.bias": found[f"{SCORES}.bias"] + shift}


def moved_to(rows: Params, prototypes: Tensor, squares: Tensor, strength: Tensor) -> Params:
    """Scores of classes, each moved to its prototype: the formula above.

    Args:
        rows: what `class_rows` returned.
        prototypes: mean features of the classes, ``[ways, width]``.
        squares: mean squared norm of the features of each class, ``[ways]``.
        strength: how much prototypes count.
    """
    middle = prototypes.mean(0)
    off = prototypes - middle
    spread = squares.mean() - middle.square().sum()
    scale = strength / torch.maximum(spread, FLOOR * squares.mean()).clamp_min(1e-6)
    weight, bias = scale * off, -scale * (off @ middle + off.square().sum(1) / 2)
    zero = torch.zeros_like(weight[:1])
    return {
        f"{SCORES}.weight": rows[f"{SCORES}.weight"] + torch.cat([zero, weight]),
        f"{SCORES}.bias": rows[f"{SCORES}.bias"] + torch.cat([zero[:, 0], bias]),
    }


def count_classes(call: str, support: Batch) -> int:
    """Number of classes that a support set shows.

    Raises:
        ValueError: for a support set without boxes, or one that skips a class.
    """
    labels = support.y["labels"]
    ways = int(labels.max())
    if ways < 1:
        raise ValueError(f"{call}: the support set must show objects, got pictures without a box. Add some.")
    missing = sorted(set(range(1, ways + 1)) - set(labels.flatten().tolist()))
    if missing:
        raise ValueError(
            f"{call}: labels of the support set must be 1 .. {ways} without gaps, got no box of class {missing[0]}. "
            "Number the classes that are there."
        )
    return ways


def check_query(call: str, query: Batch, ways: int) -> None:
    """Refuse classes in the query set that the support set lacks."""
    most = int(query.y["labels"].max())
    if most > ways:
        raise ValueError(
            f"{call}: the query set must show classes of the support set only, got class {most} where that has 1 .. "
            f"{ways}. Sample both from the same classes."
        )
