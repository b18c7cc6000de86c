"""``fmeta.explain``: flops, bytes and memory against numbers found otherwise, and how it reads."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from problems import EAGER, LOSS, conv_model, model_problem, network, normal, regression_tasks
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fmeta
from fmeta import Plan
from fmeta.parallel.cost import cost_of_graph
from fmeta.parallel.explain import amount, size
from fmeta.parallel.trace import trace
from fmeta.parallel.tune import Choice

PLANS = [
    EAGER,
    Plan(engine="nested"),
    Plan(engine="autograd", tasks="loop"),
    Plan(compile=False, chunk_size=2),
    Plan(compile=False, remat=2),
]


def explained(plan: Plan, steps: int = 3) -> Any:
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=steps)
    return fmeta.explain(algorithm, plan, network(), regression_tasks())


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_flops_are_those_that_torch_counts(plan: Plan) -> None:
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=3)
    function = fmeta.meta_grad(algorithm, plan)
    function(network(), regression_tasks())
    with FlopCounterMode(display=False) as counter:
        function(network(), regression_tasks())
    assert explained(plan).flops == counter.get_total_flops() > 0


def test_convolutions_count_too() -> None:
    found = model_problem(conv_model())
    algorithm = fmeta.maml(fmeta.losses.mse(found.apply), fmeta.sgd(0.1), steps=2)
    examples = fmeta.Batch(normal(3, 4, 1, 4, 4, seed=1), normal(3, 4, 3, seed=2))
    tasks = fmeta.Task(examples, examples)
    # one task after another, since torch counts the gradients of groups as if there were one group
    plan = Plan(tasks="loop", compile=False)
    function = fmeta.meta_grad(algorithm, plan)
    function(found.params, tasks)
    with FlopCounterMode(display=False) as counter:
        function(found.params, tasks)
    one_by_one = fmeta.explain(algorithm, plan, found.params, tasks).flops
    assert one_by_one == counter.get_total_flops()
    # side by side, tasks share what does not depend on them
    assert 0.9 * one_by_one < fmeta.explain(algorithm, EAGER, found.params, tasks).flops <= one_by_one


def test_choices_and_reasons() -> None:
    plain, chunks, blocks, loop = (explained(plan) for plan in (EAGER, PLANS[3], PLANS[4], PLANS[2]))
    assert (plain.compiled, plain.why) == (False, "the plan says compile=False")
    assert (plain.chunk_size, plain.chunks, plain.carries, plain.ranks) == (3, 1, 3, 1)
    assert (chunks.chunk_size, chunks.chunks) == (2, 2)
    assert blocks.remat == 2 and "blocks of 2 steps" in str(blocks)
    assert (loop.chunk_size, loop.chunks, loop.carries) == (1, 3, 0) and "never" in loop.why
    assert plain.carry_bytes == 3 * sum(leaf.nbytes for leaf in network().values())
    assert not plain.kernels and plain.operations > 0 and plain.seconds > 0


def test_how_it_reads() -> None:
    lines = str(explained(EAGER)).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "engine", "compiled", "chunks", "remat", "ranks", "time", "flops", "bytes moved", "peak memory",
        "operations",
    ]  # fmt: skip
    assert lines[2] == "chunks         1 of 3 tasks"
    assert (amount(12), amount(2.5e9), size(12), size(3 * 2**20)) == ("12 ", "2.50 G", "12 B", "3.00 MiB")


@pytest.mark.compiles
def test_kernels_of_a_compiled_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmeta.parallel.run.choose", lambda *args: Choice(3, 3, {3: 1.0}, "as asked"))
    found, plain = explained(Plan(compile=True, chunk_size="auto")), explained(EAGER)
    assert {kernel.name: kernel.calls for kernel in found.kernels}["step"] == 2
    assert found.compiled and found.compile_seconds > 0 and not found.why
    assert found.compiler in ("fmeta", "inductor") and f"yes, by {found.compiler} in" in str(found)
    assert 0 < found.flops <= plain.flops, "a traced graph computes nothing twice and nothing in vain"
    assert found.flops == sum(kernel.calls * kernel.flops for kernel in found.kernels)
    assert all(kernel.seconds > 0 and kernel.moved > 0 for kernel in found.kernels)
    assert max(kernel.peak for kernel in found.kernels) <= found.peak <= plain.peak
    assert "as asked" in found.choice and "as asked" in str(found)
    assert str(found).splitlines()[-len(found.kernels) - 1].split()[:2] == ["kernel", "calls"]


def test_a_kernel_that_did_not_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmeta.parallel.kernels.TESTED", ("1.0",))
    monkeypatch.setattr("fmeta.parallel.kernels.told", set())
    with pytest.warns(fmeta.MetaLearningWarning, match="not among the releases"):
        found = explained(Plan())
    assert not found.compiled and "not among the releases" in found.why


def test_it_refuses_a_call_that_is_differentiated() -> None:
    meta = {name: leaf.requires_grad_() for name, leaf in network().items()}
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=1)
    with pytest.raises(ValueError, match=r"explain: expected a plain call, got one inside"):
        fmeta.explain(algorithm, EAGER, meta, regression_tasks())


def peak_of_graph(fn: Any, *inputs: Tensor) -> int:
    flat, spec = torch.utils._pytree.tree_flatten(inputs)
    return cost_of_graph(trace(fn, flat, spec).graph.graph).peak


def test_fused_work_takes_no_memory_and_products_do() -> None:
    x, w, one = torch.randn(100, 100), torch.randn(100, 100), 40_000
    assert peak_of_graph(lambda x: (x.tanh() + x.sin()).sum(), x) == 4
    assert peak_of_graph(lambda x, w: (x @ w).tanh().sum(), x, w) == one + 4
    assert peak_of_graph(lambda x, w: ((x @ w).tanh() @ w).sum(), x, w) == 2 * one
    assert peak_of_graph(lambda x, w: (x @ w, (x @ w).t(), x.expand(5, 100, 100).sum()), x, w) == one + 4
    assert peak_of_graph(lambda x: x.unbind(0)[3].view(10, 10), x) == 0


MEASURED = """
import ctypes, sys, threading, time, torch, fmeta
ctypes.CDLL("libc.so.6").mallopt(-3, 65536)  # what is freed leaves the process at once
torch.set_num_threads(1)
apply, params = fmeta.functionalize(fmeta.models.mlp([1, 64, 64, 1]))
shape = {"tasks": 16, "shots": 1000} if sys.argv[1] == "uncompiled" else {"tasks": 4, "shots": 8000}
tasks = fmeta.tasks.sinusoid(**shape, queries=shape["shots"])(0, 0)
algorithm = fmeta.maml(fmeta.losses.mse(apply), fmeta.sgd(0.01), steps=2)
plan = fmeta.Plan(compile=sys.argv[1] == "compiled")
def elsewhere(call):
    # a thread takes with it what its kernels keep from call to call
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    time.sleep(0.5)  # it is gone a little later than Python says
    return found[0]
predicted = elsewhere(lambda: fmeta.explain(algorithm, plan, params, tasks)).peak
def resident(name):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))
function = fmeta.meta_grad(algorithm, plan)
elsewhere(lambda: function(params, tasks) and None)
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark starts anew
elsewhere(lambda: function(params, tasks) and None)
print(predicted, resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("how", ["uncompiled", "compiled"])
def test_predicted_memory_is_what_a_process_takes(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED, how], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    predicted, measured = map(int, done.stdout.split())
    assert abs(predicted / measured - 1) < 0.25, f"predicted {predicted}, measured {measured}"
