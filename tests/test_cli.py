"""The command line: help, errors in one line with the right exit code, Ctrl-C, and commands from end to end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from fmeta.train import baselines, cli, commands
from fmeta.train.arguments import plainly_spelled
from fmeta.train.config import Config
from fmeta.train.options import options
from fmeta.train.recipes import RECIPES
from fmeta.types import MetaLearningWarning

ROOT = Path(__file__).parents[1]
TINY = (
    "--device cpu --compile off --hidden 6 --tasks 4 --outer-steps 4 --val-interval 2 --log-interval 2 "
    "--val-tasks 4 --test-tasks 5 --test-queries 4"
).split()


@pytest.fixture(autouse=True)
def few_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "RATES", (0.01, 0.1))


def parsed(arguments: str) -> Config:
    return cli.parse(cli.resume_spelled_out(arguments.split())).config


def exit_code(arguments: list[str]) -> int:
    """What the shell sees."""
    try:
        return cli.main(arguments)
    except SystemExit as leaving:  # tyro's way to end
        assert isinstance(leaving.code, int)
        return leaving.code


def test_options_reach_the_config() -> None:
    config = parsed(
        "train omniglot --ways 20 --shots 5 --algorithm anil --inner-lr 0.1 --no-rotations --minutes 60"
    )
    assert config.recipe == "omniglot"
    changed = {
        "ways": 20,
        "shots": 5,
        "algorithm": "anil",
        "inner_lr": 0.1,
        "rotations": False,
        "minutes": 60.0,
    }
    assert options(config) == options(RECIPES["omniglot"]()) | changed


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_without_options_a_recipe_is_what_its_function_returns(recipe: str) -> None:
    assert parsed(f"train {recipe}") == RECIPES[recipe]()


@pytest.mark.parametrize(
    "arguments",
    ["--help", "train --help", "eval --help", "compare --help", "list --help", "train glyphs --help"],
)
def test_help_ends_well(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(arguments.split()) == 0
    assert "usage: fmeta" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_help_of_a_recipe_explains_every_option(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["train", recipe, "--help"]) == 0
    shown = " ".join(re.sub("[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
    config = RECIPES[recipe]()
    for name in options(config):
        hidden = recipe == "learned-optimizer" and name in options(config.inner)
        assert not hidden or f" --{name.replace('_', '-')} " not in shown
        if name == "recipe" or hidden:
            continue
        flag = "--" + name.replace("_", "-")
        text = re.search(
            rf"(?<!or ){re.escape(flag)}(?:, --no-\S+)?(?: [A-Z]+| \{{\S+\}}| \[\S+ \[\S+ ...\]\])? (.*?)\(default",
            shown,
        )
        assert text and len(text.group(1).split()) > 2, f"{flag} has no help"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "trian sinusoid",
            "there is no command 'trian', only train, eval, compare, adapt, export, list. Did you mean train?",
        ),
        (
            "train sinusiod",
            "only sinusoid, glyphs, omniglot, images, detection, text, learned-optimizer. Did you mean sinusoid?",
        ),
        (
            "train xyz",
            "there is no recipe 'xyz', only sinusoid, glyphs, omniglot, images, detection, text, learned-optimizer.",
        ),
        ("train sinusoid --inner-step 3", "Perhaps you meant: --inner-steps INT"),
        ("train sinusoid --algorithm maaml", "invalid choice 'maaml' for argument '--algorithm'"),
        ("train sinusoid --tasks many", "invalid literal for int() with base 10: 'many'"),
        ("train", "Expected one of {sinusoid, glyphs, omniglot, images, detection, text, learned-optimizer}"),
        ("", "Expected one of {train, eval, compare, adapt, export, list}"),
    ],
)
def test_wrong_command_lines_suggest_the_right_one(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(arguments.split()) == 2
    printed = capsys.readouterr()
    assert said in " ".join(re.sub("[│─╭╮╰╯]", " ", printed.err + printed.out).split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("eval nothing", "fmeta: load: nothing is not a run folder: it has no config.json."),
        (
            "train sinusoid --resume nothing",
            "fmeta: load: nothing is not a run folder: it has no config.json.",
        ),
        ("train sinusoid --resume", "fmeta: train: --resume needs to know the run."),
        ("train sinusoid --outer-steps 0", "fmeta: train: --outer-steps must be at least 1, got 0."),
        ("train sinusoid --out a-file", "fmeta: train: --out must be a folder, but a-file is a file."),
        ("train sinusoid --out a-file/run", "fmeta: train: --out must be a folder, but a-file/run is"),
        ("train omniglot --root empty", "fmeta: omniglot: empty must hold images_background"),
        ("eval run --tasks 0", "fmeta: eval: --tasks must be at least 2, got 0."),
        ("eval run --steps 1,-1", "fmeta: eval: --steps must be whole numbers of at least 0, got '1,-1'."),
        ("eval run --steps=a", "fmeta: eval: --steps must be whole numbers of at least 0, got 'a'."),
        ("eval run --steps 1.5", "fmeta: eval: --steps must be whole numbers of at least 0, got '1.5'."),
        ("eval run --steps ,", "fmeta: eval: --steps must be whole numbers of at least 0, got ','."),
        ("compare a b --steps -3", "fmeta: compare: --steps must be whole numbers of at least 0, got '-3'."),
        ("eval run --baseline-steps 0", "fmeta: eval: --baseline-steps must be at least 1, got 0."),
        ("compare a b --tasks 1", "fmeta: compare: --tasks must be at least 2, got 1."),
    ],
)
def test_stated_errors_are_one_line(
    arguments: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    assert exit_code(arguments.split()) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(said)
    assert "Traceback" not in printed and printed.count("\n") == 1
    assert not (tmp_path / "runs").exists(), "a run that could not start left a folder"


def test_debug_shows_where_an_error_came_from() -> None:
    with pytest.raises(ValueError, match="is not a run folder"):
        cli.main(["eval", "nothing", "--debug"])


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "show_list", lambda runs: {}["bug"])
    with pytest.raises(KeyError):
        cli.main(["list"])


def test_ctrl_c_outside_of_the_loop_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(runs: Path) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "show_list", press)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "fmeta: stopped.\n"


def test_ctrl_c_while_testing_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "report", press)
    assert cli.main(["train", "sinusoid", "--out", str(tmp_path / "run"), *TINY]) == 130
    assert (
        f"Stopped; the training itself is saved. Test it with:\n  fmeta eval {tmp_path}"
        in capsys.readouterr().out
    )


def test_closed_pipe_ends_quietly() -> None:
    arguments = [sys.executable, "-m", "fmeta", "list"]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as listing:
        assert listing.stdout and listing.stderr
        listing.stdout.close()
        assert listing.stderr.read() == b""
        assert listing.wait(60) == 0


def test_own_warnings_are_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warn(runs: Path) -> int:
        warnings.warn("it runs uncompiled", MetaLearningWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(commands, "show_list", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["list"]) == 0
    assert capsys.readouterr().err == "fmeta: it runs uncompiled\n"


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ("train sinusoid --resume RUN", "train sinusoid --out RUN --resume"),
        ("train sinusoid --resume=RUN --minutes 3", "train sinusoid --out RUN --resume --minutes 3"),
        ("train sinusoid --out=RUN --resume", "train sinusoid --out RUN --resume"),
        ("train sinusoid --resume --out RUN", "train sinusoid --resume --out RUN"),
        ("train sinusoid --out RUN", "train sinusoid --out RUN"),
    ],
)
def test_both_ways_to_say_what_is_resumed(given: str, spelled: str) -> None:
    assert cli.resume_spelled_out(given.split()) == spelled.split()


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ("eval RUN --steps 0,1,3", "eval RUN --steps=0,1,3"),
        ("eval --steps 0 1, 3 RUN", "eval --steps=0,1,,3 RUN"),
        ("compare A B --steps=0,1 --test-tasks 5", "compare A B --steps=0,1 --tasks 5"),
        ("compare A B --steps 0 1 --out 3", "compare A B --steps=0,1 --out 3"),
        ("eval RUN --test-tasks=5", "eval RUN --tasks=5"),
        ("eval RUN --steps", "eval RUN --steps"),
        ("train sinusoid --test-tasks 5", "train sinusoid --test-tasks 5"),
    ],
)
def test_numbers_of_steps_and_old_names(given: str, spelled: str) -> None:
    assert plainly_spelled(given.split()) == spelled.split()


def test_steps_without_a_number_are_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["eval", "run", "--steps"]) == 2
    assert "--steps" in capsys.readouterr().err


def test_train_resume_list_and_eval_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "sinusoid", "--seed", "3", "--out", "runs/a b", *TINY]) == 0
    assert "again: fmeta eval 'runs/a b'" in capsys.readouterr().out
    # The run's own options are the defaults when it is resumed: nothing has to be said again.
    assert cli.main(["train", "sinusoid", "--resume", "runs/a b", "--no-baselines"]) == 0
    assert "from step 4 to step 4" in capsys.readouterr().out
    assert cli.main(["train", "sinusoid", "--resume", "runs/a b", "--seed", "4"]) == 1
    assert "got another --seed (was 3, now 4)" in capsys.readouterr().err
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "omniglot           Handwritten characters that training never saw" in printed
    assert re.search(r"runs/a b   sinusoid, maml: test loss \d+\.\d{3} after 10 steps of adaptation", printed)
    assert cli.main(["eval", "runs/a b", "--no-baselines", "--device", "cpu", "--compile", "off"]) == 0
    assert "on 5 unseen tasks" in capsys.readouterr().out


def test_list_where_there_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["list"]) == 0
    assert "Runs under ./runs: none yet" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_saves_and_says_how_to_resume(tmp_path: Path) -> None:
    endless = [part if part != "4" else "1000000" for part in TINY]
    arguments = [
        "train",
        "sinusoid",
        "--out",
        str(tmp_path / "run"),
        *endless,
        "--tasks",
        "4",
        "--val-tasks",
        "4",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "fmeta", *arguments],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    end = time.monotonic() + 60
    lines = tmp_path / "run" / "metrics.jsonl"
    while not (lines.exists() and lines.stat().st_size):
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    step = re.search(
        r"Stopped and saved at step ([\d,]+)\. Continue with:\n  fmeta train sinusoid --resume (\S+)\n", out
    )
    assert step and step.group(2) == str(tmp_path / "run"), out
    assert "Traceback" not in err
    from fmeta.train.checkpoint import read

    saved = read(tmp_path / "run" / "last.safetensors")[1]["progress"]["step"]
    assert saved == int(step.group(1).replace(",", ""))
