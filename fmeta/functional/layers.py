"""What `functionalize` does to single layers: refuse, by name, or replace what is not a pure function."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from fmeta.functional import purity
from fmeta.functional.recurrent import Recurrent

NOT_PURE: dict[type, str] = {
    nn.SyncBatchNorm: "it talks to other processes in its forward. Use nn.BatchNorm2d",
    torch.jit.ScriptModule: "TorchScript hides its operations. Pass the Python module it was made from",
    nn.DataParallel: "it spreads a batch over devices. Pass its .module, and shard tasks instead",
    nn.parallel.DistributedDataParallel: "it talks to other processes. Pass its .module, and shard tasks",
}
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)


def refuse(name: str, layer: nn.Module, batch_norm: str | None, registered: set[nn.Module]) -> None:
    """Raise for a layer, one of those registered, that cannot be made a pure function."""
    place = f"{type(layer).__name__} at {name or 'the top'!r}"
    for kind, reason in NOT_PURE.items():
        if isinstance(layer, kind):
            raise NotImplementedError(f"functionalize: {place} is not supported: {reason}.")
    if "_orig_mod" in layer._modules:
        raise NotImplementedError(
            f"functionalize: {place} is compiled, and cannot be differentiated twice. Pass the module before "
            "torch.compile."
        )
    if any(
        tensor is not None and is_lazy(tensor)
        for tensor in (*layer._parameters.values(), *layer._buffers.values())
    ):
        raise ValueError(
            f"functionalize: {place} has parameters without a shape. Call the module on one batch first."
        )
    if isinstance(layer, nn.RNNBase) and type(layer).forward not in [kind.forward for kind in RECURRENT]:
        raise NotImplementedError(
            f"functionalize: {place} overrides the forward of a recurrent layer, whose weights cannot be "
            "replaced. Write it as a module that holds the layer."
        )
    if batch_norm and isinstance(layer, _BatchNorm) and not _is_plain(layer):
        raise NotImplementedError(
            f"functionalize: batch_norm={batch_norm!r} cannot reach {place}, which has a forward of its own. "
            "Use batch_norm=None, and its train() or eval() mode."
        )
    if batch_norm == "frozen" and isinstance(layer, _BatchNorm) and layer.running_mean is None:
        raise ValueError(
            f'functionalize: batch_norm="frozen" needs running statistics, but {place} keeps none. '
            'Use batch_norm="batch".'
        )
    if not isinstance(layer, nn.RNNBase):
        _refuse_hidden_parameters(place, layer, registered)


def make_pure(layer: Any, batch_norm: str | None) -> None:
    """Give a layer of the copy a forward that updates no statistics and takes no fused path."""
    pure = layer  # the type checker takes the class of layer from what follows
    if isinstance(layer, RECURRENT):
        for cache in ("_flat_weights", "_flat_weight_refs"):
            pure.__dict__.pop(cache, None)
        pure.__class__ = Recurrent
    elif isinstance(layer, _BatchNorm) and _is_plain(layer):
        pure.frozen = _is_frozen(layer) if batch_norm is None else batch_norm == "frozen"
        pure.__class__ = type(type(layer).__name__, (_PureBatchNorm, type(layer)), {})
    elif isinstance(layer, _InstanceNorm) and layer.running_mean is not None:
        pure.frozen = _is_frozen(layer)
        pure.__class__ = type(type(layer).__name__, (_PureInstanceNorm, type(layer)), {})
    elif isinstance(layer, nn.TransformerEncoder):
        pure.use_nested_tensor = False
    elif isinstance(layer, nn.TransformerEncoderLayer):
        pure.activation_relu_or_gelu = 0  # one of the conditions of the fast path, read by nothing else
    elif isinstance(layer, nn.MultiheadAttention):
        pure.__class__ = type(type(layer).__name__, (_SlowAttention, type(layer)), {})


@contextmanager
def calling_layers() -> Iterator[None]:
    """A context in which torch's transformers call the layers that they hold.

    Their fast path, without gradients, reads the weights of a layer past its forward and its hooks.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _PureBatchNorm:
    def forward(self: Any, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return F.batch_norm(
            input, *_running(self), self.weight, self.bias, training=not self.frozen, eps=self.eps
        )


class _PureInstanceNorm:
    def _apply_instance_norm(self: Any, input: Tensor) -> Tensor:
        return F.instance_norm(
            input, *_running(self), self.weight, self.bias, use_input_stats=not self.frozen, eps=self.eps
        )


class _SlowAttention:
    def forward(self: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Eagerly an active mode blocks the fast path of evaluation; torch.compile does not look, but it
        # sees that query and key are two tensors.
        key = key[...] if purity.under_compilation() and not self.training else key
        return nn.MultiheadAttention.forward(self, query, key, *args, **kwargs)


def _running(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    return (layer.running_mean, layer.running_var) if layer.frozen else (None, None)


def _is_plain(layer: _BatchNorm) -> bool:
    return type(layer).forward is _BatchNorm.forward


def _is_frozen(layer: _NormBase) -> bool:
    return not layer.training and layer.running_mean is not None


def _refuse_hidden_parameters(place: str, layer: nn.Module, registered: set[nn.Module]) -> None:
    """What is kept beside the registered parameters cannot be replaced: its gradient would silently be zero."""
    for name, value in vars(layer).items():
        for kept, shared in () if name in purity.PARTS else _held(value, set()):
            if isinstance(kept, nn.Parameter):
                raise ValueError(
                    f"functionalize: {place} keeps parameters in the attribute {name!r}, where they cannot be "
                    "replaced. Use nn.ParameterList or nn.ParameterDict, or look them up in forward."
                )
            if not any(p.requires_grad for p in kept.parameters()):
                continue
            if shared:
                raise ValueError(
                    f"functionalize: {place} keeps a function in the attribute {name!r} that refers to a "
                    f"{type(kept).__name__}, whose parameters cannot be replaced in it. Make it a method, or pass "
                    "the module as an argument."
                )
            if kept not in registered:
                raise ValueError(
                    f"functionalize: {place} keeps a {type(kept).__name__} in the attribute {name!r}, where it is "
                    "not registered and its parameters cannot be replaced. Use nn.ModuleList or nn.ModuleDict."
                )


def _held(value: Any, seen: set[Any], shared: bool = False) -> Iterator[tuple[Any, bool]]:
    """Parameters and modules within a value, and whether a function holds them: a copy of it has the same ones."""
    if (id(value), shared) in seen:
        return
    seen.add((id(value), shared))
    parts: Iterable[Any] = ()
    match value:
        case nn.Parameter() | nn.Module():
            yield value, shared
        case dict():
            parts = value.values()
        case list() | tuple() | set() | frozenset() | deque():
            parts = value
        case partial():
            parts = (value.func, *value.args, *value.keywords.values())
        case MethodType():
            parts = (value.__self__, value.__func__)
        case FunctionType():
            filled = [cell for cell in value.__closure__ or () if cell != CellType()]
            parts = (*(cell.cell_contents for cell in filled), value.__defaults__, value.__kwdefaults__)
            shared = True
    for part in parts:
        yield from _held(part, seen, shared)
