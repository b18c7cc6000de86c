"""The command ``fmeta adapt``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fmeta.train.config import MaybeStr


@dataclass(frozen=True)
class AdaptCommand:
    """Use a run of the text recipe: learn the labels of one csv from a few sentences, predict those of another."""

    run: tyro.conf.Positional[Path]
    """A run folder of `fmeta train text`."""
    support: Path
    """A csv of text,label: a few sentences for each label."""
    query: Path
    """A csv of text; with a label column too, the accuracy is said."""
    out: Path = Path("predictions.csv")
    """The csv to write: text, predicted, probability, and the probability of each label."""
    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint: the best on validation tasks, or the last."""
    model: MaybeStr = None
    """Folder of the encoder, if it is not where it was in training."""
    text_column: str = "text"
    """The column of sentences."""
    label_column: str = "label"
    """The column of labels."""

    def carry_out(self) -> int:
        """Do it; returns the exit code."""
        from fmeta.train.adapting import adapt_text  # late, as help should come without delay

        return adapt_text(
            self.run,
            self.support,
            self.query,
            self.out,
            name=self.checkpoint,
            model=self.model,
            text=self.text_column,
            label=self.label_column,
        )
