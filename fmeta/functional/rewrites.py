"""What stands in for functions of torch that cannot be differentiated twice, or not under vmap.

Each takes the arguments of the function that it replaces and gives its values. Norms are silently wrong in
torch, and so are some solvers (`norms`, `linalg`); the others here would raise in one nesting or
another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmeta.functional import linalg, norms, recurrent


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(scale * query key^T) value``; fused kernels have no second derivative."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # the formula adds its mask; only the function in front of it knows what a boolean means
        attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(query.dtype)
    outputs, _ = torch._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return outputs


def multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    """Torch's own, with its attention kept to the plain formula by torch's switch.

    A mode does not see what its own handlers call, so `attention` would not be reached.
    """
    with sdpa_kernel(SDPBackend.MATH):
        return F.multi_head_attention_forward(*args, **kwargs)


def one_hot(input: Tensor, num_classes: int = -1) -> Tensor:
    """Torch's own, which reads the labels to check their range, without reading them."""
    if num_classes < 0:
        return F.one_hot(input)  # the number of classes is in the labels: torch says that vmap cannot know it
    return (input.unsqueeze(-1) == torch.arange(num_classes, device=input.device)).to(input.dtype)


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """``a * sigmoid(b)`` for the two halves of the input; torch's has no reverse over forward mode."""
    a, b = input.chunk(2, dim)
    return a * torch.sigmoid(b)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``clamp(x + 3, 0, 6) / 6``; torch's has no second derivative."""
    return (input + 3).clamp(0, 6) / 6


def rrelu(
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """Leaky ReLU of a random slope, or of the mean slope in an evaluation; torch's has no batching rule."""
    slope = lower + (upper - lower) * torch.rand_like(input) if training else (lower + upper) / 2
    return torch.where(input >= 0, input, slope * input)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``v * g / |v|``, the norm over all dimensions but ``dim``, or over all for -1.

    Torch's has no forward mode, and a wrong second derivative.
    """
    dims = [d for d in range(v.dim()) if d != dim]
    return v * (g * torch.rsqrt((v * v).sum(dims, keepdim=True)))


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x1^T W_o x2 + b_o`` for every output o; torch's has no batching rule."""
    out = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return out if bias is None else out + bias


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sum or mean of the embeddings of each row; torch's has no second derivative."""
    if input.dim() != 2 or mode == "max" or max_norm is not None or scale_grad_by_freq:
        raise NotImplementedError(
            f"embedding_bag: only the sum or mean of bags of one size can be differentiated twice, got mode={mode!r}, "
            f"input of shape {tuple(input.shape)}, max_norm={max_norm}, scale_grad_by_freq={scale_grad_by_freq}. "
            "Pad the bags to [bags, size] with padding_idx, or use nn.Embedding."
        )
    found = F.embedding(input, weight)
    shares = torch.ones_like(found[..., 0]) if per_sample_weights is None else per_sample_weights
    if padding_idx is not None:
        shares = torch.where(input == padding_idx % len(weight), 0.0, shares)
    total = (found * shares.unsqueeze(-1)).sum(1)
    return total if mode == "sum" else total / shares.sum(1, keepdim=True).clamp(min=1)


def soft_margin_loss(
    input: Tensor, target: Tensor, size_average: Any = None, reduce: Any = None, reduction: str = "mean"
) -> Tensor:
    """``log(1 + exp(-y x))``; torch's has no forward mode."""
    return _reduce(-F.logsigmoid(target * input), reduction)


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """``(log var + (x - y)^2 / var) / 2``; torch's reads values, to refuse negative variances."""
    var = torch.full_like(input, var) if isinstance(var, float) else var
    if var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    var = var + (var.clamp(min=eps) - var).detach()  # the gradient of torch, which clamps without one
    loss = (torch.log(var) + (input - target) ** 2 / var) / 2
    return _reduce(loss + math.log(2 * math.pi) / 2 if full else loss, reduction)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _cell(name: str) -> Callable[..., Any]:
    """One step of a recurrent cell; torch's writes in place to what the tasks share."""
    step = recurrent.CELLS[name]

    def cell(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = step(F.linear(input, w_ih, b_ih), tuple(hx) if name == "LSTM" else (hx,), w_hh, b_hh)
        return state if name == "LSTM" else state[0]

    return cell


REWRITES: dict[Any, Callable[..., Any]] = {
    F.one_hot: one_hot,
    **norms.REWRITES,
    **linalg.REWRITES,
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: multi_head_attention,
    F.glu: glu,
    F.hardsigmoid: hardsigmoid,
    F.rrelu: rrelu,
    F.bilinear: bilinear,
    F.embedding_bag: embedding_bag,
    F.soft_margin_loss: soft_margin_loss,
    F.gaussian_nll_loss: gaussian_nll_loss,
    torch._weight_norm: weight_norm,
    torch.rnn_tanh_cell: _cell("RNN_TANH"),
    torch.rnn_relu_cell: _cell("RNN_RELU"),
    torch.lstm_cell: _cell("LSTM"),
    torch.gru_cell: _cell("GRU"),
}
"""What `fmeta.functional.differentiable` calls in place of a function of torch."""
