"""`fmeta train detection` on generated scenes, adaptation to a user's own pictures, average precision."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detection_problems import HEAD, as_coco, characters, problem, tiny_scenes, write_folder
from helpers import assert_trees_close
from torchvision.ops import FrozenBatchNorm2d

import fmeta
from fmeta.data import Pools
from fmeta.models.rcnn import with_norms_of
from fmeta.tasks.detection import batch_of
from fmeta.train import checkpoint, cli, commands
from fmeta.train.config import Config, Inner, Machine, Outer, Report
from fmeta.train.detection import data as detection_data
from fmeta.train.detection.adapting import (
    adapt_detector,
    adapt_heads,
    adapted_at,
    load_detector,
    make_algorithm,
    support_of,
)
from fmeta.train.detection.average_precision import average_precision
from fmeta.train.detection.baselines import fine_tuning
from fmeta.train.detection.config import DetectionTask
from fmeta.train.detection.recipe import train


def tiny_config(out: Path, **task: Any) -> Config[DetectionTask]:
    sizes = {"channels": 4, "head_width": 8, "width": 0.1, "size": 64, "scene_size": 64, "proposals": 6}
    few = {"scenes": 24, "scene_classes": 4, "ways": 2, "shots": 2, "queries": 1, "batch": 2, "test_shots": 2}
    return Config(
        recipe="detection",
        task=DetectionTask(detector="mobilenet", base_steps=3, **sizes, **(few | task)),  # type: ignore[arg-type]
        inner=Inner(algorithm="fomaml", inner_lr=0.01, inner_steps=2, test_steps=3),
        outer=Outer(tasks=2, outer_steps=4, outer_lr=1e-3),
        report=Report(log_interval=2, val_interval=2, val_tasks=2, test_tasks=2, baselines=False),
        machine=Machine(device="cpu"),
        out=out,
    )


@pytest.fixture(autouse=True)
def shapes_in_place_of_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters take seconds to draw."""

    def few() -> Any:
        pool = characters()
        return Pools(pool, replace(pool, names=tuple(f"v{n}" for n in pool.names)),
                     replace(pool, names=tuple(f"t{n}" for n in pool.names)))  # fmt: skip

    monkeypatch.setattr(detection_data, "glyphs", few)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run, which all of these tests look at."""
    path = tmp_path_factory.mktemp("runs") / "one"
    data = write_folder(tmp_path_factory.mktemp("data") / "set", count=18)
    with pytest.MonkeyPatch.context() as patch:
        pool = characters()
        pools = Pools(pool, replace(pool, names=tuple(f"v{n}" for n in pool.names)),
                      replace(pool, names=tuple(f"t{n}" for n in pool.names)))  # fmt: skip
        patch.setattr(detection_data, "glyphs", lambda: pools)
        patch.setenv("FMETA_CACHE", str(tmp_path_factory.mktemp("cache")))
        config = tiny_config(path, data=str(data), test=str(data), shots=1)
        assert train(config, "fmeta train detection") == 0
    return path


def test_a_run_leaves_checkpoints_results_and_pictures(trained: Path) -> None:
    for name in ("config.json", "metrics.jsonl", "base.safetensors", "best.safetensors", "last.safetensors"):
        assert (trained / name).stat().st_size > 0, name
    results = json.loads((trained / "results.json").read_text())
    assert set(results["sets"]) == {"scenes", "set"}
    for found in results["sets"].values():
        for when in ("before", "after"):
            assert len(found[when]["draws"]) == 2
            assert 0.0 <= found[when]["ap50"] <= 1.0
    for name in ("scenes", "set"):
        assert (trained / f"detections_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_goes_on_bit_for_bit(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path / "cache"))
    config = tiny_config(tmp_path / "whole")
    assert train(config, "") == 0
    parts = replace(
        config, out=tmp_path / "parts", outer=replace(config.outer, schedule="constant", outer_steps=2)
    )
    whole = replace(config, out=tmp_path / "constant", outer=replace(config.outer, schedule="constant"))
    assert train(whole, "") == 0
    assert train(parts, "") == 0
    assert train(replace(whole, out=tmp_path / "parts", resume=True), "") == 0
    states = [checkpoint.read(tmp_path / name / "last.safetensors")[0] for name in ("constant", "parts")]
    assert_trees_close(*states)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_base_training_that_is_stopped_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fmeta.train.detection.recipe.base_training", interrupted)
        assert train(tiny_config(tmp_path / "run"), "") == 130
    said = " ".join(capsys.readouterr().out.split())
    assert "starts anew" in said and f"--resume {tmp_path / 'run'}" in said


def test_the_command_line_runs_it_and_tests_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    options = (
        "--detector mobilenet --channels 4 --head-width 8 --width 0.1 --size 64 --scene-size 64 --proposals 6 "
        "--scenes 16 --scene-classes 3 --ways 2 --shots 1 --queries 1 --batch 2 --test-shots 1 --base-steps 2 "
        "--inner-steps 1 --test-steps 1 --tasks 1 --outer-steps 1 --val-tasks 1 --test-tasks 2 --algorithm anil "
        "--device cpu"
    )
    assert cli.main(["train", "detection", *options.split(), "--out", str(out)]) == 0, capsys.readouterr().err
    first = (out / "results.json").read_text()
    assert cli.main(["eval", str(out)]) == 0
    again = json.loads((out / "results.json").read_text())
    assert again["sets"] == json.loads(first)["sets"]
    assert "AP50" in capsys.readouterr().out


def test_the_list_of_runs_says_what_a_detector_reached(trained: Path) -> None:
    assert commands.outcome_of(trained).startswith("detection, fomaml: AP50 after adaptation scenes ")


def test_a_detector_is_adapted_to_new_pictures(trained: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", count=8)
    (tmp_path / "coco.json").write_text(json.dumps(as_coco(folder)))
    facts = adapt_detector(trained, tmp_path / "coco.json", folder / "images", tmp_path / "out", steps=6)
    assert facts == json.loads((tmp_path / "out" / "adapted.json").read_text())
    assert (tmp_path / "out" / "adapted.png").read_bytes().startswith(b"\x89PNG")
    assert facts["classes"] == ["a", "b"] and facts["loss"][1] < facts["loss"][0]
    weights, _ = checkpoint.read(tmp_path / "out" / "detector.safetensors")
    # An ordinary detector of torchvision's, of two classes.
    module = detection_data.built(load_detector(trained).config.task, weights)
    found = module([torch.rand(3, 40, 64)])[0]
    assert weights[f"{HEAD}.cls_score.bias"].shape == (3,) and set(found) == {"boxes", "labels", "scores"}
    words = [
        "adapt",
        str(trained),
        "--support",
        str(tmp_path / "coco.json"),
        "--steps",
        "6",
        "--dtype",
        "fp16",
    ]
    assert cli.main([*words, "--images", str(folder / "images"), "--out", str(tmp_path / "half")]) == 0
    half, _ = checkpoint.read(tmp_path / "half" / "detector.safetensors")
    sizes = [(tmp_path / name / "detector.safetensors").stat().st_size for name in ("half", "out")]
    assert 0.5 < sizes[0] / sizes[1] < 0.7  # names and counters take some
    for name, x in weights.items():
        kept = "running" in name or not x.is_floating_point()
        assert half[name].dtype == (x.dtype if kept else torch.float16), name
    rounded = {name: half[name].to(x.dtype) for name, x in weights.items()}
    again = detection_data.built(load_detector(trained).config.task, rounded)([torch.full((3, 40, 64), 0.5)])[
        0
    ]
    assert set(again) == {"boxes", "labels", "scores"}
    assert cli.main([*words, "--out", str(tmp_path / "half")]) == 1
    content = as_coco(folder)
    content["categories"].append({"id": 9, "name": "c"})
    (tmp_path / "coco.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="every class needs a box, got none of 'c'"):
        adapt_detector(trained, tmp_path / "coco.json", folder / "images", tmp_path / "out")


def test_a_run_is_not_taken_for_one_of_another_recipe(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", str(trained), str(trained)]) == 1
    assert "load: detection has runs of its own kind" in capsys.readouterr().err


def test_one_process_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(ValueError, match="train: detection runs in one process, got 2"):
        train(tiny_config(tmp_path / "run"), "")


def test_runs_that_do_not_fit(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        (trained / "config.json").read_text().replace('"detection"', '"sinusoid"')
    )
    with pytest.raises(ValueError, match="load: "):
        load_detector(tmp_path)
    for name in ("config.json", "base.safetensors"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    weights, record = checkpoint.read(trained / "best.safetensors")
    name = next(name for name in weights if name.endswith("fc6.weight"))
    checkpoint.save(tmp_path / "best.safetensors", {**weights, name: weights[name][:-1]}, record)
    with pytest.raises(
        ValueError, match=r"another architecture: meta.params.roi_heads.box_head.fc6.weight is missing"
    ):
        load_detector(tmp_path)
    config = tiny_config(tmp_path / "none")
    wrong = replace(config, inner=replace(config.inner, algorithm="cavia"))
    with pytest.raises(
        ValueError, match="detection takes --algorithm fomaml, maml, anil or reptile, got cavia"
    ):
        make_algorithm(problem()[0], wrong)
    for changed, said in (
        (wrong, "detection takes --algorithm"),
        (
            replace(config, task=replace(config.task, test="nowhere")),
            "nowhere.annotations.json must be a json",
        ),
        (
            replace(config, task=replace(config.task, shots=3_000)),
            r"pictures for training, of generated scenes",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            commands.train(changed, "fmeta train detection")
        assert not config.out.exists(), "before anything is trained or kept"
    with pytest.raises(ValueError, match="adapt_detector: steps must be at least 0, got -3"):
        folder = write_folder(tmp_path / "set", count=8)
        (tmp_path / "coco.json").write_text(json.dumps(as_coco(folder)))
        adapt_detector(trained, tmp_path / "coco.json", folder / "images", tmp_path / "out", steps=-3)


@pytest.mark.parametrize("name", ["fomaml", "maml", "anil", "reptile"])
def test_what_each_algorithm_adapts(name: Any) -> None:
    loss_fn, params, source = problem()
    config = tiny_config(Path("none"))
    algorithm = make_algorithm(loss_fn, replace(config, inner=replace(config.inner, algorithm=name)))
    adapted = algorithm.inner_loop.start(
        algorithm.init(params), batch_of(source, torch.tensor([1, 2]), torch.arange(8))
    )
    heads = {key.rsplit(".", 2)[0] for key in adapted}
    assert (heads == {HEAD}) == (name == "anil")


def test_adaptation_is_the_inner_loop_of_the_algorithm() -> None:
    loss_fn, params, source = problem()
    algorithm = fmeta.few_shot_detection(loss_fn, fmeta.sgd(0.05, momentum=0.9), steps=3)
    meta = algorithm.init(params)
    pool = source.pool
    support = support_of(source, torch.tensor([1, 2]), torch.arange(6), 3, 2)
    adapted = adapt_heads(algorithm, meta, support, 3)
    plan = fmeta.Plan(engine="autograd", tasks="loop")
    query = batch_of(source, torch.tensor([1, 2]), torch.arange(len(pool.files)))
    expected = fmeta.meta_eval(algorithm, plan, steps=3)(meta, [fmeta.Task(support, query)])["loss"]
    with torch.no_grad():
        found, _ = loss_fn({**meta["params"], **adapted.params}, query)
    assert_trees_close(found[None], expected)
    assert adapted.losses.shape == (3,)
    at = adapted_at(algorithm, meta, support, [0, 3])
    assert_trees_close(at[3].params, adapted.params)
    assert_trees_close(at[0].params, algorithm.inner_loop.start(meta, support))


@pytest.mark.parametrize("scores", ["linear", "cosine"])
def test_tfa_tunes_the_last_layer_only(scores: Any) -> None:
    loss_fn, params, source = problem()
    params = {name: value.float() for name, value in params.items()}
    loss_fn.detector.module.float()
    pool = replace(source.pool, boxes=source.pool.boxes.float())
    source = source._replace(pool=pool, features={n: level.float() for n, level in source.features.items()})
    algorithm, start = fine_tuning(
        loss_fn, params, fmeta.sgd(0.1, momentum=0.9), ways=2, seed=1, scores=scores
    )
    support = support_of(source, torch.tensor([1, 2]), torch.arange(8), 25, 4)
    adapted = adapt_heads(algorithm, start, support, 25)
    assert {name.rsplit(".", 1)[0] for name in adapted.params} == {f"{HEAD}.cls_score", f"{HEAD}.bbox_pred"}
    assert adapted.params[f"{HEAD}.cls_score.weight"].shape == (3, 8)
    assert adapted.losses[-5:].mean() < adapted.losses[:5].mean()
    kept = torch.equal(start[f"{HEAD}.cls_score.weight"][0], params[f"{HEAD}.cls_score.weight"][0])
    assert kept == (scores == "linear")
    x = {"features": source.maps(torch.arange(3)), "sizes": source.pool.sizes[:3]}
    found = algorithm.predict(start, adapted, x)
    assert len(found) == 3


# Average precision


def truth() -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[[0, 0, 10, 10], [20, 20, 40, 40]], [[5, 5, 25, 25], [0, 0, 0, 0]]]).float()
    return {"boxes": boxes, "labels": torch.tensor([[1, 2], [1, 0]])}


def found(row: int, score: float = 0.9, shift: float = 0.0) -> dict[str, torch.Tensor]:
    y = truth()
    keep = y["labels"][row] > 0
    labels = y["labels"][row][keep]
    return {
        "boxes": y["boxes"][row][keep] + shift,
        "labels": labels,
        "scores": torch.full(labels.shape, score),
    }


def test_average_precision_of_known_detections() -> None:
    y = truth()
    perfect = average_precision([found(0), found(1)], y, 2)
    assert (perfect.ap, perfect.ap50, perfect.classes) == (
        pytest.approx(1),
        pytest.approx(1),
        [pytest.approx(1)] * 2,
    )
    # The one object of class 2 is found, and one of two of class 1: a recall of one half at full precision.
    nothing = {name: value[:0] for name, value in found(0).items()}
    half = average_precision([found(0), nothing], y, 2)
    assert half.classes == [pytest.approx(51 / 101), pytest.approx(1)]  # 51 of COCO's 101 recalls are reached
    # A false alarm with a higher score halves the precision of what follows.
    alarm = {
        "boxes": torch.tensor([[50.0, 50, 60, 60]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.95]),
    }
    both = {name: torch.cat([found(0)[name], alarm[name]]) for name in alarm}
    assert average_precision([both, found(1)], y, 2).classes[1] == pytest.approx(0.5)
    # Moved by 2 of 10 or 20 pixels: an overlap of 0.47 and 0.68.
    moved = average_precision([found(0, shift=2.0), found(1, shift=2.0)], y, 2)
    assert moved.ap50 < 1 and moved.ap75 == 0
    assert average_precision([nothing, nothing], y, 2).ap50 == 0
    assert math.isnan(average_precision([found(0), found(1)], y, 3).classes[2])


def test_average_precision_of_wrong_input() -> None:
    with pytest.raises(ValueError, match="every picture needs predictions, got 1 for 2"):
        average_precision([found(0)], truth(), 2)
    empty = {"boxes": torch.zeros(1, 1, 4), "labels": torch.zeros(1, 1, dtype=torch.int64)}
    with pytest.raises(ValueError, match="pictures must show objects, got none with a box"):
        average_precision([found(0)], empty, 2)


def test_without_pycocotools_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ImportError, match=r"needs pycocotools.* pip install 'fmeta\[detection\]'"):
        average_precision([found(0), found(1)], truth(), 2)
    with pytest.raises(ImportError, match="needs pycocotools"):
        train(tiny_config(tmp_path / "run"), "")
    assert not (tmp_path / "run").exists()


def test_a_run_of_torchvisions_own_detector_is_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    task = DetectionTask()
    made = fmeta.models.faster_rcnn(weights=None)
    frozen = with_norms_of(made, {}, eps=1e-5)  # as torchvision builds it with COCO weights
    assert any(isinstance(layer, FrozenBatchNorm2d) for layer in frozen.modules())
    monkeypatch.setattr(detection_data, "faster_rcnn", lambda name, **options: frozen)
    assert detection_data.make_module(task) is frozen
    monkeypatch.undo()
    again, x = detection_data.built(task, dict(frozen.state_dict())), [torch.rand(3, 64, 64)]
    assert_trees_close(again.backbone(x[0][None]), frozen.backbone(x[0][None]))
    kept = detection_data.built(task, dict(fmeta.models.faster_rcnn(weights=None).state_dict()))
    assert not any(isinstance(layer, FrozenBatchNorm2d) for layer in kept.modules())


def test_scenes_of_a_run_have_scripts_of_their_own() -> None:
    sources = detection_data.load_sources(tiny_config(Path("none")).task)
    names = [set(part[0].names) for part in sources]
    assert not names[0] & names[1] and not names[1] & names[2]
    assert len(tiny_scenes(2).files) == 2
