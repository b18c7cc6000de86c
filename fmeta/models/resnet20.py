"""The small residual network for pictures of 32 x 32 (CIFAR)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class ResNet20(nn.Module):
    """Three stages of three residual blocks, 16-32-64 filters, global mean, linear head.

    Where a stage halves the picture, the shortcut takes every second position and pads channels with zeros (the
    paper's option A), so that it has no parameters. Names are those of the CIFAR weights that are about: ``conv1``,
    ``bn1``, ``layer<i>.<j>.conv<k>``, ``layer<i>.<j>.bn<k>``, ``linear``.

    References:
        He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2016, arXiv 1512.03385, section 4.2.
    """

    def __init__(self, num_classes: int = 10) -> None:
        """A head of so many outputs."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = stage(WIDTHS[0], WIDTHS[0])
        self.layer2 = stage(WIDTHS[0], WIDTHS[1])
        self.layer3 = stage(WIDTHS[1], WIDTHS[2])
        self.linear = nn.Linear(WIDTHS[2], num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def stage(inputs: int, outputs: int) -> nn.Sequential:
    """Three blocks, of which the first changes the width."""
    return nn.Sequential(Block(inputs, outputs), Block(outputs, outputs), Block(outputs, outputs))


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Half the size where the width grows."""
        super().__init__()
        self.stride, self.pad = (1, 0) if inputs == outputs else (2, (outputs - inputs) // 2)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + shortcut)
