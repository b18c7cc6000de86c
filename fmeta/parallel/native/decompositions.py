"""Operations that are recorded as the simpler ones that they are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fmeta.parallel.native.matrices import kthvalue, linalg_det, linalg_inv_ex, lu_unpack, topk
from fmeta.parallel.native.placing import (
    diag_embed,
    diagonal_backward,
    index_add,
    new_empty_strided,
    slice_backward,
    slice_scatter,
)
from fmeta.parallel.native.windows import (
    _adaptive_avg_pool2d,
    _adaptive_avg_pool2d_backward,
    avg_pool2d,
    avg_pool2d_backward,
    convolution,
    convolution_backward,
    upsample_nearest2d,
    upsample_nearest2d_backward,
)

aten = torch.ops.aten
COMPOSED = """
    _log_softmax _log_softmax_backward_data _softmax _softmax_backward_data mse_loss mse_loss_backward
    smooth_l1_loss smooth_l1_loss_backward huber_loss huber_loss_backward binary_cross_entropy
    binary_cross_entropy_backward binary_cross_entropy_with_logits nll_loss_forward nll_loss_backward
    soft_margin_loss addcmul addcdiv lerp linalg_vector_norm logsumexp     softplus
    softplus_backward elu elu_backward hardtanh hardtanh_backward hardsigmoid hardsigmoid_backward hardswish
    hardswish_backward mish mish_backward silu_backward log_sigmoid_forward log_sigmoid_backward
    select_backward select_scatter masked_fill frac logit heaviside native_layer_norm
    native_layer_norm_backward native_group_norm xlogy  logaddexp glu glu_backward  tril triu addmv mv
    dot nan_to_num roll rsub special_entr deg2rad
    celu softshrink hardshrink threshold repeat sinc linspace pixel_shuffle pixel_unshuffle
    rot90 norm isneginf isposinf _safe_softmax aminmax count_nonzero nansum linalg_cross trace index_fill index_fill_
"""

OWN: tuple[Callable[..., Any], ...] = (
    index_add, slice_backward, slice_scatter, diagonal_backward, diag_embed, new_empty_strided, lu_unpack,
    linalg_inv_ex, topk, kthvalue, avg_pool2d, avg_pool2d_backward, _adaptive_avg_pool2d,
    _adaptive_avg_pool2d_backward, upsample_nearest2d, upsample_nearest2d_backward, convolution,
    convolution_backward,
)  # fmt: skip


@functools.cache
def table() -> dict[Any, Callable[..., Any]]:
    """Decompositions by operation."""
    from torch._decomp import get_decompositions

    found = dict(get_decompositions([getattr(aten, name) for name in COMPOSED.split()]))
    own = {function.__name__: function for function in OWN} | {"_linalg_det": linalg_det}
    return {**found, **{getattr(aten, name).default: function for name, function in own.items()}}
