"""A finished run put to use: it learns new labels from a few examples and tells new examples apart.

In Python, for a run of the text recipe::

    from fmeta.train.text.adapting import load_classifier

    learner = load_classifier("runs/text-20261128-120000")
    classifier = learner.fit(["where is my card?", "I was charged twice"], ["arrival", "charge"])
    print(classifier.predict(["two payments for one coffee"]))  # a probability for each label
"""

from __future__ import annotations

import csv
import functools
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import tree
from fmeta.adapt import run
from fmeta.data.lines import csv_lines
from fmeta.data.text import read_texts
from fmeta.data.tokens import tokenise, trim
from fmeta.train import checkpoint, folder
from fmeta.train.choices import EMBEDDINGS, STEPLESS
from fmeta.train.config import Config
from fmeta.train.device import pick_device
from fmeta.train.experiment import Experiment, build
from fmeta.train.family import Family
from fmeta.train.terminal import say
from fmeta.train.text.config import TextTask
from fmeta.train.text.recipe import make_learner, model_parts
from fmeta.types import Adapted, Algorithm, Batch, MetaLearningWarning, Task, Tree

CALL = "adapt"
SIDE_BY_SIDE = 128
"""Query examples that are predicted at once."""


class Learner(NamedTuple):
    """A meta-learned model, and how its examples are read."""

    prepare: Callable[[Sequence[Any]], Tree]
    """``(examples) -> x`` with a row an example."""
    build: Callable[[int], tuple[Algorithm, Tree]]
    """``(labels) -> (algorithm, meta)``."""
    steps: int
    """Steps of adaptation."""

    def fit(self, examples: Sequence[Any], labels: Sequence[str]) -> Classifier:
        """Learn labels from examples of each.

        Args:
            examples: sentences.
            labels: the label of each.

        Raises:
            ValueError: for fewer than two labels, unlike counts, or more labels than the run's model has outputs.
        """
        if len(examples) != len(labels) or len(set(labels)) < 2:
            raise ValueError(
                f"{CALL}: the support set must have a label for each example, of at least 2 kinds, got "
                f"{len(examples)} examples and {len(labels)} labels of {len(set(labels))} kinds."
            )
        names = tuple(dict.fromkeys(labels))
        algorithm, meta = self.build(len(names))
        y = torch.tensor([names.index(label) for label in labels], device=tree.device(meta))
        support = Batch(self.prepare(examples), y)
        adapted = tree.detach(run(algorithm.inner_loop, meta, support, self.steps))
        return Classifier(self, algorithm, meta, adapted, names)


class Classifier(NamedTuple):
    """A model that is adapted to some labels."""

    learner: Learner
    algorithm: Algorithm
    meta: Tree
    adapted: Adapted
    names: tuple[str, ...]
    """The labels, in the order of their first example."""

    def probabilities(self, examples: Sequence[Any]) -> Tensor:
        """``[n, labels]``: the probability of each label."""
        found = [torch.zeros(0, len(self.names))]
        for begin in range(0, len(examples), SIDE_BY_SIDE):
            x = self.learner.prepare(examples[begin : begin + SIDE_BY_SIDE])
            with torch.no_grad():
                scores = self.algorithm.predict(self.meta, self.adapted, x)
            found.append(scores[:, : len(self.names)].softmax(-1).cpu())
        return torch.cat(found)

    def predict(self, examples: Sequence[Any]) -> list[dict[str, float]]:
        """For each example the probability of each label."""
        return [dict(zip(self.names, row, strict=True)) for row in self.probabilities(examples).tolist()]


def load_classifier(path: str | Path, name: str = "best", *, model: str | None = None) -> Learner:
    """A run of the text recipe, ready to learn labels from a few sentences. It needs no training data.

    Args:
        path: a run folder.
        name: ``"best"`` by validation, or ``"last"``.
        model: path of the encoder, if it is not where it was in training.

    Raises:
        ValueError: for a run of another recipe, and as ``load_run``.
    """
    path, config = Path(path), folder.read_config(Path(path))
    if not isinstance(config.task, TextTask):
        raise ValueError(
            f"{CALL}: {path} must be a run of the text recipe, got one of {config.recipe}. Train one with "
            "`fmeta train text --data FILE.csv`."
        )
    config = replace(config, task=replace(config.task, model=model or config.task.model))
    algorithm, device = config.inner.algorithm, pick_device(config.machine.device)
    parts = make_learner(config.task, device)

    def prepare(texts: Sequence[str]) -> Tree:
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{CALL}: texts must be a list of str, got {texts!r:.60}.")
        x, cut = tokenise(CALL, texts, parts.tokenizer, config.task.max_length)
        if cut:
            warnings.warn(
                f"{CALL}: {cut} of {len(texts)} texts are longer than the {config.task.max_length} tokens of the run; "
                "their ends are not read.",
                MetaLearningWarning,
                stacklevel=2,
            )
        x = trim(tree.map(lambda leaf: leaf.to(device), x))
        return x if parts.prepare is None else parts.prepare(x)

    def family(config: Config[Any], device: torch.device) -> Family:
        return without_tasks(model_parts(config.task, parts, algorithm))

    @functools.cache
    def make(ways: int) -> tuple[Algorithm, Tree]:
        own = with_ways(config, ways)
        experiment: Experiment = build(own, make=family)
        state, _, _ = folder.load(path, name, experiment)
        return experiment.algorithm, tree.detach(state.meta)

    return Learner(prepare, make, 0 if algorithm in STEPLESS else config.inner.test_steps)


def with_ways(config: Config[Any], ways: int) -> Config[Any]:
    """The config of a run for tasks of so many labels.

    Raises:
        ValueError: for more labels than a trained head has outputs.
    """
    if config.inner.algorithm in EMBEDDINGS:
        return replace(config, task=replace(config.task, ways=ways, train_ways=None))
    if ways > config.task.ways:
        raise ValueError(
            f"{CALL}: this run has a head of {config.task.ways} outputs ({config.inner.algorithm}), got {ways} labels. "
            "Runs of protonet, protomaml and others that make their head take any number."
        )
    return config


def no_tasks(seed: int, step: int) -> Task:
    """In the place of a sampler."""
    raise ValueError(f"{CALL}: a run that is put to use has no tasks of its own. Build it with load_run.")


def without_tasks(parts: dict[str, Any]) -> Family:
    """The family of a run that is put to use, from what it has without data."""
    outputs = {"train_outputs": parts["outputs"], "pooled_outputs": 0}
    return Family(**outputs | parts, train=no_tasks, val=no_tasks, test=no_tasks, pooled=no_tasks)


def adapt_text(
    path: Path,
    support: Path,
    query: Path,
    out: Path,
    *,
    name: str = "best",
    model: str | None = None,
    text: str = "text",
    label: str = "label",
) -> int:
    """Learn the labels of one csv and write those of another; returns 0.

    Args:
        path: a run folder of the text recipe.
        support: a csv of text,label with a few sentences for each label.
        query: a csv of text. Where lines have a label too, the accuracy on these is said.
        out: the csv to write: text, predicted, probability, and the probability of each label.
        name: the checkpoint.
        model: path of the encoder, if it has moved.
        text: name of the column of sentences.
        label: name of the column of labels.

    Raises:
        ValueError: for files that cannot be read, a support set with fewer than two labels, and query labels that
            it lacks.
    """
    known = read_texts(support, (text, label), CALL)
    asked = read_query(query, text, label)
    lacking = sorted({row[1] for row in asked if row[1:] and row[1]} - {row[1] for row in known})
    if lacking:
        raise ValueError(
            f"{CALL}: every label of {query} needs an example in {support}, got none of {lacking[0]!r}"
            f"{f' and {len(lacking) - 1} more' if lacking[1:] else ''}. Add one, or leave the label column out."
        )
    classifier = load_classifier(path, name, model=model).fit(*zip(*known, strict=True))
    found = classifier.probabilities([row[0] for row in asked])
    write_predictions(out, [row[0] for row in asked], classifier.names, found)
    say(f"{len(classifier.names)} labels from {len(known)} sentences; {len(asked)} predictions in {out}")
    labelled = [i for i, row in enumerate(asked) if row[1:] and row[1]]
    if labelled:
        said_accuracy(classifier.names, found[labelled], [asked[i][1] for i in labelled])
    return 0


def said_accuracy(names: Sequence[str], found: Tensor, labels: Sequence[str]) -> None:
    """Say how many labels were found."""
    right = [names[i] == label for i, label in zip(found.argmax(1).tolist(), labels, strict=True)]
    say(f"accuracy {100 * sum(right) / len(right):.1f} %")


def read_query(query: Path, text: str, label: str) -> list[tuple[str, ...]]:
    """The sentences of a csv, with their labels where it has such a column."""
    head = next(csv_lines(query, CALL), (0, []))[1] if query.is_file() else []
    labelled = label in map(str.strip, head)
    return read_texts(query, (text, label) if labelled else (text,), CALL, may_be_empty=(label,))


def write_predictions(
    out: Path, texts: Sequence[str], names: Sequence[str], found: Tensor, head: str = "text"
) -> None:
    """A line for each sentence, or for each file."""
    page = io.StringIO()
    lines = csv.writer(page, lineterminator="\n")
    lines.writerow([head, "predicted", "probability", *(f"p({name})" for name in names)])
    for text, row in zip(texts, found.tolist(), strict=True):
        best = max(range(len(row)), key=row.__getitem__)
        lines.writerow([text, names[best], f"{row[best]:.4f}", *(f"{p:.4f}" for p in row)])
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomic(out, page.getvalue().encode())
