"""Recording: what a call did is replayed from the third call on, with today's tensors and the same numbers."""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import assert_trees_close, assert_trees_equal
from torch import Tensor
from torch.utils import _pytree as pytree

import fmeta
from fmeta import tree
from fmeta.parallel import cuda
from fmeta.parallel.forms import form_of, put_together
from fmeta.parallel.program import Program, Recorder
from fmeta.parallel.replay import Replay
from fmeta.parallel.rewrite import multiply_and_sum
from fmeta.parallel.trace import trace


class Counted:
    """A function that counts its plain calls."""

    def __init__(self, fn: Any) -> None:
        self.fn, self.calls = fn, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.fn(*args)


def mixed(state: dict[str, Tensor], x: Tensor) -> Any:
    """Operations of every form: lists, several results, keywords, views, writing in place, None."""
    top, bottom = x.split(2)
    values, index = torch.cat([top, bottom * state["w"]]).sort(dim=0, descending=True)
    room = torch.zeros(4, 3, dtype=x.dtype)
    room[1:3] = top
    _, slope, _ = torch.ops.aten.native_layer_norm_backward(
        x, x, [3], x.mean(1, keepdim=True), x.std(1, keepdim=True), state["w"], None, [False, True, False]
    )
    return {
        "values": values,
        "index": index,
        "room": room + x.new_ones(()),
        "slope": slope,
        "kept": state["w"],
    }


def arguments(seed: int) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(seed)
    return {"w": torch.randn(3)}, torch.randn(4, 3)


def test_third_call_is_replayed_with_the_same_numbers() -> None:
    counted = Counted(mixed)
    replay = Replay(counted, wanted=True)
    for seed in range(5):
        args = arguments(seed)
        assert_trees_equal(replay(*args), mixed(*args))
    assert counted.calls == 2


def test_one_tensor_passed_twice_is_two_arguments() -> None:
    counted = Counted(lambda a, b: a - 2 * b)
    replay, x = Replay(counted, wanted=True), torch.ones(3)
    for _ in range(2):
        replay(x, x)
    assert_trees_equal(replay(x, 3 * x), -5 * x)
    assert counted.calls == 2


def test_other_shapes_and_grad_modes_are_recorded_apart() -> None:
    counted = Counted(lambda x: x.sum(0) * len(x))
    replay = Replay(counted, wanted=True)
    for rows in (2, 3):
        for _ in range(4):
            assert_trees_equal(replay(torch.ones(rows, 2)), torch.full((2,), float(rows**2)))
    with torch.no_grad():
        replay(torch.ones(2, 2))
    assert counted.calls == 5


def test_what_cannot_be_replayed_runs_as_it_is() -> None:
    captured = torch.ones(2)
    counted = Counted(lambda x: x * captured)
    replay, x = Replay(counted, wanted=True), torch.ones(2)
    for value in range(4):
        captured.fill_(value)
        assert_trees_equal(replay(x), x * value)
    assert counted.calls == 4
    watched = x.clone().requires_grad_()
    assert replay(watched).requires_grad
    assert_trees_equal(torch.func.vmap(replay)(torch.ones(3, 2)), torch.full((3, 2), 3.0))
    assert Replay(counted, wanted=False)(x) is not None and counted.calls == 7


def test_a_function_that_fails_while_recorded_leaves_nothing_behind() -> None:
    fails = [False]

    def fn(x: Tensor) -> Tensor:
        if fails[0]:
            raise ValueError("no")
        return x + 1

    replay, x = Replay(fn, wanted=True), torch.ones(2)
    replay(x)
    fails[0] = True
    with pytest.raises(ValueError, match="no"):
        replay(x)
    assert Recorder.active is None
    fails[0] = False
    for _ in range(2):
        assert_trees_equal(replay(x), x + 1)


def test_registers_are_freed_at_their_last_use() -> None:
    def chain(x: Tensor) -> Tensor:
        for _ in range(50):
            x = x * 2
        return x

    replay = Replay(chain, wanted=True)
    for _ in range(2):
        replay(torch.ones(1))
    (program,) = replay.calls.values()
    assert isinstance(program, Program)
    alive, most = 1, 0
    for instruction in program.instructions:
        alive += len(instruction.outputs)
        most = max(most, alive)
        alive -= len(instruction.free)
    assert most <= 3


@pytest.mark.parametrize("small", [0, 10**9])
def test_traced_graph_computes_the_function(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmeta.parallel.rewrite.SMALL", small)
    bias, batched = torch.randn(5).double(), torch.randn(2, 3, 4).double()

    def fn(x: Tensor, w: Tensor) -> dict[str, Tensor]:
        twice = (x @ w) + (x @ w)
        return {
            "mm": twice,
            "addmm": torch.addmm(bias, x, w),
            "bmm": batched @ w,
            "baddbmm": torch.baddbmm(batched[..., :1], batched, w.expand(2, 4, 5)),
            "hessian": torch.func.vmap(torch.func.hessian(lambda r: ((r @ w) ** 3).sum()))(x),
        }

    args = (torch.randn(3, 4).double(), torch.randn(4, 5).double())
    flat, spec = tree.flatten(args)
    traced = trace(fn, flat, spec)
    multiply_and_sum(traced.graph.graph)
    traced.graph.recompile()
    assert any("mm" in str(n.target) for n in traced.graph.graph.nodes) == (small == 0)
    other = tree.map(torch.randn_like, args)
    found = traced.graph(*tree.leaves(other), *traced.constants)
    torch.testing.assert_close(tree.unflatten(found, traced.out_spec), fn(*other), rtol=1e-12, atol=1e-12)


def test_captured_tensors_of_a_graph_are_references_and_equal_values_are_computed_once() -> None:
    captured = torch.ones(3)
    flat, spec = tree.flatten((torch.ones(3),))
    traced = trace(lambda x: (x.exp() + captured, x.exp() * 1, x.exp() * 1.0, captured), flat, spec)
    assert traced.constants[0] is captured and len(traced.constants) == 1
    targets = [str(node.target) for node in traced.graph.graph.nodes]
    assert targets.count("aten.exp.default") == 1
    assert targets.count("aten.mul.Tensor") == 2
    captured.fill_(5.0)
    assert_trees_equal(traced.graph(torch.zeros(3), captured)[0], torch.full((3,), 6.0))


def recorded(fn: Any, *flat: Tensor) -> Program:
    inputs = list(flat)
    with Recorder(inputs) as recorder:
        result = fn(*inputs)
    program = recorder.program(result)
    assert program is not None
    return program


def test_on_a_cpu_nothing_is_captured() -> None:
    program = recorded(lambda x: x + 1, torch.ones(2))
    assert cuda.graphed(program, [torch.ones(2)]) is program
    assert cuda.graphed(program, []) is program


def test_what_cannot_be_captured_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*args: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda, "Graphed", refuses)
    program = recorded(lambda x: x + 1, torch.ones(2))
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), nbytes=8)
    with caplog.at_level(logging.INFO, "fmeta"):
        assert cuda.graphed(program, [on_gpu]) is program
    assert caplog.messages == ["no CUDA graph: operation not permitted when stream is capturing"]
    monkeypatch.setattr(cuda, "LARGEST", 4)
    monkeypatch.setattr(cuda, "Graphed", lambda *args: pytest.fail("too large to be captured"))
    assert cuda.graphed(program, [on_gpu]) is program


@pytest.mark.gpu
@pytest.mark.compiles
def test_a_meta_step_on_a_gpu_is_one_graph() -> None:
    apply, params = fmeta.functionalize(fmeta.models.mlp([1, 8, 1]).cuda())
    algorithm = fmeta.maml(fmeta.losses.mse(apply), fmeta.sgd(0.01), steps=2)
    outer = fmeta.adam(1e-3)
    sampler = fmeta.tasks.sinusoid(tasks=4, shots=5, queries=5, device="cuda")
    step = fmeta.meta_step(algorithm, outer)
    plain = fmeta.meta_step(algorithm, outer, fmeta.Plan(compile=False))
    states = [fmeta.meta_init(algorithm, outer, params)] * 2
    for i in range(5):
        states = [fn(state, sampler(0, i))[0] for fn, state in zip((step, plain), states, strict=True)]
    (how,) = step.calls.values()  # type: ignore[attr-defined]
    assert isinstance(how, cuda.Graphed)
    assert_trees_close(states[0].meta, states[1].meta, 1e-4)


def test_a_kernel_may_free_its_inputs() -> None:
    """A register that nobody reads after a kernel is the kernel's own."""
    alive: list[int] = []
    kinds: list[Any] = []

    def kernel(flat: list[Tensor]) -> list[Tensor]:
        kinds.extend(weakref.ref(x) for x in flat)
        out = [flat[0] * 2]
        flat.clear()
        alive.append(sum(kind() is not None for kind in kinds))
        return out

    x = torch.ones(3)
    with Recorder([x]) as recorder:
        (y,) = recorder.kernel(kernel, [x])
        (z,) = recorder.kernel(kernel, [y])
    program = recorder.program(z)
    del y
    kinds.clear()
    alive.clear()
    assert program is not None
    torch.testing.assert_close(program([x]), 4 * x)
    assert alive == [1, 1], "x is the caller's; what the first kernel made is gone inside the second"


class Pair(NamedTuple):
    first: Any
    second: Any


def test_plain_trees_are_taken_apart_as_pytrees_are() -> None:
    a, b, c, d = torch.zeros(4, 1).unbind()
    value = ({"z": a, "a": [b]}, Pair(c, (d,)), (), {})
    found = form_of(value)
    assert found is not None
    leaves, form = found
    assert [x is y for x, y in zip(leaves, pytree.tree_leaves(value), strict=True)] == [True] * 4
    assert put_together(form, iter(leaves)) == value
    assert type(put_together(form, iter(leaves))[1]) is Pair
    assert form != form_of(({"a": a, "z": [b]}, Pair(c, (d,)), (), {}))[1]  # type: ignore[index]
    for other in (OrderedDict(x=a), {"x": None}, {"x": 1.0}):
        assert form_of(other) is None
