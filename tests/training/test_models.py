"""ResNet18 has the report's size and the right shapes, and refuses impossible settings."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_lib.training.models import Convolution, resnet18

stems = pytest.mark.parametrize("stem", ["cifar", "imagenet"])


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_cifar_stem_has_the_released_network_s_parameters():
    assert size(resnet18(num_classes=10)) == 11_173_962


def test_the_imagenet_stem_gives_torchvision_s_network():
    torchvision = pytest.importorskip("torchvision")
    ours, theirs = resnet18(10, stem="imagenet"), torchvision.models.resnet18(num_classes=10)
    assert size(ours) == size(theirs) == 11_181_642
    # Layer by layer, in order: the same weights then give the same logits.
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@stems
@pytest.mark.parametrize("pixels", [8, 9, 28, 33, 64])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_any_image_of_8_to_64_pixels_becomes_one_row_of_logits(stem, pixels, in_channels):
    model = resnet18(num_classes=7, in_channels=in_channels, width=2, stem=stem)
    x = torch.zeros(3, in_channels, pixels, pixels, requires_grad=True)
    logits = model.eval()(x)
    assert logits.shape == (3, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("stem", "maps"), [("cifar", 4), ("imagenet", 1)])
def test_the_cifar_stem_keeps_the_resolution(stem, maps):
    model = resnet18(width=2, stem=stem)
    assert model.blocks(model.stem(torch.zeros(2, 3, 32, 32))).shape == (2, 16, maps, maps)


class Strides(TorchDispatchMode):
    """Record the kernel size and stride of every convolution, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.seen.add((args[1].shape[-1], *args[3]))
        if function is torch.ops.aten.convolution_backward.default:
            self.seen.add((args[2].shape[-1], *args[4]))
        return function(*args, **(kwargs or {}))


def test_a_cpu_never_meets_the_strided_1x1_convolution_that_corrupts_its_memory():
    # oneDNN issue 6035: channels last, fewer channels than a vector has numbers.
    model = resnet18(num_classes=3, in_channels=1, width=2).to(memory_format=torch.channels_last)
    with Strides() as strides:
        model(torch.randn(8, 1, 8, 8)).sum().backward()
    assert strides.seen == {(3, 1, 1), (3, 2, 2), (1, 1, 1)}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pixels", [7, 8])
def test_a_strided_1x1_convolution_is_torch_s(layout, pixels):
    ours = Convolution(4, 6, 1, 2, 0).to(memory_format=layout)
    x = torch.randn(5, 4, pixels, pixels).contiguous(memory_format=layout).requires_grad_()
    y = ours(x)
    ours_grads = torch.autograd.grad(y.sin().sum(), (x, ours.weight))
    x, weight = x.detach().double().requires_grad_(), ours.weight.detach().double()
    reference = F.conv2d(x, weight.requires_grad_(), stride=2)
    assert y.shape == reference.shape
    theirs = reference, *torch.autograd.grad(reference.sin().sum(), (x, weight))
    for one, other in zip((y, *ours_grads), theirs):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


BAD = [(name, bad) for name in ("num_classes", "in_channels", "width") for bad in (0, -1)]
BAD += [("stem", bad) for bad in ("CIFAR", "torchvision", "", None)]


@pytest.mark.parametrize(("argument", "bad"), BAD)
def test_impossible_settings_are_refused(argument, bad):
    allowed = ".*cifar.*imagenet" if argument == "stem" else ""
    with pytest.raises(ValueError, match=f"{argument}={bad!r}{allowed}"):
        resnet18(**{argument: bad})
