"""ResNet18 with two stems: the CIFAR one that the report's code trains, and torchvision's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut (He et al. 2016, Figure 5 left)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """Stem, four stages of two blocks (widths w, 2w, 4w, 8w), mean over pixels, linear head."""

    def __init__(self, num_classes: int, in_channels: int, width: int, stem: str):
        super().__init__()
        if stem == "cifar":  # keeps the resolution: 32x32 images reach the head as 4x4 maps
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
        else:  # quarters it: 32x32 images reach the head as a single pixel
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(3, stride=2, padding=1),
            )
        blocks, channels = [], width
        for stage in range(4):
            out_channels = width * 2**stage
            blocks.append(BasicBlock(channels, out_channels, stride=1 if stage == 0 else 2))
            blocks.append(BasicBlock(out_channels, out_channels, stride=1))
            channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def resnet18(
    num_classes: int = 10, in_channels: int = 3, width: int = 64, stem: str = "cifar"
) -> ResNet18:
    """ResNet18 for images of at least 8x8 pixels; 11.17 million parameters at width 64.

    Args:
        num_classes: outputs of the head.
        in_channels: 1 for grey images, 3 for colour.
        width: channels of the first stage; the others have 2, 4 and 8 times as many. Parameters
            and arithmetic grow with its square.
        stem: "cifar", one 3x3 convolution without stride or pooling, as in the released code; or
            "imagenet", torchvision's 7x7 convolution and max pooling, as the report describes it.

    Raises:
        ValueError: for a number below 1 or an unknown stem.

    Weights are drawn from torch's global generator, by PyTorch's default rules for each layer.

    >>> sum(p.numel() for p in resnet18().parameters())
    11173962
    """
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value!r}: must be at least 1")
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f'stem={stem!r}: must be "cifar" or "imagenet"')
    return ResNet18(num_classes, in_channels, width, stem)
