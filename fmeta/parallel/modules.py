"""Kernels that were compiled before, in this process or another, loaded without the compiler.

Inductor writes a kernel as a Python module that calls libraries of C++ code. It keeps both, but to find them again
it must be imported and asked, which takes longer than everything else that a new process does before its first
step. Here they are found by the traced graph, and the module runs with stand-ins for what it imports of inductor.

On a CPU only: modules for a GPU call compilers by themselves.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fmeta.parallel import store
from fmeta.parallel.program import FlatKernel
from fmeta.parallel.trace import Traced

FORMAT = 1
"""Of what is kept; another number makes all kernels be compiled anew."""
LIBRARY = ("mm", "bmm", "addmm", "baddbmm", "convolution")
"""Functions of torch that a module may call as ``extern_kernels``; one that calls others is not kept."""
ENTRY = "kernel"
Call = Callable[[list[Tensor]], Any]


def key_of(traced: Traced, flat: list[Tensor]) -> str:
    """What a compiled graph depends on."""
    like = [(x.shape, x.dtype, x.device) for x in [*flat, *traced.constants]]
    chosen = sorted(
        (k, v) for k, v in os.environ.items() if k.startswith("TORCHINDUCTOR") and "CACHE" not in k
    )
    strict = torch.are_deterministic_algorithms_enabled()
    return store.key_of(FORMAT, str(traced.graph.graph), like, chosen, strict, device=torch.device("cpu"))


@contextmanager
def noted() -> Iterator[list[ModuleType]]:
    """The modules that inductor loads meanwhile."""
    from torch._inductor.codecache import PyCodeCache

    found: list[ModuleType] = []
    load = PyCodeCache.load_by_key_path

    def noting(*args: Any, **kwargs: Any) -> ModuleType:
        found.append(load(*args, **kwargs))
        return found[-1]

    PyCodeCache.load_by_key_path = noting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        PyCodeCache.load_by_key_path = load  # type: ignore[method-assign]


def keep(key: str, modules: list[ModuleType]) -> None:
    """Remember the module of a kernel, if it is one that can be loaded by itself."""
    if len(modules) != 1 or modules[0].__file__ is None:
        return
    module, path = modules[0], pathlib.Path(modules[0].__file__)
    source = path.read_text()
    called = re.findall(r"extern_kernels\.(\w+)", source)
    names = re.findall(r"^(\w+) = async_compile\.cpp_pybinding\(", source, re.MULTILINE)
    others = re.findall(r"async_compile\.(\w+)", source)
    constants = re.findall(r"\b_tensor_constant\w*|\bconstant\d+\b|\btorchbind\w*", source)
    foreign = not set(called) <= set(LIBRARY) or not set(others) <= {"cpp_pybinding", "wait"} or constants
    if foreign or needs(source) - stand_ins([]).keys():
        return
    libraries = [getattr(getattr(module, name), "__self__", None) for name in names]
    files = [getattr(library, "__file__", None) for library in libraries]
    if all(files):
        store.write("modules", key, {"module": str(path), "libraries": files})


def load(key: str) -> Call | None:
    """The kernel of a key; None where it is not there or cannot be loaded, and then it is compiled anew."""
    found = store.read("modules", key)
    try:
        source = pathlib.Path(found["module"]).read_text()
        return run(source, [library(path) for path in found["libraries"]])
    except Exception:
        return None


def library(path: str) -> FlatKernel:
    """The entry point of a library of C++ code, which is an extension module of Python."""
    data_ptr = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(data_ptr)
    name = f"{pathlib.Path(path).name.partition('.')[0]}.{ENTRY}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return getattr(sys.modules[name], ENTRY)


def needs(source: str) -> set[str]:
    """The names that a module imports from inductor and makes use of."""
    lines = re.findall(r"^from torch\._inductor\S* import (.*)$", source, re.MULTILINE)
    names = {part.split(" as ")[-1].strip() for line in lines for part in line.split(",")}
    return {name for name in names if len(re.findall(rf"\b{name}\b", source)) > 1}


def stand_ins(libraries: list[FlatKernel]) -> dict[str, Any]:
    """What a module finds in place of inductor's own; its calls for a compiler get the libraries in turn."""
    rest = iter(libraries)
    compiler = SimpleNamespace(cpp_pybinding=lambda *args: next(rest), wait=lambda names: None)
    check = torch._C._dynamo.guards.assert_size_stride
    return {
        "AsyncCompile": lambda: compiler,
        "extern_kernels": SimpleNamespace(**{name: getattr(torch, name) for name in LIBRARY}),
        "assert_tensor_metadata": lambda x, size, stride, dtype, op: check(x, size, stride, op),
    }


def run(source: str, libraries: list[FlatKernel]) -> Call:
    """The function of a module that inductor wrote, with these libraries."""
    body = re.sub(r"^from torch\._inductor.*$", "", source, flags=re.MULTILINE)
    names = {**stand_ins(libraries), "__name__": "fmeta.kernel"}
    exec(compile(body, "<kernel>", "exec"), names)
    return names["call"]
