"""The commands behind the command line: train or resume a run, test it again, list what there is."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fmeta.parallel import processes
from fmeta.train import folder
from fmeta.train.config import Config, Machine
from fmeta.train.experiment import Experiment, build_together
from fmeta.train.loop import Reason
from fmeta.train.options import check, located, sizes, with_tasks
from fmeta.train.recipes import RECIPES
from fmeta.train.report import report
from fmeta.train.run import divergence, first_state, run
from fmeta.train.terminal import format_metric, format_seconds, say

ENDED: dict[Reason, str] = {
    "steps": "All steps are done",
    "target": "Validation reached --target",
    "patience": "Validation has not become better for --patience times",
    "minutes": "--minutes are over",
}


def train(config: Config[Any], command: str) -> int:
    """Train a recipe, or continue a run; returns the exit code.

    Args:
        config: the complete config.
        command: the command line, to be written down.

    Raises:
        ValueError: for options out of range, a folder that holds a run already, a run that cannot be
            resumed, and after too many steps that were not finite.
    """
    if config.recipe == "detection":
        from fmeta.train.detection import recipe as detection  # torchvision takes seconds to import

        return detection.train(config, command)
    if config.recipe == "learned-optimizer":
        from fmeta.train.learning import recipe as learning

        return learning.train(config, command)
    with processes() as together:
        together.once(lambda: check_start(config))
        use_threads(config.machine)
        experiment = build_together(config, together)
        for sample in (experiment.family.train, experiment.val.sampler, experiment.test.sampler):
            sample(config.outer.seed, 0)  # says what is wrong with their sizes before there is a folder
        if not config.resume:
            first_state(experiment)  # the same for a run to start from
        folder.check_data(config, experiment.family.data)
        path = together.once(lambda: start_folder(config, command))
        return train_and_test(path, experiment, command)


def check_start(config: Config[Any]) -> None:
    """Refuse options out of range and runs that cannot be resumed, before anything is built."""
    check(config)
    if config.resume:
        folder.check_resumable(config)


def start_folder(config: Config[Any], command: str) -> Path:
    """The folder of a new run, or that of the run which is resumed, with this config in it."""
    if not config.resume:
        return folder.create(config, command)
    path = folder.check_resumable(config)
    folder.write_config(path, config, command)
    return path


def train_and_test(path: Path, experiment: Experiment, command: str) -> int:
    """Train until there is a reason to stop, say it, and test the run; returns the exit code."""
    config, outcome = experiment.config, run(path, experiment)
    progress = outcome.progress
    if outcome.reason == "diverged":
        raise experiment.processes.same(ValueError(divergence(path, progress)))
    if outcome.reason == "interrupted":
        say(f"Stopped and saved at step {progress.step:,}. Continue with:\n  {resume_command(path, config)}")
        return 130
    say(f"{ENDED[outcome.reason]}: {progress.step:,} steps in {format_seconds(progress.wall_s)}.")
    try:
        return report(path, experiment, "best", command)
    except KeyboardInterrupt:
        say(
            f"Stopped; the training itself is saved. Test it with:\n  {shlex.join(['fmeta', 'eval', str(path)])}"
        )
        return 130


def evaluate(
    path: Path,
    command: str,
    *,
    tasks: int | None = None,
    steps: str | None = None,
    ways: int | None = None,
    shots: int | None = None,
    queries: int | None = None,
    checkpoint: str = "best",
    baselines: bool = True,
    baseline_steps: int | None = None,
    root: Path | None = None,
    device: str | None = None,
    compile: str | None = None,
    threads: int | None = None,
) -> int:
    """Test a run again; returns the exit code. What is None stays as the run's config says.

    Args:
        path: the run folder.
        command: the command line, to be written down.
        tasks: test tasks, at least 2.
        steps: the numbers of steps that the table shows, as in ``"0,1,5"``.
        ways, shots, queries: sizes of the test tasks; others than the config's give a folder in the run's.
        checkpoint: ``"best"`` or ``"last"``.
        baselines: whether to compare with the models without meta-learning.
        baseline_steps: training steps of the one that is trained on all tasks together, at least 1.
        root: folder of the data set.
        device, compile, threads: see ``fmeta.train.config.Machine``.
    """
    shown = checked("eval", tasks, steps, baseline_steps)
    with_tasks(folder.read_config(path), ways, shots, queries)
    if folder.read_config(path).recipe == "detection":
        from fmeta.train.detection import recipe as detection  # torchvision takes seconds to import

        return detection.report(path, command, checkpoint)
    if folder.read_config(path).recipe == "learned-optimizer":
        from fmeta.train.learning import recipe as learning

        return learning.report(path, command, checkpoint, tasks)
    with processes() as together:
        config = together.once(lambda: folder.read_config(path))
        asked: dict[str, Any] = {"device": device, "compile": compile, "threads": threads}
        machine = replace(
            config.machine, **{name: value for name, value in asked.items() if value is not None}
        )
        numbers = replace(
            config.report,
            baselines=baselines,
            test_tasks=tasks or config.report.test_tasks,
            baseline_steps=baseline_steps or config.report.baseline_steps,
        )
        own = replace(config, report=numbers, machine=machine, task=located(config.task, root))
        config = with_tasks(own, ways, shots, queries)
        check(config)
        use_threads(machine)
        experiment = build_together(config, together)
        out = path if config == own else path / "{}w{}s{}q".format(*sizes(config.task))
        return report(path, experiment, checkpoint, command, shown, out)


def compare_runs(
    paths: list[Path],
    *,
    tasks: int = 1_000,
    steps: str | None = None,
    out: Path = Path("comparison"),
    checkpoint: str = "best",
    baselines: bool = False,
    baseline_steps: int | None = None,
    root: Path | None = None,
) -> int:
    """Test several runs on the same tasks; returns the exit code. See ``evaluate`` for the arguments."""
    from fmeta.train.compare import compare

    if len(paths) < 2:
        raise ValueError(f"compare: at least two runs are needed, got {len(paths)}. Give their folders.")
    shown = checked("compare", tasks, steps, baseline_steps)
    return compare(
        paths,
        out,
        tasks=tasks,
        steps=shown,
        checkpoint=checkpoint,
        root=root,
        with_baselines=baselines,
        baseline_steps=baseline_steps,
    )


def checked(call: str, tasks: int | None, steps: str | None, baseline_steps: int | None) -> list[int] | None:
    """The numbers of steps that were asked for; refuses those that are none, and options out of range."""
    if baseline_steps is not None and baseline_steps < 1:
        raise ValueError(f"{call}: --baseline-steps must be at least 1, got {baseline_steps}.")
    if tasks is not None and tasks < 2:
        raise ValueError(
            f"{call}: --tasks must be at least 2, got {tasks}. 600 or more give useful intervals."
        )
    if steps is None:
        return None
    words = [word for word in steps.replace(",", " ").split() if word]
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(
            f"{call}: --steps must be whole numbers of at least 0, got {steps!r}. Write --steps 0,1,5, say."
        )
    return sorted({int(word) for word in words})


def show_list(runs: Path) -> int:
    """Print the recipes and the runs below a folder."""
    say("Recipes (fmeta train RECIPE)")
    for name, recipe in RECIPES.items():
        say(f"  {name:<18} {(recipe.__doc__ or '').strip().splitlines()[0]}")
    paths = sorted(
        (path.parent for path in runs.glob("*/config.json")), key=lambda path: path.stat().st_mtime
    )
    say(f"\nRuns under ./{runs}" + ("" if paths else ": none yet"))
    for path in paths:
        say(f"  {path}   {outcome_of(path)}")
    return 0


def outcome_of(path: Path) -> str:
    """A run's result in a few words."""
    try:
        result = json.loads((path / "results.json").read_text(encoding="utf-8"))
        if result["recipe"] == "detection":
            said = [f"{label} {100 * one['after']['ap50']:.1f}" for label, one in result["sets"].items()]
            return f"detection, {result['algorithm']}: AP50 after adaptation {', '.join(said)}"
        if result["recipe"] == "learned-optimizer":
            label, one = next(iter(result["tests"].items()))
            own, adam = (one[name]["mean"][0] for name in ("learned", "adam"))
            return f"{result['optimizer']}: mean loss on {label} {own:.3f}, adam {adam:.3f}"
        step, name = result["headline"]["steps"], result["metric"]
        value = format_metric(name, result["headline"]["mean"])
        return (
            f"{result['recipe']}, {result['algorithm']}: test {name} {value} after {step} steps of adaptation"
        )
    except (OSError, ValueError, KeyError):
        return "no result yet; `fmeta eval` it or resume it"


def use_threads(machine: Machine) -> None:
    """Set the number of CPU threads, if the options say one."""
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)


def resume_command(path: Path, config: Config[Any]) -> str:
    """The command that continues a run."""
    return shlex.join(["fmeta", "train", config.recipe, "--resume", str(path)])
