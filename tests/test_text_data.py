"""Texts from a csv: what is read, how it is tokenised, padded, divided and cut, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from text_cases import LONGEST, save_encoder, sentences, tiny_bert, write_csv

import fmeta
from fmeta.data import class_pool, load_tokenizer, prepared_pool, text_csv
from fmeta.data.tokens import tokenise, trim
from fmeta.tasks import few_shot, prepared, trimmed, umtra
from fmeta.types import MetaLearningWarning


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "data.csv", sentences(10, 6))


def test_texts_become_ids_with_a_mask(data: Path, folder: Path) -> None:
    pools = text_csv(data, folder, split=(0.5, 0.2, 0.3), max_length=LONGEST)
    assert [len(p.names) for p in (pools.train, pools.val, pools.test)] == [5, 2, 3]
    assert "input_ids=int64[30, 10]" in repr(pools.train)
    own = load_tokenizer(folder)
    by_name = dict.fromkeys(name for _, name in sentences(10, 6))
    texts = {name: [t for t, n in sentences(10, 6) if n == name] for name in by_name}
    for pool in (pools.train, pools.test):
        for i, name in enumerate(pool.names):
            rows = pool.rows[i, : pool.counts[i]]
            for row, text in zip(rows.tolist(), texts[name], strict=True):
                ids, mask = pool.x["input_ids"][row], pool.x["attention_mask"][row]
                assert ids[mask.bool()].tolist() == own(text)["input_ids"]
                assert (ids[~mask.bool()] == own.pad_token_id).all()


def test_without_a_tokenizer_texts_are_bytes(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "d.csv", [["é!", "a"], ["x", "b"], ["yy", "c"]])
    pools = text_csv(path, split={"a": "train", "b": "val", "c": "test"})
    assert pools.train.x["input_ids"].tolist() == [[b + 3 for b in "é!".encode()] + [1]]
    assert pools.val.x["input_ids"].tolist() == [[ord("x") + 3, 1, 0, 0]]
    assert pools.val.x["attention_mask"].tolist() == [[1, 1, 0, 0]]


def test_long_texts_lose_their_end_and_are_counted(tmp_path: Path, folder: Path) -> None:
    path = write_csv(tmp_path / "d.csv", [["ba " * 9, "a"], ["ba " * 8, "b"], ["ba", "c"]])
    with pytest.warns(MetaLearningWarning, match="text_csv: 1 of 3 texts are longer than 10 tokens and lost"):
        pools = text_csv(path, folder, split={"a": "train", "b": "val", "c": "test"}, max_length=10)
    own = load_tokenizer(folder)
    assert pools.train.x["input_ids"][0].tolist() == own("ba " * 8)["input_ids"]  # the end mark stays
    with pytest.warns(MetaLearningWarning, match="2 of 3 texts are longer than 5 tokens"):
        cut = text_csv(path, split={"a": "train", "b": "val", "c": "test"}, max_length=5)
    assert cut.train.x["input_ids"][0].tolist() == [ord(c) + 3 for c in "ba b"] + [1]


def test_a_split_in_a_column_or_a_file(tmp_path: Path) -> None:
    rows = [["x", "a", "train"], ["y", "b", "valid"], ["z", "c", "test"], ["w", "a", "train"]]
    path = write_csv(tmp_path / "d.csv", rows, ("text", "label", "part"))
    pools = text_csv(path, split="part")
    assert (pools.train.names, pools.val.names, pools.test.names) == (("a",), ("b",), ("c",))
    split = tmp_path / "splits.json"
    split.write_text(json.dumps({"one": {"fold1": {"train": ["a"], "valid": ["c"], "test": ["b"]}}}))
    assert text_csv(path, split=split, fold="one/fold1").test.names == ("b",)
    split.write_text(json.dumps({"a": "train", "c": "test"}))
    with pytest.warns(MetaLearningWarning, match="1 texts of classes without a split are left out: b"):
        found = text_csv(path, split=str(split))
    assert (found.train.names, found.val.names, found.test.names) == (("a",), (), ("c",))


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("", {}, r"must have a column 'text', got \[\]"),
        ("text,label\n", {}, "must have lines behind the names of its columns"),
        ("text,class\nx,a\n", {}, r"must have a column 'label', got \['text', 'class'\]"),
        ("text,label\nx,a\n,b\n", {}, "line 3: text is empty"),
        ("text,label\nx,a\ny, \n", {}, "line 3: label is empty"),
        ("text,label\nx,a\ny,z,b\n", {}, "line 3: expected 2 cells, got 3. Put texts with commas in double quotes"),
        ('text,label\n"x\ny",a\nz\n', {}, "line 4: expected 2 cells, got 1"),
        ('text,label\nx,a\n"y,b\n', {}, "line 3: unexpected end of data"),
        ("text,label\nx,a\ny,a\n", {}, "must hold at least 2 classes, got 1 in column 'label'"),
        ("text,label\nx,a\ny,b\n", {"max_length": 2}, "max_length must be an int of at least 3 or None, got 2"),
        ("text,label,s\nx,a,train\ny,a,test\n", {"split": "s"}, "a class must be in one split, but column 's'"),
        ("text,label,s\nx,a,train\ny,b,tset\n", {"split": "s"}, "must be 'train', 'val' or 'test', got 'tset'"),
        ("text,label\nx,a\ny,b\n", {"split": "none.json"}, "split must be a column or a JSON file, but none.json"),
        ("text,label\nx,a\ny,b\n", {"split": "s.json", "fold": "two"}, "fold must lead .* at 'two' there is 'one'"),
        ("text,label\nx,a\ny,b\n", {"split": "s.json"}, r"must hold \{class: split\} or .* got one"),
        ("text,label\nx,a\ny,b\n", {"split": "s.json", "fold": "one"}, "split names 1 classes that .* lacks, 'q'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, options: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.csv").write_text(content)
    (tmp_path / "s.json").write_text(json.dumps({"one": {"train": ["a", "b"], "test": ["q"]}}))
    with pytest.raises(ValueError, match=f"text_csv: .*{said}"):
        text_csv("d.csv", **options)


def test_a_file_must_be_there_and_in_utf8(tmp_path: Path, folder: Path, data: Path) -> None:
    with pytest.raises(
        ValueError, match=r"text_csv: there is no file .*none.csv. Give a csv with columns text, label"
    ):
        text_csv(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("text,label\ncafé,a\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"text_csv: .* must be a csv in UTF-8, but 'utf-8' codec can't decode"
    ):
        text_csv(tmp_path / "latin.csv")
    with pytest.raises(
        ValueError, match=f"max_length must be at most the {LONGEST} tokens that the model takes, got 30"
    ):
        text_csv(data, folder, max_length=30)
    with pytest.raises(
        TypeError, match="text_csv: tokenizer must be one of transformers with a pad token, got object"
    ):
        text_csv(data, object())  # type: ignore[arg-type]


def test_tasks_of_texts(data: Path, folder: Path) -> None:
    pools = text_csv(data, folder, split=(0.5, 0.2, 0.3), max_length=LONGEST)
    sampler = few_shot(pools.train, ways=3, shots=1, queries=2, tasks=4)
    task = sampler(0, 0)
    assert task.support.x["input_ids"].shape == (4, 3, 10) and task.query.y.shape == (4, 6)
    short = trimmed(sampler, (6, 8, 10))(0, 0)
    for whole, cut in zip(task, short, strict=True):
        longest = int(whole.x["attention_mask"].sum(-1).max())
        length = cut.x["input_ids"].shape[-1]
        assert length == min(n for n in (6, 8, 10) if n >= longest)
        assert torch.equal(whole.x["input_ids"][..., :length], cut.x["input_ids"])
        assert int(whole.x["attention_mask"][..., length:].sum()) == 0
    assert trim(torch.ones(2, 3)).shape == (2, 3)
    with pytest.raises(
        ValueError, match=r"few_shot: augment needs images .* got x of \['input_ids', 'attention_mask'\]"
    ):
        few_shot(pools.train, ways=3, shots=1, queries=2, tasks=4, augment="rotations")
    with pytest.raises(TypeError, match="umtra: pool must be a Pool of pictures"):
        umtra(pools.train, ways=2, tasks=1, augment="affine")


def test_the_frozen_part_sees_every_text_once_or_every_batch(data: Path, folder: Path) -> None:
    pools = text_csv(data, folder, split=(0.5, 0.2, 0.3), max_length=LONGEST)
    lower, _ = fmeta.models.part(fmeta.models.encoder(folder), 1)
    sizes: dict[str, Any] = {"ways": 3, "shots": 1, "queries": 2, "tasks": 4}
    seen: list[int] = []

    def counted(x: Any) -> Any:
        seen.append(len(x["input_ids"]))
        assert not torch.is_grad_enabled()
        return lower(x)

    ahead = prepared_pool(pools.train, counted, batch=7)
    assert sum(seen) == 30 and max(seen) == 7
    once, each = (
        trimmed(few_shot(ahead, **sizes))(0, 3),
        trimmed(prepared(few_shot(pools.train, **sizes), lower))(0, 3),
    )
    for a, b in zip(once, each, strict=True):
        assert a.x["hidden"].shape == (*a.y.shape, a.x["attention_mask"].shape[-1], 16)
        mask = a.x["attention_mask"][..., None]
        torch.testing.assert_close(a.x["hidden"] * mask, b.x["hidden"] * mask, atol=1e-5, rtol=1e-5)
        assert torch.equal(a.y, b.y)
    embed = fmeta.models.encoder(tiny_bert())
    features = prepared_pool(pools.test, lambda x: embed(**x), batch=5)
    torch.testing.assert_close(features.x, embed(**pools.test.x).detach(), atol=1e-5, rtol=1e-5)


def test_a_dict_needs_a_row_an_example() -> None:
    x = {"a": torch.ones(3, 2), "b": torch.ones(2)}
    with pytest.raises(
        ValueError, match=r"class_pool: x and y must have one row an example, got x of shape \[2\]"
    ):
        class_pool(x, torch.zeros(3, dtype=torch.int64), ("one",))
    with pytest.raises(
        TypeError, match="class_pool: x must be a tensor of uint8 or floating numbers, got dict"
    ):
        class_pool({"a": 1}, torch.zeros(3, dtype=torch.int64), ("one",))


@pytest.mark.data
def test_the_published_splits_of_two_data_sets(data_root: Path) -> None:
    path = data_root / "text_intent"
    split = path / "class_splits_protaugment.json"
    with pytest.warns(MetaLearningWarning):
        banking = text_csv(path / "banking77.csv", split=split, fold="banking77/fold3", max_length=100)
    assert [len(p.names) for p in (banking.train, banking.val, banking.test)] == [25, 25, 27]
    with pytest.warns(MetaLearningWarning, match="1,200 texts of classes without a split are left out: oos"):
        clinc = text_csv(path / "clinc150.csv", split=split, fold="clinc150/fold1", max_length=None)
    assert [len(p.names) for p in (clinc.train, clinc.val, clinc.test)] == [50, 50, 50]
    assert clinc.train.counts.tolist() == [150] * 50


def test_texts_given_one_by_one_are_those_of_the_pool(folder: Path) -> None:
    one = tokenise("demo", ["ba ce", "di"], folder, None)
    assert one.cut == 0 and one.x["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
