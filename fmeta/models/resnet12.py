"""The residual network of the few-shot literature."""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (64, 160, 320, 640)


def resnet12(in_channels: int = 3, ways: int | None = 5) -> nn.Module:
    """Four residual blocks of three 3x3 convolutions, 64-160-320-640 filters, global mean, linear head.

    Each block: (convolution, batch norm, leaky ReLU of slope 0.1) three times, the shortcut through a 1x1
    convolution added before the last ReLU, then 2x2 max-pool. Batch norm always uses the statistics of the
    batch. Weights are drawn by Kaiming's normal rule, the head's bias is zero. Parameters are
    ``blocks.<i>.convs.<j>.weight``, ``blocks.<i>.norms.<j>.weight``, ``blocks.<i>.shortcut.*``, ``head.*``.

    Args:
        in_channels: 3 for colour images.
        ways: outputs of the head; None leaves it out and returns the embedding ``[shots, 640]``.

    References:
        Lee et al., "Meta-Learning with Differentiable Convex Optimization", 2019, arXiv 1904.03758,
        section 4.1.
        Deviation: no DropBlock and no dropout, so that the loss is a function of its arguments.
    """
    return ResNet12(in_channels, ways)


class ResNet12(nn.Module):
    """What `resnet12` returns: ``[shots, in_channels, height, width] -> [shots, ways]`` or the embedding."""

    def __init__(self, in_channels: int, ways: int | None) -> None:
        """Four blocks and a head."""
        super().__init__()
        inputs = (in_channels, *WIDTHS[:-1])
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in zip(inputs, WIDTHS, strict=True)))
        self.head = nn.Identity() if ways is None else nn.Linear(WIDTHS[-1], ways)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, a=0.1, mode="fan_out", nonlinearity="leaky_relu")
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.head(self.blocks(x).mean((2, 3)))


class Block(nn.Module):
    """Three convolutions and a shortcut: half the height and width."""

    def __init__(self, in_channels: int, channels: int) -> None:
        """A block of ``channels`` filters."""
        super().__init__()
        inputs = (in_channels, channels, channels)
        self.convs = nn.ModuleList(nn.Conv2d(n, channels, 3, padding=1, bias=False) for n in inputs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels, track_running_stats=False) for _ in inputs)
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels, track_running_stats=False),
        )
        self.relu = nn.LeakyReLU(0.1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            if i < 2:
                y = self.relu(y)
        return self.pool(self.relu(y + self.shortcut(x)))
