"""A tiny pre-trained encoder on disk and a csv that it can learn, for the tests of texts."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

SYLLABLES = [a + b for a in "bcdfghjklmnpqrstvwxz" for b in "aeiou"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LONGEST = 24


def tiny_bert(layers: int = 2, words: int = len(SYLLABLES) + len(SPECIAL)) -> BertModel:
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=words, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=LONGEST, initializer_range=0.3,
        )
    )  # fmt: skip
    return model.eval()


def save_encoder(folder: Path, model: Any = None) -> Path:
    """A folder as ``save_pretrained`` makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *SYLLABLES]) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=LONGEST).save_pretrained(folder)
    (model or tiny_bert()).save_pretrained(folder)
    return folder


def sentences(classes: int, each: int, seed: int = 0) -> list[tuple[str, str]]:
    """Labelled sentences; a label prefers six syllables of its own."""
    draw = random.Random(seed)
    rows = []
    for c in range(classes):
        own = draw.sample(SYLLABLES, 6)
        for _ in range(each):
            rows.append((" ".join(draw.choice(own) for _ in range(draw.randint(2, 8))), f"intent {c}"))
    return rows


def write_csv(path: Path, rows: Sequence[Sequence[str]], head: Sequence[str] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    return path
