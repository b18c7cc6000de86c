"""Operations that are recorded as the simpler ones that they are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
COMPOSED = """
    _log_softmax _log_softmax_backward_data _softmax _softmax_backward_data mse_loss mse_loss_backward
    smooth_l1_loss smooth_l1_loss_backward huber_loss huber_loss_backward binary_cross_entropy
    binary_cross_entropy_backward binary_cross_entropy_with_logits nll_loss_forward nll_loss_backward
    soft_margin_loss addcmul addcdiv lerp linalg_vector_norm logsumexp     softplus
    softplus_backward elu elu_backward hardtanh hardtanh_backward hardsigmoid hardsigmoid_backward hardswish
    hardswish_backward mish mish_backward silu_backward log_sigmoid_forward log_sigmoid_backward
    select_backward slice_backward select_scatter slice_scatter masked_fill frac logit heaviside native_layer_norm
    native_layer_norm_backward native_group_norm xlogy  logaddexp glu glu_backward  tril triu addmv mv
    dot nan_to_num roll rsub special_entr deg2rad
"""


@functools.cache
def table() -> dict[Any, Callable[..., Any]]:
    """Decompositions by operation."""
    from torch._decomp import get_decompositions

    found = dict(get_decompositions([getattr(aten, name) for name in COMPOSED.split()]))
    return {**found, aten.index_add.default: index_add}


def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    """``index_add`` by ``scatter_add``, which kernels know; torch makes an ``index_put`` of it."""
    shape = [1] * source.ndim
    shape[dim] = -1
    places = index.reshape(shape).expand(source.shape)
    return x.scatter_add(dim, places, source if alpha == 1 else alpha * source)
