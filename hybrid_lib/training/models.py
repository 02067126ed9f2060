"""ResNet18 with two stems: the CIFAR one that the report's code trains, and torchvision's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_generator_lock = threading.Lock()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw weights in this context from ``seed``, then restore torch's global generator.

    Threads take turns, because they all draw from that one generator.
    """
    with _generator_lock, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's only, unlike torch.manual_seed
        yield


class Convolution(nn.Conv2d):
    """A convolution without bias, computed in ``compute_dtype`` (None: the input's dtype)."""

    def __init__(self, in_channels, channels, size, stride, padding, compute_dtype=None):
        super().__init__(in_channels, channels, size, stride, padding, bias=False)
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        dtype, stride = self.compute_dtype or x.dtype, self.stride
        if x.is_cpu and self.kernel_size == (1, 1):
            # Drop the unused pixels here: with few channels in channels_last, torch's own kernel
            # writes past its buffer when it computes the weights' gradient (oneDNN issue 6035).
            x, stride = x[:, :, :: stride[0], :: stride[1]], 1
        y = F.conv2d(x.to(dtype), self.weight.to(dtype), None, stride, self.padding)
        return y.to(x.dtype)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that can append its batch's mean and variance to ``statistics`` instead of writing
    them into its buffers, which ``torch.func`` does not allow.
    """

    def forward(self, x: Tensor, statistics: list | None = None) -> Tensor:
        if statistics is None:
            return super().forward(x)
        normalised, mean, inverse_std = torch.native_batch_norm(
            x, self.weight, self.bias, None, None, True, self.momentum, self.eps
        )
        n = x.numel() / x.shape[1]
        unbiased = (inverse_std**-2 - self.eps) * (n / (n - 1))
        statistics += [mean, unbiased]
        return normalised


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut (He et al. 2016, Figure 5 left)."""

    def __init__(self, in_channels: int, channels: int, stride: int, compute_dtype):
        super().__init__()
        self.conv1 = Convolution(in_channels, channels, 3, stride, 1, compute_dtype)
        self.bn1 = BatchNorm(channels)
        self.conv2 = Convolution(channels, channels, 3, 1, 1, compute_dtype)
        self.bn2 = BatchNorm(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            projection = Convolution(in_channels, channels, 1, stride, 0, compute_dtype)
            self.shortcut = nn.Sequential(projection, BatchNorm(channels))

    def forward(self, x: Tensor, statistics: list | None = None) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x), statistics))
        y = self.bn2(self.conv2(y), statistics)
        if len(self.shortcut):
            projection, norm = self.shortcut
            x = norm(projection(x), statistics)
        return F.relu(y + x)


class ResNet18(nn.Module):
    """Stem, four stages of two blocks (widths w, 2w, 4w, 8w), mean over pixels, linear head."""

    def __init__(self, num_classes: int, in_channels: int, width: int, stem: str, compute_dtype):
        super().__init__()
        if stem == "cifar":  # keeps the resolution: 32x32 images reach the head as 4x4 maps
            first, pool = Convolution(in_channels, width, 3, 1, 1, compute_dtype), nn.Identity()
        else:  # quarters it: 32x32 images reach the head as a single pixel
            first = Convolution(in_channels, width, 7, 2, 3, compute_dtype)
            pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stem = nn.Sequential(first, BatchNorm(width), nn.ReLU(), pool)
        blocks, channels = [], width
        for stage in range(4):
            out_channels, stride = width * 2**stage, 1 if stage == 0 else 2
            blocks.append(BasicBlock(channels, out_channels, stride, compute_dtype))
            blocks.append(BasicBlock(out_channels, out_channels, 1, compute_dtype))
            channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor, statistics: list | None = None) -> Tensor:
        """Return logits; the list ``statistics`` receives what :class:`BatchNorm` would write."""
        convolution, norm, relu, pool = self.stem
        x = pool(relu(norm(convolution(x), statistics)))
        for block in self.blocks:
            x = block(x, statistics)
        return self.head(x.mean(dim=(2, 3)))

    def running_statistics(self) -> list[Tensor]:
        """The buffers that ``statistics`` corresponds to, in the same order."""
        norms = [m for m in self.modules() if isinstance(m, BatchNorm)]
        return [b for norm in norms for b in (norm.running_mean, norm.running_var)]

    def absorb(self, statistics: list[Tensor]) -> None:
        """Update the running statistics with those that a forward pass returned."""
        torch._foreach_lerp_(self.running_statistics(), statistics, self.stem[1].momentum)


def resnet18(
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 64,
    stem: str = "cifar",
    compute_dtype: torch.dtype | None = None,
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

    Weights are drawn from torch's global generator, with PyTorch's default initialisation.

    >>> sum(p.numel() for p in resnet18().parameters())
    11173962
    """
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value!r}: must be at least 1")
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f'stem={stem!r}: must be "cifar" or "imagenet"')
    return ResNet18(num_classes, in_channels, width, stem, compute_dtype)
