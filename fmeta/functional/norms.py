"""Normalisation out of mean, rsqrt and products, so that every derivative of it is right.

torch 2.14 computes the weight's gradient of affine batch, layer and instance norm from saved statistics that
its vmap rule hands to outer levels as constants. ``grad(vmap(grad))``, ``jvp(vmap(grad))`` and autograd over
``vmap(grad)``, the nestings of meta-learning, are then silently wrong, eager and compiled. The functions here
take the arguments of their namesakes in ``torch.nn.functional`` and give the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``(input - mean) / sqrt(var + eps) * weight + bias`` over the last dimensions, of ``normalized_shape``.

    >>> layer_norm(torch.tensor([[1.0, 3.0]]), (2,), eps=0.0)
    tensor([[-1.,  1.]])
    """
    shape = _shape("layer_norm", input, normalized_shape)
    x = _at_least_float32(input)
    x = _standardise(x, tuple(range(-len(shape), 0)), eps)
    return _affine(x, weight, bias, shape).to(input.dtype)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``input / sqrt(mean(input^2) + eps) * weight`` over the last dimensions, of ``normalized_shape``.

    ``eps`` is by default the smallest step from 1 in the dtype of the sum, as in torch.
    """
    shape = _shape("rms_norm", input, normalized_shape)
    x = _at_least_float32(input)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    x = x * torch.rsqrt((x * x).mean(tuple(range(-len(shape), 0)), keepdim=True) + eps)
    return _affine(x, weight, None, shape).to(input.dtype)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``(input - mean) / sqrt(var + eps) * weight + bias`` for each channel of ``[batch, channels, ...]``.

    ``training`` takes the statistics from the batch, otherwise they are ``running_mean`` and ``running_var``.
    ``momentum`` stands in torch's argument order only: nothing is updated here.

    Raises:
        ValueError: if running statistics would have to be updated in place, or a channel has one value only.
    """
    del momentum
    if training:
        _refuse_update("batch_norm", running_mean, running_var)
        _refuse_single("batch_norm", input, math.prod(input.shape) // max(input.shape[1], 1))
    x = _at_least_float32(input)
    if training:
        x = _standardise(x, (0, *range(2, x.dim())), eps)
    else:
        x = _standardise_by(x, running_mean, running_var, eps)
    return _affine(x, weight, bias, _per_channel(x)).to(input.dtype)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `batch_norm`, with the statistics of each example apart.

    Raises:
        ValueError: if running statistics would have to be updated in place, or a channel has one value only.
    """
    del momentum
    if use_input_stats:
        _refuse_update("instance_norm", running_mean, running_var)
        _refuse_single("instance_norm", input, math.prod(input.shape[2:]))
    x = _at_least_float32(input)
    if use_input_stats:
        x = _standardise(x, tuple(range(2, x.dim())), eps)
    else:
        x = _standardise_by(x, running_mean, running_var, eps)
    return _affine(x, weight, bias, _per_channel(x)).to(input.dtype)


def _shape(name: str, input: Tensor, normalized_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{name}: input must end in normalized_shape {shape}, got shape {tuple(input.shape)}. "
            "Build the layer for the size of the features it sees."
        )
    return shape


def _at_least_float32(x: Tensor) -> Tensor:
    """Statistics of half precision are summed in float32, as torch does."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _standardise(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)


def _standardise_by(x: Tensor, mean: Tensor | None, var: Tensor | None, eps: float) -> Tensor:
    if mean is None or var is None:
        raise ValueError(
            "batch_norm: running_mean and running_var are needed to normalise without the batch, got None. "
            "Pass training=True (use_input_stats=True for instance_norm)."
        )
    shape = _per_channel(x)
    return (x - mean.view(shape)) * torch.rsqrt(var.view(shape) + eps)


def _per_channel(x: Tensor) -> tuple[int, ...]:
    return (1, x.shape[1], *[1] * (x.dim() - 2))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if weight is not None:
        x = x * weight.view(shape)
    if bias is not None:
        x = x + bias.view(shape)
    return x


def _refuse_update(name: str, *running: Tensor | None) -> None:
    if any(tensor is not None for tensor in running):
        raise ValueError(
            f"{name}: running statistics would be updated in place, which a pure function cannot do. Use "
            "fmeta.functionalize(module), which normalises by the batch and leaves them alone, or pass "
            "running_mean=None and running_var=None."
        )


def _refuse_single(name: str, input: Tensor, values: int) -> None:
    if values == 1:
        raise ValueError(
            f"{name}: more than 1 value per channel is needed for statistics of the input, got shape "
            f"{tuple(input.shape)}. Use more examples, or frozen running statistics."
        )


def _torch_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return layer_norm(input, normalized_shape, weight, bias, eps)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: its second derivative is wrong under vmap and it returns statistics that cannot be "
            "rewritten. Call layer_norm or batch_norm of torch.nn.functional instead."
        )

    return refuse


NATIVE_NORMS = (
    "native_layer_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
)
"""ATen operators whose derivatives cannot be trusted: none may stand in the traced graph of a loss."""

REWRITES: dict[Any, Callable[..., Any]] = {
    F.layer_norm: layer_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.rms_norm: rms_norm,
    torch.layer_norm: _torch_layer_norm,
    torch.rms_norm: rms_norm,
    torch.batch_norm: _torch_batch_norm,
    torch.instance_norm: _torch_instance_norm,
    **{getattr(torch, name): _refusal(f"torch.{name}") for name in NATIVE_NORMS if hasattr(torch, name)},
}
"""What stands in for torch's functions inside `fmeta.functional.differentiable`."""
