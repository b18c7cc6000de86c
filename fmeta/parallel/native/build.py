"""From a function to a kernel in a library: generated, compiled once, found on disk by later processes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta.parallel import store
from fmeta.parallel.cost import Built, Cost
from fmeta.parallel.native import (
    arithmetic,
    convolutions,
    indexing,
    pooling,
    products,
    reductions,
    solvers,
    strided,
    views,
)
from fmeta.parallel.native.axis import one_task
from fmeta.parallel.native.emit import Emitter
from fmeta.parallel.native.ir import NAMES, Unsupported
from fmeta.parallel.native.lower import Lowering
from fmeta.parallel.native.memory import BYTES
from fmeta.parallel.native.schedule import Plan

PARTS = (views, arithmetic, reductions, indexing, products, convolutions, pooling, solvers, strided)
RULES: dict[str, Any] = {name: rule for part in PARTS for name, rule in part.RULES.items()}
FLAGS = (
    "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic",  # -O3 takes half as long again, and gains nothing
    "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-w",
)  # fmt: skip
POOL = ThreadPoolExecutor(1)
HERE = pathlib.Path(__file__).parent


def compiles_itself(device: torch.device) -> bool:
    """Whether kernels for a device are our own: on a CPU with a C++ compiler.

    ``FMETA_COMPILER=inductor`` in the environment leaves everything to inductor.
    """
    wanted = os.environ.get("FMETA_COMPILER") != "inductor"
    return wanted and device.type == "cpu" and compiler() is not None


def native(
    fn: Callable[..., Any], flat: list[Tensor], spec: Any, axes: list[int | None], apart: Collection[int] = ()
) -> Built:
    """Compile ``fn`` for tensors like ``flat`` and any number of tasks; raises ``Unsupported``.

    ``apart``: numbers of the arguments, results counted on, that come as ``Rows``.
    """
    if not all(compiles_itself(x.device) for x in flat):
        raise Unsupported("not on a CPU, no C++ compiler, or not wanted")
    tasks = next((x.shape[axis] for x, axis in zip(flat, axes, strict=True) if axis is not None), None)
    if tasks is not None and 2 * tasks < torch.get_num_threads():
        raise Unsupported("too few tasks for this many threads")
    for number in {NAMES[x.dtype] for x in flat if x.dtype in (torch.float32, torch.float64)}:
        ahead(number)
    graph = one_task(fn, flat, spec, axes)
    try:
        low = Lowering(graph, RULES).run()
        emitter = Emitter(low, apart)
        text = emitter.text()
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Unsupported("an operation with arguments that are not known") from error
    run = caller(library(text), low, graph.constants)
    return Built(run, graph.out_spec, cost_of(low, emitter.plan, tasks or 1), "fmeta", run)


def cost_of(low: Lowering, plan: Plan, tasks: int) -> Cost:
    """The cost of a call with so many tasks."""
    tensors = [*low.arguments, *(b for b, _ in low.results)]
    sizes = [b.size * BYTES[NAMES[b.dtype]] * (tasks if b.scope == "task" else 1) for b in tensors]
    out = sum(sizes[len(low.arguments) :])
    scratch = plan.shared_bytes + plan.persist_bytes * tasks
    each = torch.get_num_threads() * (plan.task_bytes + plan.partial_bytes)
    flops = low.flops["shared"] + tasks * low.flops["task"]
    return Cost(flops, sum(sizes), out + scratch + each)


@functools.cache
def compiler() -> str | None:
    """The C++ compiler, ``$CXX`` or the first that is found."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def machine_flags() -> tuple[str, ...]:
    """What depends on the processor and the system."""
    native_to = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    return (native_to,) if platform.system() == "Darwin" else (native_to, "-fopenmp")


@functools.cache
def library(text: str) -> Any:
    """The kernel of a text."""
    calls = "product(" in text or "transpose(" in text
    objects = [str(ahead(name).result()) for name in ("float", "double") if calls and name in text]
    path = made("kernel.cpp", text, ".so", ["-shared", *objects])
    kernel = ctypes.CDLL(str(path)).kernel
    kernel.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    kernel.restype = ctypes.c_int
    return kernel


@functools.cache
def ahead(number: str) -> Future[pathlib.Path]:
    """The products for a type of numbers, being compiled while the first function is traced."""
    return POOL.submit(products_object, number)


def products_object(number: str) -> pathlib.Path:
    """The products of ``products.cpp``, compiled once for a machine."""
    text = (HERE / "products.cpp").read_text()
    return made("products.cpp", f"#define FM_{number.upper()}\n{text}", ".o", ["-c"])


def made(name: str, text: str, ending: str, how: list[str]) -> pathlib.Path:
    """What a compiler makes of a text, from the cache where it is there."""
    command = [str(compiler()), *FLAGS, *machine_flags()]
    headers = [path.read_text() for path in sorted(HERE.glob("*.h"))]
    told = "\0".join([text, *headers, *command, *how, processor(), torch.__version__])
    path = store.cache_folder() / "native" / (hashlib.sha256(told.encode()).hexdigest()[:32] + ending)
    if not path.exists():
        build(name, text, [*command, f"-I{HERE}"], how, path)
    return path


@functools.cache
def processor() -> str:
    """What ``-march=native`` means here."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next((x for x in lines if x.startswith(("flags", "Features"))), "") + platform.machine()
    except OSError:
        return platform.machine() + platform.processor()


def build(name: str, text: str, command: list[str], how: list[str], path: pathlib.Path) -> None:
    """Compile into the cache; another process may do the same at the same time.

    ``FMETA_KEEP_SOURCES=1`` in the environment keeps the C++ beside the library, for those who debug it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, result = pathlib.Path(folder) / name, pathlib.Path(folder) / "result"
        source.write_text(text)
        if os.environ.get("FMETA_KEEP_SOURCES"):
            shutil.copy(source, path.with_suffix(".cpp"))
        line = [*command, str(source), *how, "-o", str(result)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unsupported(f"the C++ compiler failed: {done.stderr.strip().splitlines()[:1]}")
        result.replace(path)


class Result(NamedTuple):
    """How to make room for a result."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # of one task
    axis: int | None


def caller(kernel: Any, low: Lowering, constants: list[Tensor]) -> Any:
    """A function of a list of tensors around a kernel."""
    pairs = zip(low.results, low.graph.outputs, strict=True)
    results = [Result(b.dtype, op.shape, op.axis) for (b, _), op in pairs]
    moved = [(i, op.axis) for i, op in enumerate(low.graph.inputs) if op.axis]
    turned = [(i, r.axis) for i, r in enumerate(results) if r.axis]
    with_tasks = [(i, op.shape[op.axis]) for i, op in enumerate(low.graph.inputs) if op.axis is not None]
    index, size = with_tasks[0] if with_tasks else (0, 0)
    pointers = ctypes.c_void_p * (len(low.graph.inputs) + len(results))
    rooms: dict[int, list[tuple[tuple[int, ...], torch.dtype]]] = {}

    def run(inputs: list[Tensor], into: Sequence[Tensor | None] = ()) -> list[Tensor]:
        inputs = [*inputs, *[x.contiguous() for x in constants]]
        for i, axis in moved:
            inputs[i] = inputs[i].movedim(axis, 0).contiguous()
        tasks = inputs[index].shape[0] // size if size else 1  # tasks are outermost by now
        if tasks not in rooms:
            rooms[tasks] = [(shape_of(r, tasks), r.dtype) for r in results]
        outs = [
            room
            if room is not None and (room.shape, room.dtype) == like
            else torch.empty(like[0], dtype=like[1])
            for room, like in itertools.zip_longest(into, rooms[tasks])
        ]
        given = pointers(*[x.data_ptr() for x in inputs], *[x.data_ptr() for x in outs])
        bad = kernel(given, tasks, torch.get_num_threads())
        if bad >= 2:
            raise RuntimeError("kernel: expected memory for the numbers of a task, can't allocate memory")
        if bad:
            raise IndexError("kernel: expected indices within their tensors, got one that is out of bounds")
        for i, axis in turned:
            outs[i] = outs[i].movedim(0, axis)
        return outs

    return run


def shape_of(r: Result, tasks: int) -> tuple[int, ...]:
    """The shape of a result, tasks first."""
    if r.axis is None:
        return r.shape
    return (tasks * r.shape[r.axis], *r.shape[: r.axis], *r.shape[r.axis + 1 :])
