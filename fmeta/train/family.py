"""The tasks, the model and the loss of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import fmeta
import fmeta.data
import fmeta.embeddings
import fmeta.tasks
from fmeta.data.pool import Pool, Pools
from fmeta.tasks.augment import gathered, parse
from fmeta.tasks.seeding import generator
from fmeta.train.config import Config, SinusoidTask
from fmeta.train.later import later
from fmeta.train.pictures.config import FewShotTask, ImagesTask, OmniglotTask
from fmeta.train.pictures.pretrained import Made, with_backbone
from fmeta.train.text.config import TextTask
from fmeta.train.text.recipe import text_parts
from fmeta.types import Algorithm, Batch, LossFn, Params, Sampler, Task

HELD_BATCH = 50
"""Validation and test tasks that are measured side by side. It is no option: with another number they would be
other tasks, and results would not compare."""
HIDDEN = (256, 128, 64, 64)
"""Widths of MAML's network without convolutions (arXiv 1703.03400, section 5.2)."""


class Family(NamedTuple):
    """What differs between recipes: the tasks, the model and the loss."""

    model: Callable[[int | None], nn.Module]
    """``(outputs) -> module``; None gives the embedding."""
    outputs: int
    train_outputs: int
    """Classes of a training task."""
    loss: Callable[..., LossFn]
    """``(apply) -> LossFn``."""
    metric: str
    """What validation and the report show: ``"loss"``, lower is better, or ``"accuracy"``."""
    adapts: tuple[str, ...] | None
    """Names of the parameters that adapt; None for all."""
    train: Sampler
    val: Sampler
    test: Sampler
    pooled: Sampler
    """Examples of all training tasks together as one query set, for the baseline without meta-learning."""
    pooled_outputs: int
    """Outputs of the model that learns them."""
    shown: Sampler | None = None
    """The test tasks as pictures, where ``test`` gives what a frozen part of the model makes of them."""
    chunk_size: int | None = None
    """Tasks side by side, where all of them would take too much memory."""
    reference: Callable[[], tuple[Algorithm, Params]] | None = None
    """What the result is compared with, without steps: an algorithm and its meta."""
    pretrained: Callable[[], str] | None = None
    """A checksum of the weights that the model starts from, where a run does not keep all of them."""
    data: Callable[[], str] | None = None
    """A checksum of the classes that tasks are made of."""


def make_family(config: Config[Any], device: torch.device) -> Family:
    """Tasks, model and loss of a recipe."""
    if isinstance(config.task, SinusoidTask):
        context = config.inner.context if config.inner.algorithm == "cavia" else 0
        return sinusoid_family(config.task, config.outer.tasks, device, context)
    if isinstance(config.task, TextTask):
        return Family(
            **text_parts(config.task, config.inner.algorithm, config.outer.tasks, HELD_BATCH, device)
        )
    return few_shot_family(config.task, config.outer.tasks, device)


def sinusoid_family(task: SinusoidTask, tasks: int, device: torch.device, context: int = 0) -> Family:
    """Regression of sine waves; training, validation and test tasks differ by their seeds."""
    train = fmeta.tasks.sinusoid(tasks=tasks, shots=task.shots, queries=task.queries, device=device)
    held = fmeta.tasks.sinusoid(
        tasks=HELD_BATCH, shots=task.test_shots, queries=task.test_queries, device=device
    )
    return Family(
        model=lambda outputs: spread_kinks(
            fmeta.models.mlp([1, *task.hidden, outputs or 1], context=context)
        ),
        outputs=1,
        train_outputs=1,
        loss=fmeta.losses.mse,
        metric="loss",
        adapts=None,
        train=train,
        val=held,
        test=held,
        pooled=pooled_points(train),
        pooled_outputs=1,
    )


def spread_kinks(module: nn.Module) -> nn.Module:
    """Draw the weights by torch's own rule, whose biases are not zero.

    With zero biases every kink of the network lies at x = 0 to begin with. It then learns slower, and some
    tasks diverge after several inner steps.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return module


def few_shot_family(task: FewShotTask, tasks: int, device: torch.device) -> Family:
    """Classification of classes that training never saw."""
    pictures, made = load_pools(task).to(device), None
    pools, behind = pictures, lambda sampler: sampler
    if isinstance(task, ImagesTask) and task.backbone:
        pools, made, behind = with_backbone(task, pictures)
    ways, shots = task.train_ways or task.ways, task.train_shots or task.shots
    queries = task.queries or task.shots
    sizes: dict[str, Any] = {"ways": ways, "shots": shots, "queries": queries, "tasks": tasks}
    held: dict[str, Any] = {
        "ways": task.ways, "shots": task.shots, "queries": task.test_queries or queries, "tasks": HELD_BATCH,
    }  # fmt: skip

    def train() -> Sampler:
        if task.labels:
            turned = ["rotations"] if task.rotations else []
            return fmeta.tasks.few_shot(pools.train, **sizes, augment=[*turned, *task.augment])
        if task.unlabelled == "umtra":
            return fmeta.tasks.umtra(pools.train, **sizes, augment=task.augment or "affine")
        return clustered(task, pools.train, sizes)

    return Family(
        **model_parts(task, pictures.train.x.shape[1:], made),
        train_outputs=ways,
        train=behind(later(train, "training")),
        val=later(lambda: fmeta.tasks.few_shot(pools.val, **held), "validation"),
        test=later(lambda: fmeta.tasks.few_shot(pools.test, **held)),
        pooled=behind(pooled_pictures(pools.train, tasks * ways * (shots + queries), task)),
        pooled_outputs=len(pools.train.names) * (4 if task.rotations else 1),
        shown=later(lambda: fmeta.tasks.few_shot(pictures.test, **held)) if made else None,
        data=pictures.digest,
    )


def model_parts(task: FewShotTask, picture: torch.Size, made: Made | None) -> dict[str, Any]:
    """What a ``Family`` of pictures, each ``[C, H, W]``, has without data."""
    return {
        "model": made.model if made else lambda outputs: network(task, picture, outputs),
        "outputs": task.ways,
        "loss": fmeta.losses.cross_entropy,
        "metric": "accuracy",
        "adapts": None if made else ("*", "!*norm*"),
        "pretrained": made.pretrained if made else None,
    }


def clustered(task: FewShotTask, pool: Pool, sizes: dict[str, Any]) -> Sampler:
    """Tasks whose classes are clusters; the embedding is learned when the first task is asked for."""
    made: list[Sampler] = []

    def sample(seed: int, step: int) -> Task:
        if not made:
            embed = fmeta.embeddings.pca(pool, min(64, len(pool.y), pool.x[0].numel()))
            if task.embedding_steps:
                embed = fmeta.embeddings.prototransfer(pool, steps=task.embedding_steps)
            least = sizes["shots"] + sizes["queries"]
            (found,) = fmeta.data.cactus(pool, embed, clusters=task.clusters, smallest=least)
            made.append(fmeta.tasks.few_shot(found, **sizes, augment=task.augment))
        return made[0](seed, step)

    return sample


def network(task: FewShotTask, picture: torch.Size, outputs: int | None) -> nn.Module:
    """The model for pictures of this shape, ``[C, H, W]``; without outputs the embedding."""
    if task.network == "mlp":
        return fmeta.models.mlp([picture.numel(), *HIDDEN, *([outputs] if outputs else [])], norm=True)
    if task.network == "resnet12":
        return fmeta.models.resnet12(picture[0], ways=outputs)
    return fmeta.models.conv4(
        picture[0], outputs, task.channels, task.pool, "flatten" if task.flatten else "mean", picture[1]
    )


def load_pools(task: FewShotTask) -> Pools:
    """The pictures of a few-shot recipe.

    Raises:
        ValueError: where the data is not there.
    """
    if isinstance(task, OmniglotTask):
        return fmeta.data.omniglot(task.root, download=task.download, split=task.split)
    if isinstance(task, ImagesTask):
        if task.root is None:
            raise ValueError("train: images needs a folder of pictures. Give it with --root FOLDER.")
        split: Any = task.index or tuple(task.shares)
        return fmeta.data.image_folder(task.root, size=task.size, grey=task.grey, split=split)
    return fmeta.data.glyphs()


def minibatches(sampler: Sampler, steps: int) -> Sampler:
    """The same tasks with the support dealt to ``steps`` batches, one after another: ``[task, steps, shots, ...]``."""

    def sample(seed: int, step: int) -> Task:
        task = sampler(seed, step)
        dealt = lambda leaf: leaf.unflatten(1, (-1, steps)).transpose(1, 2).contiguous()  # noqa: E731
        return task._replace(support=fmeta.tree.map(dealt, task.support))

    return sample


def pooled_points(sampler: Sampler) -> Sampler:
    """The same tasks with support and query points together as the query set."""

    def sample(seed: int, step: int) -> Task:
        support, query = sampler(seed, step)
        return Task(support, Batch(*(torch.cat(pair, dim=1) for pair in zip(support, query, strict=True))))

    return sample


def pooled_pictures(pool: Pool, count: int, task: FewShotTask) -> Sampler:
    """One task of ``count`` pictures of all training classes with labels; a turned class is another one."""
    _, changes = parse("train", task.augment)

    def sample(seed: int, step: int) -> Task:
        random = generator(seed, step)
        rows = torch.randint(len(pool.y), (count,), generator=random)
        turn = torch.randint(4, (count,), generator=random) if task.rotations else None
        x = gathered("train", pool, rows, turn, changes, random)
        y = pool.y[rows.to(pool.y.device)]
        y = y if turn is None else y * 4 + turn.to(y.device)
        return Task(Batch(x[None, :1], y[None, :1]), Batch(x[None], y[None]))

    return sample
