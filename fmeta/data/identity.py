"""Checksums of tensors, and of what a module computes: its code, its options and its numbers."""

from __future__ import annotations

import enum
import hashlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (
    type(None), bool, int, float, complex, str, bytes, slice, range, PurePath, enum.Enum,
    torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
"""Values that are said by their text."""
NAMED = (type, ModuleType, logging.Logger)
"""Values that are said by their name."""
INNER = ("torch.fx", "torch.jit", "torch._C", "torch.utils.hooks")
"""Where torch keeps what no option of a module is in."""
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
OWN = frozenset(vars(nn.Module()))
"""What torch keeps in every module."""


def tensor_digest(x: Tensor) -> str:
    """A checksum of a tensor's type, shape and content."""
    content = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return digest(f"{x.dtype} {tuple(x.shape)}".encode() + hashlib.sha256(content).digest())


def digest(content: bytes) -> str:
    """A checksum of bytes."""
    return hashlib.sha256(content).hexdigest()


def digest_of(module: nn.Module) -> str:
    """A checksum of what a module computes: its code, options, parameters and buffers."""
    return digest(joined(Reader().module(module)).encode())


class Reader:
    """Says what values are, in the same words in every process."""

    def __init__(self) -> None:
        """With nothing read."""
        self.known: dict[int, tuple[Any, str]] = {}  # the values too, so that no other one gets their id

    def module(self, module: nn.Module) -> Iterator[str]:
        """All that a module computes with."""
        parts = dict(module.named_modules())
        for place, part in parts.items():
            self.known[id(part)] = part, f"part {place}"
        yield f"{torch.__version__} {module!r}"
        kinds = {kind for part in parts.values() for kind in type(part).__mro__}
        yield from sorted(self.source(kind) for kind in kinds - {nn.Module, object})
        for name, x in [*module.named_parameters(), *module.named_buffers()]:
            yield f"{name} {tensor_digest(x)}"
        for place, part in parts.items():
            options = {name: value for name, value in vars(part).items() if not is_torchs(part, name)}
            hooks = [list(getattr(part, name).values()) for name in HOOKS]
            code = getattr(part, "code", "")  # of a graph
            said = f"{code if isinstance(code, str) else ''} {self.text(options)} {self.text(hooks)}"
            yield f"{place} {type(part).__qualname__} {said}"

    def source(self, kind: type) -> str:
        """The code of a class, so that a changed forward is another trunk; its name where there is none."""
        name = f"{kind.__module__}.{kind.__qualname__}"
        if kind.__module__.startswith("torch."):
            return name
        closures = [f.__closure__ or () for f in vars(kind).values() if isinstance(f, FunctionType)]
        outside = [inside(cell) for closure in closures for cell in closure]
        try:
            return f"{inspect.getsource(kind)} {self.text(outside)}"
        except (OSError, TypeError):
            return f"{name} {self.text(outside)}"

    def text(self, value: Any) -> str:
        """What a value is."""
        kind = type(value)
        if isinstance(value, PLAIN):
            return f"{kind.__qualname__} {value!r}"
        if isinstance(value, Tensor):
            return tensor_digest(value)
        if isinstance(value, np.ndarray | np.generic):
            return f"{value.dtype} {value.shape} {digest(value.tobytes())}"
        if id(value) not in self.known:
            self.known[id(value)] = value, "itself"
            said = f"{kind.__module__}.{kind.__qualname__} {name_of(value)} {joined(self.parts(value))}"
            self.known[id(value)] = value, digest(said.encode())
        return self.known[id(value)][1]

    def parts(self, value: Any) -> Iterable[str]:
        """What an object consists of."""
        if isinstance(value, nn.Module):  # one that is kept beside the registered ones
            return self.module(value)
        if isinstance(value, CodeType):
            return [value.co_code.hex(), str(value.co_names), *map(self.text, value.co_consts)]
        if isinstance(value, set | frozenset):
            return sorted(map(self.text, value))
        return map(self.text, contents(value))


def is_torchs(part: nn.Module, name: str) -> bool:
    """Whether an attribute is torch's own bookkeeping."""
    return name in OWN or (name.startswith("_") and type(part).__module__.startswith("torch."))


def contents(value: Any) -> Iterable[Any]:
    """The values that an object consists of."""
    if isinstance(value, NAMED) or type(value).__module__.startswith(INNER):
        return []
    if isinstance(value, FunctionType):  # its code too: two lambdas of one name differ by it
        cells = [inside(cell) for cell in value.__closure__ or ()]
        return [value.__code__, value.__defaults__, value.__kwdefaults__, *cells]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, BuiltinFunctionType):
        return [value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, list | tuple):
        return value
    return [part for item in getattr(value, "__dict__", {}).items() for part in item]


def inside(cell: Any) -> Any:
    """What a function has from outside; None for a name that has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def name_of(value: Any) -> str:
    """Where a function or class is from."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    return f"{getattr(value, '__module__', '')}.{name}" if isinstance(name, str) else ""


def joined(texts: Iterable[str]) -> str:
    """Texts with a mark between them."""
    return "\n".join(texts)
