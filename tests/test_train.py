"""The training loop, on stand-ins: what it logs, validates, saves and skips, and when it stops."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import assert_trees_equal
from tiny_runs import Seen
from torch import Tensor

from fmeta.train.loop import Outcome, Progress, Settings, absorb, fit
from fmeta.train.terminal import describe, format_seconds, stop_signals
from fmeta.types import MetaState


# A stand-in for meta_step: meta counts the finite steps, the sampler says what is finite.
def count_up(state: MetaState, tasks: Any) -> tuple[MetaState, dict[str, Tensor]]:
    finite = torch.as_tensor(tasks["finite"])
    place = torch.tensor([4, 2]) if not tasks["finite"] else torch.tensor([-1, -1])
    loss = torch.tensor(float(tasks["step"])) if tasks["finite"] else torch.tensor(math.nan)
    after = MetaState(state.meta + 1, (), state.step + 1) if tasks["finite"] else state
    return after, {"loss": loss, "finite": finite, "first_bad": place}


def fit_stand_in(
    seen: Seen,
    values: Iterator[float] | None = None,
    bad: Callable[[int], bool] = lambda step: False,
    progress: Progress | None = None,
    **settings: Any,
) -> Outcome:
    values, progress = values or iter([]), progress or Progress()
    start = MetaState(torch.tensor(float(progress.step)), (), torch.tensor(progress.step))
    chosen = Settings(**{"steps": 20, "tasks": 5, "log_interval": 4} | settings)
    sampler: Any = lambda seed, step: {"finite": not bad(step), "step": step}  # noqa: E731
    return fit(count_up, sampler, lambda meta: next(values, math.nan), start, progress, chosen, seen.hooks)


def test_metrics_are_means_over_the_interval() -> None:
    seen = Seen()
    outcome = fit_stand_in(seen)
    assert (outcome.reason, outcome.progress.step, outcome.state.meta.item()) == ("steps", 20, 20.0)
    assert [step for step, _ in seen.lines] == [4, 8, 12, 16, 20]
    assert [line["loss"] for _, line in seen.lines] == [1.5, 5.5, 9.5, 13.5, 17.5]
    assert all(line["tasks_per_s"] > 0 and line["wall_s"] > 0 for _, line in seen.lines)
    assert seen.steps == list(range(1, 21))
    assert len(seen.starts) == 1


def test_metrics_are_read_from_the_device_once_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (reads.append(1), plain(self))[1])
    fit_stand_in(Seen(), steps=100, log_interval=50, max_bad_steps=50)
    assert len(reads) == 2 * 3, "the first step and two intervals, loss and finite each"


def test_best_is_saved_and_counted_by_validation() -> None:
    seen = Seen()
    outcome = fit_stand_in(seen, iter([3.0, 2.0, 2.5, math.nan, 1.0]), val_interval=4)
    assert [(step, best) for step, _, best in seen.values] == [
        (4, True),
        (8, True),
        (12, False),
        (16, False),
        (20, True),
    ]
    assert [save for save in seen.saves if save[0] == "best"] == [
        ("best", 4, 4.0),
        ("best", 8, 8.0),
        ("best", 20, 20.0),
    ]
    assert [save[1] for save in seen.saves if save[0] == "last"] == [4, 8, 12, 16, 20]
    assert (outcome.progress.best, outcome.progress.best_step, outcome.progress.stale) == (1.0, 20, 0)


def test_accuracy_is_better_when_higher() -> None:
    outcome = fit_stand_in(Seen(), iter([0.5, 0.7, 0.6]), val_interval=8, higher_is_better=True)
    assert (outcome.progress.best, outcome.progress.best_step, outcome.progress.stale) == (0.7, 16, 1)


def test_validation_comes_at_the_end_even_without_an_interval() -> None:
    seen = Seen()
    fit_stand_in(seen, iter([3.0]), val_interval=0)
    assert seen.values == [(20, 3.0, True)]
    assert seen.saves == [("best", 20, 20.0), ("last", 20, 20.0)]


@pytest.mark.parametrize(
    ("settings", "values", "reason", "step"),
    [
        ({"target": 2.0}, [3.0, 2.0, 1.0], "target", 8),
        ({"target": 0.9, "higher_is_better": True}, [0.5, 0.95], "target", 8),
        ({"patience": 2}, [1.0, 2.0, 1.5, 0.5], "patience", 12),
        ({"minutes": 1e-12}, [1.0], "minutes", 1),
        ({"steps": 6}, [1.0, 2.0], "steps", 6),
    ],
)
def test_reasons_to_stop(settings: dict[str, Any], values: list[float], reason: str, step: int) -> None:
    outcome = fit_stand_in(Seen(), iter(values), val_interval=4, **settings)
    assert (outcome.reason, outcome.progress.step) == (reason, step)


def test_wall_time_of_earlier_runs_counts() -> None:
    outcome = fit_stand_in(Seen(), progress=Progress(step=3, wall_s=61.0), minutes=1.0)
    assert (outcome.reason, outcome.progress.step) == ("minutes", 3)


def test_a_step_that_is_not_finite_is_skipped_and_counted() -> None:
    seen = Seen()
    outcome = fit_stand_in(seen, bad=lambda step: step in (1, 2, 9))
    assert (outcome.reason, outcome.progress.step, outcome.state.meta.item()) == ("steps", 20, 17.0)
    assert (outcome.progress.skipped, outcome.progress.bad, outcome.progress.first_bad) == (3, 0, (4, 2))
    assert seen.lines[0][1]["loss"] == 1.5, "the mean of steps 0 and 3"
    assert [line["skipped"] for _, line in seen.lines] == [2, 2, 3, 3, 3]


def test_too_many_steps_in_a_row_that_are_not_finite_stop_the_run() -> None:
    seen = Seen()
    outcome = fit_stand_in(seen, iter([1.0]), bad=lambda step: step >= 6, val_interval=4, max_bad_steps=3)
    assert (outcome.reason, outcome.progress.bad, outcome.progress.first_bad) == ("diverged", 3, (4, 2))
    assert outcome.progress.step == 9
    assert seen.saves == [("best", 4, 4.0), ("last", 4, 4.0), ("last", 8, 6.0)], "and nothing at step 9"


def test_good_steps_between_bad_ones_keep_the_run_going() -> None:
    outcome = fit_stand_in(Seen(), bad=lambda step: step % 3 != 0, max_bad_steps=3)
    assert (outcome.reason, outcome.progress.skipped) == ("steps", 13)


def test_bad_steps_are_seen_although_a_good_one_follows_before_they_are_read() -> None:
    metrics = [count_up(MetaState(torch.zeros(()), (), torch.tensor(0)), {"finite": ok, "step": 0})[1]
               for ok in (True, False, False, True)]  # fmt: skip
    assert absorb(Progress(), metrics, 2).bad == 2
    assert absorb(Progress(), metrics, 3).bad == 0


def test_interrupted_run_saves_last_and_goes_on_as_if_never_stopped() -> None:
    whole, first, second = Seen(), Seen(stop_at=6), Seen()
    values = [3.0, 2.0, 2.5, 4.0, 5.0]
    never_stopped = fit_stand_in(whole, iter(values), val_interval=4)
    stopped = fit_stand_in(first, iter(values), val_interval=4)
    assert (stopped.reason, stopped.progress.step) == ("interrupted", 6)
    assert first.saves[-1] == ("last", 6, 6.0)
    assert stopped.progress.window == {"loss": [4.0, 5.0]}
    again = Progress(**json.loads(json.dumps(stopped.progress._asdict())))
    resumed = fit_stand_in(second, iter(values[1:]), progress=again, val_interval=4)
    assert_trees_equal(resumed.state, never_stopped.state)
    without_time = lambda p: p._replace(wall_s=0.0, first_bad=tuple(p.first_bad))  # noqa: E731
    assert without_time(resumed.progress) == without_time(never_stopped.progress)
    losses = [(step, line["loss"]) for step, line in first.lines + second.lines]
    assert losses == [(step, line["loss"]) for step, line in whole.lines]
    assert first.values + second.values == whole.values


def test_numbers_in_words() -> None:
    numbers = {"tasks_per_s": 1234.5, "loss": 0.51249, "accuracy": 0.971, "skipped": 3.0}
    assert describe(numbers) == "1,234 tasks/s, loss 0.512, accuracy 97.1 %, 3 steps skipped"
    assert [format_seconds(s) for s in (2.04, 41.2, 200, 4320)] == [
        "2.0 s",
        "41 s",
        "3 min 20 s",
        "1 h 12 min",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_signals() as asked:
        assert not asked()
        signal.raise_signal(number)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) is before
