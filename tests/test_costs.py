"""What a meta-gradient costs: evaluations of the loss, and bytes alive at once."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from problems import network, normal, regression_tasks, squared_error
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

import fmeta
from fmeta import Batch, Plan, Task


def evaluations(steps: int, adjoint: fmeta.Adjoint, **plan: Any) -> int:
    """How often the loss of one task is evaluated by an eager call after the first."""
    calls: list[None] = []

    def counted(params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        calls.append(None)
        return squared_error(params, tuple(batch)), {}

    algorithm = fmeta.maml(counted, fmeta.sgd(0.2), steps=steps, adjoint=adjoint)
    function = fmeta.meta_grad(algorithm, Plan(compile=False, **plan))
    function(network(), regression_tasks())
    calls.clear()
    function(network(), regression_tasks())
    return len(calls)


@pytest.mark.parametrize("steps", [1, 4])
def test_first_order_never_runs_the_loop_backward(steps: int) -> None:
    assert evaluations(steps, fmeta.first_order()) == steps + 1


@pytest.mark.parametrize("steps", [1, 4])
def test_an_exact_step_costs_three_evaluations(steps: int) -> None:
    """One forward; in the backward loop one for the gradient and one for the Hessian-vector product."""
    assert evaluations(steps, fmeta.unroll()) == 3 * steps + 1


def test_truncation_costs_only_what_it_keeps() -> None:
    assert evaluations(6, fmeta.truncated(2)) <= 6 + 2 * 2 + 1


@pytest.mark.parametrize("remat", [1, 2, 3])
def test_recomputation_costs_at_most_one_more_forward_loop(remat: int) -> None:
    plain, block = evaluations(9, fmeta.unroll()), evaluations(9, fmeta.unroll(), remat=remat)
    assert plain <= block <= plain + 9


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self.seen:
                storage = leaf.untyped_storage()
                self.seen[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def drop(self, size: int) -> None:
        self.now -= size


def peak(steps: int, *, width: int, shots: int, **plan: Any) -> int:
    """Bytes at the peak of a linear-tanh model with ``width`` weights on ``shots`` examples, two tasks."""

    def loss(params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return (torch.tanh(batch.x * params["w"].mean()) - batch.y).square().mean(), {}

    examples = Batch(normal(2, shots, seed=1), normal(2, shots, seed=2))
    algorithm = fmeta.maml(loss, fmeta.sgd(0.1), steps=steps)
    function = fmeta.meta_grad(algorithm, Plan(compile=False, **plan))
    meta, tasks = {"w": normal(width, seed=3)}, Task(examples, examples)
    function(meta, tasks)
    with LiveBytes() as live:
        function(meta, tasks)
    return live.peak


def test_activations_of_one_step_only_are_alive() -> None:
    """Where activations dominate, the adjoint engine's memory does not grow with steps; the nested one's does."""
    few, many = (peak(steps, width=8, shots=4096) for steps in (2, 16))
    assert many <= 1.05 * few
    few, many = (peak(steps, width=8, shots=4096, engine="nested") for steps in (2, 16))
    assert many >= 4 * few


def test_recomputation_keeps_a_block_and_the_starts_of_the_others() -> None:
    """Where carries dominate: sixteen of them, or about four and four."""
    carry = 2 * 4096 * 8  # two tasks in float64
    whole, blocks = (peak(16, width=4096, shots=4, remat=remat) for remat in (None, 4))
    assert whole - blocks >= 6 * carry
