"""Compiled kernels: a pure function of tensors, traced to ATen once per shape and handed to inductor.

A traced graph goes to inductor without dynamo, which makes calls cheaper, and gives a kernel a name on disk by
which later processes find it. The price is that nothing guards a kernel but the key below, so whatever may
change from call to call must reach a kernel as a tensor (the inner step index among it), and every closure
must be pure.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import tree
from fmeta.functional import differentiable
from fmeta.parallel import modules
from fmeta.parallel.convolutions import as_products
from fmeta.parallel.cost import Cost, cost_of_graph
from fmeta.parallel.faster import faster_as_product
from fmeta.parallel.native.axis import Axes, axes_of
from fmeta.parallel.native.build import native
from fmeta.parallel.native.ir import Unsupported
from fmeta.parallel.program import FlatKernel, Recorder
from fmeta.parallel.rewrite import multiply_and_sum
from fmeta.parallel.store import cache_folder
from fmeta.parallel.trace import Traced, own_copy, trace
from fmeta.types import MetaLearningWarning, Plan

TESTED = ("2.14",)  # the torch releases whose private compiler entry points this file was tested with
LOG = logging.getLogger("fmeta")
told: set[str] = set()


class CannotCompile(Exception):
    """Why a function runs uncompiled; becomes a warning or an error according to ``Plan.compile``."""


class Built(NamedTuple):
    """A compiled function of a list of tensors, and the structure of its result."""

    run: FlatKernel
    out_spec: Any
    cost: Cost


class Kernel:
    """One function of pytrees of tensors, compiled once for every combination of shapes it is called with."""

    def __init__(self, name: str, fn: Callable[..., Any], plan: Plan, axes: Axes | None = None) -> None:
        """Nothing is traced before the first call. ``axes``: the dimension of tasks in each argument."""
        self.name, self.fn, self.plan, self.axes = name, fn, plan, axes
        self.compiled: dict[Any, Built | None] = {}
        self.compile_seconds = 0.0
        self.why = ""  # it runs uncompiled

    def __call__(self, *args: Any) -> Any:
        """Run on these trees; compiles first where their shapes are new."""
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
        out = recorder.kernel(built.run, flat) if recorder else built.run(flat)
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


class Prepared(NamedTuple):
    """A function traced on tensors of some shapes and rewritten: what is compiled."""

    traced: Traced
    flat: list[Tensor]
    cost: Cost
    key: str  # among the modules on disk; empty where none are kept


def prepare(fn: Callable[..., Any], flat: list[Tensor], spec: Any) -> Prepared:
    """Trace ``fn`` on tensors like ``flat`` and write its products as they are fastest."""
    traced = trace(fn, flat, spec)
    graph = traced.graph.graph
    flops = cost_of_graph(graph).flops
    as_products(graph, faster_as_product(tree.device(flat)))
    cost = cost_of_graph(graph)._replace(flops=flops)
    multiply_and_sum(graph)
    graph.eliminate_dead_code()
    traced.graph.recompile()
    on_cpu = all(x.device.type == "cpu" for x in [*flat, *traced.constants])
    return Prepared(traced, flat, cost, modules.key_of(traced, flat) if on_cpu else "")


def compile_flat(fn: Callable[..., Any], flat: list[Tensor], spec: Any, axes: list[int | None]) -> Built:
    """Compile ``fn`` for tensors like ``flat``, or find it compiled: on a CPU by our own means, where these do."""
    try:
        with torch.no_grad():
            return Built(*native(fn, flat, spec, axes))
    except Unsupported as why:
        LOG.debug("inductor compiles %s: %s", getattr(fn, "__name__", "a kernel"), why)
    return by_inductor(fn, flat, spec)


def by_inductor(fn: Callable[..., Any], flat: list[Tensor], spec: Any) -> Built:
    """Compile ``fn`` with inductor, or find what it made before."""
    job = prepare(fn, flat, spec)
    call = (modules.load(job.key) if job.key else None) or compile_graph(job)
    constants = job.traced.constants

    def run(inputs: list[Tensor]) -> list[Tensor]:
        inputs += constants  # no copy of the list, so that an input can be freed at its last use
        return call(inputs)

    return Built(run, job.traced.out_spec, job.cost)


def compile_graph(job: Prepared) -> Callable[[list[Tensor]], Any]:
    """Hand a graph to inductor, and keep what it makes."""
    with quiet(), cache_environment(), torch.no_grad():
        from torch._inductor.compile_fx import compile_fx
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        # inductor's caches on disk pass over a graph whose fake tensors know no shape environment
        fake = FakeTensorMode(shape_env=ShapeEnv())
        real = [*job.flat, *job.traced.constants]
        example = [fake.from_tensor(own_copy(x), static_shapes=True) for x in real]
        with settings(), modules.noted() as found:
            compiled: Any = compile_fx(job.traced.graph, example)
    if job.key:
        modules.keep(job.key, found)
    return (modules.load(job.key) if job.key else None) or (lambda inputs: compiled(*inputs))


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """What fmeta asks of inductor, where the user has not chosen.

    Inductor proves that the C++ compiler can build for each instruction set of the processor, which takes 5 of
    the first 13 seconds on two cores. Here the processor is asked and the compiler trusted: should it refuse, the
    kernel does not compile, and that is handled already.

    To choose a loop to vectorise, inductor puts the strides of every access through ``sympy.simplify``, which takes
    half of its time on the graph of a convolutional network. They are sums of products, so expanding does.
    """
    from torch._inductor import config, sizevars

    trusted = config.cpp.vec_isa_ok is None and platform.machine() in ("x86_64", "AMD64", "aarch64", "arm64")
    before = sizevars.sympy
    sizevars.sympy = Expanding()
    try:
        with config.patch({"cpp.vec_isa_ok": True} if trusted else {}):
            yield
    finally:
        sizevars.sympy = before


class Expanding:
    """Sympy, but for ``simplify``."""

    def __getattr__(self, name: str) -> Any:
        """Whatever sympy has."""
        return getattr(sys.modules["sympy"], name)

    @staticmethod
    def simplify(expression: Any) -> Any:
        """The expression as a sum."""
        return expression.expand()


@contextlib.contextmanager
def cache_environment() -> Iterator[None]:
    """Point inductor's on-disk cache to fmeta's folder while a kernel is compiled."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    if before and before != default_cache_dir():  # the user chose; torch itself sets the default
        yield
        return
    os.environ[name] = str(cache_folder())
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name)
        else:
            os.environ[name] = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's remarks about its own internals from the user; errors pass."""
    remarks = logging.getLogger("torch.utils.cpp_extension")  # "No CUDA runtime is found", on any CPU machine
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        remarks.setLevel(level)
