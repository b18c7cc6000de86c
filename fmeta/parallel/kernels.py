"""Compiled kernels: a pure function of tensors, traced to ATen once per shape and handed to inductor.

Tracing with make_fx before compiling, and calling inductor without dynamo, makes cold compiles shorter,
lets the on-disk cache work across processes, and takes about 0.1 ms off every call. The price is that
nothing guards a kernel but the key below, so whatever may change from call to call must reach a kernel as
a tensor (the inner step index among it), and every closure must be pure.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fmeta import tree
from fmeta.functional import differentiable
from fmeta.types import MetaLearningWarning, Plan

TESTED = ("2.14",)  # the torch releases whose private compiler entry points this file was tested with
told: set[str] = set()


class CannotCompile(Exception):
    """Why a function runs uncompiled; becomes a warning or an error according to ``Plan.compile``."""


def cache_folder() -> pathlib.Path:
    """Where compiled kernels are kept: ``$FMETA_CACHE``, else the user's cache directory."""
    base = os.environ.get("FMETA_CACHE")
    if base:
        return pathlib.Path(base) / "kernels"
    return (
        pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "fmeta" / "kernels"
    )


class Kernel:
    """One function of pytrees of tensors, compiled once for every combination of shapes it is called with."""

    def __init__(self, name: str, fn: Callable[..., Any], plan: Plan) -> None:
        """Nothing is traced before the first call."""
        self.name, self.fn, self.plan = name, fn, plan
        self.compiled: dict[Any, Callable[..., Any]] = {}
        self.compile_seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        """Run on these trees; compiles first where their shapes are new."""
        flat, spec = tree.flatten(args)
        flat = [x.contiguous() for x in flat]  # a kernel is compiled for one layout
        key = (spec, *((x.shape, x.dtype, x.device) for x in flat))
        run = self.compiled.get(key)
        if run is None:
            run = self.compiled[key] = self.build(flat, spec)
        return run(args, flat)

    def build(self, flat: list[Tensor], spec: Any) -> Callable[..., Any]:
        """Compile for the shapes of ``flat``, or fall back to the plain function and say so once."""
        begin = time.perf_counter()
        try:
            why = reason_not_to_compile()
            if why:
                raise CannotCompile(why)
            kernel, out_spec = compile_flat(self.fn, flat, spec)
        except Exception as error:
            if self.plan.compile is True:
                raise RuntimeError(
                    f"compile=True: the {self.name} kernel must compile, got {first_line(error)}. "
                    'Use compile="auto" to run it uncompiled.'
                ) from error
            warn_once(f"fmeta runs uncompiled: {first_line(error)}", self.name)
            return lambda args, flat: self.fn(*args)
        self.compile_seconds += time.perf_counter() - begin
        return lambda args, flat: tree.unflatten(kernel(flat), out_spec)


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


def compile_flat(
    fn: Callable[..., Any], flat: list[Tensor], spec: Any
) -> tuple[Callable[..., list[Tensor]], Any]:
    """Trace ``fn`` on tensors like ``flat`` and compile the graph; returns the kernel and its output structure."""
    graph, out_spec, constants = trace(fn, flat, spec)
    with quiet(), cache_environment(), torch.no_grad():
        from torch._inductor.compile_fx import compile_fx
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        # inductor's caches on disk pass over a graph whose fake tensors know no shape environment
        fake = FakeTensorMode(shape_env=ShapeEnv())
        example = [fake.from_tensor(own_copy(x), static_shapes=True) for x in [*flat, *constants]]
        compiled: Any = compile_fx(graph, example)
    return (lambda inputs: compiled(*inputs, *constants)), out_spec


def trace(fn: Callable[..., Any], flat: list[Tensor], spec: Any) -> tuple[fx.GraphModule, Any, list[Tensor]]:
    """``fn`` as an ATen graph of flat tensors; tensors it had captured become inputs, returned as the last."""
    from torch._functorch.compile_utils import (
        fx_graph_cse,
    )  # late: this part of torch takes seconds to import
    from torch.fx.experimental.proxy_tensor import make_fx

    structure: list[Any] = []

    def of_leaves(*leaves: Tensor) -> list[Tensor]:
        with differentiable():
            out, out_spec = tree.flatten(fn(*tree.unflatten(list(leaves), spec)))
        structure[:] = [out_spec]
        return out

    # Real mode: fake tensors break the forward derivative of convolutions in 2.14. It takes two inputs that
    # are one tensor object for a single input, silently, so every example is a copy of its own.
    with torch.no_grad(), quiet():
        graph = make_fx(of_leaves, tracing_mode="real")(*[own_copy(x) for x in flat])
    graph.graph.eliminate_dead_code()
    graph = fx.GraphModule(graph, fx_graph_cse(graph.graph))
    constants = lift_constants(graph)
    graph.recompile()
    return graph, structure[0], constants


def own_copy(x: Tensor) -> Tensor:
    """A copy that shares nothing with the original."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def lift_constants(graph: fx.GraphModule) -> list[Tensor]:
    """Turn captured tensors (buffers, a user's rate tensor) into inputs, so that they stay references."""
    constants: list[Tensor] = []
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    anchor = inputs[-1] if inputs else next(iter(graph.graph.nodes))
    lifted: dict[int, fx.Node] = {}
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        value = graph
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor):
            continue
        if id(value) not in lifted:
            with graph.graph.inserting_after(anchor):
                anchor = lifted[id(value)] = graph.graph.placeholder(f"constant_{len(constants)}")
            anchor.meta["val"] = value
            constants.append(value)
        node.replace_all_uses_with(lifted[id(value)])
        graph.graph.erase_node(node)
    return constants


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
