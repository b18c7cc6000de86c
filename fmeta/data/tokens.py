"""Texts as token ids, padded on the right, and cut to a few lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import tree
from fmeta.types import Tree
from fmeta.weights.hub import pretrained

Tokenizer = Callable[..., Any]
"""As of transformers: ``tokenizer(texts, ...) -> {"input_ids": ...}``, with a ``pad_token_id``."""
BYTE_OFFSET, BYTE_END = 3, 1
"""Ids of bytes start behind padding, end and unknown, as in ByT5 (Xue et al., 2022, arXiv 2105.13626)."""
LENGTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Lengths that token ids are cut to: few, so that few kernels are compiled."""


class Tokenised(NamedTuple):
    """Token ids of some texts."""

    x: dict[str, Tensor]  # input_ids and attention_mask, [n, length] int64
    cut: int
    """How many texts lost their end."""


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a pre-trained model.

    Args:
        name: a folder, a name on the hub, or ``"minilm"``.

    Raises:
        ValueError: where there is none, or one without words.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = pretrained("load_tokenizer", AutoTokenizer, name)
    special = len(set(getattr(tokenizer, "all_special_ids", ())))
    if special and len(tokenizer) <= special:  # transformers makes an empty one of a folder without its files
        raise ValueError(
            f"load_tokenizer: {name} must hold the files of a tokenizer, such as tokenizer.json or vocab.txt, got a "
            f"vocabulary of {len(tokenizer)} special tokens. Save the tokenizer into the folder of the model."
        )
    return tokenizer


def tokenise(
    call: str, texts: Sequence[str], tokenizer: Tokenizer | str | Path | None, max_length: int | None
) -> Tokenised:
    """Token ids of texts, padded to the longest; longer texts than ``max_length`` tokens lose their end.

    Args:
        call: the public function that errors name.
        texts: the texts.
        tokenizer: see `text_csv`.
        max_length: at most so many tokens; None for what the tokenizer's model takes.

    Raises:
        TypeError: for something that is no tokenizer.
        ValueError: for more tokens than its model takes.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    if max_length is not None and (not isinstance(max_length, int) or max_length < 3):
        raise ValueError(f"{call}: max_length must be an int of at least 3 or None, got {max_length!r}.")
    if tokenizer is None:
        rows, cut = byte_ids(texts, max_length)
        return Tokenised(padded(rows, 0), cut)
    padding = getattr(tokenizer, "pad_token_id", None)
    if not callable(tokenizer) or padding is None:
        raise TypeError(
            f"{call}: tokenizer must be one of transformers with a pad token, got {type(tokenizer).__name__}. "
            "Pass the name or path of an encoder, or None for bytes."
        )
    most = getattr(tokenizer, "model_max_length", None) or 10**9
    if max_length is not None and max_length > most:
        raise ValueError(
            f"{call}: max_length must be at most the {most} tokens that the model takes, got {max_length}."
        )
    limit = min(max_length or most, most)
    rows = tokenizer(list(texts), verbose=False)["input_ids"]
    long = [i for i, row in enumerate(rows) if len(row) > limit]
    if long:  # again, since an end mark must stay
        shorter = tokenizer([texts[i] for i in long], truncation=True, max_length=limit)["input_ids"]
        for i, row in zip(long, shorter, strict=True):
            rows[i] = row
    return Tokenised(padded(rows, padding), len(long))


def byte_ids(texts: Sequence[str], limit: int | None) -> tuple[list[list[int]], int]:
    """UTF-8 bytes as ids, with an end mark, and how many texts were cut."""
    rows = [[b + BYTE_OFFSET for b in text.encode()] for text in texts]
    cut = 0 if limit is None else sum(len(row) > limit - 1 for row in rows)
    return [[*(row if limit is None else row[: limit - 1]), BYTE_END] for row in rows], cut


def padded(rows: Sequence[Sequence[int]], padding: int) -> dict[str, Tensor]:
    """Rows of ids as one matrix, with the mask of what is no padding."""
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    mask = torch.arange(int(counts.max()) if len(rows) else 0) < counts[:, None]
    ids = torch.full(mask.shape, padding, dtype=torch.int64)
    ids[mask] = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": mask.long()}


def length_for(longest: int, lengths: Sequence[int] = LENGTHS) -> int:
    """The smallest of some lengths that holds ``longest`` tokens, or ``longest`` itself."""
    return next((n for n in sorted(lengths) if n >= longest), longest)


def trim(x: Tree, lengths: Sequence[int] = LENGTHS) -> Tree:
    """Cut padding that no text of these needs.

    Args:
        x: a dict with ``attention_mask`` ``[..., length]``, whose other leaves have the length at the same place.
            Anything else is returned as it is.
        lengths: to choose from.

    Example:
        >>> trim({"attention_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])}, (2, 4))["attention_mask"].shape
        torch.Size([2, 2])
    """
    if not isinstance(x, dict) or "attention_mask" not in x:
        return x
    mask = x["attention_mask"]
    longest = int(mask.sum(-1).max()) if mask.numel() else 0
    length, place = min(length_for(longest, lengths), mask.shape[-1]), mask.ndim - 1
    return tree.map(lambda leaf: leaf.narrow(place, 0, length), x)
