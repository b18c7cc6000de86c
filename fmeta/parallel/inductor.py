"""Kernels by inductor: on a GPU, and on a CPU for what our own code does not know.

A traced graph goes to inductor without dynamo, which makes calls cheaper, and gives a kernel a name on disk by
which later processes find it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import tree
from fmeta.parallel import modules
from fmeta.parallel.convolutions import as_products
from fmeta.parallel.cost import Built, Cost, cost_of_graph
from fmeta.parallel.faster import faster_as_product
from fmeta.parallel.rewrite import multiply_and_sum
from fmeta.parallel.store import cache_folder
from fmeta.parallel.trace import Traced, own_copy, trace


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


def by_inductor(fn: Callable[..., Any], flat: list[Tensor], spec: Any) -> Built:
    """Compile ``fn`` with inductor, or find what it made before."""
    job = prepare(fn, flat, spec)
    call = (modules.load(job.key) if job.key else None) or compile_graph(job)
    constants = job.traced.constants

    def run(inputs: list[Tensor]) -> list[Tensor]:
        inputs += constants  # no copy of the list, so that an input can be freed at its last use
        return call(inputs)

    return Built(run, job.traced.out_spec, job.cost, "inductor")


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
