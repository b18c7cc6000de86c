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
from fmeta.train.curves import Look, reliability_figure, step_figure
from fmeta.train.evaluate import (
    Compared,
    Curve,
    Estimate,
    Scores,
    as_json,
    differences,
    estimate,
    paired,
    per_task,
)
from fmeta.train.report import report
from fmeta.train.run import run
from fmeta.train.table import written
from fmeta.types import Task


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "load_pools", lambda task: random_pictures())


@pytest.fixture
def few_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer settings of the baseline to choose from, for the sake of time."""
    monkeypatch.setattr(baselines, "RATES", (0.01, 0.1))


def check_fine_tuning(result: dict[str, Any]) -> None:
    """The scores of a baseline are those of the scope that was chosen for each number of steps."""
    for name, found in result["fine_tuning"].items():
        assert found["steps"] == list(range(11)) and len(found["chosen"]) == 11
        for column, (scope, rate) in enumerate(found["chosen"]):
            assert found["scopes"][scope]["rates"][column] == rate
            for number in {"mean", "interval_95", "ece"} & set(found["scopes"][scope]):
                assert result["scores"][name][number][column] == found["scopes"][scope][number][column]
        assert set(found["scopes"]) == {"all weights", "the head"}


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
    assert set(result["meta_learned_minus"]) == {"no_adaptation", "from_scratch", "no_meta_learning"}
    assert result["baseline_steps"] == 6
    assert "ece" not in result["headline"]
    check_fine_tuning(result)
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
    assert commands.evaluate(path, "eval", checkpoint="last", tasks=4, baselines=False, device="cpu") == 0
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
    assert result["scores"]["meta_learned"]["steps"] == list(range(len(curve)))
    for plot in ("episode", "steps", "calibration"):
        assert (path / f"{plot}.png").stat().st_size > 5_000
    names = {"from_scratch", "no_meta_learning", "no_meta_learning_zero_head"}
    assert set(result["scores"]) - {"no_adaptation"} == {"meta_learned", *names}
    for name in names:  # the baselines adapt, whether the algorithm does or not
        assert len(result["scores"][name]["mean"]) == len(result["scores"][name]["ece"]) == 11
        assert len(result["meta_learned_minus"][name]["mean"]) == 11
    check_fine_tuning(result)


def curve(name: str, values: torch.Tensor, steps: list[int] | None = None) -> Curve:
    return Curve(name, steps or list(range(values.shape[1])), Scores(values, None))


def test_no_class_is_found_by_what_is_no_number(tmp_path: Path, pictures: None) -> None:
    built = experiment.build(tiny_few_shot(tmp_path / "run", "protonet"))

    def nothing(meta: Any, tasks: Task) -> torch.Tensor:
        return torch.full((*tasks.query.y.shape[:1], 1, *tasks.query.y.shape[1:], 3), torch.nan)

    assert per_task(nothing, built.params, built.test, "accuracy").max() == 0


def test_intervals_and_paired_differences() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 6.0]).double()
    found = estimate(values)
    assert found.mean == 3.0
    assert math.isclose(
        found.interval, 1.96 * math.sqrt(14 / 3) / 2
    )  # squares of -2, -1, 0, 3 over n - 1 = 3
    learned = torch.stack([values, values - 1], dim=1)
    tuned = curve("fine-tuned", learned + torch.tensor([0.5, 2.0]))
    compared = Compared("loss", curve("maml", learned), {"no_meta_learning": tuned})
    paired = differences(compared)
    assert [tuple(e) for e in paired["no_adaptation"]] == [(0.0, 0.0), (-1.0, 0.0)]
    assert [tuple(e) for e in paired["no_meta_learning"]] == [(-0.5, 0.0), (-2.0, 0.0)]
    assert as_json(compared)["meta_learned_minus"]["no_meta_learning"]["mean"] == [-0.5, -2.0]


def test_differences_of_models_with_and_without_steps() -> None:
    """After the same number of steps; without steps there is one score, compared at the end that is shown."""
    values = torch.tensor([[1.0, 2.0, 3.0, 5.0], [1.0, 4.0, 6.0, 9.0]]).double()
    adapting, level = curve("maml", values, [0, 1, 2, 10]), curve("protonet", values[:, 1:2])
    fewer = curve("anil", values[:, [0, 3]] + 1, [1, 10])
    assert paired(fewer, adapting, 10).tolist() == [[0.0, 1.0], [-2.0, 1.0]]
    assert paired(level, adapting, 2).tolist() == [[-1.0], [-2.0]]
    assert paired(level, adapting, 10).tolist() == [[-3.0], [-5.0]]
    assert paired(adapting, level, 10).tolist() == [[-1.0, 0.0, 1.0, 3.0], [-3.0, 0.0, 2.0, 5.0]]
    assert paired(level, level, 0).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("algorithm", ["maml", "protonet", "protomaml"])
def test_calibration_is_of_all_queries_of_all_tasks(
    tmp_path: Path, pictures: None, few_rates: None, algorithm: str
) -> None:
    path = tmp_path / "run"
    config = tiny_few_shot(path, algorithm)
    config = replace(config, report=replace(config.report, test_tasks=52, baselines=False))
    assert commands.train(config, "test") == 0
    result = json.loads((path / "results.json").read_text())
    built, meta = folder.load_run(path)
    logits, labels = [], []
    for batch, count in enumerate((50, 2)):
        tasks = built.test.sampler(built.test.seed, batch)
        for index in range(count):
            task = fmeta.tree.select(tasks, index)
            steps = result["headline"]["steps"]
            logits.append(plots.predicted(built, meta, task, task.query.x, steps))
            labels.append(task.query.y)
    ece = fmeta.losses.calibration_error(torch.cat(logits), torch.cat(labels)).item()
    assert ece > 0.01
    assert result["headline"]["ece"] == pytest.approx(ece, abs=1e-5)
    right = (torch.cat(logits).argmax(1) == torch.cat(labels)).double().mean().item()
    assert result["headline"]["mean"] == pytest.approx(right)


def test_curves_end_where_they_diverge(tmp_path: Path) -> None:
    falling = torch.tensor([[3.0, 1.0, 0.5], [2.0, 1.0, 0.4]]).double()
    wild = torch.tensor([[3.0, 1.0, 1e9], [2.0, 1.0, math.nan]]).double()
    looks = [Look(curve("maml", falling), "C0", "maml"), Look(curve("metasgd", wild), "C1", "metasgd")]
    looks.append(Look(curve("bad", falling * math.nan), "C2", "bad"))
    figure = step_figure(looks, "loss", start=True)
    figure.savefig(tmp_path / "steps.png")
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["maml", "metasgd (diverges)", "bad (diverges)", "no adaptation"]
    drawn = [line.get_xdata() for line in figure.axes[0].lines]
    assert [len(x) for x in drawn[:3]] == [3, 2, 0]


def test_reliability_is_drawn_of_the_step_that_is_said(tmp_path: Path) -> None:
    logits = torch.tensor([[2.0, 0.0]] * 4).double()  # 88 % sure
    sums = [fmeta.losses.reliability(logits, torch.tensor(labels)) for labels in ([1, 1, 1, 1], [0, 0, 0, 1])]
    values = torch.tensor([[0.0, 0.75]]).double()
    learned = Curve("maml", [0, 1], Scores(values, fmeta.tree.stack(sums)))
    figure = reliability_figure([Look(learned, "C0", "maml")], [1], "after 1 step")
    figure.savefig(tmp_path / "calibration.png")
    assert figure.axes[0].get_title(loc="left") == "after 1 step"
    assert [text.get_text() for text in figure.legends[0].get_texts()][1] == "maml\nECE 13.1 %"
    (x, y) = figure.axes[0].lines[1].get_data()
    assert (round(float(x[0]), 1), float(y[0])) == (88.1, 75.0)
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert heights == [0.0] * 13 + [100.0, 0.0]


def lines_of_table(said: str) -> list[list[str]]:
    """The lines between the rule below the titles and the notes."""
    lines = said.splitlines()
    assert all(len(line) <= 100 for line in lines if "/" not in line), "wider than 100 columns"
    begin = next(i for i, line in enumerate(lines) if line.startswith("---")) + 1
    end = next(i for i, line in enumerate(lines) if "er is better." in line)
    return [line.replace(" ± ", "±").split() for line in lines[begin : end - 1]]


def test_eval_shows_the_steps_that_are_asked_for(
    tmp_path: Path, pictures: None, few_rates: None, capsys: Any
) -> None:
    path = tmp_path / "run"
    assert commands.train(tiny_few_shot(path), "test") == 0
    capsys.readouterr()
    for steps in (["--steps", "12,0,1"], ["--steps", "0", "1", "12"], ["--steps=0,1,12"]):
        assert main(["eval", *steps, str(path), "--tasks", "7"]) == 0
        said = capsys.readouterr().out
        rows = lines_of_table(said)
        names = ["maml", "from scratch", "fine-tuned", "zero head"]
        assert [" ".join(row[: row.index("0")]) for row in rows[::4]] == names
        assert [row[0] for row in rows[1::4]] == ["1"] * 4 and [row[0] for row in rows[2::4]] == ["12"] * 4
        assert "on 7 unseen tasks" in said and "ECE" in said and "maml minus it" in said
        result = json.loads((path / "results.json").read_text())
        assert result["steps"] == [*range(11), 12] and result["tasks"] == 7
        ece = result["scores"]["no_meta_learning_zero_head"]["ece"][11]
        assert rows[14][2] == f"{100 * ece:.1f}"
        assert result["headline"]["mean"] == result["scores"]["meta_learned"]["mean"][2]


def test_a_run_is_tested_on_tasks_of_other_sizes(tmp_path: Path, pictures: None, capsys: Any) -> None:
    path, tasks = tmp_path / "run", ["--tasks", "60", "--no-baselines"]
    assert commands.train(tiny_few_shot(path, "protonet"), "test") == 0
    first = json.loads((path / "results.json").read_text())
    assert main(["eval", str(path), "--ways", "2", "--shots", "2", "--queries", "4", *tasks]) == 0
    assert f"again: fmeta eval {path} --ways 2 --shots 2 --queries 4" in capsys.readouterr().out
    assert json.loads((path / "results.json").read_text()) == first, "the run's own result stays"
    found = json.loads((path / "2w2s4q" / "results.json").read_text())
    built, meta = folder.load_run(path)
    pool = random_pictures().test
    sampler = fmeta.tasks.few_shot(pool, ways=2, shots=2, queries=4, tasks=family.HELD_BATCH)
    measure = fmeta.meta_eval(built.algorithm, fmeta.Plan(), steps=[0])
    scores = torch.cat([measure(meta, sampler(built.test.seed, i))["accuracy"] for i in range(2)])[:60]
    assert found["headline"]["mean"] == pytest.approx(scores.mean().item(), abs=1e-6)
    assert (path / "2w2s4q" / "episode.png").exists() and not (path / "2w2s4q" / "config.json").exists()
    assert main(["eval", str(path), "--shots", "1", *tasks]) == 0
    assert {p.name for p in path.iterdir() if p.is_dir()} == {"2w2s4q", "events"}, "the run's own sizes"
    assert (
        main(["eval", str(path), "--ways", "9", *tasks]) == 0
    )  # of 9 classes for test; validation has as many
    capsys.readouterr()
    with pytest.raises(ValueError, match="eval: --queries must be at least 1, got 0"):
        commands.evaluate(path, "eval", queries=0)
    folder.create(tiny_few_shot(tmp_path / "maml"), "test")
    with pytest.raises(
        ValueError, match=r"--ways may differ .* a run of maml, .* each of 3 classes.*--ways 4"
    ):
        commands.evaluate(tmp_path / "maml", "eval", ways=4)
    folder.create(tiny_sinusoid(tmp_path / "waves"), "test")
    with pytest.raises(ValueError, match="eval: --ways, --queries: the recipe sinusoid has its own tasks"):
        commands.evaluate(tmp_path / "waves", "eval", ways=4, queries=2)


def test_only_the_splits_that_are_used_need_enough_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = random_pictures()
    few = fmeta.data.class_pool(pools.val.x[:18], torch.arange(3).repeat_interleave(6), pools.val.names[:3])
    monkeypatch.setattr(family, "load_pools", lambda task: replace(pools, val=few))
    config = tiny_few_shot(tmp_path / "run", "protomaml")
    config = replace(config, report=replace(config.report, baselines=False))
    assert commands.train(config, "test") == 0
    assert commands.evaluate(tmp_path / "run", "eval", ways=8, baselines=False) == 0  # of 9 classes for test
    config = replace(config, out=tmp_path / "more", task=replace(config.task, ways=4))
    with pytest.raises(
        ValueError, match=r"train: validation tasks: few_shot: ways must be at most the 3 classes .*, got 4"
    ):
        commands.train(config, "test")
    assert not (tmp_path / "more").exists()


def test_minibatches_of_reptile(tmp_path: Path, pictures: None) -> None:
    config = tiny_few_shot(tmp_path / "run", "reptile")
    inner = replace(config.inner, minibatches=True, inner_steps=2)
    config = replace(config, inner=inner, task=replace(config.task, train_shots=4, ways=2))
    built = experiment.build(config)
    whole = fmeta.tasks.few_shot(
        random_pictures().train, ways=2, shots=4, queries=2, tasks=2, augment="rotations"
    )
    mine, theirs = built.family.train(0, 3), whole(0, 3)
    assert mine.support.x.shape == (2, 2, 4, 1, 16, 16) and mine.query.x.shape == theirs.query.x.shape
    for part in range(2):  # every second shot, so that the two have all of them
        assert_trees_equal(mine.support.x[:, part], theirs.support.x[:, part::2])
        assert_trees_equal(mine.support.y[:, part], theirs.support.y[:, part::2])
    assert commands.train(config, "test") == 0
    with pytest.raises(
        ValueError,
        match=r"to divide the support examples of a training task, got 2 and 3. Give --train-shots 4",
    ):
        experiment.build(replace(config, task=replace(config.task, ways=3, train_shots=1)))
    waves = replace(tiny_sinusoid(tmp_path), inner=inner)
    with pytest.raises(ValueError, match=r"got 2 and 3. Give --shots 4, say"):
        experiment.build(waves)
    with pytest.raises(ValueError, match=r"--minibatches is for reptile, .* got glyphs with maml"):
        experiment.build(replace(config, inner=replace(inner, algorithm="maml")))


def test_options_of_imaml_reach_its_gradient(tmp_path: Path) -> None:
    config = tiny_sinusoid(tmp_path)

    def gradient(**options: Any) -> Any:
        inner = replace(config.inner, algorithm="imaml", inner_steps=3, **options)
        built = experiment.build(replace(config, inner=inner))
        tasks = built.family.train(0, 0)
        return fmeta.meta_grad(built.algorithm, fmeta.Plan(compile=False))(built.params, tasks)[0]

    plain = experiment.build(config)
    loss = plain.family.loss(fmeta.functionalize(plain.family.model(None))[0])
    for iterations, strength, damping in ((0, 2.0, 0.0), (2, 2.0, 0.0), (2, 0.5, 3.0)):
        found = gradient(solver_iterations=iterations, strength=strength, damping=damping)
        algorithm = fmeta.imaml(
            loss,
            fmeta.sgd(config.inner.inner_lr),
            steps=3,
            strength=strength,
            iterations=iterations,
            damping=damping,
        )
        tasks = plain.family.train(0, 0)
        wanted = fmeta.meta_grad(algorithm, fmeta.Plan(compile=False))(plain.params, tasks)[0]
        assert_trees_close(found, wanted)
    with pytest.raises(ValueError, match="--solver-iterations must be at least 0"):
        gradient(solver_iterations=-1)


def test_outer_sgd_of_reptile_goes_all_the_way(tmp_path: Path, pictures: None) -> None:
    config = tiny_few_shot(tmp_path / "run", "reptile")
    outer = Outer(tasks=2, outer_steps=1, outer_optimizer="sgd", outer_lr=1.0, schedule="constant")
    config = replace(config, outer=outer, report=replace(config.report, baselines=False))
    built = experiment.build(config)
    tasks = built.family.train(config.outer.seed, 0)
    module = built.family.model(3)
    loss = built.family.loss(fmeta.functionalize(module)[0])
    supports = [fmeta.tree.select(tasks, i).support for i in range(2)]
    moved = [fmeta.adapt(loss, built.params, one, fmeta.sgd(0.1), steps=1).params for one in supports]
    expected = fmeta.tree.map(lambda a, b: (a + b) / 2, *moved)
    commands.train(config, "test")
    assert_trees_close(folder.load_run(config.out, "last")[1], expected, 1e-6)


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
    best = folder.load(path, "best", experiment.build(config))[1].step
    assert (folder.steps_taken(path), folder.steps_taken(kept)) == (6, best)
    with pytest.raises(ValueError, match=r"last\.safetensors does not exist"):
        folder.load(kept, "last", experiment.build(config))


def trained(path: Path, config: Any) -> Path:
    run(folder.create(replace(config, out=path), "test"), experiment.build(config))
    return path


def test_runs_are_compared_on_the_same_tasks(tmp_path: Path, capsys: Any) -> None:
    config = tiny_sinusoid(tmp_path)
    paths = [
        trained(tmp_path / name, replace(config, inner=replace(config.inner, algorithm=name)))
        for name in ("maml", "cavia")
    ]
    out = tmp_path / "compared"
    assert main(["compare", *map(str, paths), "--out", str(out), "--test-tasks", "12"]) == 0
    said = capsys.readouterr().out
    assert "minus maml" in said and "cavia" in said and "ECE" not in said
    assert [row[0] for row in lines_of_table(said) if row] == ["maml", *"1235", "10", "cavia", *"1235", "10"]
    found = json.loads((out / "compare.json").read_text())
    first, second = found["runs"]
    assert found["tasks"] == 12 and [row["mean"] for row in first["minus_first"]] == [0.0] * 11
    for a, b, d in zip(first["scores"], second["scores"], second["minus_first"], strict=True):
        assert d["mean"] == pytest.approx(b["mean"] - a["mean"])
    assert "baselines" not in found and "ece" not in first
    with Image.open(out / "compare.png") as picture:
        assert picture.size[0] > 500


def test_runs_and_their_baselines_are_compared(
    tmp_path: Path, pictures: None, few_rates: None, capsys: Any
) -> None:
    """Runs that differ in their algorithm alone share their baselines; scores are those of each alone."""
    paths = [trained(tmp_path / name, tiny_few_shot(tmp_path, name)) for name in ("protonet", "maml", "anil")]
    assert main(["eval", str(paths[1]), "--tasks", "9"]) == 0  # stores the model of all training classes
    capsys.readouterr()
    out = tmp_path / "compared"
    arguments = ["compare", *map(str, paths), "--out", str(out), "--tasks", "9", "--steps", "0,1,4"]
    assert main([*arguments, "--baselines"]) == 0
    said = capsys.readouterr().out
    assert "steps on all training tasks together\n" not in said, "trained again"
    rows = [row for row in lines_of_table(said) if row]
    assert len(rows) == 1 + 5 * 3
    assert rows[0][:2] == ["protonet", "-"]
    found = json.loads((out / "compare.json").read_text())
    assert [row["name"] for row in found["runs"]] == ["protonet", "maml", "anil"]
    assert [row["name"] for row in found["baselines"]] == ["from scratch", "fine-tuned", "zero head"]
    assert {row["run"] for row in found["baselines"]} == {str(paths[1])}
    alone = json.loads((paths[1] / "results.json").read_text())["scores"]
    maml = found["runs"][1]
    for row, name in ((maml, "meta_learned"), *((row, row["baseline"]) for row in found["baselines"])):
        assert [score["mean"] for score in row["scores"]] == pytest.approx(alone[name]["mean"])
        assert row["ece"] == pytest.approx(alone[name]["ece"])
        for score, difference in zip(row["scores"], row["minus_first"], strict=True):
            first = found["runs"][0]["scores"][0]["mean"]
            assert difference["mean"] == pytest.approx(score["mean"] - first)
    assert found["baselines"][0]["fine_tuning"]["steps"] == list(range(11))


def test_baselines_that_differ_are_named_after_their_runs(
    tmp_path: Path, pictures: None, few_rates: None, capsys: Any
) -> None:
    """Another number of training steps is another pre-trained model, but no other random one."""
    config = tiny_few_shot(tmp_path)
    longer = replace(config, outer=replace(config.outer, outer_steps=4))
    paths = [trained(tmp_path / "short", config), trained(tmp_path / "long", longer)]
    out = str(tmp_path / "compared")
    assert main(["compare", *map(str, paths), "--out", out, "--tasks", "5", "--baselines"]) == 0
    said = capsys.readouterr().out
    found = json.loads((Path(out) / "compare.json").read_text())["baselines"]
    assert [row["name"] for row in found] == [
        "from scratch", "fine-tuned (short)", "zero head (short)", "fine-tuned (long)", "zero head (long)",
    ]  # fmt: skip
    assert "trained for as many steps as its run" in " ".join(said.split())
    lines_of_table(said)
    arguments = ["compare", *map(str, paths), "--out", out, "--tasks", "5"]
    assert main([*arguments, "--baselines", "--baseline-steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "trained for 2 steps" in " ".join(said.split())
    found = json.loads((Path(out) / "compare.json").read_text())["baselines"]
    assert [row["name"] for row in found] == ["from scratch", "fine-tuned", "zero head"]


def test_options_of_training_tasks_alone_do_not_matter(tmp_path: Path, pictures: None, capsys: Any) -> None:
    config = tiny_few_shot(tmp_path)
    task = replace(config.task, queries=3, test_queries=2, rotations=False)
    paths = [trained(tmp_path / "a", config), trained(tmp_path / "b", replace(config, task=task))]
    out = str(tmp_path / "compared")
    assert main(["compare", *map(str, paths), "--out", out, "--tasks", "5"]) == 0
    assert {row[0] for row in lines_of_table(capsys.readouterr().out) if row} >= {"a", "b"}


def test_what_does_not_compare_is_refused(tmp_path: Path, capsys: Any, pictures: None) -> None:
    config = tiny_few_shot(tmp_path)
    more = replace(config, task=replace(config.task, queries=3, test_queries=5))
    for name, one in {"a": tiny_sinusoid(tmp_path), "b": config, "c": more}.items():
        folder.create(replace(one, out=tmp_path / name), "test")
    refused = {
        ("a",): "compare: at least two runs are needed, got 1",
        ("a", "b"): "b differs from {}/a in recipe. Compare runs of one recipe",
        ("b", "c"): "c differs from {}/b in queries, test_queries. Compare runs of one recipe",
        ("b", "b", "--tasks", "1"): "compare: --tasks must be at least 2, got 1",
        ("b", "b", "--steps", "0,x"): "compare: --steps must be whole numbers of at least 0, got '0,x'",
    }
    for given, said in refused.items():
        paths = [str(tmp_path / word) if word in "abc" else word for word in given]
        assert main(["compare", *paths, "--out", str(tmp_path / "compared")]) == 1
        printed = capsys.readouterr().err
        assert said.format(tmp_path) in printed and printed.count("\n") == 1
    assert not (tmp_path / "compared").exists()


def test_tasks_that_diverge_are_named_in_the_table() -> None:
    found = [Estimate(0.5, 0.1), Estimate(float("nan"), float("nan")), Estimate(2e16, 4e16)]
    assert written(found, [0, 1, 2], "loss") == ["0.500 ± 0.100", "diverged", "diverged"]
