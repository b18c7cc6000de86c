"""Operations that are recorded as the simpler ones that they are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten
COMPOSED = """
    _log_softmax _log_softmax_backward_data _softmax _softmax_backward_data mse_loss mse_loss_backward
    smooth_l1_loss smooth_l1_loss_backward huber_loss huber_loss_backward binary_cross_entropy
    binary_cross_entropy_backward binary_cross_entropy_with_logits nll_loss_forward nll_loss_backward
    soft_margin_loss addcmul addcdiv lerp linalg_vector_norm logsumexp     softplus
    softplus_backward elu elu_backward hardtanh hardtanh_backward hardsigmoid hardsigmoid_backward hardswish
    hardswish_backward mish mish_backward silu_backward log_sigmoid_forward log_sigmoid_backward
    select_backward slice_backward masked_fill frac logit heaviside native_layer_norm
    native_layer_norm_backward native_group_norm xlogy  logaddexp glu glu_backward  tril triu addmv mv
    dot nan_to_num roll rsub special_entr deg2rad
"""


@functools.cache
def table() -> dict[Any, Callable[..., Any]]:
    """Decompositions by operation."""
    from torch._decomp import get_decompositions

    return dict(get_decompositions([getattr(aten, name) for name in COMPOSED.split()]))
