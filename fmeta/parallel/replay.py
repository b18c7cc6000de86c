"""A function recorded at its second call with arguments of some shapes, and replayed from the third."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fmeta import tree
from fmeta.parallel.boundary import translated
from fmeta.parallel.forms import form_of
from fmeta.parallel.precision import products
from fmeta.parallel.program import Program, Recorder

Guard = Callable[[], AbstractContextManager[Any]]
Replayed = Any
"""A function of a list of tensors: a ``Program``, which mypy does not take for one, or a capture of it."""


class Replay:
    """A function that is recorded at its second call with arguments of some shapes, and replayed from the third.

    The first call builds kernels and makes the checks that are made once for every combination of shapes.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        wanted: bool,
        guard: Guard = nullcontext,
        capture: Callable[[Program, list[Tensor]], Replayed] = lambda program, flat: program,
    ) -> None:
        """Remember nothing yet; where it is not wanted, every call is a plain one.

        Replays run in ``guard()``, of what ``capture`` makes of a program and its inputs.
        """
        self.fn, self.wanted, self.guard, self.capture = fn, wanted, guard, capture
        self.calls: dict[Any, Replayed | str] = {}
        """For arguments of each form, how the next call runs."""

    def __call__(self, *args: Any) -> Any:
        """The value of the function."""
        if not self.wanted:
            return self.fn(*args)
        flat, spec = form_of(args) or tree.flatten(args)
        if not replayable(flat):
            return self.fn(*args)
        flat = [x if x.is_contiguous() else x.contiguous() for x in flat]
        key = (spec, torch.is_grad_enabled(), *[(x.shape, x.dtype, x.device) for x in flat])
        how = self.calls.get(key)
        if callable(how):
            with torch.no_grad(), self.guard():
                return how(flat)
        if how is None:
            result = self.fn(*args)
            self.calls[key] = "record"
            return result
        return self.record(key, flat, tree.flatten(args)[1]) if how == "record" else self.fn(*args)

    def record(self, key: Any, flat: list[Tensor], spec: Any) -> Any:
        """Call the function, and keep what it did; what cannot be replayed runs as it is from then on."""
        distinct = [x.detach() for x in flat]  # one tensor may be passed twice; a register holds one
        with Recorder(distinct) as recorder:
            result = self.fn(*tree.unflatten(distinct, spec))
        program = recorder.program(result)
        self.calls[key] = self.capture(program, flat) if program else "plain"
        return result


def replayable(flat: list[Any]) -> bool:
    """Whether a call is a plain one: on plain tensors, and nobody differentiates, maps, compiles or watches it."""
    return (
        all(type(x) in (Tensor, torch.nn.Parameter) for x in flat)
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in flat))
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
    )


@contextlib.contextmanager
def replaying(call: str, precision: str | None) -> Iterator[None]:
    """What surrounds a replay."""
    with translated(call), products(precision):
        yield
