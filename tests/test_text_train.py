"""The text recipe and what is done with its runs, on a tiny encoder."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_trees_equal
from safetensors.torch import load_file, save_file
from text_cases import LONGEST, save_encoder, sentences, tiny_bert, write_csv

import fmeta
from fmeta.train import commands
from fmeta.train.cli import main
from fmeta.train.config import Config
from fmeta.train.experiment import build
from fmeta.train.folder import keep, load_run
from fmeta.train.recipes import RECIPES
from fmeta.train.text import recipe as text
from fmeta.train.text.adapting import load_classifier, no_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "data.csv", sentences(20, 10))


def tiny(out: Path, data: Path | None, folder: Path, algorithm: Any = "protonet", **task: Any) -> Config[Any]:
    config = RECIPES["text"]()
    given: dict[str, Any] = {
        "data": data, "model": str(folder), "ways": 3, "queries": 3, "train_ways": None, "layers": 1, "rank": 2,
        "learns": "last",
        "max_length": LONGEST, "train_shots": None,
    }  # fmt: skip
    return replace(
        config,
        task=replace(config.task, **given | task),
        inner=replace(config.inner, algorithm=algorithm, inner_steps=2, test_steps=3),
        outer=replace(config.outer, tasks=2, outer_steps=4, outer_lr=1e-3),
        report=replace(config.report, log_interval=2, val_interval=2, val_tasks=4, test_tasks=6),
        machine=replace(config.machine, device="cpu"),
        out=out,
    )


def few(path: Path, shots: int = 2, labels: int = 2, seed: int = 5) -> tuple[Path, Path]:
    """A support and a query csv of labels that no training saw."""
    rows = sentences(labels, shots + 4, seed)
    part = lambda keep: [r for i, r in enumerate(rows) if (i % (shots + 4) < shots) == keep]  # noqa: E731
    return write_csv(path / "few.csv", part(True)), write_csv(path / "new.csv", part(False))


def test_from_the_command_line_to_predictions(
    tmp_path: Path, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    words = [
        "train", "text", "--data", str(data), "--model", str(folder), "--max-length", str(LONGEST), "--layers", "1",
        "--queries", "3", "--outer-steps", "60", "--outer-lr", "0.003", "--val-interval", "20", "--val-tasks", "20",
        "--test-tasks", "40", "--ways", "4", "--train-ways", "6", "--device", "cpu", "--out", run,
    ]  # fmt: skip
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "protonet minus it" in said and "Frozen encoder: as it came" in said
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"meta_learned", "frozen_encoder"} <= set(found["scores"])
    support, query = few(tmp_path, shots=3, labels=3)
    out = tmp_path / "deep" / "predictions.csv"
    assert main(["adapt", run, "--support", str(support), "--query", str(query), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "3 labels from 9 sentences; 12 predictions" in said and "accuracy " in said
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 12 and list(rows[0])[:4] == ["text", "predicted", "probability", "p(intent 0)"]
    for row in rows:
        shares = {name[2:-1]: float(p) for name, p in row.items() if name.startswith("p(")}
        assert abs(sum(shares.values()) - 1) < 2e-4 and row["predicted"] == max(
            shares, key=shares.__getitem__
        )
        assert float(row["probability"]) == max(shares.values())
    text = query.read_text(encoding="utf-8").splitlines()
    query.write_text(
        "\n".join([text[0], *(line.rsplit(",", 1)[0] + "," for line in text[1:])]), encoding="utf-8"
    )
    assert main(["adapt", run, "--support", str(support), "--query", str(query), "--out", str(out)]) == 0
    assert "accuracy " not in capsys.readouterr().out, "no label to compare with"
    assert list(csv.DictReader(out.read_text(encoding="utf-8").splitlines())) == rows
    assert main(["eval", run, "--no-baselines", "--test-tasks", "4"]) == 0


def test_training_teaches_the_encoder(tmp_path: Path, data: Path, folder: Path) -> None:
    """The tiny encoder has random weights: what it knows in the end, it learned."""
    config = tiny(tmp_path / "run", data, folder, learns="all", train_ways=5)
    config = replace(
        config,
        outer=replace(config.outer, outer_steps=150, outer_lr=3e-3, tasks=4),
        report=replace(config.report, val_interval=50, val_tasks=50, test_tasks=100),
    )
    assert commands.train(config, "fmeta train text") == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    gain = found["meta_learned_minus"]["frozen_encoder"]
    assert gain["mean"][0] > gain["interval_95"][0] > 0


@pytest.mark.parametrize("kept", [False, True])
def test_another_encoder_in_the_old_place_is_refused(tmp_path: Path, data: Path, kept: bool) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    config = tiny(tmp_path / "run", data, encoder)
    assert (
        commands.train(replace(config, report=replace(config.report, baselines=False)), "fmeta train text")
        == 0
    )
    path = config.out
    if kept:
        path = tmp_path / "kept"
        keep(config.out, path)
    load_run(path)
    weights = encoder / "model.safetensors"
    tensors = load_file(weights)
    tensors["embeddings.word_embeddings.weight"][0, 0] += 1  # of the frozen part
    save_file(tensors, weights, {"format": "pt"})
    texts = ["ba be", "bi bo", "bu ba"]
    for load in (load_run, lambda path: load_classifier(path).fit(texts, ["a", "b", "c"])):
        with pytest.raises(
            ValueError, match=f"load: {path} started from other pre-trained weights than {encoder}"
        ):
            load(path)


@pytest.mark.parametrize(
    ("algorithm", "options", "learned"),
    [
        ("protonet", {"learns": "lora"}, "*.lora_*"),
        ("protonet", {"learns": "adapters"}, "*.adapter.up.*"),
        ("mamlpp", {"learns": "adapters"}, "*.layer.1.output.dense.adapter.up.*"),
        ("protonet", {"learns": "head"}, "map"),
        ("protomaml", {"learns": "lora"}, "*.lora_*"),
        ("mamlpp", {"learns": "lora"}, "head"),
        ("anil", {"learns": "head"}, "head"),
        ("fomaml", {"learns": "last"}, "model.encoder.layer.1.*"),
        ("r2d2", {"learns": "last"}, "model.encoder.layer.1.*"),
    ],
)
def test_runs_of_every_kind_adapt_again(
    tmp_path: Path, data: Path, folder: Path, algorithm: str, options: dict[str, Any], learned: str
) -> None:
    """What a run predicts of new labels is what its algorithm does in a test task of the same sentences."""
    assert commands.train(tiny(tmp_path / "run", data, folder, algorithm, **options), "fmeta train text") == 0
    built, meta = load_run(tmp_path / "run", "last")
    start = fmeta.meta_init(built.algorithm, built.outer, built.params).meta
    changed = meta["params"] if "params" in meta else meta
    before = start["params"] if "params" in start else start
    moved = {n for n in changed if not torch.equal(changed[n], before[n])}
    assert set(fmeta.select(changed, learned)) & moved
    assert not any("layer.0" in n or "embeddings" in n for n in changed)
    known = sentences(3, 2, seed=9)
    asked = [t for t, _ in sentences(3, 4, seed=9)]
    learner = load_classifier(tmp_path / "run", "last")
    classifier = learner.fit(*zip(*known, strict=True))
    found = classifier.probabilities(asked)
    task = fmeta.Task(
        fmeta.Batch(learner.prepare([t for t, _ in known]), torch.arange(3).repeat_interleave(2)),
        fmeta.Batch(learner.prepare(asked), torch.zeros(12, dtype=torch.int64)),
    )
    steps = 0 if algorithm in ("protonet", "r2d2") else 3
    adapted = fmeta.adapt.__globals__["run"](built.algorithm.inner_loop, meta, task.support, steps)
    expected = built.algorithm.predict(meta, adapted, task.query.x).softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert list(classifier.predict(asked[:1])[0]) == ["intent 0", "intent 1", "intent 2"]
    assert classifier.predict([]) == []


def test_a_frozen_part_too_large_for_memory_runs_with_each_batch(
    tmp_path: Path, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, data, folder)
    once = build(config).family
    monkeypatch.setattr(text, "FITS", 0)
    each = build(config).family
    for name in ("train", "val", "test"):
        a, b = getattr(once, name)(0, 1), getattr(each, name)(0, 1)
        mask = a.query.x["attention_mask"][..., None]
        torch.testing.assert_close(
            a.query.x["hidden"] * mask, b.query.x["hidden"] * mask, atol=1e-5, rtol=1e-5
        )
    pooled = once.pooled(0, 0)
    assert pooled.query.y.shape[0] == 1 and int(pooled.query.y.max()) < once.pooled_outputs


def test_the_model_may_have_moved(tmp_path: Path, data: Path, folder: Path) -> None:
    here = save_encoder(tmp_path / "here")
    assert commands.train(tiny(tmp_path / "run", data, here), "fmeta train text") == 0
    moved = here.rename(tmp_path / "there")
    support, query = few(tmp_path)
    words = ["adapt", str(tmp_path / "run"), "--support", str(support), "--query", str(query)]
    words += ["--out", str(tmp_path / "p.csv")]
    assert main(words) == 1
    assert main([*words, "--model", str(moved)]) == 0


def test_what_cannot_be_trained_is_refused(tmp_path: Path, data: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"train: text needs a csv of text,label. Give it with --data FILE"):
        build(tiny(tmp_path, None, folder))
    small = save_encoder(tmp_path / "small", tiny_bert(words=50))
    with pytest.raises(
        ValueError, match=r"train: the tokenizer of .* has 105 tokens, but its model knows 50"
    ):
        build(tiny(tmp_path, data, small))
    with pytest.raises(ValueError, match="few_shot: ways must be at most the 4 classes"):
        build(tiny(tmp_path, data, folder, ways=5, train_ways=5))
    with pytest.raises(ValueError, match="train: --layers must be at least 1, got 0"):
        build(tiny(tmp_path, data, folder, layers=0))


def test_broken_model_folders_are_refused(tmp_path: Path, data: Path, folder: Path) -> None:
    """Without its tokenizer's files transformers makes one that knows no word."""
    bare = shutil.copytree(folder, tmp_path / "bare")
    for file in [*bare.glob("tokenizer*"), *bare.glob("vocab*"), *bare.glob("special*")]:
        file.unlink()
    with pytest.raises(ValueError, match=r"load_tokenizer: .*bare must"):
        build(tiny(tmp_path, data, bare))
    torn = shutil.copytree(folder, tmp_path / "torn")
    file = torn / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(
        ValueError, match=r"encoder: .*torn must be a folder as transformers' save_pretrained"
    ):
        build(tiny(tmp_path, data, torn))


def test_runs_that_learn_differently_are_compared(
    tmp_path: Path, run: Path, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path / "last", data, folder, learns="last", train_ways=4)
    assert commands.train(config, "fmeta train text") == 0
    assert (
        main(["compare", str(run), str(tmp_path / "last"), "--tasks", "5", "--out", str(tmp_path / "c")]) == 0
    )
    other = tiny(tmp_path / "other", data, folder, shots=2)
    assert commands.train(other, "fmeta train text") == 0
    assert (
        main(["compare", str(run), str(tmp_path / "other"), "--tasks", "5", "--out", str(tmp_path / "d")])
        == 1
    )
    assert "differs from" in (error := capsys.readouterr().err) and "in shots" in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dtype", "fp16"], "adapt: --dtype is for runs of detection, got a run of text"),
        (["--steps", "3"], "adapt: --steps is for runs of detection"),
        (["--root", "."], "adapt: --root is for runs of pictures"),
    ],
)
def test_options_of_other_recipes_are_refused(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    support, query = few(tmp_path)
    assert main(["adapt", str(run), "--support", str(support), "--query", str(query), *words]) == 1
    assert said in capsys.readouterr().err


def test_what_leaves_a_text_run(tmp_path: Path, run: Path, data: Path, folder: Path) -> None:
    for words, said in (
        ({"what": "adapted"}, "an adapted model of a text run is not written"),
        (
            {"what": "meta", "root": "gone.csv"},
            "the data of the run must be .* no file gone.csv. Say .* --root",
        ),
    ):
        with pytest.raises((ValueError, NotImplementedError), match=f"export: {said}"):
            fmeta.export(run, tmp_path / "x.safetensors", **words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"export: a file of 'meta' must end in .safetensors, got x.pt"):
        fmeta.export(run, tmp_path / "x.pt", what="meta")
    with pytest.raises(FileNotFoundError, match=r"weights.save: there is no folder .*none for x.safetensors"):
        fmeta.export(run, tmp_path / "none" / "x.safetensors", what="meta")
    fmeta.export(run, tmp_path / "x.safetensors", what="meta")
    moved = tmp_path / "moved.csv"
    moved.write_bytes(data.read_bytes())
    assert (
        main(
            ["export", str(run), str(tmp_path / "moved.safetensors"), "--what", "meta", "--root", str(moved)]
        )
        == 0
    )
    assert_trees_equal(*(fmeta.weights.read(tmp_path / f"{name}.safetensors") for name in ("moved", "x")))
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert commands.train(tiny(tmp_path / "last", data, folder), "fmeta train text") == 0
    with pytest.raises(NotImplementedError, match="a text run that learns last takes tokens"):
        fmeta.export(tmp_path / "last", tmp_path / "x.pt2")


def test_texts_that_lose_their_end_are_told_of(run: Path) -> None:
    learner = load_classifier(run)
    with pytest.warns(fmeta.MetaLearningWarning, match=r"adapt: 1 of 2 texts are longer than the"):
        learner.fit(["ba ce " * 100, "ce"], ["a", "b"])
    for wrong in ("ba", ["ba", 3]):
        with pytest.raises(TypeError, match=r"adapt: texts must be a list of str"):
            learner.fit(wrong, ["a", "b"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path, folder: Path) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert commands.train(tiny(path, data, folder, "fomaml", learns="head"), "fmeta train text") == 0
    return path


@pytest.mark.parametrize(
    ("support", "query", "said"),
    [
        ("text,label\nba,a\nce,b\n", "text,label\nba,a\nce,c\n", "every label of .* needs an example .* none of 'c'"),
        ("text,label\nba,a\nce,b\n", "text,label\nba,d\nce,c\n", "got none of 'c' and 1 more. Add one, or leave"),
        ("text,label\nba,a\nce,a\n", "text\nba\n", "at least 2 kinds, got 2 examples and 2 labels of 1 kinds"),
        ("text,label\nba,a\nce,b\ndi,c\nfo,d\n", "text\nba\n", r"a head of 3 outputs \(fomaml\), got 4 labels"),
        ("text\nba\n", "text\nba\n", "must have a column 'label'"),
        ("text,label\nba,a\nce,b\n", "words\nba\n", "must have a column 'text'"),
        ("text,label\nba,a\n,b\n", "text\nba\n", "line 3: text is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_adapted_to_is_refused(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], support: str, query: str, said: str
) -> None:
    (tmp_path / "s.csv").write_text(support)
    (tmp_path / "q.csv").write_text(query)
    words = ["adapt", str(run), "--support", str(tmp_path / "s.csv"), "--query", str(tmp_path / "q.csv")]
    assert main([*words, "--out", str(tmp_path / "p.csv")]) == 1
    error = capsys.readouterr().err
    assert pytest.importorskip("re").search(f"fmeta: adapt: .*{said}", error), error
    assert not (tmp_path / "p.csv").exists()


def test_other_runs_have_no_sentences(tmp_path: Path, run: Path) -> None:
    from tiny_runs import tiny_sinusoid

    from fmeta.train import folder as folders

    folders.create(tiny_sinusoid(tmp_path / "sine"), "fmeta train sinusoid")
    with pytest.raises(
        ValueError, match=r"adapt: .*sine must be a run of the text recipe, got one of sinusoid"
    ):
        load_classifier(tmp_path / "sine")
    with pytest.raises(ValueError, match="adapt: there is no file"):
        from fmeta.train.text.adapting import adapt_text

        few_csv, _ = few(tmp_path)
        adapt_text(run, few_csv, tmp_path / "none.csv", tmp_path / "p.csv")
    with pytest.raises(ValueError, match="adapt: a run that is put to use has no tasks of its own"):
        no_tasks(0, 0)
