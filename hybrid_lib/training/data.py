"""Data sets as uint8 tensors, and the batches made from them on the device.

Each batch is cropped, flipped and normalised on whatever device holds the images. There is no data
loader and no worker process.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hybrid_lib.optim.compiled import first_line

TITLES = {
    "digits": "handwritten digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100",
    "mnist": "MNIST", "fashion-mnist": "Fashion-MNIST",
    "python-docs": "Python {}.{}'s documentation".format(*sys.version_info),  # see training.text
}  # fmt: skip
NAMES = tuple(TITLES)
# A copy of a known data set has its own title, so that it is never mistaken for the original.
FOLDER_TITLES = {"cifar10-jpeg": "CIFAR-10 (JPEG copy)"}
_CHECKOUT = Path(__file__).resolve().parents[2]
# The folder that holds data/, notebooks/ and runs/: the checkout, else the working folder.
PROJECT = _CHECKOUT if (_CHECKOUT / "pyproject.toml").exists() else Path.cwd()


@dataclass(frozen=True)
class Data:
    """Training, validation and test images with their labels."""

    title: str  # the name that figures and tables show
    classes: tuple[str, ...]  # label i is classes[i]
    train_images: Tensor  # uint8, (n, channels, height, width)
    train_labels: Tensor  # int64, (n,)
    validation_images: Tensor  # empty unless validation_limit is given
    validation_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor  # of the training images scaled to [0, 1]; float32, (channels,)
    std: Tensor
    checksum: str  # SHA-256 over images and labels, first 16 hexadecimal digits

    def to(self, device) -> Data:
        """The same data with all tensors on ``device``."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def check_name(dataset: str) -> None:
    """Raise ValueError if no data set can have this name; :func:`load` looks for the files."""
    if dataset.startswith("folder:") and not dataset.removeprefix("folder:").strip():
        raise ValueError(f"dataset={dataset!r}: name the folder, as in folder:data/cifar10-jpeg")
    if dataset not in NAMES and not dataset.startswith("folder:"):
        known = f"{', '.join(NAMES)} or folder:PATH (PATH/train/CLASS/*, PATH/test/CLASS/*)"
        raise ValueError(f"dataset={dataset!r}: must be one of {known}")


def title(dataset: str) -> str:
    """The display name of a data set in figures and tables.

    >>> title("folder:data/cifar10-jpeg"), title("folder:my/birds")
    ('CIFAR-10 (JPEG copy)', 'folder birds')
    """
    if dataset in TITLES:
        return TITLES[dataset]
    name = Path(dataset.removeprefix("folder:")).expanduser().resolve().name
    return FOLDER_TITLES.get(name, f"folder {name}")


def load(
    dataset: str, train_limit: int | None = None, test_limit: int | None = None,
    validation_limit: int | None = None,
) -> Data:  # fmt: skip
    """Load a data set, or a class-balanced part of it, into memory.

    Args:
        dataset: "digits" (inside scikit-learn: no download), "cifar10", "cifar100", "mnist",
            "fashion-mnist" (through torchvision, downloaded once into ``data/`` of the project or
            into the folder named by the environment variable HYBRID_DATA), or "folder:PATH".
        train_limit, test_limit: number of images to keep: the first ones of each class, as evenly
            as the classes allow. None: all.
        validation_limit: number of those training images to set aside for validation: the last
            ones of each class. None: there is no validation set.

    Raises:
        ValueError: for an unknown name, a limit out of range, or a folder with the wrong layout.
        FileNotFoundError: if files are missing and cannot be downloaded.
    """
    check_name(dataset)
    if dataset == "python-docs":
        raise ValueError(
            "dataset='python-docs' is text, not images: hybrid_lib.training.text loads it"
        )
    if dataset.startswith("folder:"):
        return _folder(dataset, train_limit, test_limit, validation_limit)
    classes, *parts = _digits() if dataset == "digits" else _torchvision(dataset)
    for i, (name, limit) in enumerate((("train_limit", train_limit), ("test_limit", test_limit))):
        images, labels = parts[i]
        kept = _balanced(labels, limit, name)
        parts[i] = images[kept], labels[kept]
    return _data(title(dataset), classes, *parts, validation_limit)


def order(n: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits n images, drawn on the CPU: the same for every device.

    >>> order(5, seed=0, epoch=1).tolist() == order(5, seed=0, epoch=1).tolist()
    True
    """
    return torch.randperm(n, generator=generator("order", seed, epoch))


def generator(purpose: str, seed: int, epoch: int, device="cpu") -> torch.Generator:
    """A separate generator for each purpose, seed and epoch: resuming restores no generators."""
    return torch.Generator(device).manual_seed(seed_of(purpose, seed, epoch))


def seed_of(purpose: str, seed: int, epoch: int) -> int:
    """Derive a seed from the purpose, the run's seed and the epoch."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def batches(images: Tensor, labels: Tensor, index: Tensor, size: int) -> Iterator[tuple]:
    """Yield (images, labels) batches of ``size`` in ``index``'s order; the last may be smaller."""
    for part in index.to(images.device, non_blocking=True).split(size):
        yield images.index_select(0, part), labels[part]  # copies whole images


def normalised(images: Tensor, data: Data) -> Tensor:
    """uint8 images as float32, standardised by the training set's mean and std per channel."""
    mean, std = data.mean.view(-1, 1, 1), data.std.view(-1, 1, 1)
    return images.float().sub_(255 * mean).mul_(1 / (255 * std))  # in place: allocates one batch


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its size, padding with zeros, and mirror half of them.

    At 32x32 pixels this is the usual random crop with a padding of 4. ``generator`` must live on
    the images' device.
    """
    n, channels, height, width = images.shape
    pad_y, pad_x = height // 8, width // 8
    device = images.device
    draw = functools.partial(torch.randint, size=(n, 1), generator=generator, device=device)
    rows = draw(0, 2 * pad_y + 1) + torch.arange(height, device=device)
    columns = draw(0, 2 * pad_x + 1) + torch.arange(width, device=device)
    columns = torch.where(draw(0, 2) == 1, columns.flip(1), columns)
    pixels = rows.unsqueeze(2) * (width + 2 * pad_x) + columns.unsqueeze(1)
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y)).flatten(2)
    index = pixels.view(n, 1, height * width).expand(-1, channels, -1)
    return padded.gather(2, index).view(images.shape)


def _data(
    name: str, classes: list[str], train: tuple, test: tuple, validation_limit: int | None = None
) -> Data:
    held = torch.zeros(len(train[1]), dtype=torch.bool)
    if validation_limit is not None:  # the last ones of each class are held out
        if validation_limit == len(held):
            raise ValueError(f"validation_limit={validation_limit}: leaves no image to train on")
        last = _balanced(train[1].flip(0), validation_limit, "validation_limit")
        held[len(held) - 1 - last] = True
    (train_images, train_labels), validation = ([x[part] for x in train] for part in (~held, held))
    digest = hashlib.sha256()
    for tensor in (train_images, train_labels, *test, *validation):
        digest.update(tensor.numpy().tobytes())
    # In float64, one channel at a time: 50,000 colour images at once would need 1.2 GB.
    channels = train_images.transpose(0, 1)
    std, mean = zip(*(torch.std_mean(c.double() / 255, correction=0) for c in channels))
    std, mean = torch.stack(std).float(), torch.stack(mean).float()
    std = torch.where(std > 0, std, 1.0)  # a constant channel becomes zero
    return Data(
        name, tuple(classes), train_images, train_labels, *validation, *test,
        mean, std, digest.hexdigest()[:16],
    )  # fmt: skip


@functools.cache
def _digits():
    from sklearn.datasets import load_digits  # imported here: it takes a second

    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    n = 1200  # two thirds for training, 597 for testing, in file order: no lucky split
    classes = [str(name) for name in bunch.target_names]
    return classes, (images[:n], labels[:n]), (images[n:], labels[n:])


def _torchvision(dataset: str):
    try:
        from torchvision import datasets  # imported here: the digits do not need it
    except ImportError as error:
        raise ImportError(
            f"dataset={dataset} needs torchvision: pip install torchvision ({error})"
        ) from error
    cls, folder = {
        "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
        "cifar100": (datasets.CIFAR100, "cifar-100-python"),
        "mnist": (datasets.MNIST, "MNIST"),
        "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST"),
    }[dataset]
    root = Path(os.environ.get("HYBRID_DATA", PROJECT / "data"))
    try:
        train, test = (cls(root, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError, ValueError, AssertionError, tarfile.TarError) as error:
        raise FileNotFoundError(
            f"{title(dataset)} is not complete in {root / folder} and could not be downloaded "
            f"({first_line(error)}). Run again with network access, or unpack the original files "
            "there (HYBRID_DATA sets another root), or use dataset=folder:PATH or digits. Delete "
            "damaged files first"
        ) from error
    tensors = []
    for part in (train, test):
        images = torch.as_tensor(part.data)
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
        tensors.append((images.contiguous(), torch.as_tensor(part.targets)))
    return train.classes, *tensors


def folder_sizes(dataset: str) -> dict[str, int]:
    """Count the images of a "folder:PATH" in "train" and "test", without decoding any."""
    root = _root(dataset)
    return {part: sum(map(len, _files(root / part).values())) for part in ("train", "test")}


def _root(dataset: str) -> Path:
    root = Path(dataset.removeprefix("folder:")).expanduser()
    # A notebook's working folder is not the project's root.
    return root if root.is_absolute() or root.exists() else PROJECT / root


def _files(part: Path) -> dict[str, list[Path]]:
    """Image files by class, without hidden files and folders (.ipynb_checkpoints, ._1.png)."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    def listed(folder: Path) -> list[Path]:
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted(f for f in found if not f.name.startswith("."))

    return {
        folder.name: [f for f in listed(folder) if f.suffix.lower() in IMG_EXTENSIONS]
        for folder in listed(part) if folder.is_dir()
    }  # fmt: skip


def _folder(
    dataset: str, train_limit: int | None, test_limit: int | None, validation_limit: int | None
) -> Data:
    root = _root(dataset)
    layout = f"{dataset}/train/CLASS/* and test/CLASS/*"
    if not root.is_dir():
        raise FileNotFoundError(f"dataset={dataset}: no such folder; expected {layout}")
    train, test = _files(root / "train"), _files(root / "test")
    if len(train) < 2 or train.keys() != test.keys():
        raise ValueError(
            f"dataset={dataset}: expected images in {layout}, with the same two or more "
            f"classes in both; found train: {_shortened(train)}, test: {_shortened(test)}"
        )
    parts = []
    for part, by_class, limit in (("train", train, train_limit), ("test", test, test_limit)):
        for name in (name for name, files in by_class.items() if not files):
            raise ValueError(f"dataset={dataset}: no image in {root / part / name}")
        files = [file for of_class in by_class.values() for file in of_class]
        labels = torch.tensor([i for i, c in enumerate(by_class.values()) for _ in c])
        kept = _balanced(labels, limit, f"{part}_limit")  # so that only these are decoded
        parts.append((_decoded([files[i] for i in kept.tolist()]), labels[kept]))
    return _data(title(dataset), list(train), *parts, validation_limit)


def _decoded(files: list[Path]) -> Tensor:
    def decode(file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                if image.mode[0] not in "IF":
                    return np.asarray(image.convert("RGB"))
                if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
                    raise ValueError(f"mode {image.mode}, 32 bits per pixel: save it with 8 or 16")
                grey = (np.asarray(image) >> 8).astype(np.uint8)  # PIL's own conversion clips
                return np.stack([grey] * 3, axis=-1)
        except Exception as error:  # decoders raise anything, even SyntaxError
            raise ValueError(f"{file}: not a readable image ({first_line(error)})") from error

    images = np.empty((len(files), *decode(files[0]).shape), np.uint8)
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        for i, pixels in enumerate(pool.map(decode, files)):
            if pixels.shape != images.shape[1:]:
                here, there = (f"{h}x{w}" for h, w, _ in (pixels.shape, images.shape[1:]))
                sizes = f"{files[i]} has {here} pixels, {files[0]} has {there}"
                raise ValueError(f"{sizes}: all images of a folder must have one size")
            images[i] = pixels
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _balanced(labels: Tensor, limit: int | None, name: str) -> Tensor:
    """Indices, in file order, of ``limit`` images: the first ones of each class, taken in turn."""
    n = len(labels)
    if limit is None or limit == n:
        return torch.arange(n)
    if not 1 <= limit <= n:
        raise ValueError(f"{name}={limit!r}: must lie between 1 and {n}, the number of images")
    rank = torch.empty(n, dtype=torch.long)  # number of earlier images of the same class
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        rank[members] = torch.arange(len(members))
    by_turn = torch.argsort(rank * (int(labels.max()) + 1) + labels, stable=True)
    return by_turn[:limit].sort().values


def _shortened(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + ("" if len(names) <= 5 else ", …") or "none"
