"""Kernels kept on disk: loaded in later processes without the compiler, and only where they are whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_trees_close
from problems import EAGER, LOSS, network, regression_tasks

import fmeta
from fmeta import Plan
from fmeta.parallel import inductor, modules
from fmeta.parallel.trace import trace

ALGORITHM = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=1)
ALWAYS = Plan(compile=True)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the kernels of one meta-gradient."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMETA_CACHE", str(folder))
        patch.setenv("FMETA_COMPILER", "inductor")
        fmeta.meta_grad(ALGORITHM, ALWAYS)(network(), regression_tasks())
    return folder


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "kernels" / "modules").glob("*.json"))


@pytest.mark.compiles
def test_the_compiler_is_not_asked_again(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMETA_CACHE", str(filled))
    monkeypatch.setenv("FMETA_COMPILER", "inductor")
    monkeypatch.setattr(inductor, "compile_graph", lambda job: pytest.fail("compiled again"))
    torch.use_deterministic_algorithms(False)  # as when the cache was filled
    got = fmeta.meta_grad(ALGORITHM, ALWAYS)(network(), regression_tasks())
    assert_trees_close(got, fmeta.meta_grad(ALGORITHM, EAGER)(network(), regression_tasks()), 1e-12)


LATER = """
import sys
import torch
torch.manual_seed(0)
from problems import LOSS, network, regression_tasks
import fmeta
algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=1)
grads, _ = fmeta.meta_grad(algorithm, fmeta.Plan(compile=True))(network(), regression_tasks())
print("torch._inductor.compile_fx" in sys.modules, sum(g.sum().item() for g in grads.values()))
"""


@pytest.mark.compiles
def test_a_later_process_does_not_import_the_compiler(filled: Path) -> None:
    environment = {
        **os.environ,
        "FMETA_CACHE": str(filled),
        "FMETA_COMPILER": "inductor",
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    told = subprocess.run(
        [sys.executable, "-c", LATER],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.split()
    grads, _ = fmeta.meta_grad(ALGORITHM, EAGER)(network(), regression_tasks())
    assert told[0] == "False"
    assert float(told[1]) == pytest.approx(sum(g.sum().item() for g in grads.values()), rel=1e-9)


@pytest.mark.compiles
@pytest.mark.parametrize("damage", ["no library", "no module", "not JSON", "other JSON"])
def test_what_is_not_whole_is_not_loaded(damage: str, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMETA_CACHE", str(filled))
    file = kept(filled)[0]
    whole = file.read_text()
    found: dict[str, Any] = json.loads(whole)
    broken = {
        "no library": json.dumps({**found, "libraries": ["/nowhere/k.so"]}),
        "no module": json.dumps({**found, "module": "/nowhere/k.py"}),
        "not JSON": whole[:-5],
        "other JSON": "[1]",
    }[damage]
    try:
        file.write_text(broken)
        assert modules.load(file.stem) is None
        file.write_text(whole)
        assert modules.load(file.stem) is not None
    finally:
        file.write_text(whole)


SOURCE = """
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.somewhere import helper as tool
async_compile = AsyncCompile()
first = async_compile.cpp_pybinding(["float*"], '''code''')
async_compile.wait(globals())
def call(args):
    return (extern_kernels.mm(args[0], args[1]), first(args[0]))
"""


def test_a_module_runs_with_stand_ins() -> None:
    x = torch.randn(3, 3)
    product, doubled = modules.run(SOURCE, [lambda x: 2 * x])([x, x])
    torch.testing.assert_close(product, x @ x)
    torch.testing.assert_close(doubled, 2 * x)


def test_only_what_can_stand_alone_is_kept() -> None:
    assert modules.needs(SOURCE) == {"AsyncCompile", "extern_kernels"}
    assert modules.needs(SOURCE + "tool()") - modules.stand_ins([]).keys() == {"tool"}


def test_graphs_and_settings_have_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(fn: Any, *flat: torch.Tensor) -> str:
        leaves, spec = torch.utils._pytree.tree_flatten(flat)
        return modules.key_of(trace(fn, leaves, spec), leaves)

    x = torch.randn(2)
    plain = key(lambda x: x + 1, x)
    assert plain == key(lambda x: x + 1, torch.randn(2))
    others = [key(lambda x: x + 2, x), key(lambda x: x + 1, x.double()), key(lambda x: x + 1, torch.randn(3))]
    monkeypatch.setenv("TORCHINDUCTOR_FREEZING", "1")
    others.append(key(lambda x: x + 1, x))
    assert len({plain, *others}) == 5
