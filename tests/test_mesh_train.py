"""``torchrun -m fmeta``: one run as one process makes it, decisions shared, and errors said once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_trees_close
from tiny_runs import losses

from fmeta.parallel import ALONE, Elsewhere, Processes, launched
from fmeta.train import baselines, cli
from fmeta.train.checkpoint import read
from fmeta.train.device import pick_device
from fmeta.train.logging import read_metrics

ROOT = Path(__file__).parents[1]
TINY = (
    "--device cpu --compile off --threads 1 --hidden 6 --tasks 5 --schedule constant --val-interval 3 "
    "--log-interval 2 --val-tasks 4 --test-tasks 5 --test-queries 4"
).split()
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TOLERANCE = 1e-4  # float32 sums in another order, over a few steps


def train(out: Path | str, steps: int, *more: str) -> list[str]:
    return ["train", "sinusoid", "--out", str(out), "--outer-steps", str(steps), *TINY, *more]


def resume(out: Path | str, steps: int, *more: str) -> list[str]:
    return ["train", "sinusoid", "--resume", str(out), "--outer-steps", str(steps), *more]


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process, asked to end in any case (torchrun then ends its own)."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that is compared with: seven steps."""
    path = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "RATES", (0.01, 0.1))
        assert cli.main(train(path, 7)) == 0
    return path


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks said to each of some commands, by the command's name."""
    folder = tmp_path_factory.mktemp("two")
    assert cli.main(train(folder / "begun", 4, "--no-baselines")) == 0
    given = {
        "whole": train(folder / "whole", 7),
        "resumed": resume(folder / "begun", 7),
        "exists": train(folder / "whole", 7),
        "wrong": ["train", "sinusiod"],
        "unknown": ["train", "sinusoid", "--inner-step", "3"],
        "range": train(folder / "range", 7, "--minutes", "0"),
        "device": train(folder / "device", 7, "--device", "cuda:0"),
        "diverged": train(folder / "diverged", 40, "--inner-lr", "1e30", "--no-baselines"),
        "minutes": train(folder / "minutes", 10_000, "--minutes", "1e-7", "--no-baselines"),
        "eval": ["eval", str(folder / "begun"), "--no-baselines", "--test-tasks", "7"],
        "list": ["list"],
        "rank 1 fails": train(folder / "fails", 10_000, "--no-baselines"),
    }
    script = str(ROOT / "tests" / "mesh_commands.py")
    with started(script, str(folder), json.dumps(list(given.values()))) as process:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-4000:]
    said: dict[str, Any] = {"folder": folder}
    for number, name in enumerate(given):
        said[name] = [json.loads((folder / f"{number}.{rank}.json").read_text()) for rank in range(2)]
    return said


def result(path: Path) -> dict[str, Any]:
    return json.loads((path / "results.json").read_text())


def test_a_run_is_that_of_one_process(commands: dict[str, Any], one: Path) -> None:
    path = commands["folder"] / "whole"
    assert [rank["code"] for rank in commands["whole"]] == [0, 0], commands["whole"]
    for got, want in zip(losses(path), losses(one), strict=True):
        assert got[:2] == want[:2]
        assert got[2] == pytest.approx(want[2], rel=TOLERANCE)
    assert {file.name for file in path.iterdir()} == {file.name for file in one.iterdir()}
    assert len(list((path / "events").iterdir())) == 1
    found, want = result(path), result(one)
    assert (found["processes"], want["processes"]) == (2, 1)
    assert found["headline"]["mean"] == pytest.approx(want["headline"]["mean"], rel=TOLERANCE)
    for name, scores in want["scores"].items():
        assert found["scores"][name]["mean"] == pytest.approx(scores["mean"], rel=TOLERANCE)
    for name in ("last", "best"):
        assert_trees_close(
            read(path / f"{name}.safetensors")[0], read(one / f"{name}.safetensors")[0], TOLERANCE
        )


def test_the_first_process_speaks_for_all(commands: dict[str, Any]) -> None:
    first, second = commands["whole"]
    assert "cpu (1 threads), 2 processes" in first["out"]
    assert "All steps are done: 7 steps" in first["out"]
    assert (first["err"], second["out"], second["err"]) == ("", "", "")


def test_a_run_of_one_process_is_continued_by_two(commands: dict[str, Any], one: Path) -> None:
    path = commands["folder"] / "begun"
    assert "from step 4 to step 7" in commands["resumed"][0]["out"]
    assert losses(path)[-1][:2] == losses(one)[-1][:2]
    got, want = (read(folder / "last.safetensors")[0] for folder in (path, one))
    assert_trees_close(got, want, TOLERANCE)


SAID = {
    "exists": (1, "holds a run already. Continue it with"),
    "wrong": (2, "there is no recipe 'sinusiod'"),
    "unknown": (2, "--inner-steps"),
    "range": (1, "--minutes must be above 0, got 0.0"),
    "device": (1, "--device must be auto, cpu or cuda for 2 processes, got cuda:0. Each takes"),
    "diverged": (1, "train: expected finite numbers, got 10 steps in a row that were not finite"),
}


@pytest.mark.parametrize("name", SAID)
def test_an_error_ends_all_processes_and_is_said_once(name: str, commands: dict[str, Any]) -> None:
    code, message = SAID[name]
    first, second = commands[name]
    assert (first["code"], second["code"]) == (code, code)
    assert (first["out"] + first["err"]).count(message) == 1
    assert second["out"] + second["err"] == ""


def test_wall_time_is_judged_together(commands: dict[str, Any]) -> None:
    """The question of one step is answered after the next."""
    first, second = commands["minutes"]
    assert (first["code"], second["code"]) == (0, 0)
    assert "--minutes are over: 2 steps" in first["out"]


def test_evaluation_and_the_list(commands: dict[str, Any]) -> None:
    assert "on 7 unseen tasks" in commands["eval"][0]["out"]
    assert result(commands["folder"] / "begun")["tasks"] == 7
    assert "Recipes (fmeta train RECIPE)" in commands["list"][0]["out"]
    for name in ("eval", "list"):
        assert [rank["code"] for rank in commands[name]] == [0, 0]
        assert commands[name][1]["out"] == ""


def test_a_rank_that_fails_alone_says_so_and_leaves_nobody_waiting(commands: dict[str, Any]) -> None:
    first, second = commands["rank 1 fails"]
    assert second["code"] == 1
    assert second["err"] == "fmeta (rank 1): the disk of rank 1 is full\n"
    assert first["code"] == 1
    assert first["err"].count("fmeta: ") == 1


def test_ctrl_c_stops_all_ranks_at_one_step_and_one_process_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    with started(*TORCHRUN, "-m", "fmeta", *train(path, 1_000_000, "--no-baselines")) as process:
        end = time.monotonic() + 120
        while not (path / "last.safetensors").exists():
            assert time.monotonic() < end and process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    step = read(path / "last.safetensors")[1]["progress"]["step"]
    assert out.count(f"Stopped and saved at step {step:,}.") == 1, out + err
    assert cli.main(resume(path, step + 2, "--no-baselines")) == 0
    assert cli.main(train(tmp_path / "whole", step + 2, "--no-baselines")) == 0
    assert f"from step {step:,} to step {step + 2:,}" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(path)] == [
        line["step"] for line in read_metrics(tmp_path / "whole")
    ]
    got, want = (read(folder / "last.safetensors")[0] for folder in (path, tmp_path / "whole"))
    assert_trees_close(got, want, 1e-2)  # many steps of rounding in float32


# In one process


def test_one_process_needs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # some clusters set it for programs of their own
    assert launched() == (0, 1, 0)
    assert ALONE.mesh(torch.device("cpu")) is None
    assert ALONE.once(lambda: 3) == ALONE.first(lambda: 3) == 3


def test_an_error_that_all_processes_meet_is_said_by_the_first() -> None:
    error = ValueError("said")
    assert ALONE.same(error) is error
    assert isinstance(Processes((1, 2, 1)).same(error), Elsewhere)  # type: ignore[arg-type]


def test_every_process_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    second = Processes((3, 4, 1))  # type: ignore[arg-type]
    assert pick_device("auto", second) == pick_device("cuda", second) == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")] * 2
    with pytest.raises(ValueError, match="--device is cuda:2, but torch sees 2 CUDA devices"):
        pick_device("cuda", Processes((2, 4, 2)))  # type: ignore[arg-type]
