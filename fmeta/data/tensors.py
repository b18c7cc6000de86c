"""Pools from tensors that the caller already has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fmeta.data.pool import Pools, split_pools
from fmeta.data.split import assign_splits

CALL = "from_tensors"


def from_tensors(
    x: Tensor,
    y: Tensor,
    *,
    split: Sequence[float] | Mapping[int | str, str] = (0.64, 0.16, 0.2),
    seed: int = 0,
) -> Pools:
    """Divide labelled examples into pools of different classes.

    Args:
        x: examples ``[n, *feature]``, uint8 or floating; images are ``[n, C, H, W]``.
        y: integer labels ``[n]``, any values. A class is named by its label as text.
        split: fractions of the classes for train, validation and test (the default is miniImageNet's
            64/16/20), or ``{label: "train" | "val" | "test"}`` for every label.
        seed: which classes go where, for fractions.

    Example:
        >>> y = torch.tensor([7, 7, 8, 8, 9, 9])
        >>> pools = from_tensors(torch.rand(6, 3), y, split={7: "train", 8: "train", 9: "test"})
        >>> pools.train.names, pools.val.names, pools.test.names
        (('7', '8'), (), ('9',))
    """
    if not isinstance(y, Tensor) or y.ndim != 1 or y.is_floating_point() or y.is_complex():
        got = f"{y.dtype} of shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"{CALL}: y must be a tensor of integer labels [n], got {got}. Pass y.long().")
    labels, inside = torch.unique(y, return_inverse=True)
    names = tuple(str(label) for label in labels.tolist())
    wanted = {str(label): kind for label, kind in split.items()} if isinstance(split, Mapping) else split
    return split_pools(x, inside, names, assign_splits(names, wanted, seed, CALL), CALL)
