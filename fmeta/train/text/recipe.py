"""The text recipe: a pre-trained encoder, the part of it that learns, and tasks of sentences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import fmeta
import fmeta.data
import fmeta.models
import fmeta.tasks
from fmeta import tree
from fmeta.data.features import Prepare, bytes_of, prepared_pool, weights_digest
from fmeta.data.pool import Pool, Pools
from fmeta.data.tokens import Tokenizer
from fmeta.models.encoder import Encoder
from fmeta.tasks.seeding import generator
from fmeta.train.choices import EMBEDDINGS, STEPLESS
from fmeta.train.later import later
from fmeta.train.text.config import TextTask
from fmeta.types import Algorithm, Batch, Params, Sampler, Task

FITS = 2**30
"""Bytes that the frozen part's results for a split may take; more, and it runs again for each batch of tasks."""
MANY = 20
"""Labels of a training task at most, where the algorithm leaves the choice."""
INSERTED = {"lora": "*.lora_*", "adapters": "*.adapter.*"}
"""Names of what is put into layers, by --learns."""
SUBLAYER_ENDS = (".output.dense", ".out_lin", ".lin2", ".attn.o")
"""The last layers of attention and feed-forward, as the classes of BERT, DistilBERT and MPNet name them; adapters
go behind all linear layers of a model that has none of these."""
TEXTS = 256
"""Sentences that go through what learns side by side."""


class Learner(NamedTuple):
    """An encoder with what of it learns."""

    tokenizer: Tokenizer
    prepare: Prepare | None
    """The frozen part: ``x -> x``. None where all learns."""
    model: Callable[[int | None], nn.Module]
    """``(outputs) -> module``; None gives the embedding."""
    pretrained: Callable[[], str] | None
    """A checksum of the encoder as it came; None where a run keeps all of it."""


def make_learner(task: TextTask, device: torch.device) -> Learner:
    """Load the encoder of a text recipe and part it into what is frozen and what learns.

    Raises:
        ValueError: for a model or tokenizer that is not there, or that do not belong together.
    """
    tokenizer: Any = fmeta.data.load_tokenizer(task.model)
    whole = fmeta.models.encoder(task.model, pooling=task.pooling).to(device)
    rows = whole.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if len(tokenizer) > rows:
        raise ValueError(
            f"train: the tokenizer of {task.model} has {len(tokenizer):,} tokens, but its model knows {rows:,}. They "
            "do not belong together; save both into one folder again."
        )
    checksum = functools.cache(lambda: weights_digest(whole))
    if task.learns == "head":
        project = lambda outputs: fmeta.models.Projection(whole.dim, ways=outputs)  # noqa: E731
        return Learner(tokenizer, frozen(whole), project, checksum)
    if task.learns == "all":
        return Learner(tokenizer, None, lambda outputs: with_head(whole, outputs), None)
    lower, upper = fmeta.models.part(whole, task.layers)
    if task.learns == "last":
        return Learner(tokenizer, lower, lambda outputs: with_head(upper, outputs), checksum)
    return Learner(
        tokenizer, lower, lambda outputs: with_inserts(upper, task.learns, task.rank, outputs), checksum
    )


def frozen(whole: Encoder) -> Prepare:
    """Embeddings of a whole encoder, without gradient."""

    def embed(x: Any) -> Any:
        with torch.no_grad():
            return whole(**x)

    return embed


def with_head(encoder: Encoder, outputs: int | None) -> Encoder:
    """A copy of an encoder with a head of zeros; what its embedding does not read is no parameter."""
    copied = fmeta.models.with_ways(encoder, outputs)
    pooler = getattr(copied.model, "pooler", None)
    if isinstance(pooler, nn.Module):
        pooler.requires_grad_(False)
    return copied


def with_inserts(encoder: Encoder, learns: str, rank: int, outputs: int | None) -> nn.Module:
    """A copy of an encoder whose layers learn by what is put into them alone: low-rank updates or adapters."""
    copied = with_head(encoder, outputs)
    copied.model.requires_grad_(False)
    layers = f"model.{fmeta.models.layers_of(copied.model)[0]}."
    if learns == "lora":
        return fmeta.with_lora(copied, f"{layers}*", rank=rank)
    ends = [n for n, _ in copied.named_modules() if n.startswith(layers) and n.endswith(SUBLAYER_ENDS)]
    return fmeta.with_adapters(copied, ends or f"{layers}*", size=rank)


def adapting(task: TextTask, algorithm: str) -> tuple[str, ...]:
    """Names of what adapts to a task: what was put in, or all but the length of embeddings."""
    if task.learns not in INSERTED:
        return ("*", "!length")
    return (INSERTED[task.learns],) if algorithm in EMBEDDINGS else (INSERTED[task.learns], "head")


def load_pools(task: TextTask, tokenizer: Tokenizer) -> Pools:
    """The sentences of a text recipe."""
    return fmeta.data.text_csv(
        task.data or "",
        tokenizer,
        text=task.text_column,
        label=task.label_column,
        split=task.splits or tuple(task.shares),
        fold=task.fold,
        max_length=task.max_length,
    )


def text_parts(
    task: TextTask, algorithm: str, tasks: int, held_tasks: int, device: torch.device
) -> dict[str, Any]:
    """What a ``Family`` of a text recipe is made of: tasks, model and loss."""
    if task.data is None:  # said before the encoder is loaded
        raise ValueError("train: text needs a csv of text,label. Give it with --data FILE.")
    learner = make_learner(task, device)
    pools = load_pools(task, learner.tokenizer).to(device)
    ways, shots = train_ways(task, algorithm, len(pools.train.names)), task.train_shots or task.shots
    sizes: dict[str, Any] = {"ways": ways, "shots": shots, "queries": task.queries, "tasks": tasks}
    held: dict[str, Any] = {
        "ways": task.ways, "shots": task.shots, "queries": task.test_queries or task.queries, "tasks": held_tasks,
    }  # fmt: skip
    return {
        **model_parts(task, learner, algorithm),
        "train_outputs": ways,
        "chunk_size": None if task.learns == "head" else max(1, TEXTS // (ways * (shots + task.queries))),
        "train": later(lambda: sampler(pools.train, learner.prepare, **sizes), "training"),
        "val": later(lambda: sampler(pools.val, learner.prepare, **held), "validation"),
        "test": sampler(pools.test, learner.prepare, **held),
        "pooled": pooled_texts(pools.train, learner.prepare, tasks * ways * (shots + task.queries)),
        "pooled_outputs": len(pools.train.names),
        "data": pools.digest,
        "reference": lambda: untrained(task, learner, device),
    }


def model_parts(task: TextTask, learner: Learner, algorithm: str) -> dict[str, Any]:
    """What a ``Family`` has without data."""
    return {
        "model": learner.model,
        "outputs": task.ways,
        "train_outputs": task.ways,
        "loss": fmeta.losses.cross_entropy,
        "metric": "accuracy",
        "adapts": adapting(task, algorithm),
        "pretrained": learner.pretrained,
    }


def train_ways(task: TextTask, algorithm: str, classes: int) -> int:
    """Labels of a training task."""
    if task.train_ways is not None or algorithm not in STEPLESS:
        return task.train_ways or task.ways
    return max(task.ways, min(MANY, classes))


def untrained(task: TextTask, learner: Learner, device: torch.device) -> tuple[Algorithm, Params]:
    """Nearest class means by the encoder as it came."""
    apply, params = fmeta.functionalize(learner.model(None).to(device))
    return fmeta.protonet(apply, ways=task.ways), params


def sampler(pool: Pool, prepare: Prepare | None, **sizes: Any) -> Sampler:
    """Tasks of sentences that the frozen part has seen: once each where that fits, else once a step.

    Its work is done when the first task is asked for.
    """
    plain = fmeta.tasks.few_shot(pool, **sizes)  # which refuses sizes that cannot be, now
    if prepare is None:
        return fmeta.tasks.trimmed(plain)

    @functools.cache
    def made() -> Sampler:
        if bytes_of(pool, prepare) > FITS:
            return fmeta.tasks.trimmed(fmeta.tasks.prepared(plain, prepare))
        return fmeta.tasks.trimmed(fmeta.tasks.few_shot(prepared_pool(pool, prepare), **sizes))

    return lambda seed, step: made()(seed, step)


def pooled_texts(pool: Pool, prepare: Prepare | None, count: int) -> Sampler:
    """One task of ``count`` sentences of all training labels, numbered as the pool has them."""

    def sample(seed: int, step: int) -> Task:
        rows = torch.randint(len(pool.y), (1, count), generator=generator(seed, step)).to(pool.device)
        x = tree.map(lambda leaf: leaf[rows], pool.x)
        return Task(Batch(tree.map(lambda leaf: leaf[:, :1], x), pool.y[rows[:, :1]]), Batch(x, pool.y[rows]))

    short = fmeta.tasks.trimmed(sample)
    return short if prepare is None else fmeta.tasks.trimmed(fmeta.tasks.prepared(short, prepare))
