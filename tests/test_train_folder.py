"""The run folder: metrics, config, resuming bit for bit, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_trees_equal
from tiny_runs import losses, tiny_few_shot, tiny_sinusoid

from fmeta.train import commands, experiment, folder
from fmeta.train.config import Inner, Machine, Outer, Report
from fmeta.train.logging import open_metrics, read_metrics
from fmeta.train.loop import Hooks
from fmeta.train.options import ABOVE_ZERO, AT_LEAST, check, from_json, options, to_json
from fmeta.train.recipes import RECIPES
from fmeta.train.run import first_state, run
from fmeta.types import Batch, Task


def test_metrics_are_json_lines_and_events(tmp_path: Path) -> None:
    writer = open_metrics(tmp_path)
    writer.write("train", 10, {"loss": 0.5, "accuracy": math.nan})
    writer.write("validation", 10, {"loss": 0.25})
    writer.close()
    assert read_metrics(tmp_path) == [
        {"step": 10, "kind": "train", "loss": 0.5, "accuracy": None},
        {"step": 10, "kind": "validation", "loss": 0.25},
    ]
    assert event_values(tmp_path, "train/loss") == [(10, 0.5)]


def test_resumed_metrics_continue_without_duplicates(tmp_path: Path) -> None:
    writer = open_metrics(tmp_path)
    for step in (10, 20, 30):
        writer.write("train", step, {"loss": float(step)})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 40, "ki')  # killed while writing
    writer = open_metrics(tmp_path, step=20)
    writer.write("train", 30, {"loss": 31.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (10, 10.0),
        (20, 20.0),
        (30, 31.0),
    ]
    assert event_values(tmp_path, "train/loss") == [(10, 10.0), (20, 20.0), (30, 31.0)]


def event_values(path: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "events"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_config_comes_back_from_json() -> None:
    for recipe in RECIPES.values():
        config = replace(recipe(), out=Path("somewhere"))
        saved = json.loads(json.dumps(to_json(config)))
        assert from_json(recipe(), saved, "config.json") == config


def test_config_of_another_version_is_refused() -> None:
    saved = to_json(RECIPES["sinusoid"]())
    saved["outer"]["momentum"] = 0.9
    with pytest.raises(
        ValueError, match=r"config\.json has an option 'momentum' that this version of fmeta does not"
    ):
        from_json(RECIPES["sinusoid"](), saved, "config.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"outer": Outer(outer_steps=0)}, "--outer-steps must be at least 1, got 0"),
        ({"inner": Inner(inner_lr=0.0)}, "--inner-lr must be above 0, got 0.0"),
        ({"report": Report(test_tasks=1)}, "--test-tasks must be at least 2, got 1"),
        ({"outer": Outer(seed=1_000_000)}, "--seed must be below 1,000,000, got 1000000"),
    ],
)
def test_options_out_of_range_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"train: {said}"):
        check(replace(RECIPES["sinusoid"](), **change))


def test_every_numeric_option_has_a_range() -> None:
    known = {*AT_LEAST, *ABOVE_ZERO, "target"}
    for recipe in RECIPES.values():
        numbers = {
            n for n, v in options(recipe()).items() if isinstance(v, int | float) and not isinstance(v, bool)
        }
        assert numbers <= known, f"{numbers - known} of {recipe.__name__} have no range"


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_resumed_run_equals_one_never_stopped_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for path in (whole, parts):
        folder.create(tiny_sinusoid(path), "test")
    run(whole, experiment.build(tiny_sinusoid(whole)))
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        assert run(parts, experiment.build(tiny_sinusoid(parts))).reason == "interrupted"
    torch.rand(7)  # a new process has another random state
    assert run(parts, experiment.build(tiny_sinusoid(parts))).reason == "steps"
    built = experiment.build(tiny_sinusoid(whole))
    for name in ("best", "last"):
        state, progress, record = folder.load(whole, name, built)
        again, progress_again, record_again = folder.load(parts, name, built)
        assert_trees_equal(again, state)
        assert progress_again._replace(wall_s=0.0) == progress._replace(wall_s=0.0)
        assert record_again["random_state"] == record["random_state"]
    assert losses(parts) == losses(whole)


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Ask the next run to stop after this many steps, as Ctrl-C does."""
    from fmeta.train import run as module

    plain = module.make_hooks

    def hooks(*args: Any) -> Hooks:
        made, count = plain(*args), []
        return made._replace(
            stepped=lambda step: (count.append(step), made.stepped(step))[1],
            interrupted=lambda: len(count) >= steps,
        )

    patch.setattr(module, "make_hooks", hooks)


def test_resuming_keeps_what_determines_the_run(tmp_path: Path) -> None:
    path = folder.create(tiny_sinusoid(tmp_path / "run"), "test")
    asked = replace(tiny_sinusoid(path, outer_lr=0.5), resume=True)
    with pytest.raises(
        ValueError, match=r"keeps the options .* got another --outer-lr \(was 0.01, now 0.5\)"
    ):
        commands.train(asked, "test")
    with pytest.raises(ValueError, match=r"got another --outer-steps \(was 6, now 12\)"):
        commands.train(replace(tiny_sinusoid(path, outer_steps=12), resume=True), "test")
    with pytest.raises(ValueError, match="is a run of sinusoid, got glyphs"):
        commands.train(replace(tiny_few_shot(path), resume=True), "test")
    with pytest.raises(ValueError, match="--resume needs to know the run"):
        commands.train(replace(asked, out=None), "test")
    with pytest.raises(ValueError, match="holds a run already"):
        commands.train(tiny_sinusoid(path), "test")


def test_more_steps_at_a_constant_rate_are_no_other_run(tmp_path: Path) -> None:
    long, short = tmp_path / "long", tmp_path / "short"
    for path, steps in ((long, 6), (short, 3)):
        config = tiny_sinusoid(path, schedule="constant", outer_steps=steps)
        config = replace(config, report=replace(config.report, baselines=False))
        assert commands.train(config, "test") == 0
    assert (
        commands.train(replace(config, resume=True, outer=replace(config.outer, outer_steps=6)), "test") == 0
    )
    built = experiment.build(folder.read_config(long))
    assert_trees_equal(folder.load(short, "last", built)[0], folder.load(long, "last", built)[0])


def test_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    path = folder.create(tiny_sinusoid(tmp_path / "run"), "test")
    run(path, experiment.build(tiny_sinusoid(path)))
    other = tiny_sinusoid(path)
    folder.write_config(path, replace(other, task=replace(other.task, hidden=(6, 6))), "test")
    with pytest.raises(ValueError, match=r"another architecture\. missing: meta\.layers\.1\.weight"):
        folder.load_run(path)


def test_run_without_a_best_checkpoint_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder.create(tiny_sinusoid(tmp_path / "run"), "test")
    stop_after(monkeypatch, 2)
    run(path, experiment.build(tiny_sinusoid(path)))
    with pytest.raises(ValueError, match=r"has no best checkpoint, .* Resume it, or use --checkpoint last"):
        folder.load_run(path)
    assert folder.load(path, "last", experiment.build(tiny_sinusoid(path)))[1].step == 2


def test_run_without_a_config_or_with_a_damaged_one_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"nothing is not a run folder: it has no config\.json\. `fmeta train"
    ):
        folder.read_config(Path("nothing"))
    folder.create(tiny_sinusoid(Path("runs/a")), "test")
    with pytest.raises(ValueError, match="The latest run here is runs/a"):
        folder.read_config(Path("nothing"))
    Path("runs/a/config.json").write_text('{"config": {"recipe"')
    with pytest.raises(ValueError, match=r"config\.json is damaged \(JSONDecodeError"):
        folder.read_config(Path("runs/a"))


def test_diverging_run_names_task_and_inner_step_and_keeps_its_best(tmp_path: Path) -> None:
    path = tmp_path / "run"
    config = tiny_sinusoid(path, outer_steps=8)
    folder.create(config, "test")
    built = experiment.build(config)
    calm = built.family.train

    def sampler(seed: int, step: int) -> Task:
        task = calm(seed, step)
        if step < 4:
            return task
        bad = task.support.x.clone()
        bad[2, 1] = math.inf
        return Task(Batch(bad, task.support.y), task.query)

    built = built._replace(family=built.family._replace(train=sampler))
    built = built._replace(config=replace(config, stop=replace(config.stop, max_bad_steps=3)))
    outcome = run(path, built)
    assert (outcome.reason, outcome.progress.first_bad) == ("diverged", (2, 0))
    from fmeta.train.run import divergence

    said = divergence(path, outcome.progress)
    assert "got 3 steps in a row that were not finite, up to step 8" in said
    assert "task 2 went bad first, at inner step 0" in said
    assert "The best checkpoint in" in said and "of step 6, is intact" in said
    assert folder.load(path, "best", built)[1].step == 6


def test_wrong_device_and_impossible_algorithm_are_refused(tmp_path: Path) -> None:
    config = tiny_sinusoid(tmp_path)
    with pytest.raises(ValueError, match="--device must be auto, cpu, cuda or cuda:N, got 'gpu0'"):
        experiment.build(replace(config, machine=Machine(device="gpu0")))
    with pytest.raises(ValueError, match=r"--device is cuda:99, but torch sees \d+ CUDA devices"):
        experiment.build(replace(config, machine=Machine(device="cuda:99")))
    with pytest.raises(ValueError, match="protonet needs classes, got a regression recipe"):
        experiment.build(replace(config, inner=Inner(algorithm="protonet")))
    with pytest.raises(ValueError, match="cavia needs a model with context parameters"):
        experiment.build(replace(tiny_few_shot(tmp_path), inner=Inner(algorithm="cavia")))


def test_a_run_may_start_from_what_another_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole run or one that was kept; rates and steps begin anew, and the folder it came from may go."""
    quiet = replace(tiny_sinusoid(tmp_path).report, baselines=False)
    first = replace(tiny_sinusoid(tmp_path / "first"), report=quiet)
    assert commands.train(first, "test") == 0
    folder.keep(tmp_path / "first", tmp_path / "kept")
    built = experiment.build(folder.read_config(tmp_path / "first"))
    learned = folder.load(tmp_path / "first", "best", built)[0].meta
    ends = []
    for name in ("first", "kept"):
        config = replace(first, out=tmp_path / f"after {name}", start=tmp_path / name)
        config = replace(config, outer=replace(config.outer, seed=1, outer_steps=3))
        state = first_state(experiment.build(config))
        assert_trees_equal(state.meta, learned)
        assert int(state.step) == 0
        assert commands.train(config, "test") == 0
        ends.append(folder.load(tmp_path / f"after {name}", "last", built)[0])
    assert_trees_equal(*ends)
    assert f"from what {tmp_path / 'kept'} learned to step 3" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "kept")
    assert commands.evaluate(tmp_path / "after kept", "test", baselines=False) == 0


def test_what_a_run_cannot_start_from(tmp_path: Path) -> None:
    first = tiny_sinusoid(tmp_path / "first")
    assert commands.train(replace(first, report=replace(first.report, baselines=False)), "test") == 0
    other = replace(first, out=tmp_path / "other", start=tmp_path / "first")
    sgd = replace(other, inner=replace(other.inner, algorithm="metasgd"))
    for config in (sgd, replace(other, task=replace(other.task, hidden=(5,)))):
        with pytest.raises(
            ValueError, match=r"^train: --start needs a run of the same model and algorithm, got"
        ):
            commands.train(config, "test")
    with pytest.raises(ValueError, match="is not a run folder"):
        commands.train(replace(other, start=tmp_path / "nothing"), "test")
    with pytest.raises(ValueError, match=r"--start is for recipes other than detection"):
        commands.train(replace(other, recipe="detection"), "test")
    assert not (tmp_path / "other").exists()
