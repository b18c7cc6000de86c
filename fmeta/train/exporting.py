"""What leaves a run folder: weights in any precision, an adapted model, adaptation as a program."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import fmeta
from fmeta import tree, weights
from fmeta.train import folder as folders
from fmeta.train.adapted import Source, adapted, base, program
from fmeta.train.config import Config
from fmeta.train.evaluate import estimate, per_task
from fmeta.train.experiment import Experiment, build
from fmeta.train.options import located, to_json
from fmeta.train.pictures.config import ImagesTask
from fmeta.train.pictures.pretrained import Pieces, original, pieces_of_run
from fmeta.train.terminal import format_metric, say
from fmeta.train.text.config import TextTask
from fmeta.types import Algorithm, Params, Tree
from fmeta.weights import Dtype
from fmeta.weights.files import BESIDE

What = Literal["meta", "adapted", "program"]


class Loaded(NamedTuple):
    """A run as the library's own objects."""

    algorithm: Algorithm
    meta: Tree
    config: Config[Any]


def load(folder: str | Path, checkpoint: str = "best") -> Loaded:
    """The algorithm, meta-parameters and config of a run: ``algorithm.predict(meta, support, x)`` is its model.

    Args:
        folder: a run folder, as ``fmeta train`` makes it.
        checkpoint: ``"best"`` by validation, or ``"last"``.

    Raises:
        ValueError: if there is no run, no such checkpoint, or one that does not fit its config.
    """
    experiment, meta = folders.load_run(folder, checkpoint)
    return Loaded(experiment.algorithm, meta, experiment.config)


def export(
    folder: str | Path,
    file: str | Path,
    *,
    what: What = "program",
    dtype: Dtype = "fp32",
    support: str | Path | None = None,
    queries: int | None = None,
    checkpoint: str = "best",
    root: str | Path | None = None,
) -> dict[str, Any]:
    """Write what a run has learned to a file that needs no run folder.

    ``"program"`` is a ``torch.export`` file that adapts and predicts with torch alone, see ``export_adaptation``.
    ``"meta"`` is safetensors of the learned numbers; of a backbone all its weights, the frozen ones too, under
    torchvision's names, so that ``--weights FILE`` takes it. The record's ``"beside"`` names what is no weight of
    the model, learned rates say, which ``--weights`` leaves out. ``"adapted"`` is safetensors of the model after
    adaptation to a folder of pictures: a state dict that loads into torchvision's class (``num_classes`` as many
    as the folder has classes) with ``strict=True``. Batch norm's statistics and learned rates stay float32 in half
    files; for ``"meta"`` the loss by rounding is measured on the run's test tasks.

    Args:
        folder: a run folder.
        file: where it goes, ``.pt2`` or ``.safetensors``.
        what: ``"program"``, ``"meta"`` or ``"adapted"``.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``; programs are float32.
        support: a folder of pictures, one folder a class, that ``"adapted"`` adapts to, and whose numbers of
            classes and pictures a ``"program"`` has; the sizes of the run's test tasks if not given.
        queries: inputs that a program predicts at once; as many as a test task has if not given.
        checkpoint: ``"best"`` or ``"last"``.
        root: folder of the data set, of texts its csv, if it is not where it was in training.

    Returns:
        The record that is kept in the file: shapes, classes, measured losses.

    Raises:
        ValueError: for numbers too large for the dtype, a support folder that does not fit.
        NotImplementedError: where an algorithm has no such form, saying why.
    """
    if what not in ("meta", "adapted", "program") or (what == "program" and dtype != "fp32"):
        raise ValueError(
            f"export: what must be 'meta' or 'adapted' in any dtype, or 'program' in fp32, got {what!r} in {dtype}."
        )
    if Path(file).suffix in ((".safetensors",) if what == "program" else (".pt", ".pth", ".bin", ".pt2")):
        ending = ".pt2" if what == "program" else ".safetensors"
        raise ValueError(f"export: a file of {what!r} must end in {ending}, got {Path(file).name}.")
    config = folders.read_config(Path(folder))
    experiment, meta = moved(config, folder, checkpoint, root)
    source = Source(experiment, meta, parts_of(experiment))
    if what == "program":
        return program(source, Path(file), support, queries)
    return (learned if what == "meta" else adapted)(source, Path(file), dtype, support)


def moved(
    config: Config[Any], folder: str | Path, checkpoint: str, root: str | Path | None
) -> tuple[Experiment, Tree]:
    """A run, whose data may lie elsewhere now."""
    if root is not None and not (hasattr(config.task, "root") or hasattr(config.task, "data")):
        raise ValueError(
            f"export: --root is for runs of pictures and texts, got a run of {config.recipe}. Leave it out."
        )
    task = located(config.task, None if root is None else Path(root))
    place = task.data if isinstance(task, TextTask) else getattr(task, "root", None)
    if isinstance(task, TextTask | ImagesTask) and place is not None and not place.exists():
        raise ValueError(
            f"export: the data of the run must be where it was in training, but there is no file {place}. Say where it "
            "is now by --root."
        )
    experiment = build(replace(config, task=task))
    state, _, _ = folders.load(Path(folder), checkpoint, experiment)
    return experiment, tree.detach(state.meta)


def parts_of(experiment: Experiment) -> Pieces | None:
    """The backbone of a run, where it has one."""
    task, seed = experiment.config.task, experiment.config.outer.seed
    return pieces_of_run(task, seed) if isinstance(task, ImagesTask) and task.backbone else None


def learned(source: Source, file: Path, dtype: Dtype, support: Any) -> dict[str, Any]:
    """Write the learned numbers, and measure what rounding costs."""
    record: dict[str, Any] = {"what": "meta", "dtype": dtype, "config": to_json(source.experiment.config)}
    own, others = named(source)
    if set(own) & set(others):
        raise NotImplementedError(
            f"export: the model has a parameter {min(set(own) & set(others))}, which is also a name of what the "
            "algorithm learns beside it. Export a program (--what program)."
        )
    tensors = own | others
    if others:
        record[BESIDE] = sorted(others)
    if dtype != "fp32":
        weights.in_dtype(tensors, dtype)  # refuses before anything is measured
        record["rounding"] = rounding(source, dtype)
    weights.save(file, tensors, dtype=dtype, record=record)
    aside = f", {len(others)} of them beside the model's weights" if others else ""
    say(f"{file}: {len(tensors)} tensors{aside}, {file.stat().st_size:,} bytes")
    return record


def named(source: Source) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by name, of a backbone all of them under torchvision's; and what is learned beside them."""
    params = base(source.meta)
    others = {} if params is source.meta else {n: x for n, x in source.meta.items() if n != "params"}
    beside = dict(tree.paths(others))
    if source.backbone is None:
        return params, beside
    task = source.experiment.config.task
    module, own = original(task, source.backbone, {n: p.cpu() for n, p in params.items()})
    return weights.state_dict(module, own), beside


def rounding(source: Source, dtype: Dtype) -> dict[str, float]:
    """The metric on test tasks with float32 numbers, with rounded ones, and the paired difference."""
    experiment, name = source.experiment, source.experiment.family.metric
    exact = scores(experiment, source.meta, source.steps)
    other, meta = rounded(source, dtype)
    half = scores(other, meta, source.steps)
    change = estimate(half - exact)
    say(
        f"test {name} of {len(exact):,} tasks: fp32 {format_metric(name, exact.mean().item())}, {dtype} "
        f"{format_metric(name, half.mean().item())}; difference {change.mean:+.5f} ± {change.interval:.5f}"
    )
    return {
        "fp32": exact.mean().item(),
        dtype: half.mean().item(),
        "difference": change.mean,
        "interval_95": change.interval,
    }


def scores(experiment: Experiment, meta: Tree, steps: int) -> Tensor:
    """The metric of each test task."""
    predict = fmeta.meta_predict(experiment.algorithm, experiment.plan, steps=[steps])
    return per_task(predict, meta, experiment.test, experiment.family.metric)[:, 0]


def rounded(source: Source, dtype: Dtype) -> tuple[Experiment, Tree]:
    """The run and its meta-parameters with the numbers of a half file."""
    flat = weights.in_dtype(dict(tree.paths(source.meta)), dtype)
    taken_in = lambda key: source.backbone is not None and ".lora_" in key  # noqa: E731
    leaves = [x if taken_in(key) else flat[key].to(x.dtype) for key, x in tree.paths(source.meta)]
    meta = tree.unflatten(leaves, tree.flatten(source.meta)[1])
    return with_rounded_backbone(source, dtype) if source.backbone else source.experiment, meta


def with_rounded_backbone(source: Source, dtype: Dtype) -> Experiment:
    """The run with its frozen weights as a half file has them.

    The file has low-rank updates taken into the weights that they belong to. The run adds them itself, so that its
    weights are here those of the file without them.
    """
    assert source.backbone is not None
    plain: Any = source.backbone.plain
    updates = low_rank(base(source.meta), plain)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rounded.safetensors"
        half = weights.in_dtype(named(source)[0], dtype)
        full = {name: x.float() if x.is_floating_point() else x for name, x in half.items()}
        weights.save(path, full | {name: full[name] - change for name, change in updates.items()})
        task = replace(
            source.experiment.config.task,
            weights=str(path),
            colour_mean=tuple(plain.colour_mean.flatten().tolist()),
            colour_std=tuple(plain.colour_std.flatten().tolist()),
        )
        return build(replace(source.experiment.config, task=task))


def low_rank(params: Params, plain: torch.nn.Module) -> Params:
    """What low-rank updates add to the weights of a backbone, by the name of the weight."""
    factors = {n.removeprefix("body."): p.detach().cpu() for n, p in params.items() if ".lora_" in n}
    layers = [name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")]
    zeros = {f"{layer}.weight": torch.zeros_like(plain.get_parameter(f"{layer}.weight")) for layer in layers}
    return {name: x.detach() for name, x in fmeta.merged(zeros | factors).items()}
