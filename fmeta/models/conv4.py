"""The four-block convolutional network of the few-shot literature."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn


def conv4(
    in_channels: int = 1,
    ways: int | None = 5,
    channels: int = 64,
    pool: Literal["stride", "max"] = "stride",
    head: Literal["mean", "flatten"] = "mean",
    size: int = 28,
) -> nn.Module:
    """Four blocks of 3x3 convolution, batch norm and ReLU, each halving the image, then a linear head.

    Batch norm always uses the statistics of the batch, so that a prediction depends on the other queries
    (the transductive setting of MAML). Convolutions have no bias, since batch norm would cancel it. Weights
    are drawn by Xavier's uniform rule, the head's bias is zero. Parameters are ``blocks.<i>.conv.weight``,
    ``blocks.<i>.norm.weight``, ``.bias``, ``head.weight`` and ``head.bias``.

    Args:
        in_channels: 1 for Omniglot, 3 for colour images.
        ways: outputs of the head; None leaves the head out and returns the embedding.
        channels: filters of each block: 64 for Omniglot, 32 for MAML on miniImageNet.
        pool: ``"stride"``: convolutions of stride 2 (MAML on Omniglot); ``"max"``: stride 1 and 2x2 max-pool.
        head: ``"mean"``: the embedding is the mean over positions, ``[shots, channels]``; ``"flatten"``: all
            positions, ``[shots, channels * side * side]``, which needs the size.
        size: height and width of the images; read for ``head="flatten"`` only.

    Raises:
        ValueError: for another pool or head, or an image that four halvings leave nothing of.

    References:
        Vinyals et al., "Matching Networks", 2016, arXiv 1606.04080, section 4.1 (the architecture).
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", 2017, arXiv 1703.03400, appendix A.1.
    """
    if pool not in ("stride", "max"):
        raise ValueError(f'conv4: pool must be "stride" or "max", got {pool!r}.')
    if head not in ("mean", "flatten"):
        raise ValueError(f'conv4: head must be "mean" or "flatten", got {head!r}.')
    side = size
    for _ in range(4):
        side = (side + 1) // 2 if pool == "stride" else side // 2
    if side < 1:
        raise ValueError(f"conv4: size must be at least {16 if pool == 'max' else 1}, got {size}.")
    return Conv4(in_channels, ways, channels, pool, None if head == "mean" else side)


class Conv4(nn.Module):
    """What `conv4` returns: ``[shots, in_channels, size, size] -> [shots, ways]`` or the embedding."""

    def __init__(
        self, in_channels: int, ways: int | None, channels: int, pool: str, side: int | None
    ) -> None:
        """Four blocks, and a head on ``channels * side * side`` features or on their mean."""
        super().__init__()
        self.blocks = nn.Sequential(*(Block(n, channels, pool) for n in (in_channels, *[channels] * 3)))
        self.mean = side is None
        features = channels if side is None else channels * side * side
        self.head = nn.Identity() if ways is None else nn.Linear(features, ways)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.blocks(x)
        return self.head(x.mean((2, 3)) if self.mean else x.flatten(1))


class Block(nn.Module):
    """Convolution, batch norm, ReLU and pooling: half the height and width."""

    def __init__(self, in_channels: int, channels: int, pool: str) -> None:
        """A block of ``channels`` filters."""
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, channels, 3, stride=2 if pool == "stride" else 1, padding=1, bias=False
        )
        self.norm = nn.BatchNorm2d(channels, track_running_stats=False)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2) if pool == "max" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.pool(self.relu(self.norm(self.conv(x))))
