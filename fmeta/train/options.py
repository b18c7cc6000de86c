"""What is done with a config's options: names on the command line, ranges, JSON, what a resumed run keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from fmeta.train.choices import EMBEDDINGS
from fmeta.train.config import Config
from fmeta.train.pictures.config import FewShotTask, ImagesTask
from fmeta.train.text.config import TextTask

FREE_ON_RESUME = frozenset(
    {
        "out",
        "resume",
        "start",
        "root",
        "index",
        "test",
        "data",
        "splits",
        "download",
        "target",
        "patience",
        "minutes",
        "max_bad_steps",
        "log_interval",
    }
    | {"test_tasks", "baselines", "baseline_steps", "device", "compile", "threads"}
)
"""Options that may differ when a run is resumed: when to stop, what to show, where to run."""

AT_LEAST = {
    **dict.fromkeys(["outer_steps", "log_interval", "val_tasks", "max_bad_steps", "tasks"], 1),
    **dict.fromkeys(["val_interval", "test_steps", "inner_steps", "seed", "base_steps"], 0),
    **dict.fromkeys(["embedding_steps", "damping", "solver_iterations"], 0),
    **dict.fromkeys(["clusters"], 2),
    **dict.fromkeys(["patience", "baseline_steps", "threads", "channels", "context", "stop_patience"], 1),
    **dict.fromkeys(["ways", "shots", "queries", "test_shots", "test_queries"], 1),
    **dict.fromkeys(["train_ways", "train_shots", "size", "batch", "proposals", "head_width"], 1),
    **dict.fromkeys(["scenes", "scene_classes", "scene_size", "layers", "rank"], 1),
    **dict.fromkeys(["max_length"], 3),
    **dict.fromkeys(["shortest", "longest", "classes"], 1),
    **dict.fromkeys(["truncation"], 0),
    **dict.fromkeys(["test_tasks"], 2),
}
ABOVE_ZERO = (
    *(
        "inner_lr",
        "outer_lr",
        "minutes",
        "strength",
        "radius",
        "base_lr",
        "width",
        "std",
        "start_lr",
        "colour_std",
    ),
)
MAX_SEED = 1_000_000


def options(config: Any) -> dict[str, Any]:
    """All options by the name they have on the command line, without their groups."""
    found: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        found |= options(value) if is_dataclass(value) else {entry.name: value}
    return found


def flag(name: str) -> str:
    """The command line's spelling of an option."""
    return "--" + name.replace("_", "-")


def check(config: Config[Any]) -> None:
    """Refuse values out of range before anything is built.

    Raises:
        ValueError: naming the option, its range and what it got.
    """
    for name, value in options(config).items():
        if value is None:
            continue
        value = min(value) if name == "colour_std" else value
        if name in AT_LEAST and value < AT_LEAST[name]:
            raise ValueError(f"train: {flag(name)} must be at least {AT_LEAST[name]}, got {value}.")
        if name in ABOVE_ZERO and not value > 0:
            raise ValueError(f"train: {flag(name)} must be above 0, got {value}.")
    train_ways = getattr(config.task, "train_ways", None)
    if train_ways is not None and train_ways != config.task.ways and config.inner.algorithm not in EMBEDDINGS:
        raise ValueError(
            f"train: --train-ways may differ from --ways for {', '.join(EMBEDDINGS)}, got "
            f"{config.inner.algorithm}, whose model has one output a class. Leave it out."
        )
    backbone, learns = getattr(config.task, "backbone", None), getattr(config.task, "learns", None)
    if backbone and learns == "head" and config.inner.algorithm in EMBEDDINGS:
        raise ValueError(
            f"train: --learns head leaves {config.inner.algorithm} nothing to learn, since it makes its head of the "
            "support set. Use --learns last-1, or --algorithm anil."
        )
    check_unread(config.task)
    if config.inner.minibatches:
        check_minibatches(config)
    if config.outer.seed >= MAX_SEED:
        raise ValueError(
            f"train: --seed must be below {MAX_SEED:,}, got {config.outer.seed}. Larger seeds are kept for "
            "validation and test tasks."
        )


def check_unread(task: Any) -> None:
    """Refuse options of a model or a split that is not there, which nothing would read."""
    lacks = {}
    if isinstance(task, ImagesTask) and not task.backbone:
        names = ("weights", "learns", "batch_norm", "colour_mean", "colour_std", "norm_eps")
        lacks = dict.fromkeys(names, "--backbone")
    elif isinstance(task, TextTask) and task.splits is None:
        lacks = {"fold": "--splits"}
    for name, other in lacks.items():
        if getattr(task, name) != type(task).__dataclass_fields__[name].default:
            raise ValueError(
                f"train: {flag(name)} needs {other}, got {getattr(task, name)!r} without. Give {other}, or leave it "
                "out."
            )


def check_minibatches(config: Config[Any]) -> None:
    """Refuse them where there is nothing that they could be made from."""
    task, steps = config.task, config.inner.inner_steps
    if config.inner.algorithm != "reptile" or config.recipe == "detection":
        said = f"{config.recipe} with {config.inner.algorithm}"
        raise ValueError(f"train: --minibatches is for reptile, not in detection, got {said}. Leave it out.")
    shots = getattr(task, "train_shots", None) or task.shots
    examples = shots * (getattr(task, "train_ways", None) or getattr(task, "ways", 1))
    if steps < 1 or examples % steps:
        option = "--train-shots" if hasattr(task, "train_shots") else "--shots"
        raise ValueError(
            f"train: --minibatches needs --inner-steps to divide the support examples of a training task, got {steps} "
            f"and {examples}. Give {option} {2 * max(steps, 1)}, say."
        )


def located(task: Any, place: Path | None) -> Any:
    """A task whose data lies at another place, if one is given."""
    return task if place is None else replace(task, **{"data" if hasattr(task, "data") else "root": place})


def sizes(task: Any) -> tuple[int, int, int]:
    """Ways, shots and queries of validation and test tasks."""
    return task.ways, task.shots, task.test_queries or task.queries or task.shots


def with_tasks(
    config: Config[Any], ways: int | None = None, shots: int | None = None, queries: int | None = None
) -> Config[Any]:
    """A config whose validation and test tasks have other sizes; training tasks stay as they are.

    Raises:
        ValueError: for sizes below 1, a recipe without classes to choose, or other ways of a model with one output a
            class.
    """
    asked = {"--ways": ways, "--shots": shots, "--queries": queries}
    asked = {name: size for name, size in asked.items() if size is not None}
    task, algorithm = config.task, config.inner.algorithm
    if not asked:
        return config
    if not hasattr(task, "train_ways"):
        raise ValueError(
            f"eval: {', '.join(asked)}: the recipe {config.recipe} has its own tasks. Leave it out."
        )
    for name, size in asked.items():
        if size is not None and size < 1:
            raise ValueError(f"eval: {name} must be at least 1, got {size}.")
    if ways is not None and ways != task.ways and algorithm not in EMBEDDINGS:
        raise ValueError(
            f"eval: --ways may differ from training's for {', '.join(EMBEDDINGS)}, got a run of {algorithm}, whose "
            f"model has one output for each of {task.ways} classes. Train another with --ways {ways}."
        )
    wanted = replace(
        task,
        ways=ways or task.ways,
        shots=shots or task.shots,
        train_ways=task.train_ways or (task.ways if isinstance(task, FewShotTask) else None),
        train_shots=task.train_shots or task.shots,
        queries=task.queries or task.shots,
        test_queries=queries or task.test_queries or task.queries or shots or task.shots,
    )
    return config if sizes(wanted) == sizes(task) else replace(config, task=wanted)


def to_json(config: Config[Any]) -> dict[str, Any]:
    """The config as plain JSON values, groups kept."""
    plain = lambda value: str(value) if isinstance(value, Path) else value  # noqa: E731
    return asdict(config, dict_factory=lambda pairs: {name: plain(value) for name, value in pairs})


def from_json(default: Any, saved: Mapping[str, Any], source: str) -> Any:
    """A config of the type of ``default`` with the saved values; what was not saved keeps its default.

    Raises:
        ValueError: for an option that this version does not have.
    """
    unknown = sorted(set(saved) - {entry.name for entry in fields(default)})
    if unknown:
        raise ValueError(
            f"load: {source} has an option {unknown[0]!r} that this version of fmeta does not know. Use the "
            "version that wrote it."
        )
    kinds = {entry.name: str(entry.type) for entry in fields(default)}
    values = {
        name: _restored(getattr(default, name), kinds[name], value, source) for name, value in saved.items()
    }
    return replace(default, **values)


def _restored(default: Any, kind: str, value: Any, source: str) -> Any:
    if is_dataclass(default):
        return from_json(default, value, source)
    if "MaybePath" in kind:
        return None if value is None else Path(value)
    return tuple(value) if isinstance(value, list) else value


def changed_maths(saved: Config[Any], wanted: Config[Any]) -> list[str]:
    """Options that differ and would make a resumed run another run."""
    before, after = options(saved), options(wanted)
    free = (
        FREE_ON_RESUME - {"data"} if wanted.recipe == "learned-optimizer" else FREE_ON_RESUME
    )  # there it is no path
    names = [name for name in after if name not in free and before.get(name) != after[name]]
    # Under a constant rate the number of steps only says when to stop.
    return [name for name in names if name != "outer_steps" or wanted.outer.schedule != "constant"]
