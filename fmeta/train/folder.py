"""The run folder: config.json, metrics.jsonl, events/, best and last checkpoints, results.json, plots."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import fmeta
from fmeta import tree
from fmeta.train import checkpoint
from fmeta.train.config import Config
from fmeta.train.experiment import Experiment, build
from fmeta.train.loop import Progress
from fmeta.train.options import changed_maths, flag, from_json, options, to_json
from fmeta.train.recipes import RECIPES
from fmeta.train.text.config import TextTask
from fmeta.types import MetaState, Tree


def versions() -> dict[str, str]:
    """What a result depends on beside config and seed."""
    return {"fmeta": fmeta.__version__, "torch": torch.__version__, "python": platform.python_version()}


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file at once."""
    checkpoint.write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def create(config: Config[Any], command: str) -> Path:
    """Make the folder of a new run.

    Raises:
        ValueError: if there is a run in it already, or a file is in its place.
    """
    folder = config.out or Path("runs") / f"{config.recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    if any((folder / name).exists() for name in ("config.json", "last.safetensors")):
        raise ValueError(
            f"train: {folder} holds a run already. Continue it with `fmeta train {config.recipe} --resume "
            f"{folder}`, or choose another --out."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"train: --out must be a folder, but {error.filename} is a file. Choose another."
        ) from error
    write_config(folder, config, command)
    return folder


def write_config(folder: Path, config: Config[Any], command: str) -> None:
    """Write down what the run is made of."""
    content = {"command": command, "versions": versions(), "config": to_json(config) | {"resume": False}}
    write_json(folder / "config.json", content)


def read_config(folder: Path) -> Config[Any]:
    """The config of a run folder.

    Raises:
        ValueError: if the folder holds no run, or one of another version.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"load: {folder} is not a run folder: it has no config.json. {_nearby()}")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["config"]
        recipe = RECIPES[saved["recipe"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"load: {path} is damaged ({type(error).__name__}: {error}). Restore it.") from error
    return from_json(recipe(), saved, str(path))


def _nearby() -> str:
    runs = sorted(Path("runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    return f"The latest run here is {runs[-1].parent}." if runs else "`fmeta train sinusoid` makes one."


def check_resumable(wanted: Config[Any]) -> Path:
    """The run folder to continue, if the config asks for the same run.

    Raises:
        ValueError: without a folder, or naming the recipe or the options that differ.
    """
    if wanted.out is None:
        raise ValueError(
            "train: --resume needs to know the run. Write --resume RUN, with RUN the run folder."
        )
    saved = read_config(wanted.out)
    if saved.recipe != wanted.recipe:
        raise ValueError(
            f"train: {wanted.out} is a run of {saved.recipe}, got {wanted.recipe}. Resume it with "
            f"`fmeta train {saved.recipe} --resume {wanted.out}`."
        )
    names = changed_maths(saved, wanted)
    if names:
        before, after = options(saved), options(wanted)
        said = ", ".join(f"{flag(name)} (was {before[name]}, now {after[name]})" for name in names)
        raise ValueError(
            f"train: a resumed run keeps the options that determine it, got another {said}. Leave it out, or "
            "start a new run with another --out."
        )
    return wanted.out


def save(folder: Path, name: str, state: MetaState, progress: Progress, experiment: Experiment) -> None:
    """Write the ``best`` or ``last`` checkpoint, once for all processes."""
    record = {
        "progress": progress._asdict(),
        "seed": experiment.config.outer.seed,
        "random_state": checkpoint.random_state(experiment.device),
        **came_with(experiment),
    }
    path = folder / f"{name}.safetensors"
    experiment.processes.once(lambda: checkpoint.save(path, state, record))


def came_with(experiment: Experiment) -> dict[str, str]:
    """What a checkpoint notes of weights and data that it does not hold, so that others are not taken for them."""
    noted = {"pretrained": experiment.family.pretrained, "data": experiment.family.data}
    return {name: checksum() for name, checksum in noted.items() if checksum is not None}


def check_data(config: Config[Any], now: Callable[[], str] | None) -> None:
    """Refuse to continue a run with classes or numbers of examples that it did not begin with."""
    last = config.out / "last.safetensors" if config.resume and config.out else None
    before = checkpoint.read(last)[1].get("data") if last and last.exists() else None
    if before is not None and now is not None and before != now():
        raise ValueError(
            f"train: {config.out} began with other data than there is now: its classes, or how many examples they "
            "have, differ. Restore it, or begin a new run with --start."
        )


def load(folder: Path, name: str, experiment: Experiment) -> tuple[MetaState, Progress, dict[str, Any]]:
    """Read the ``best`` or ``last`` checkpoint into the structure that the experiment has."""
    if (
        name == "best"
        and not (folder / "best.safetensors").exists()
        and (folder / "last.safetensors").exists()
    ):
        raise ValueError(
            f"load: {folder} has no best checkpoint, since no validation has given a number yet. Resume it, or use "
            "--checkpoint last."
        )
    template = fmeta.meta_init(experiment.algorithm, experiment.outer, experiment.params)
    path = folder / f"{name}.safetensors"
    if checkpoint.read(path)[1].get("meta_only"):
        meta, record = checkpoint.load(path, template.meta)
        state = template._replace(meta=meta)
    else:
        state, record = checkpoint.load(path, template)
    check_pretrained(folder, experiment, record)
    saved = record["progress"]
    progress = Progress(**saved | {"first_bad": tuple(saved["first_bad"])})
    return state, progress, record


def learned_before(config: Config[Any], meta: Tree, experiment: Experiment | None = None) -> Tree:
    """``meta`` as it was drawn, or what the run of ``--start`` learned.

    Raises:
        ValueError: for a folder without a run, and for one of another model or algorithm.
    """
    if config.start is None:
        return meta
    read_config(config.start)
    try:
        found, record = checkpoint.load_meta(config.start / "best.safetensors", meta)
    except ValueError as error:
        raise ValueError(
            f"train: --start needs a run of the same model and algorithm, got {config.start}. {error}"
        ) from error
    if experiment is not None:
        check_pretrained(config.start, experiment, record)
    return found


def check_pretrained(folder: Path, experiment: Experiment, record: dict[str, Any]) -> None:
    """Refuse a checkpoint that lies on other pre-trained weights than these."""
    checksum = experiment.family.pretrained
    if checksum is not None and record.get("pretrained", checksum()) != checksum():
        task = experiment.config.task
        source = task.model if isinstance(task, TextTask) else task.weights or task.backbone
        raise ValueError(
            f"load: {folder} started from other pre-trained weights than {source} has now, and holds only what it "
            "learned. Restore the old ones, or train again."
        )


def keep(folder: Path, out: Path, name: str = "best") -> None:
    """Copy what testing a run takes to another folder: config, metrics, and a checkpoint of meta alone.

    A third of the size of the checkpoint, which cannot be resumed.
    """
    experiment = build(read_config(folder))
    state, progress, before = load(folder, name, experiment)
    out.mkdir(parents=True, exist_ok=True)
    record = {"progress": progress._asdict(), "seed": experiment.config.outer.seed, "meta_only": True}
    record |= {"pretrained": before["pretrained"]} if "pretrained" in before else {}
    checkpoint.save(out / "best.safetensors", state.meta, record)
    for kept in ("config.json", "metrics.jsonl"):
        (out / kept).write_bytes((folder / kept).read_bytes())


def steps_taken(folder: Path) -> int:
    """Outer steps of a run up to its last checkpoint, or where it was kept without, up to the best one."""
    name = "last" if (folder / "last.safetensors").exists() else "best"
    return int(checkpoint.read(folder / f"{name}.safetensors")[1]["progress"]["step"])


def load_run(folder: str | Path, name: str = "best") -> tuple[Experiment, Tree]:
    """A finished or stopped run: its experiment, and the meta-parameters of a checkpoint.

    Args:
        folder: a run folder.
        name: ``"best"`` by validation, or ``"last"``.

    Raises:
        ValueError: if there is no run, no such checkpoint, or one that does not fit the config.
    """
    experiment = build(read_config(Path(folder)))
    state, _, _ = load(Path(folder), name, experiment)
    return experiment, tree.detach(state.meta)
