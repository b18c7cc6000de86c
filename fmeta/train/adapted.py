"""A run's model after adaptation: as weights, and as a program that adapts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fmeta
import fmeta.data
from fmeta import tree, weights
from fmeta.adapt import run
from fmeta.models.backbones import INCEPTION
from fmeta.standalone import export_adaptation
from fmeta.stopping import unwrapped
from fmeta.train.choices import STEPLESS
from fmeta.train.experiment import Experiment
from fmeta.train.options import to_json
from fmeta.train.pictures.config import FewShotTask
from fmeta.train.pictures.pretrained import Pieces, original
from fmeta.train.terminal import say
from fmeta.types import Batch, Params, Tree
from fmeta.weights import Dtype


class Source(NamedTuple):
    """The run that is exported."""

    experiment: Experiment
    meta: Tree
    backbone: Pieces | None

    @property
    def before(self) -> Callable[[Tensor], Tensor]:
        """What comes before the model: the frozen trunk of a backbone, or nothing."""
        if self.backbone is None or self.backbone.trunk is None:
            return lambda x: x
        apply, params = fmeta.functionalize(self.backbone.trunk.to(self.experiment.device))
        return lambda x: apply(params, x)

    @property
    def steps(self) -> int:
        """Inner steps of the result."""
        inner = self.experiment.config.inner
        return 0 if inner.algorithm in STEPLESS else inner.test_steps


def base(meta: Tree) -> Params:
    """The weights among the learned numbers."""
    inside = meta.get("params") if isinstance(meta, dict) else None
    return inside if isinstance(inside, dict) else meta


def adapted(source: Source, file: Path, dtype: Dtype, support: str | Path | None) -> dict[str, Any]:
    """Write the model after adaptation to a folder of pictures."""
    if source.experiment.config.recipe == "text":
        raise NotImplementedError(
            "export: an adapted model of a text run is not written, got --what adapted. Use `fmeta adapt`."
        )
    if support is None:
        raise ValueError(
            "export: an adapted model needs pictures to adapt to. Give support=FOLDER (--support)."
        )
    refuse_statistics_of_batches(source)
    examples, classes = pictures(source, support)
    batch = Batch(source.before(examples.x), examples.y)
    found = unwrapped(run(source.experiment.algorithm.inner_loop, source.meta, batch, source.steps))
    params = {name: p.detach().cpu() for name, p in whole_model(source, found.params).items()}
    record = {
        "what": "adapted",
        "dtype": dtype,
        "classes": classes,
        "config": to_json(source.experiment.config),
    }
    task: Any = source.experiment.config.task
    if source.backbone is not None:
        tensors = weights.state_dict(*original(task, source.backbone, params))
    else:
        outputs = source.experiment.family.outputs
        tensors = weights.state_dict(source.experiment.family.model(outputs), params)
    weights.save(file, tensors, dtype=dtype, record=record)
    say(f"{file}: a model of {len(classes)} classes, {', '.join(classes)}; {file.stat().st_size:,} bytes")
    if source.backbone is not None and task.norm_eps is not None:
        say(
            f"Its batch norms have eps={task.norm_eps}, which weights do not say. Set it in torchvision's model, or "
            f"load the file by fmeta.models.backbone({task.backbone!r}, ..., norm_eps={task.norm_eps})."
        )
    if source.backbone is not None and task.backbone in INCEPTION:
        say(f"torchvision's {task.backbone} needs transform_input=True for it, which weights do not say.")
    return record


def refuse_statistics_of_batches(source: Source) -> None:
    """Refuse a backbone that normalises by each batch, which the original does not do in evaluation.

    Raises:
        NotImplementedError: for a run of ``--batch-norm batch`` that has batch norms where it learns.
    """
    layers = [] if source.backbone is None else list(source.backbone.body.modules())
    if any(layer.training and isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers):
        raise NotImplementedError(
            "export: an adapted model must normalise by the statistics in the file, as torchvision's class does, but "
            "this run's batch norms take those of each batch (--batch-norm batch). Export a program (--what program), "
            "or train with --batch-norm frozen."
        )


def whole_model(source: Source, params: Tree) -> Params:
    """All parameters of the adapted model, from what adapted.

    Raises:
        NotImplementedError: for an algorithm whose adapted classifier is no layer of the model.
    """
    own = base(source.meta)
    if set(params) == {"body", "head"} and isinstance(params["head"], dict):
        return own | params["body"] | {f"head.{part}": x for part, x in params["head"].items()}
    if set(params) <= {*own, *(source.meta.get("per_step", ()) if isinstance(source.meta, dict) else ())}:
        return own | params  # mamlpp's weights of every step with those of the last one
    name = source.experiment.config.inner.algorithm
    raise NotImplementedError(
        f"export: the adapted model must be weights alone, but {name} classifies by {', '.join(params)}. Export a "
        "program (--what program), or train with an algorithm that has a head, protomaml say."
    )


def pictures(source: Source, support: str | Path) -> tuple[Batch, list[str]]:
    """The pictures of a support folder, with labels in the order of their classes' names."""
    task, device = source.experiment.config.task, source.experiment.device
    if not isinstance(task, FewShotTask):
        raise ValueError(
            f"export: support is a folder of pictures, got a run of {source.experiment.config.recipe}. Leave it out."
        )
    size, grey = getattr(task, "size", 28), getattr(task, "grey", True)
    pool = fmeta.data.image_folder(support, size=size, grey=grey, split=(1, 0, 0)).train
    if len(pool.names) != source.experiment.family.outputs:
        raise ValueError(
            f"export: {support} must have {source.experiment.family.outputs} folders, the classes of a task of this "
            f"run, got {len(pool.names)}. Add or remove some, or train with --ways {len(pool.names)}."
        )
    names = sorted(pool.names)
    place = torch.tensor([names.index(name) for name in pool.names])
    return Batch(pool.x.float().to(device) / 255, place[pool.y].to(device)), names


def program(source: Source, file: Path, support: Any, queries: int | None) -> dict[str, Any]:
    """Write adaptation and prediction as one program."""
    experiment = source.experiment
    learns = getattr(experiment.config.task, "learns", "head")
    if experiment.config.recipe == "text" and learns != "head":
        raise NotImplementedError(
            f"export: a program takes tensors of numbers, but a text run that learns {learns} takes tokens. Write its "
            "weights by --what meta, or train with --learns head."
        )
    if queries is not None and queries < 1:
        raise ValueError(f"export: queries must be at least 1, got {queries}.")
    task = tree.select(experiment.test.sampler(experiment.test.seed, 0), 0)
    examples, x = task.support, task.query.x
    record: dict[str, Any] = {"what": "program", "config": to_json(experiment.config)}
    if source.backbone is not None and source.backbone.trunk is not None:
        picture = (1 if experiment.config.task.grey else 3, *[experiment.config.task.size] * 2)
        examples = Batch(x.new_zeros(len(examples.y), *picture), examples.y)
        x = x.new_zeros(len(x), *picture)
    if support is not None:
        examples, record["classes"] = pictures(source, support)
    if queries is not None:
        x = x[:1].expand(queries, *x.shape[1:]).contiguous()
    made = export_adaptation(
        experiment.algorithm,
        source.meta,
        examples,
        x,
        file,
        steps=source.steps,
        before=source.before,
        record=record,
    )
    say(
        f"{file}: {made.operations:,} operations, {file.stat().st_size:,} bytes. In any process with torch: "
        f"torch.export.load({file.name!r}).module()(support_x {list(examples.x.shape)}, support_y "
        f"{list(examples.y.shape)}, query_x {list(x.shape)})"
    )
    if experiment.config.recipe == "text":
        say(
            f"Its inputs are embeddings of {experiment.config.task.model}, which is not in the file: "
            "fmeta.models.encoder(...) or transformers make them, the mean over tokens unless --pooling said cls."
        )
    return record
