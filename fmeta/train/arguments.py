"""The arguments of the commands that look at runs; tyro makes their help of this, fields and texts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fmeta.train.config import MaybeCompile, MaybeInt, MaybePath, MaybeStr

MaybeSteps = Annotated[str | None, tyro.conf.arg(metavar="INT,INT,...")]
OLD = {"--test-tasks": "--tasks"}
"""Earlier spellings of options, and how they are spelled now."""


@dataclass(frozen=True)
class EvalCommand:
    """Test a run: adapt to test tasks, compare with the baselines, write results.json and plots."""

    run: tyro.conf.Positional[Path]
    """A run folder, as `fmeta train` makes it."""
    tasks: MaybeInt = None
    """Test tasks; as many as the run's config says if not given."""
    steps: MaybeSteps = None
    """Numbers of gradient steps to show, such as 0,1,3,5,10; all up to 10 are measured anyway."""
    ways: MaybeInt = None
    """Classes of a test task, for algorithms whose head is made from the support set; as the config says if not
    given, and so the next two. Results for other sizes have a folder of their own in the run's: 20w5s15q, say."""
    shots: MaybeInt = None
    """Support examples of a class."""
    queries: MaybeInt = None
    """Query examples of a class."""
    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint: the best on validation tasks, or the last."""
    baselines: bool = True
    """Compare with models without meta-learning; one of them is trained first if the run has none yet."""
    baseline_steps: MaybeInt = None
    """Training steps of that one; as many as the run itself took if not given."""
    root: MaybePath = None
    """Folder of the data set, if it is not where it was in training."""
    device: MaybeStr = None
    """auto, cpu, cuda or cuda:1, ...; as in training if not given, and so the next two."""
    compile: MaybeCompile = None
    """auto, on or off."""
    threads: MaybeInt = None
    """CPU threads."""


@dataclass(frozen=True)
class CompareCommand:
    """Test several runs on the same tasks: one table with paired differences, compare.json and compare.png."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of one recipe with the same test tasks; differences are to the first."""
    out: Path = Path("comparison")
    """Folder of the results."""
    tasks: int = 1_000
    """Test tasks."""
    steps: MaybeSteps = None
    """Numbers of gradient steps to show, such as 0,1,3,5,10; all up to 10 are measured anyway."""
    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint of each run."""
    baselines: bool = False
    """Add the models without meta-learning of each run; runs that would have the same share one."""
    baseline_steps: MaybeInt = None
    """Training steps of those that are trained on all tasks together; as many as each run took if not given."""
    root: MaybePath = None
    """Folder of the data set, if it is not where it was in training."""


@dataclass(frozen=True)
class ListCommand:
    """Show the recipes, and the runs under ./runs with their results."""


def plainly_spelled(arguments: list[str]) -> list[str]:
    """For ``eval`` and ``compare``: ``--steps 0 1 3`` as ``--steps=0,1,3``, and old names as those of today."""
    if arguments[:1] not in (["eval"], ["compare"]):
        return arguments
    found: list[str] = []
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        word = OLD.get(name, name) + equals + value
        if name == "--steps":
            values = [value] if equals else []
            while rest and re.fullmatch(r"-?[\d,]+", rest[0]):
                values.append(rest.pop(0))
            word = f"--steps={','.join(values)}" if values else word
        found.append(word)
    return found
