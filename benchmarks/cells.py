"""The benchmark's problems as data: a cell says everything that a worker in another process must know."""

from __future__ import annotations

import dataclasses
import fnmatch
from dataclasses import dataclass
from typing import Any, Literal

Net = Literal["mlp", "conv4", "resnet12", "transformer", "torchbench"]


@dataclass(frozen=True)
class Cell:
    """A network, a batch of tasks and an inner loop of SGD; ``queries`` are per class."""

    name: str
    net: Net
    tasks: int
    steps: int
    ways: int = 1
    shots: int = 10
    queries: int = 10
    lr: float = 0.01
    channels: int = 64
    """Filters of conv4 and torchbench, width of the transformer and of the MLP."""
    size: int = 28
    """Height and width of images, tokens of a text."""
    about: str = ""

    def config(self) -> dict[str, Any]:
        """The cell as a line of JSON."""
        return dataclasses.asdict(self)

    def smaller(self, **changes: Any) -> Cell:
        """The same cell with other numbers."""
        return dataclasses.replace(self, **changes)


def sinusoid(tasks: int, steps: int) -> Cell:
    """The regression problem of the MAML paper."""
    return Cell(f"sinusoid-{tasks}x{steps}", "mlp", tasks, steps, channels=40, about="MLP 1-40-40-1")


CELLS = (
    *(sinusoid(tasks, steps) for tasks in (25, 100, 1000) for steps in (1, 5, 10, 50)),
    Cell("conv4-5w1s1q", "conv4", 32, 1, 5, 1, 1, 0.4, about="strided conv4, 28x28, as the paper trains"),
    Cell("conv4-5w1s15q", "conv4", 8, 1, 5, 1, 15, 0.4, about="strided conv4, 28x28"),
    Cell("conv4-20w1s1q", "conv4", 16, 5, 20, 1, 1, 0.1, about="strided conv4, 28x28, 20 ways"),
    Cell("resnet12-5w1s1q", "resnet12", 2, 1, 5, 1, 1, 0.01, size=84, about="ResNet-12, 84x84"),
    Cell(
        "transformer-5w5s5q", "transformer", 16, 5, 5, 5, 5, 0.1, channels=64, size=16,
        about="two encoder layers, 4 heads, 16 tokens of a vocabulary of 1000",
    ),
    Cell(
        "torchbench-omniglot", "torchbench", 32, 5, 5, 5, 15, 0.1,
        about="network and sizes of torchbench's maml_omniglot; its stored batch is not in its repository, "
        "so inputs are random",
    ),
)  # fmt: skip
"""What the speed suite runs."""

TINY = (
    sinusoid(5, 1),
    Cell("conv4-tiny", "conv4", 2, 1, 3, 1, 1, 0.1, channels=8, size=12, about="conv4, 8 filters, 12x12"),
)
"""What ``--quick`` runs."""


def named(name: str) -> Cell:
    """The cell of that name."""
    found = [cell for cell in (*CELLS, *TINY) if cell.name == name]
    if not found:
        raise ValueError(
            f"named: a cell was expected, got {name!r}. `python -m benchmarks --list` shows them."
        )
    return found[0]


def chosen(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether ``--only`` lets this cell run: no pattern, or one that fits the whole name."""
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
