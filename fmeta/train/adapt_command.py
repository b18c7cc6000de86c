"""The command ``fmeta adapt``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fmeta.train.config import MaybeInt, MaybePath, MaybeStr

ONLY = {
    **dict.fromkeys(("images", "steps", "dtype"), ("detection",)),
    **dict.fromkeys(("model", "text_column", "label_column"), ("text",)),
    "query": ("text", "pictures"),
    "root": ("pictures",),
}
"""Options that runs of some recipes alone read."""


@dataclass(frozen=True)
class AdaptCommand:
    """Put a run to use on new classes: learn them from a few labelled examples, predict others.

    text: --support and --query are csv files, the result is a csv. Pictures: both are folders, a folder a class in
    --support; the result is a csv. detection: --support is a json in COCO's format, --images the folder or zip of its
    pictures; the result is a folder with the weights of an ordinary detector of torchvision and a picture.
    """

    run: tyro.conf.Positional[Path]
    """A run folder of `fmeta train` text, glyphs, omniglot, images or detection."""
    support: Path
    """A few examples of each class: csv of text,label; a folder with a folder a class; or a COCO json."""
    query: MaybePath = None
    """What to predict: a csv of text, or a folder of pictures; if it has labels too, the accuracy is said."""
    out: MaybePath = None
    """What to write: predictions.csv if not given; of detection a folder, adapted if not given."""
    images: MaybePath = None
    """detection: folder or zip of the pictures that --support is about."""
    steps: MaybeInt = None
    """detection: steps of adaptation; the run's own if not given."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """detection: of the weights that are written."""
    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint: the best on validation tasks, or the last."""
    root: MaybePath = None
    """Pictures: not read any more, as no picture of the run's training is needed; taken for scripts that give it."""
    model: MaybeStr = None
    """text: folder of the encoder, if it is not where it was in training."""
    text_column: str = "text"
    """text: the column of sentences."""
    label_column: str = "label"
    """text: the column of labels."""

    def carry_out(self) -> int:
        """Do it; returns the exit code.

        Raises:
            ValueError: without what the run's recipe needs.
        """
        from fmeta.train.folder import read_config  # late, as help should come without delay

        recipe = read_config(self.run).recipe
        self.refuse_others(recipe)
        if recipe == "detection":
            return self.detector()
        if self.query is None:
            raise ValueError(f"adapt: a run of {recipe} needs something to predict. Give it with --query.")
        out = self.out or Path("predictions.csv")
        if recipe != "text":
            from fmeta.train.pictures.adapting import adapt_pictures

            return adapt_pictures(
                self.run, self.support, self.query, out, name=self.checkpoint, root=self.root
            )
        from fmeta.train.text.adapting import adapt_text

        return adapt_text(
            self.run,
            self.support,
            self.query,
            out,
            name=self.checkpoint,
            model=self.model,
            text=self.text_column,
            label=self.label_column,
        )

    def refuse_others(self, recipe: str) -> None:
        """Refuse options that a run of this recipe does not read."""
        of = {"text": "text", "detection": "detection"}.get(recipe, "pictures")
        for name, kinds in ONLY.items():
            default = type(self).__dataclass_fields__[name].default
            if of not in kinds and getattr(self, name) != default:
                spelled, those = name.replace("_", "-"), " and ".join(kinds)
                raise ValueError(
                    f"adapt: --{spelled} is for runs of {those}, got a run of {recipe}. Leave it out."
                )

    def detector(self) -> int:
        """Adapt a detector."""
        from fmeta.train.detection.adapting import adapt_detector, load_detector
        from fmeta.train.terminal import say

        if self.images is None:
            raise ValueError(
                "adapt: a run of detection needs the pictures of --support. Give them with --images."
            )
        out, learned = self.out or Path("adapted"), load_detector(self.run, self.checkpoint)
        facts = adapt_detector(
            learned, self.support, self.images, out, steps=self.steps, dtype=self.dtype, say=say
        )
        say(
            f"{len(facts['classes'])} classes in {facts['seconds']} s; in {out}: detector.safetensors, adapted.png"
        )
        return 0
