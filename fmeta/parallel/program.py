"""What a call does, recorded once and replayed: kernel calls and the few operations between them, on registers.

The loops of an engine are Python, and so is taking pytrees apart at every kernel. Both depend on shapes
alone, so from the third call with the same shapes on, a list of instructions is all that runs: a kernel call
costs a few microseconds beside the kernel itself, and a register is freed at its last use.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fmeta import tree
from fmeta.parallel.forms import form_of, put_together

FlatKernel = Callable[[list[Tensor]], list[Tensor]]


class Register(NamedTuple):
    """Stands for a tensor among the recorded arguments."""

    number: int


NOTHING = -1  # the register of an output that is None


class Instruction(NamedTuple):
    """One call: of a kernel on a list of registers, or of an operation on arguments that hold registers."""

    call: Callable[..., Any]
    inputs: tuple[int, ...] | None
    args: Any
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    free: tuple[int, ...]


class Recorder(TorchDispatchMode):
    """Notes what runs under it, below vmap and grad. Operations inside a kernel are the kernel's own."""

    active: Recorder | None = None

    def __init__(self, inputs: list[Tensor], simpler: dict[Any, Callable[..., Any]] | None = None) -> None:
        """The inputs, distinct objects, are the first registers; ``simpler`` decomposes operations."""
        super().__init__()
        self.simpler = simpler or {}
        self.registers: Any = WeakIdKeyDictionary()
        self.like: list[tuple[torch.Size, torch.dtype]] = []
        self.captured: dict[int, Tensor] = {}
        self.instructions: list[Instruction] = []
        self.quiet = False
        self.broken = False
        for tensor in inputs:
            self.register(tensor)
        self.inputs = len(self.like)

    def __enter__(self) -> Recorder:
        """Kernels look for the recorder in ``Recorder.active``."""
        self.before, Recorder.active = Recorder.active, self
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        """Recording ends, whether the call succeeded or not."""
        Recorder.active = self.before
        super().__exit__(*exc)

    def register(self, tensor: Tensor) -> int:
        """The register of a tensor; a new one where it is not known."""
        if tensor not in self.registers:
            self.registers[tensor] = len(self.like)
            self.like.append((tensor.shape, tensor.dtype))
        return self.registers[tensor]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note it."""
        kwargs = kwargs or {}
        if self.quiet:
            return func(*args, **kwargs)
        if func in self.simpler:
            with note(self):
                made = self.simpler[func](*args, **kwargs)
            if made is not NotImplemented:
                return made
        if self.simpler and is_composed(func):  # inside one of them
            with note(self):
                return func.decompose(*args, **kwargs)
        args_of, kwargs_of = self.symbols(args), self.symbols(kwargs)
        out = func(*args, **kwargs)
        if func in RESHAPED:  # only the shape of a tensor changed: from here on it is another one
            func = RESHAPED[func]
            self.registers.pop(out)
        leaves = [out] if isinstance(out, Tensor) else tree.leaves(out)
        results = tuple(self.register(x) if isinstance(x, Tensor) else NOTHING for x in leaves)
        self.instructions.append(Instruction(func, None, args_of, kwargs_of, results, ()))
        return out

    def symbols(self, args: Any) -> Any:
        """Arguments with registers in place of tensors."""
        if isinstance(args, Tensor):
            known = args in self.registers
            number = self.register(args)
            if not known:
                self.captured[number] = args
            return Register(number)
        if isinstance(args, dict):
            return {name: self.symbols(value) for name, value in args.items()}
        return type(args)(map(self.symbols, args)) if isinstance(args, (list, tuple)) else args

    def kernel(self, kernel: FlatKernel, flat: list[Tensor]) -> list[Tensor]:
        """Run a kernel, and note it."""
        inputs = tuple(self.register(x) for x in flat)
        self.quiet = True
        try:
            out = kernel(list(flat))
        finally:
            self.quiet = False
        self.instructions.append(Instruction(kernel, inputs, (), {}, tuple(map(self.register, out)), ()))
        return out

    def program(self, result: Any) -> Program | None:
        """What was noted, to return such a result; None where it cannot be replayed."""
        leaves, spec = tree.flatten(result)
        known = all(isinstance(leaf, Tensor) and leaf in self.registers for leaf in leaves)
        if self.broken or self.captured or not known:
            return None
        outputs = [self.registers[leaf] for leaf in leaves]
        instructions = list(freed(self.instructions, {*outputs, NOTHING}))
        plain = form_of(result)
        return Program(instructions, self.inputs, len(self.like), outputs, spec, plain and plain[1])


aten = torch.ops.aten
RESHAPED: dict[Any, Any] = {
    aten.squeeze_.dims: aten.squeeze.dims,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.transpose_.default: aten.transpose.int,
}
"""Operations in place that change no number, and the same as new tensors: batched products make them."""


@functools.cache
def is_composed(func: Any) -> bool:
    """Whether torch itself defines an operation by others, for every device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@contextlib.contextmanager
def note(recorder: Recorder) -> Iterator[None]:
    """Inside an operation that is being recorded: record what it does."""
    TorchDispatchMode.__enter__(recorder)
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(recorder, None, None, None)


def freed(found: list[Instruction], kept: set[int]) -> Iterator[Instruction]:
    """Instructions with the registers that nobody reads after them; what is never read needs no register."""
    last: dict[int, int] = {}
    for index, one in enumerate(found):
        for number in (*reads(one), *one.outputs):
            last[number] = index
    ends: dict[int, list[int]] = {}
    for number, index in last.items():
        if number not in kept:
            ends.setdefault(index, []).append(number)
    for index, one in enumerate(found):
        yield one._replace(free=tuple(ends.get(index, ())))


def reads(one: Instruction) -> tuple[int, ...]:
    """The registers that an instruction reads."""
    return one.inputs if one.inputs is not None else tuple(_registers((one.args, one.kwargs)))


def _registers(args: Any) -> Iterator[int]:
    if isinstance(args, Register):
        yield args.number
    elif isinstance(args, (list, tuple, dict)):
        for value in args.values() if isinstance(args, dict) else args:
            yield from _registers(value)


class Program(NamedTuple):
    """Instructions on a number of registers, of which the first are the inputs."""

    instructions: list[Instruction]
    inputs: int
    registers: int
    outputs: list[int]
    spec: Any
    form: Any
    """Of the result where it is made of plain containers, else None."""

    def __call__(self, flat: list[Tensor], /) -> Any:
        """Replay on tensors like those recorded; the result has the structure of the recorded one."""
        values: list[Any] = [*flat, *([None] * (self.registers - self.inputs))]
        for call, inputs, args, kwargs, outputs, free in self.instructions:
            if inputs is not None:
                given = [values[i] for i in inputs]
                for number in free:  # the kernel may give its inputs' memory to what it computes
                    values[number] = None
                for number, value in zip(outputs, call(given), strict=True):
                    values[number] = value
                value = None  # the register alone holds it
            else:
                self.operation(values, call, args, kwargs, outputs)
            for number in free:
                values[number] = None
        results = [values[i] for i in self.outputs]
        return put_together(self.form, iter(results)) if self.form else tree.unflatten(results, self.spec)

    @staticmethod
    def operation(values: list[Any], call: Any, args: Any, kwargs: Any, outputs: tuple[int, ...]) -> None:
        """Run one operation between kernels."""
        out = call(*substituted(args, values), **substituted(kwargs, values))
        if isinstance(out, Tensor):
            values[outputs[0]] = out
        else:
            for number, value in zip(outputs, tree.leaves(out), strict=True):
                if number != NOTHING:
                    values[number] = value


def substituted(args: Any, values: list[Any]) -> Any:
    """Recorded arguments with today's tensors in place of registers."""
    if isinstance(args, Register):
        return values[args.number]
    if isinstance(args, dict):
        return {name: substituted(value, values) for name, value in args.items()}
    return type(args)([substituted(x, values) for x in args]) if isinstance(args, (list, tuple)) else args
