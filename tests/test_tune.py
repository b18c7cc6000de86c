"""``Plan(chunk_size="auto")``: which sizes are timed, what is chosen, remembered and said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_trees_close
from problems import EAGER, LOSS, network, regression_tasks
from torch import Tensor

import fmeta
from fmeta import Plan
from fmeta.parallel import run as running
from fmeta.parallel import store, tune
from fmeta.parallel.tune import Choice, choose, part_near

CPU = torch.device("cpu")


class Clockwork:
    """A call that takes what a table says, on a clock of its own; ``room`` is the size that memory allows."""

    def __init__(self, seconds: Callable[[int], float], room: int = 10**9) -> None:
        self.seconds, self.room, self.now = seconds, room, 0.0
        self.sizes: list[int] = []

    def __call__(self, size: int) -> int:
        size = min(size, self.room)
        if size not in self.sizes:
            self.sizes.append(size)
        self.now += self.seconds(size)
        return size

    def clock(self, device: torch.device) -> float:
        return self.now


def chosen(monkeypatch: pytest.MonkeyPatch, work: Clockwork, tasks: int) -> Choice:
    monkeypatch.setattr(tune, "clock", work.clock)
    return choose(work, tasks, tasks, lambda value: value, CPU)


@pytest.mark.parametrize(
    ("seconds", "sizes", "best"),
    [
        (lambda size: 0.02, [64], 64),  # too short to matter
        (lambda size: 0.1 + size / 100, [64, 16, 4], 4),  # the smaller the better
        (lambda size: 2.0 - size / 64, [64, 16], 64),  # a quarter is hopeless
        (lambda size: {64: 1.0, 16: 1.1, 32: 0.8}[size], [64, 16, 32], 32),
        (lambda size: {64: 1.0, 16: 0.98, 32: 0.98}[size], [64, 16, 32], 64),  # no real difference
    ],
)
def test_few_sizes_are_tried(
    seconds: Callable[[int], float], sizes: list[int], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Clockwork(seconds)
    choice = chosen(monkeypatch, work, 64)
    assert (work.sizes, choice.size, list(choice.milliseconds)) == (sizes, best, sizes)


def test_sizes_that_memory_does_not_allow_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = chosen(monkeypatch, Clockwork(lambda size: 1.0, room=32), 64)
    assert choice.size == 32 and 64 not in choice.milliseconds


@pytest.mark.parametrize(
    ("tasks", "target", "size"), [(100, 25, 25), (25, 6.25, 5), (32, 8, 8), (13, 3.25, 3), (1, 0.25, 1)]
)
def test_chunks_are_even_where_they_can_be(tasks: int, target: float, size: int) -> None:
    assert part_near(tasks, target) == size


def test_the_first_size_is_what_memory_is_predicted_to_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=3).inner_loop
    start = lambda: tune.start_size(loop, Plan(), network(), 64, 1000)  # noqa: E731
    assert start() == 64
    monkeypatch.setattr(tune, "free_bytes", lambda device: 10_000.0)
    assert start() < 8


def test_a_system_that_does_not_tell_its_free_memory_has_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune.free_bytes(CPU) > 0
    monkeypatch.setattr(tune, "MEMORY", Path("/nowhere"))
    assert tune.free_bytes(CPU) == float("inf")


@pytest.mark.parametrize(
    ("remat", "last", "kept"), [(None, None, 9), (3, None, 6), (None, 2, 2), (4, 0, 1), (9, None, 9)]
)
def test_carries_kept(remat: int | None, last: int | None, kept: int) -> None:
    loop = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=9, adjoint=fmeta.Adjoint(last)).inner_loop
    assert tune.carries_kept(loop, Plan(remat=remat)) == kept


def test_choices_live_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path))
    choice = Choice(4, 8, {8: 70.5, 4: 60.25}, "the fastest that was timed")
    tune.remember("some-key", choice)
    monkeypatch.setattr(tune, "known", {})
    assert tune.recall("some-key") == choice
    assert tune.recall("another-key") is None
    store.path_of("chunks", "broken-key").write_text('{"size": 4}')
    assert tune.recall("broken-key") is None


def test_a_folder_that_cannot_be_written_to_costs_the_memory_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO, "fmeta"):
        tune.remember("a-key", Choice(1, 1, {}, ""))
    assert "not kept for later processes" in caplog.text
    assert tune.known.pop("a-key").size == 1


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Kernels that are not compiled but treated as if they were, a slow clock; the sizes that run."""
    sizes: list[int] = []
    attempt = running.Runner.attempt

    def noted(self: Any, make: Any, loop: Any, mode: Any, meta: Any, chunk: Any) -> Any:
        sizes.append(chunk.support.x.shape[0])
        return attempt(self, make, loop, mode, meta, chunk)

    monkeypatch.setattr(running.Runner, "attempt", noted)
    monkeypatch.setattr(running.Runner, "kernel", lambda self, name, fn, axes=None: fn)
    monkeypatch.setattr(tune, "WORTH_IT", 0.0)
    monkeypatch.setattr(tune, "known", {})
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path))
    return sizes


def test_the_first_call_tunes_and_a_later_process_remembers(
    uncompiled: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    algorithm, plan = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=2), Plan(chunk_size="auto")
    want = fmeta.meta_grad(algorithm, EAGER)(network(), regression_tasks())
    uncompiled.clear()
    function = fmeta.meta_grad(algorithm, plan)
    with caplog.at_level(logging.INFO, "fmeta"):
        for _ in range(2):
            assert_trees_close(function(network(), regression_tasks()), want, 1e-10)
        assert {3, 1} <= set(uncompiled), "all three tasks side by side, and one at a time"
        (choice,) = tune.known.values()
        monkeypatch.setattr(tune, "known", {})
        uncompiled.clear()
        assert_trees_close(fmeta.meta_grad(algorithm, plan)(network(), regression_tasks()), want, 1e-10)
    assert uncompiled == [choice.size] * (3 // choice.size), "nothing was timed again"
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"chunk_size=auto: {choice.size} of 3 tasks") and first.endswith("timed now")
    assert second.endswith("remembered")


def test_memory_that_runs_out_later_halves_for_good(
    uncompiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "warn_once", lambda *args: None)
    full = []

    def loss(params: dict[str, Tensor], batch: Any) -> Any:
        return LOSS(params, batch)

    function = fmeta.meta_grad(fmeta.maml(loss, fmeta.sgd(0.2), steps=2), Plan(chunk_size="auto"))
    monkeypatch.setattr(running, "choose", lambda *args: Choice(3, 3, {}, "said so"))
    attempt = running.Runner.attempt

    def scarce(self: Any, make: Any, loop: Any, mode: Any, meta: Any, chunk: Any) -> Any:
        if chunk.support.x.shape[0] > 2:
            full.append(1)
            raise torch.OutOfMemoryError("full")
        return attempt(self, make, loop, mode, meta, chunk)

    monkeypatch.setattr(running.Runner, "attempt", scarce)
    for _ in range(3):
        function(network(), regression_tasks())
    assert len(full) == 1


def test_uncompiled_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "choose", lambda *args: pytest.fail("timed"))
    algorithm = fmeta.maml(LOSS, fmeta.sgd(0.2), steps=2)
    for make, compiled in ((fmeta.meta_grad, False), (fmeta.meta_eval, "auto")):
        plain, auto = (
            make(algorithm, Plan(chunk_size=size, compile=compiled))(network(), regression_tasks())
            for size in (None, "auto")
        )
        assert_trees_close(auto, plain, 0.0)
