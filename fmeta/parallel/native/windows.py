"""Pooling, upsampling and convolutions of lines, by slices, views and convolutions of images.

``NotImplemented`` leaves an operation as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmeta.parallel.native.placing import placed

aten = torch.ops.aten


def two(x: Any) -> tuple[int, int]:
    """A number for either side."""
    return (x, x) if isinstance(x, int) else (x[0], x[-1])


def avg_pool2d(
    x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """Means of windows without padding."""
    if any(two(padding)) or ceil_mode or divisor_override:
        return NotImplemented
    (kh, kw), (sh, sw) = two(kernel), two(stride or kernel)
    if (kh, kw) == (sh, sw):
        h, w = x.shape[-2] // kh, x.shape[-1] // kw
        cut = x.narrow(-2, 0, h * kh).narrow(-1, 0, w * kw)
        return cut.reshape(*x.shape[:-2], h, kh, w, kw).mean((-3, -1))
    h, w = (x.shape[-2] - kh) // sh + 1, (x.shape[-1] - kw) // sw + 1
    total = x.new_zeros(())
    for i in range(kh):
        for j in range(kw):
            total = total + x[..., i : i + (h - 1) * sh + 1 : sh, j : j + (w - 1) * sw + 1 : sw]
    return total / (kh * kw)


def avg_pool2d_backward(
    ct: Tensor, x: Tensor, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:  # fmt: skip
    """Every number shared out among its window."""
    if any(two(padding)) or ceil_mode or divisor_override:
        return NotImplemented
    (kh, kw), (sh, sw), (h, w) = two(kernel), two(stride or kernel), ct.shape[-2:]
    ct = ct / (kh * kw)
    if (kh, kw) == (sh, sw):
        wide = (
            ct[..., None, :, None].expand(*ct.shape[:-1], kh, w, kw).reshape(*ct.shape[:-2], h * kh, w * kw)
        )
        return placed(placed(wide, -2, range(h * kh), x.shape[-2]), -1, range(w * kw), x.shape[-1])
    total = x.new_zeros(())
    for i in range(kh):
        for j in range(kw):
            rows, columns = range(i, i + (h - 1) * sh + 1, sh), range(j, j + (w - 1) * sw + 1, sw)
            total = total + placed(placed(ct, -2, rows, x.shape[-2]), -1, columns, x.shape[-1])
    return total


def windows_of(x: Tensor, size: Any) -> tuple[int, int] | None:
    """Sides of the windows that give an image this size, if they are all alike."""
    even = all(n % m == 0 for n, m in zip(x.shape[-2:], size, strict=True))
    return (x.shape[-2] // size[0], x.shape[-1] // size[1]) if even else None


def _adaptive_avg_pool2d(x: Tensor, output_size: Any) -> Tensor:
    """Means of windows that are all alike."""
    kernel = windows_of(x, output_size)
    return NotImplemented if kernel is None else avg_pool2d(x, kernel)


def _adaptive_avg_pool2d_backward(ct: Tensor, x: Tensor) -> Tensor:
    """Every number shared out among its window."""
    kernel = windows_of(x, ct.shape[-2:])
    return NotImplemented if kernel is None else avg_pool2d_backward(ct, x, kernel, (), 0, False, True, None)


def upsample_nearest2d(x: Tensor, output_size: Any, *scales: float | None) -> Tensor:
    """Every number as often as whole numbers tell."""
    (h, w), (high, wide) = x.shape[-2:], output_size
    if high % h or wide % w:
        return NotImplemented
    spread = x[..., None, :, None].expand(*x.shape[:-1], high // h, w, wide // w)
    return spread.reshape(*x.shape[:-2], high, wide)


def upsample_nearest2d_backward(
    ct: Tensor, output_size: Any, input_size: Any, *scales: float | None
) -> Tensor:
    """What came of a number added up."""
    (h, w), (high, wide) = input_size[-2:], output_size
    if high % h or wide % w:
        return NotImplemented
    return ct.reshape(*ct.shape[:-2], h, high // h, w, wide // w).sum((-3, -1))


def of_images(*given: list[int]) -> list[list[int]]:
    """Stride, padding, dilation and padding of the result, of a line, for an image."""
    return [[n, *v] for n, v in zip((1, 0, 1, 0), given, strict=True)]


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Tensor:  # fmt: skip
    """A line is an image one number high."""
    if x.ndim != 3:
        return NotImplemented
    stride, padding, dilation, output_padding = of_images(stride, padding, dilation, output_padding)
    image, filters = x.unsqueeze(-2), weight.unsqueeze(-2)
    found = aten.convolution(
        image, filters, bias, stride, padding, dilation, transposed, output_padding, groups
    )
    return found.squeeze(-2)


def convolution_backward(
    ct: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, wanted: list[bool],
) -> Any:  # fmt: skip
    """The derivatives of a convolution of lines."""
    if x.ndim != 3:
        return NotImplemented
    stride, padding, dilation, output_padding = of_images(stride, padding, dilation, output_padding)
    images = (v.unsqueeze(-2) for v in (ct, x, weight))
    back, slope, bias = aten.convolution_backward(
        *images, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, wanted
    )
    return back.squeeze(-2) if wanted[0] else back, slope.squeeze(-2) if wanted[1] else slope, bias
