"""`fmeta train learned-optimizer`: a whole run in seconds, resumed, tested again, and used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_trees_close, assert_trees_equal

import fmeta
from fmeta import learned
from fmeta.train import checkpoint
from fmeta.train.cli import main
from fmeta.train.commands import outcome_of
from fmeta.train.learning import problems as learning_problems
from fmeta.train.learning.config import LearningTask
from fmeta.train.logging import read_metrics

SMALL = [
    *("--problems", "relu", "--classes", "3", "--batch", "4", "--shortest", "3", "--longest", "6"),
    *("--truncation", "3", "--tasks", "2", "--outer-steps", "4", "--val-interval", "2", "--val-tasks", "2"),
    *("--test-tasks", "3", "--log-interval", "1", "--compile", "off", "--device", "cpu"),
]


@pytest.fixture(autouse=True)
def few_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fmeta.learned.comparison", "fmeta.train.learning.report"):
        monkeypatch.setattr(f"{module}.RATES", (0.001, 0.01))


def run(*arguments: str) -> None:
    assert main(["train", "learned-optimizer", *arguments]) == 0


@pytest.mark.parametrize("estimator", ["bptt", "pes"])
def test_a_run_resumed_is_the_run_never_stopped(
    tmp_path: Path, estimator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--estimator", estimator]
    run(*options, "--out", str(tmp_path / "whole"))
    run(*options, "--out", str(tmp_path / "parts"), "--minutes", "0.0001")
    stopped = read_metrics(tmp_path / "parts")[-1]["step"]
    assert stopped < 4
    capsys.readouterr()
    assert main(["train", "learned-optimizer", "--resume", str(tmp_path / "parts"), "--data", "digits"]) == 1
    assert "another --data (was glyphs, now digits)" in capsys.readouterr().err
    assert main(["train", "learned-optimizer", "--resume", str(tmp_path / "parts"), "--minutes", "60"]) == 0
    states = [checkpoint.read(tmp_path / name / "last.safetensors")[0] for name in ("whole", "parts")]
    assert_trees_equal(*states)


def test_a_run_starts_from_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmeta.train.learning.recipe.report", lambda *args: 0)
    run(*SMALL, "--out", str(tmp_path / "first"))
    again = [*SMALL, "--start", str(tmp_path / "first"), "--outer-lr", "1e-9"]
    run(*again, "--out", str(tmp_path / "whole"))
    (tmp_path / "first" / "best.safetensors").unlink()  # as a run is kept
    run(*again, "--out", str(tmp_path / "kept"))
    thetas = [learned.load(tmp_path / name).theta for name in ("first", "whole", "kept")]
    assert_trees_close(thetas[0], thetas[1], 1e-5)
    assert_trees_equal(thetas[1], thetas[2])
    assert (
        main(["train", "learned-optimizer", *again, "--optimizer", "lstm", "--out", str(tmp_path / "no")])
        == 1
    )
    assert not (tmp_path / "no").exists()


def test_a_run_is_tested_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*SMALL, "--out", str(tmp_path / "run"))
    shown = capsys.readouterr().out
    assert "adam, cosine" in shown and "4 times wider" in shown and "5 times longer, 30 steps" in shown
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["tests"]) == {
        *("relu", "4 times wider", "2 times deeper", "another activation", "5 times longer")
    }
    found = results["tests"]["relu"]
    difference = found["learned"]["final"][0] - found["adam"]["final"][0]
    assert found["adam"]["learned_minus_this"]["final"][0] == pytest.approx(difference, abs=1e-5)
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    assert outcome_of(tmp_path / "run").startswith("meta_transformer: mean loss on relu ")
    with pytest.raises(ValueError, match=r"^load: learned-optimizer has runs of its own kind"):
        fmeta.load(tmp_path / "run")
    assert learned.load(tmp_path / "run").rule.name == "meta_transformer"
    (tmp_path / "run" / "best.safetensors").unlink()  # as a run is kept
    assert main(["eval", str(tmp_path / "run"), "--tasks", "2"]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["trainings"] == 2


@pytest.mark.parametrize("optimizer", ["policy", "schedule", "mlp", "lstm"])
def test_other_optimisers_learn_too(tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmeta.train.learning.recipe.report", lambda *args: 0)
    run(*SMALL, "--optimizer", optimizer, "--out", str(tmp_path / "run"))
    theta = learned.load(tmp_path / "run").theta
    first = learned.load(tmp_path / "run").rule.init(0)
    assert any(not torch.equal(theta[name], first[name]) for name in theta)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--problems", "relu,magic"], "--problems must be among relu, tanh"),
        (["--shortest", "9", "--longest", "8"], "--shortest must not be above --longest, got 9 and 8"),
        (["--std", "0"], "--std must be above 0"),
    ],
)
def test_wrong_options(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", "learned-optimizer", *options, "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [*learning_problems.NETWORKS, "text", "quadratics", "rosenbrock"])
def test_every_problem_can_be_trained(name: str) -> None:
    pytest.importorskip("sklearn")
    task = LearningTask(data="digits", classes=5)
    problem: Any = learning_problems.make_problem(name, task, learning_problems.pools_of(task).train)
    trainings = problem.sample(0, 0, 2, 4)
    rule = learned.meta_transformer(lr=1e-3)
    from fmeta.types import Plan

    curve = learned.curves(problem, rule, rule.init(0), trainings, 4, Plan(compile=False))
    assert torch.isfinite(curve).all() and curve.shape == (2, 4)
