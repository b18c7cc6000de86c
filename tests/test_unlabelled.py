"""Tasks without labels (UMTRA), and regression tasks from a csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import random_pictures

import fmeta
from fmeta.data import csv_families
from fmeta.tasks import regression, umtra


def test_pictures_are_classes_and_their_changed_copies_are_queries() -> None:
    pool = random_pictures().train
    negative: Any = lambda x, random: 1 - x  # noqa: E731
    task = umtra(pool, ways=3, tasks=4, shots=2, queries=2, augment=negative)(0, 5)
    assert task.support.x.shape[:2] == task.query.x.shape[:2] == (4, 6)
    assert task.support.y[0].tolist() == [0, 0, 1, 1, 2, 2]
    plain = task.support.x[:, ::2]
    assert torch.equal(task.support.x[:, 1::2], 1 - plain) and torch.equal(task.query.x[:, ::2], 1 - plain)
    known = pool.x.float().div(255).flatten(1) if pool.x.dtype == torch.uint8 else pool.x.flatten(1)
    for row in plain.flatten(0, 1).flatten(1):
        assert (known == row).all(1).any()
    for pictures in plain:
        assert len({tuple(p.flatten().tolist()) for p in pictures}) == 3


def test_umtra_is_pure_and_refuses_what_it_cannot_use() -> None:
    pool = random_pictures().train
    sampler = umtra(pool, ways=2, tasks=2, augment="affine")
    assert torch.equal(sampler(1, 2).query.x, sampler(1, 2).query.x)
    assert not torch.equal(sampler(1, 2).query.x, sampler(1, 3).query.x)
    with pytest.raises(ValueError, match="umtra: augment must change single pictures, got 'rotations'"):
        umtra(pool, ways=2, tasks=1, augment="rotations")
    with pytest.raises(ValueError, match="umtra: ways must be at most the"):
        umtra(pool, ways=10_000, tasks=1, augment="affine")
    with pytest.raises(TypeError, match="umtra: pool must be a Pool of pictures"):
        umtra(pool.x, ways=2, tasks=1, augment="affine")  # type: ignore[arg-type]


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def family(path: Path, tasks: int = 10) -> Path:
    lines = [f"{t},{i},{t * 0.5},{t + 2 * i}" for t in range(tasks) for i in range(3 + t % 4)]
    return written(path, "task,time,dose,y\n" + "\n".join(lines) + "\n")


def test_a_csv_is_divided_by_task_and_standardised(tmp_path: Path) -> None:
    found = csv_families(family(tmp_path / "f.csv"))
    sizes = [len(part.names) for part in (found.train, found.val, found.test)]
    assert sizes == [6, 2, 2] and len({*found.train.names, *found.val.names, *found.test.names}) == 10
    rows = torch.cat([found.train.rows[t, :n] for t, n in enumerate(found.train.counts)])
    assert found.train.x[rows].mean(0).abs().max() < 1e-5
    assert (found.train.y[rows].std() - 1).abs() < 1e-5
    back = found.train.y * found.scale[-1] + found.mean[-1]
    assert back[0].item() == pytest.approx(0.0, abs=1e-4)  # the first line's target


def test_points_of_a_task_are_of_one_individual_and_differ(tmp_path: Path) -> None:
    found = csv_families(family(tmp_path / "f.csv"))
    task = regression(found.train, shots=2, queries=1, tasks=16)(0, 0)
    assert task.support.x.shape == (16, 2, 2) and task.query.y.shape == (16, 1, 1)
    dose = torch.cat([task.support.x, task.query.x], 1)[..., 1]
    time = torch.cat([task.support.x, task.query.x], 1)[..., 0]
    assert (dose == dose[:, :1]).all()
    assert all(len(set(row.tolist())) == 3 for row in time)
    with pytest.raises(ValueError, match=r"regression: a task needs shots \+ queries = 40 points"):
        regression(found.train, shots=20, queries=20, tasks=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task,x,y\na,1,2\na,,3\n", r"line 3: x must be a finite number, got ''"),
        ("task,x,y\na,1,two\n", "line 2: y must be a finite number, got 'two'"),
        ("task,x,y\na,1,nan\n", "line 2: y must be a finite number"),
        ("task,x,y\na,1,2\n ,1,2\n", "line 3: the name of the task is missing"),
        ("task,x,y\na,1\n", "line 2: expected 3 cells, got 2"),
        ("id,x,y\na,1,2\n", "must have a column task, a column y and inputs"),
        ("task,x,y\na,1,2\nb,1,2\n", "at least 3 tasks are needed, got 2"),
        ('task,x,y\na,1,2\n"b,1,2\n', r"bad.csv, line 3: .* Close every double quote"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        csv_families(written(tmp_path / "bad.csv", text))


def test_what_training_does_not_vary_stays_as_it_is(tmp_path: Path) -> None:
    """An input that is constant in training has no scale to divide by; nor has a single point."""
    lines = [f"t{t},{i},{5 if t < 3 else 6},{t + i}" for t in range(5) for i in range(3)]
    split = {f"t{t}": "train" if t < 3 else "test" for t in range(5)}
    path = written(tmp_path / "f.csv", "task,time,dose,y\n" + "\n".join(lines))
    found = csv_families(path, split=split)
    assert found.scale[1] == 1 and found.test.x[:, 1].max() == 1
    path = written(tmp_path / "one.csv", "task,x,y\na,3,4\nb,5,6\nc,7,8\n")
    found = csv_families(path, split={"a": "train", "b": "val", "c": "test"})
    assert found.test.x.isfinite().all() and found.scale.tolist() == [1, 1]
    path.write_bytes("task,x,y\ncaf\xe9,1,2\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"^csv_families: .*one.csv must be a csv in UTF-8, but 'utf-8' codec"
    ):
        csv_families(path)


def test_a_missing_file_and_an_empty_training_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="csv_families: there is no file"):
        csv_families(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="some tasks must be for training"):
        csv_families(family(tmp_path / "f.csv"), split=(0.0, 0.5, 0.5))


def test_maml_learns_a_family(tmp_path: Path) -> None:
    """One task is a line; a network that adapts fits it better than before."""
    found = csv_families(family(tmp_path / "f.csv", 20))
    apply, params = fmeta.functionalize(fmeta.models.mlp([2, 8, 1]))
    algorithm = fmeta.maml(fmeta.losses.mse(apply), fmeta.sgd(0.05), steps=2)
    tasks = regression(found.train, shots=2, queries=1, tasks=8)
    outer = fmeta.adam(1e-2)
    state, step = (
        fmeta.meta_init(algorithm, outer, params),
        fmeta.meta_step(algorithm, outer, fmeta.Plan(compile=False)),
    )
    losses = []
    for k in range(60):
        state, metrics = step(state, tasks(0, k))
        losses.append(metrics["loss"].item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
