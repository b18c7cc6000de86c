"""The result of a run: scores, baselines, intervals, plots."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_trees_close, assert_trees_equal
from PIL import Image
from tiny_runs import random_pictures, tiny_few_shot, tiny_sinusoid

import fmeta
from fmeta.train import baselines, commands, experiment, family, folder, plots
from fmeta.train.choices import EMBEDDINGS, STEPLESS, WEIGHTS
from fmeta.train.cli import main
from fmeta.train.config import Outer
from fmeta.train.evaluate import Compared, Estimate, as_json, differences, estimate
from fmeta.train.report import report
from fmeta.train.run import run
from fmeta.train.table import written


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "load_pools", lambda task: random_pictures())


@pytest.fixture
def few_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer settings of the baseline to choose from, for the sake of time."""
    monkeypatch.setattr(baselines, "RATES", (0.01, 0.1))


def test_sinusoid_run_leaves_everything_in_its_folder(tmp_path: Path, few_rates: None, capsys: Any) -> None:
    path = tmp_path / "run"
    assert commands.train(tiny_sinusoid(path), "fmeta train sinusoid") == 0
    names = {entry.name for entry in path.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "events", "best.safetensors", "last.safetensors", "baseline.safetensors",
        "results.json", "learning_curve.png", "steps.png", "adaptation.png",
    }  # fmt: skip
    result = json.loads((path / "results.json").read_text())
    assert result["tasks"] == 10
    assert result["steps"] == list(range(11))
    assert result["command"] == "fmeta train sinusoid"
    assert result["headline"]["mean"] == result["scores"]["meta_learned"]["mean"][2]
    assert set(result["meta_learned_minus"]) == {"no_adaptation", "no_meta_learning"}
    assert result["baseline_steps"] == 6
    assert len(result["fine_tuning"]["no_meta_learning"]) == 11
    for plot in path.glob("*.png"):
        with Image.open(plot) as image:
            assert image.size[0] > 600 and len(image.convert("L").getcolors()) > 10, f"{plot} is empty"
    printed = capsys.readouterr().out
    assert "sinusoid: maml, 1 inner step at rate 0.01; model of 19 weights; cpu" in printed
    assert "mean squared error on 10 unseen tasks" in printed
    assert f"fmeta eval {path}" in printed


def test_evaluating_again_gives_the_same_result_and_keeps_the_baseline(
    tmp_path: Path, few_rates: None, capsys: Any
) -> None:
    path = tmp_path / "run"
    commands.train(tiny_sinusoid(path), "train")
    first = json.loads((path / "results.json").read_text())
    capsys.readouterr()
    assert commands.evaluate(path, "eval") == 0
    assert "steps on all training tasks together" not in capsys.readouterr().out.split("unseen tasks")[0]
    again = json.loads((path / "results.json").read_text())
    assert again.pop("command") == "eval" and first.pop("command") == "train"
    assert again == first
    assert (
        commands.evaluate(path, "eval", checkpoint="last", test_tasks=4, baselines=False, device="cpu") == 0
    )
    last = json.loads((path / "results.json").read_text())
    assert (last["tasks"], last["checkpoint"], "no_meta_learning" in last["scores"]) == (4, "last", False)


def test_scores_are_those_of_one_task_after_another(tmp_path: Path, few_rates: None) -> None:
    config = tiny_sinusoid(tmp_path / "run")
    config = replace(config, report=replace(config.report, test_tasks=52))  # more than are measured at once
    path = folder.create(config, "test")
    built = experiment.build(config)
    run(path, built)
    report(path, built, "best", "test")
    result = json.loads((path / "results.json").read_text())
    again, meta = folder.load_run(path)
    expected = []
    for batch, count in enumerate((50, 2)):
        tasks = again.test.sampler(again.test.seed, batch)
        for index in range(count):
            task = fmeta.tree.select(tasks, index)
            says = plots.predicted(again, meta, task, task.query.x, 2)
            expected.append(((says - task.query.y) ** 2).mean().double())
    values = torch.stack(expected)
    assert_trees_close(torch.tensor(result["headline"]["mean"]).double(), values.mean(), 1e-5)
    interval = 1.96 * values.std() / math.sqrt(52)
    assert_trees_close(torch.tensor(result["headline"]["interval"]).double(), interval, 1e-5)


@pytest.mark.parametrize("algorithm", sorted(set(WEIGHTS | EMBEDDINGS) - {"cavia"}))
def test_few_shot_run_with_every_algorithm(
    tmp_path: Path, pictures: None, few_rates: None, algorithm: str
) -> None:
    path = tmp_path / "run"
    assert commands.train(tiny_few_shot(path, algorithm), "test") == 0
    result = json.loads((path / "results.json").read_text())
    assert result["metric"] == "accuracy"
    curve = result["scores"]["meta_learned"]["mean"]
    assert len(curve) == (1 if algorithm in STEPLESS else 11)
    assert all(0 <= value <= 1 for value in curve)
    assert (path / "episode.png").stat().st_size > 5_000
    assert (path / "steps.png").exists() == (algorithm not in STEPLESS)
    assert set(result["scores"]) >= {"meta_learned", "no_meta_learning", "no_meta_learning_zero_head"}


def test_intervals_and_paired_differences() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 6.0]).double()
    found = estimate(values)
    assert found.mean == 3.0
    assert math.isclose(
        found.interval, 1.96 * math.sqrt(14 / 3) / 2
    )  # squares of -2, -1, 0, 3 over n - 1 = 3
    learned = torch.stack([values, values - 1], dim=1)
    compared = Compared([0, 1], "loss", learned, {"no_meta_learning": learned + torch.tensor([0.5, 2.0])})
    paired = differences(compared)
    assert [tuple(e) for e in paired["no_adaptation"]] == [(0.0, 0.0), (-1.0, 0.0)]
    assert [tuple(e) for e in paired["no_meta_learning"]] == [(-0.5, 0.0), (-2.0, 0.0)]
    assert as_json(compared)["meta_learned_minus"]["no_meta_learning"]["mean"] == [-0.5, -2.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 0.5, 0.5, 0.5]),
        ("cooldown", [0.5, 0.5, 0.25, 0.0]),
        ("cosine", [0.5, 0.25, 0.25 * (1 + math.cos(0.95 * math.pi)), 0.0]),
    ],
)
def test_schedules_of_the_outer_rate(schedule: Any, expected: list[float]) -> None:
    outer = experiment.make_outer(Outer(outer_lr=0.5, outer_steps=1000, schedule=schedule), steps=100)
    params = {"w": torch.zeros(1).double()}
    state, updates = outer.init(params), []
    for _ in range(101):  # Adam moves by its rate while the gradient stays the same
        update, state = outer.update({"w": torch.ones(1).double()}, state, params)
        updates.append(update["w"])
    found = torch.cat([updates[step] for step in (0, 50, 95, 100)])
    assert_trees_close(-found, torch.tensor(expected).double(), 1e-6)


def test_held_out_tasks_are_the_same_for_all_seeds_and_differ_from_training(tmp_path: Path) -> None:
    first, second = (experiment.build(tiny_sinusoid(tmp_path, seed=seed)) for seed in (0, 1))
    assert_trees_equal(second.test.sampler(second.test.seed, 0), first.test.sampler(first.test.seed, 0))
    assert first.test.seed != first.val.seed
    assert max(first.config.outer.seed, 999_999) < min(first.test.seed, first.val.seed)


def test_a_run_without_labels(tmp_path: Path, pictures: None) -> None:
    config = tiny_few_shot(tmp_path / "run")
    config = replace(config, task=replace(config.task, labels=False))
    built = experiment.build(config)
    task = built.family.train(0, 0)
    assert task.support.y[0].tolist() == [0, 1, 2] and task.query.y[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert run(folder.create(config, "test"), built).progress.step == 3


def test_a_kept_run_is_tested_as_it_was(tmp_path: Path) -> None:
    path, kept = tmp_path / "run", tmp_path / "kept"
    config = tiny_sinusoid(path)
    config = replace(config, report=replace(config.report, baselines=False))
    assert commands.train(config, "test") == 0
    folder.keep(path, kept)
    assert (kept / "best.safetensors").stat().st_size < 0.7 * (path / "best.safetensors").stat().st_size
    assert commands.evaluate(kept, "test", baselines=False) == 0
    first, second = (json.loads((p / "results.json").read_text())["scores"] for p in (path, kept))
    assert first == second
    with pytest.raises(ValueError, match=r"last\.safetensors does not exist"):
        folder.load(kept, "last", experiment.build(config))


def test_runs_are_compared_on_the_same_tasks(tmp_path: Path, capsys: Any) -> None:
    paths = [tmp_path / name for name in ("maml", "cavia")]
    for path in paths:
        config = tiny_sinusoid(path)
        config = replace(config, inner=replace(config.inner, algorithm=path.name))
        run(folder.create(config, "test"), experiment.build(config))
    out = tmp_path / "compared"
    assert main(["compare", *map(str, paths), "--out", str(out), "--test-tasks", "12"]) == 0
    said = capsys.readouterr().out
    assert "minus maml" in said and "cavia" in said
    found = json.loads((out / "compare.json").read_text())
    first, second = found["runs"]
    assert found["tasks"] == 12 and [row["mean"] for row in first["minus_first"]] == [0.0] * 11
    for a, b, d in zip(first["scores"], second["scores"], second["minus_first"], strict=True):
        assert d["mean"] == pytest.approx(b["mean"] - a["mean"])
    with Image.open(out / "compare.png") as picture:
        assert picture.size[0] > 500


def test_what_does_not_compare_is_refused(tmp_path: Path, capsys: Any, pictures: None) -> None:
    one, other = tiny_sinusoid(tmp_path / "a"), tiny_few_shot(tmp_path / "b")
    for config in (one, other):
        folder.create(config, "test")
    assert main(["compare", str(tmp_path / "a")]) == 1
    assert "at least two runs are needed, got 1" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "runs must have the same test tasks" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "a"), "--test-tasks", "1"]) == 1
    assert "--test-tasks must be at least 2" in capsys.readouterr().err


def test_tasks_that_diverge_are_named_in_the_table() -> None:
    found = [Estimate(0.5, 0.1), Estimate(float("nan"), float("nan")), Estimate(2e16, 4e16)]
    assert written(found, [0, 1, 2], "loss") == ["0.500 ± 0.100", "diverged", "diverged"]
