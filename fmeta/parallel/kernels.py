"""Compiled kernels: a pure function of tensors, traced to ATen and compiled once for every combination of shapes.

On a CPU the traced graph becomes C++ of our own (``native``); elsewhere, and where it holds an operation that is
not known there, inductor compiles it (``inductor``). Neither goes through dynamo. The price is that nothing guards
a kernel but the key below, so whatever may change from call to call must reach a kernel as a tensor (the inner
step index among it), and every closure must be pure.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fmeta import tree
from fmeta.functional import differentiable
from fmeta.parallel.cost import Built
from fmeta.parallel.inductor import by_inductor
from fmeta.parallel.native.axis import Axes, axes_of
from fmeta.parallel.native.build import native
from fmeta.parallel.native.ir import Unsupported
from fmeta.parallel.program import Recorder
from fmeta.types import MetaLearningWarning, Plan

TESTED = ("2.14",)  # the torch releases whose private compiler entry points this file was tested with
LOG = logging.getLogger("fmeta")
told: set[str] = set()


class CannotCompile(Exception):
    """Why a function runs uncompiled; becomes a warning or an error according to ``Plan.compile``."""


class Kernel:
    """One function of pytrees of tensors, compiled once for every combination of shapes it is called with."""

    def __init__(self, name: str, fn: Callable[..., Any], plan: Plan, axes: Axes | None = None) -> None:
        """Nothing is traced before the first call. ``axes``: the dimension of tasks in each argument."""
        self.name, self.fn, self.plan, self.axes = name, fn, plan, axes
        self.compiled: dict[Any, Built | None] = {}
        self.compile_seconds = 0.0
        self.why = ""  # it runs uncompiled

    def __call__(self, *args: Any, into: Sequence[Tensor | None] = ()) -> Any:
        """Run on these trees; compiles first where their shapes are new.

        ``into``: memory that the first results may be written to (contiguous, of their shapes), None for new.
        Large results in new memory cost more than they take to compute: the system hands it out page by page.
        """
        flat, spec = tree.flatten(args)
        flat = [x.contiguous() for x in flat]  # a kernel is compiled for one layout
        key = (spec, *((x.shape, x.dtype, x.device) for x in flat))
        if key not in self.compiled:
            self.compiled[key] = self.build(flat, spec, axes_of(args, self.axes))
        built, recorder = self.compiled[key], Recorder.active
        if built is None:
            if recorder:
                recorder.broken = True
            with differentiable():
                return self.fn(*args)
        if recorder:
            out = recorder.kernel(built.run, flat)
        else:
            out = built.into(flat, into) if built.into and into else built.run(flat)
        return tree.unflatten(out, built.out_spec)

    def build(self, flat: list[Tensor], spec: Any, axes: list[int | None]) -> Built | None:
        """Compile for the shapes of ``flat``; None, and a warning said once, where it cannot be done."""
        begin = time.perf_counter()
        try:
            why = reason_not_to_compile()
            if why:
                raise CannotCompile(why)
            built = compile_flat(self.fn, flat, spec, axes)
        except Exception as error:
            if self.plan.compile is True:
                raise RuntimeError(
                    f"compile=True: the {self.name} kernel must compile, got {first_line(error)}. "
                    'Use compile="auto" to run it uncompiled.'
                ) from error
            self.why = first_line(error)
            warn_once(f"fmeta runs uncompiled: {self.why}", self.name)
            return None
        self.compile_seconds += time.perf_counter() - begin
        return built


def compiled(name: str, fn: Callable[..., Any], plan: Plan = Plan()) -> Callable[..., Any]:
    """A function of trees of tensors, compiled once for every combination of shapes where that is possible."""
    return fn if plan.compile is False else Kernel(name, fn, plan)


def compiled_map(name: str, fn: Callable[..., Any], axes: Axes, plan: Plan = Plan()) -> Callable[..., Any]:
    """``vmap(fn, axes)``, compiled; on a CPU one kernel serves any number side by side."""
    mapped = vmap(fn, axes)
    return mapped if plan.compile is False else Kernel(name, mapped, plan, axes)


def first_line(error: Exception) -> str:
    """The first line of an error, with its type where that is not one of ours."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return text if isinstance(error, CannotCompile) else f"{type(error).__name__}: {text}"


def warn_once(message: str, name: str = "") -> None:
    """Say the same thing once a process."""
    if message not in told:
        told.add(message)
        warnings.warn(
            message + (f" (first seen in the {name} kernel)" if name else ""), MetaLearningWarning, 2
        )


def reason_not_to_compile() -> str:
    """Why this installation cannot compile; empty where it can."""
    release = ".".join(torch.__version__.split(".")[:2])
    if release not in TESTED:
        return (
            f"torch {torch.__version__} is not among the releases fmeta compiles with ({', '.join(TESTED)})"
        )
    return ""


def compile_flat(fn: Callable[..., Any], flat: list[Tensor], spec: Any, axes: list[int | None]) -> Built:
    """Compile ``fn`` for tensors like ``flat``, or find it compiled: on a CPU by our own means, where these do."""
    try:
        with torch.no_grad():
            return native(fn, flat, spec, axes)
    except Unsupported as why:
        LOG.debug("inductor compiles %s: %s", getattr(fn, "__name__", "a kernel"), why)
    return by_inductor(fn, flat, spec)
