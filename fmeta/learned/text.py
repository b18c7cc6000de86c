"""A problem of language: a small transformer that predicts the next byte of Python's own documentation."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from fmeta.functional import functionalize
from fmeta.learned.problems import Problem, Training, draw_lengths, draw_params, spread
from fmeta.losses import cross_entropy
from fmeta.tasks.checks import check_counts
from fmeta.tasks.seeding import generator
from fmeta.types import Batch

SYMBOLS = 96
"""Printable ASCII; all else is a space."""


class Bytes(nn.Module):
    """One block of causal attention: ``[n, context]`` symbols to scores ``[n, SYMBOLS]`` of what follows."""

    def __init__(self, width: int, context: int, heads: int = 2) -> None:
        """Positions are learned."""
        super().__init__()
        self.heads = heads
        self.symbol = nn.Parameter(torch.zeros(SYMBOLS, width))
        self.place = nn.Parameter(torch.zeros(context, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        n, context = x.shape
        seen = nn.functional.one_hot(x, SYMBOLS).to(self.symbol.dtype) @ self.symbol + self.place
        width = seen.shape[-1]
        split = self.qkv(seen).reshape(n, context, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        last = q[:, :, -1:]  # what follows the last symbol is all that is asked for
        weights = torch.softmax(last @ k.transpose(-1, -2) / math.sqrt(width // self.heads), dim=-1)
        read = seen[:, -1] + self.out((weights @ v).reshape(n, width))
        return self.head(read + self.down(torch.relu(self.up(read))))


@functools.cache
def documentation() -> Tensor:
    """The text as symbols, some 465,000 of them."""
    from pydoc_data import topics

    raw = "\n".join(topics.topics[name] for name in sorted(topics.topics)).encode("ascii", "replace")
    found = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() - 32
    return torch.where((found < 0) | (found >= SYMBOLS), 0, found)


def text(*, width: int = 16, context: int = 12, examples: int = 512, batch: int = 32) -> Problem:
    """Next-byte prediction, each task on another place of the text.

    Args:
        width: of the transformer.
        context: symbols that it sees.
        examples: windows of text of a task.
        batch: examples a step.

    Raises:
        ValueError: for sizes below 1, or a width that its two heads do not share.
    """
    check_counts("learned.text", width=width, context=context, examples=examples, batch=batch)
    if width % 2:
        raise ValueError(f"learned.text: width must be even, for two heads, got {width}. Pass 16, say.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        apply, params = functionalize(Bytes(width, context))
    source_text = documentation()

    def sample(seed: int, step: int, tasks: int, length: int | tuple[int, int]) -> Training:
        source = generator(seed, step)
        begin = torch.randint(len(source_text) - 40 * examples, (tasks, 1), generator=source)
        at = begin + torch.randint(40 * examples - context - 1, (tasks, examples), generator=source)
        windows = source_text[at[..., None] + torch.arange(context + 1)]
        start = draw_params(params, spread(tasks, 2.0, source), source)
        return Training(
            start, Batch(windows[..., :-1], windows[..., -1]), draw_lengths(length, tasks, source)
        )

    return Problem("text", cross_entropy(apply), sample, batch)
