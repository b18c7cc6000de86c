"""Losses in half precision: an inner loop whose losses run under ``torch.autocast``, all else in float32.

Products and convolutions of the model are computed in half precision; parameters, inner updates, the losses
themselves and every sum of gradients stay in float32. bfloat16 has the range of float32. The small numbers
of float16 become zero, so its losses are differentiated at a scale: gradients carry ``SCALE`` (a field of the
loop, which every gradient of a loss reads), and Hessian-vector products, which are linear in the vector, are
taken of a vector scaled to about 1. Scales are divided out in float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fmeta import tree
from fmeta.types import InnerLoop, Plan, Tree

TF32 = "tf32"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
HALF = tuple(DTYPES.values())
SCALE = 2.0**10
"""Gradients of a task's weights down to 6e-8 keep all digits of float16, down to 6e-11 some; from 64 on they
overflow, which is not finite and skips the step."""


CONVOLUTIONS = (
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
)


class LoweredConvolutions(TorchFunctionMode):
    """Lowers what a convolution reads, before it is batched.

    vmap writes these functions as ``convolution``, which torch's autocast does not know on a CPU.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        """For tensors on one kind of device."""
        super().__init__()
        self.device, self.dtype = device, dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; the loss may have switched autocast off around it."""
        kwargs = kwargs or {}
        if func in CONVOLUTIONS and torch.is_autocast_enabled(self.device):
            args, kwargs = tree.map(lambda x: narrowed(x, self.dtype), (args, kwargs))
        return func(*args, **kwargs)


def narrowed(x: Any, dtype: torch.dtype) -> Any:
    """A float32 tensor in a half precision; anything else as it is."""
    return x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x


def lowered(loop: InnerLoop, precision: str | None) -> InnerLoop:
    """The same loop with its losses under autocast, and with the scale that their derivatives need.

    ``start`` and ``inner`` are left as they are: parameters and updates are of the parameters' own dtype.
    """
    if precision not in DTYPES:
        return loop
    dtype = DTYPES[precision]

    def under_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def call(params: Tree, meta: Tree, data: Tree, *k: Tensor) -> Any:
            # A cast that the cache remembers belongs to one level of grad and vmap, and is wrong at any other.
            # meta is not looked at, which is how it is found out whether the loss does.
            device = tree.device(data, params).type
            with torch.autocast(device, dtype=dtype, cache_enabled=False), LoweredConvolutions(device, dtype):
                result = fn(params, meta, data, *k)
            return tree.map(widened, result)

        return call

    scale = SCALE if precision == "fp16" else 1.0
    return loop._replace(loss=under_autocast(loop.loss), outer=under_autocast(loop.outer), scale=scale)


@contextlib.contextmanager
def products(precision: str | None) -> Iterator[None]:
    """With TF32 products and convolutions on a GPU, where the plan says so; else as the caller has set them."""
    if precision != TF32:
        yield
        return
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def widened(x: Any) -> Any:
    """A number in half precision as float32; anything else as it is."""
    return x.float() if isinstance(x, Tensor) and x.dtype in HALF else x


def normalised(direction: Tree, scale: float, tasks: int) -> tuple[Tree, Tensor | None]:
    """A vector over its largest entry and a number of tasks, and that factor; nothing is done at scale 1."""
    if scale == 1.0:
        return direction, None
    largest = [leaf.abs().amax() for leaf in tree.leaves(direction) if leaf.is_floating_point()]
    factor = torch.stack(largest).amax().clamp_min(torch.finfo(torch.float32).tiny) * tasks
    return over(direction, factor), factor


def over(values: Tree, factor: Tensor) -> Tree:
    """The floating leaves of a tree divided by a factor."""
    return tree.map(lambda x: x / factor if x.is_floating_point() else x, values)


def times(values: Tree, factor: Tensor | None) -> Tree:
    """The floating leaves of a tree times a factor, where there is one."""
    if factor is None:
        return values
    return tree.map(lambda x: x * factor if x.is_floating_point() else x, values)


def check_precision(plan: Plan) -> None:
    """Refuse a precision that is unknown, or whose small gradients the engine cannot keep."""
    if plan.precision not in (None, TF32, *DTYPES):
        raise ValueError(
            f"Plan: precision must be one of (None, 'tf32', 'bf16', 'fp16'), got {plan.precision!r}."
        )
    if plan.precision == "fp16" and plan.engine != "adjoint":
        raise ValueError(
            'Plan: precision="fp16" needs engine="adjoint", which scales the second derivatives apart from the '
            f'first, got engine={plan.engine!r}. Use precision="bf16", which needs no scale.'
        )
