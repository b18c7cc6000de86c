"""A module as a pure function of its parameters, right under every nesting of derivatives and batching."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from fmeta.functional import layers, purity
from fmeta.functional.rewrites import REWRITES
from fmeta.types import Params

Statistics = Literal["batch", "frozen"]


def functionalize(module: nn.Module, *, batch_norm: Statistics | None = None) -> tuple[Apply, Params]:
    """A copy of the module as ``(apply, params)``; the module itself is never touched.

    ``apply(params, *args, **kwargs)`` is ``module(*args, **kwargs)`` with those parameters. Train or eval
    mode is that of the module now. ``params`` has the names and the order of ``module.named_parameters()``:
    tied parameters appear once, unused ones get zero gradients. Parameters with ``requires_grad=False`` are
    not in it: like buffers they are constants of ``apply``.

    Norm layers and attention are computed by operations whose second derivatives are right (see
    `differentiable`), recurrent layers step by step. The first uncompiled call makes sure that forward
    changes nothing.

    Args:
        module: any module whose forward is a function of its arguments.
        batch_norm: where batch norm takes its statistics from: ``"batch"``, or ``"frozen"``, the running ones
            as constants. None follows each layer's mode: the batch in training, else the running statistics
            it has. They are updated in no case.

    Raises:
        TypeError: if this is not an ``nn.Module``.
        ValueError: if ``"frozen"`` finds no running statistics; a parameter has no shape yet, or is kept, alone
            or with its module, where it cannot be replaced (a list, a closure); in the first call, if forward
            changes the module.
        NotImplementedError: for modules that cannot be a pure function, by name.

    >>> apply, params = functionalize(nn.Linear(2, 1))
    >>> list(params), apply(params, torch.ones(3, 2)).shape
    (['weight', 'bias'], torch.Size([3, 1]))
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"functionalize: a torch.nn.Module was expected, got {type(module).__name__}.")
    if batch_norm not in (None, "batch", "frozen"):
        raise ValueError(f'functionalize: batch_norm must be "batch", "frozen" or None, got {batch_norm!r}.')
    registered = set(module.modules())
    for name, layer in module.named_modules():
        layers.refuse(name, layer, batch_norm, registered)
    module = _copy(module)
    for layer in list(module.modules()):
        layers.make_pure(layer, batch_norm)
    params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    known = {*dict(module.named_parameters()), *dict(module.named_buffers())}
    return Apply(module, frozenset(params), frozenset(known), _aliases(module)), params


def check_apply(call: str, apply: Any, name: str = "apply") -> None:
    """Refuse a module where a function of its parameters is expected."""
    if not callable(apply) or isinstance(apply, nn.Module):
        raise TypeError(
            f"{call}: {name} must be a callable (params, x) -> outputs, got {type(apply).__name__}. "
            "Use `apply, params = fmeta.functionalize(module)`."
        )


def _copy(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except RuntimeError as error:
        raise ValueError(
            f"functionalize: {type(module).__name__} must be a module that can be copied, but it holds a "
            "computed tensor. Use torch.nn.utils.parametrizations for a weight that is a function of others."
        ) from error


def _aliases(module: nn.Module) -> dict[str, str]:
    """Second name of a parameter -> its name in ``named_parameters``, where two layers share one.

    functional_call can find these itself, but then it leaves its tensors behind in a layer that is used twice.
    """
    names = {p: name for name, p in module.named_parameters()}
    places = (
        (f"{prefix}.{name}" if prefix else name, p)
        for prefix, layer in module.named_modules()
        for name, p in layer._parameters.items()
    )
    return {place: names[p] for place, p in places if p is not None and place != names[p]}


@dataclass(frozen=True, eq=False)
class Apply:
    """A pure function ``(params, *args, **kwargs) -> outputs``, made by `functionalize`.

    Attributes:
        module: the copy that computes; its own parameters are only a template.
        names: the parameters that ``params`` must hold.
        known: what it may hold: constants of the module too, which are replaced for this call.
        aliases: further names of tied parameters.
    """

    module: nn.Module = field(repr=False)
    names: frozenset[str] = field(repr=False)
    known: frozenset[str] = field(repr=False)
    aliases: dict[str, str] = field(repr=False)
    _seen: set[str] = field(default_factory=set, init=False, repr=False)

    def __call__(self, params: Params, /, *args: Any, **kwargs: Any) -> Any:
        """``module(*args, **kwargs)`` with these parameters."""
        if params.keys() != self.names:
            self._refuse_names(params)
        with differentiable():
            if purity.under_compilation() or "pure" in self._seen:
                return self._call(params, args, kwargs)
            return self._first_call(params, args, kwargs)

    def _call(self, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        aliases = {alias: params[name] for alias, name in self.aliases.items() if name in params}
        # functional_call writes to the dict that it is given, so it gets one of its own
        return functional_call(self.module, {**params, **aliases}, args, kwargs, tie_weights=False)

    def _first_call(self, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = purity.snapshot(self.module)
        try:
            outputs = self._call(params, args, kwargs)
        except RuntimeError as error:
            purity.refuse_in_place(self.module, error)
            raise
        purity.refuse_changes(before, purity.snapshot(self.module))
        self._seen.add("pure")
        return outputs

    def _refuse_names(self, params: Params) -> None:
        missing, unknown = sorted(self.names - params.keys()), sorted(params.keys() - self.known)
        if missing or unknown:
            raise ValueError(
                f"apply: params must hold what functionalize returned, but {missing or 'nothing'} is missing "
                f"and {unknown or 'nothing'} is unknown. Merge partial ones first: {{**params, **adapted}}."
            )


class _Rewrite(TorchFunctionMode):
    """Calls a function's replacement wherever torch, or a module of torch, calls that function.

    Inside vmap, grad, jvp and make_fx this acts on the wrapped tensors, before anything is differentiated.
    torch.compile traces through it: a graph then holds the replacements, and the mode costs nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return REWRITES.get(func, func)(*args, **(kwargs or {}))


def differentiable() -> AbstractContextManager[Any]:
    """A context in which every derivative of norm layers and attention is right; cheap to enter.

    Whatever calls layer, batch or instance norm of torch inside, a module or a hand-written loss, gets
    `fmeta.functional.norms`. Attention is the plain formula, since the fused kernels have no second derivative, and the
    fast path of ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` is not taken.
    """
    return nullcontext() if _is_active() else _Rewrite()


def _is_active() -> bool:
    return any(
        isinstance(torch._C._get_function_stack_at(i), _Rewrite)
        for i in range(torch._C._len_torch_function_stack())
    )
