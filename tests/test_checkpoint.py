"""Checkpoints: nothing is lost when saving fails or is killed, and nothing but a checkpoint is loaded."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from helpers import assert_trees_equal
from torch import Tensor

from fmeta.train import checkpoint


class State(NamedTuple):
    meta: dict[str, Tensor]
    opt_state: tuple[Any, ...]
    step: Tensor


def make_state(value: float = 1.0) -> State:
    weights = {"body.weight": torch.full((3, 2), value), "head.bias": torch.full((2,), -value).double()}
    moments = {name: torch.zeros_like(leaf) for name, leaf in weights.items()}
    return State(weights, (moments, torch.tensor(7)), torch.tensor(3))


def test_state_and_record_come_back_as_they_were(tmp_path: Path) -> None:
    record = {"progress": {"best": 0.1 + 0.2, "first_bad": [-1, -1]}, "seed": 5}
    checkpoint.save(tmp_path / "a.safetensors", make_state(0.1), record)
    state, found = checkpoint.load(tmp_path / "a.safetensors", make_state(9.0))
    assert isinstance(state, State)
    assert_trees_equal(state, make_state(0.1))
    assert found == record


def test_leaves_that_share_memory_or_are_views_are_saved(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    state = {"a": whole[::2], "b": whole, "c": whole.view(2, 3).T}
    checkpoint.save(tmp_path / "a.safetensors", state, {})
    assert_trees_equal(checkpoint.load(tmp_path / "a.safetensors", state)[0], state)


def test_names_are_readable(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.safetensors", make_state(), {})
    names = set(safetensors.torch.load_file(tmp_path / "a.safetensors"))
    assert {"meta.body.weight", "meta.head.bias", "step", "opt_state[1]"} <= names


def test_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, make_state(1.0), {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"save: .*last\.safetensors could not be written: No space left"
    ) as caught:
        checkpoint.save(path, make_state(2.0), {"step": 2})
    assert isinstance(caught.value.__cause__, OSError)
    state, record = checkpoint.load(path, make_state())
    assert_trees_equal(state, make_state(1.0))
    assert record == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.safetensors"], "a part was left behind"


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from fmeta.train import checkpoint
path, value = Path(sys.argv[1]), 0
while True:
    value += 1
    state = {"a": torch.full((500_000,), float(value)), "b": torch.tensor(value)}
    checkpoint.save(path, state, {"value": value})
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    template = {"a": torch.zeros(500_000), "b": torch.tensor(0)}
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(path)], cwd=Path(__file__).parents[1])
    try:
        wait_for(lambda: path.exists() and checkpoint.read(path)[1]["value"] > 3)
        for _ in range(20):  # a reader beside the writer never sees half a file either
            state, record = checkpoint.load(path, template)
            assert state["a"].unique().tolist() == [state["b"].item()] == [record["value"]]
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended by itself"
    state, record = checkpoint.load(path, template)
    assert state["a"].unique().tolist() == [state["b"].item()] == [record["value"]]


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch.save", "legacy torch.save", "pickle"])
def test_pickle_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    path, sprung = tmp_path / "last.safetensors", tmp_path / "sprung"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"state": Trap(sprung)}))
    else:
        torch.save({"state": Trap(sprung)}, path, _use_new_zipfile_serialization=how == "torch.save")
    with pytest.raises(ValueError, match=r"is a pickle .* fmeta never unpickles"):
        checkpoint.load(path, make_state())
    assert not sprung.exists()


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.99])
def test_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, make_state(), {"step": 1})
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"last\.safetensors is cut short or damaged .* Use the run's other"):
        checkpoint.load(path, make_state())


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"best\.safetensors does not exist"):
        checkpoint.load(tmp_path / "best.safetensors", make_state())


def test_other_safetensors_file_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is a safetensors file but not a checkpoint of this version"):
        checkpoint.load(tmp_path / "model.safetensors", make_state())


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    saved = {
        "a": torch.zeros(2),
        "b": torch.zeros(3),
        "d": torch.zeros(1),
        **{f"x{i}": torch.zeros(1) for i in range(5)},
    }
    wanted = {"a": torch.zeros(4), "b": torch.zeros(3), "c": torch.zeros(1), "d": torch.zeros(1).long()}
    checkpoint.save(path, saved, {})
    with pytest.raises(ValueError, match="is of another architecture") as caught:
        checkpoint.load(path, wanted)
    said = str(caught.value)
    assert "missing: c;" in said
    assert "unexpected: x0, x1, x2 and 2 more;" in said
    assert "another shape: a is (2,) instead of (4,);" in said
    assert "another dtype: d is torch.float32 instead of torch.int64." in said


def test_random_state_comes_back() -> None:
    cpu = torch.device("cpu")
    torch.manual_seed(3)
    kept = checkpoint.random_state(cpu)
    first = torch.rand(5)
    checkpoint.restore_random_state(kept, cpu)
    assert_trees_equal(torch.rand(5), first)


@pytest.mark.gpu
def test_random_state_of_a_gpu_comes_back() -> None:
    cuda = torch.device("cuda")
    torch.manual_seed(3)
    kept = checkpoint.random_state(cuda)
    first = torch.rand(5, device=cuda)
    checkpoint.restore_random_state(kept, cuda)
    assert_trees_equal(torch.rand(5, device=cuda), first)
