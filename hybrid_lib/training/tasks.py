"""Tasks: the data, model and loss to train, so that the loop need not know any of them.

The loop and its engines use only these members of a task:

- ``device``, ``n_train`` (items per epoch), ``environment`` (what a history says about the data);
- ``build_model()``: the network with its initial weights, called as ``model(x, statistics=None)``.
  Given a list, it appends the statistics that it would write into its buffers, and
  ``model.absorb(list)`` writes them later (does nothing for a network without such buffers);
- ``training_batches(epoch, layout)``, ``validation_batches(layout)`` and ``test_batches(layout)``:
  batches (x, y), with 4-D tensors in that memory layout;
- ``loss(outputs, y, reduction)`` and ``right(outputs, y)``: cross entropy, and how many of the
  ``y.numel()`` predictions are right.

For another kind of data set, add a class here and a line in :func:`load_task`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lib.optim.compiled import first_line
from hybrid_lib.training import data
from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.models import ResNet18, resnet18, seeded
from hybrid_lib.training.text import load_text

TEST_BATCH = 1000  # in evaluation mode the batch size only affects memory


@dataclass(frozen=True)
class ImageClassification:
    """ResNet18 on the images of a data set."""

    experiment: Experiment
    data: data.Data

    @property
    def device(self) -> torch.device:
        return self.data.train_images.device

    @property
    def n_train(self) -> int:
        return len(self.data.train_images)

    @property
    def environment(self) -> dict:
        return {
            "dataset": self.data.title,
            "dataset_checksum": self.data.checksum,
            "train_images": self.n_train,
            "validation_images": len(self.data.validation_images),
            "test_images": len(self.data.test_images),
        }

    def check(self) -> None:
        """Refuse a batch size that does not suit the images.

        Raises:
            ValueError: with the reason.
        """
        n, size = self.n_train, self.experiment.batch_size
        if size > n:
            images = f"the {n} training images of {self.data.title}"
            raise ValueError(f"batch_size={size} is larger than {images}")
        # Shrunk 8 times (cifar stem) or 32 times (imagenet), a small image is a single pixel.
        shrink = 8 if self.experiment.stem == "cifar" else 32
        parts = [n] + [len(self.data.test_images)] * self.experiment.tests_in_training_mode
        if max(self.data.train_images.shape[2:]) <= shrink and any(
            size == 1 or m % size == 1 for m in parts
        ):
            raise ValueError(
                f"batch_size={size} leaves a last batch of one image (of {parts}), whose one-pixel "
                "feature maps have no batch statistics; change batch_size or a limit by one"
            )

    def build_model(self) -> ResNet18:
        channels = self.data.train_images.shape[1]
        return image_model(self.experiment, len(self.data.classes), channels)

    def training_batches(self, epoch: int, layout: torch.memory_format) -> Iterator[tuple]:
        e = self.experiment
        crops = data.generator("augmentation", e.seed, epoch, self.device)
        order = data.order(self.n_train, e.seed, epoch)
        pairs = self.data.train_images, self.data.train_labels
        for x, y in data.batches(*pairs, order, e.batch_size):
            yield self._inputs(data.augmented(x, crops) if e.augment else x, layout), y

    def validation_batches(self, layout: torch.memory_format) -> Iterator[tuple]:
        images, labels = self.data.validation_images, self.data.validation_labels
        for x, y in data.batches(images, labels, torch.arange(len(images)), TEST_BATCH):
            yield self._inputs(x, layout), y

    def test_batches(self, layout: torch.memory_format) -> Iterator[tuple]:
        images, labels = self.data.test_images, self.data.test_labels
        order, size = torch.arange(len(images)), TEST_BATCH
        # Tests in training mode use batch statistics and update the running ones. A folder's images
        # are sorted by class, and a batch of one class has statistics like no training batch's.
        if self.experiment.tests_in_training_mode:
            order, size = data.order(len(images), seed=0, epoch=0), self.experiment.batch_size
        for x, y in data.batches(images, labels, order, size):
            yield self._inputs(x, layout), y

    def _inputs(self, images: Tensor, layout: torch.memory_format) -> Tensor:
        images = images.contiguous(memory_format=layout)
        raw = self.experiment.protocol == "released"  # 0-255, as the report's code fed them
        return images.float() if raw else data.normalised(images, self.data)

    def loss(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(logits, labels, reduction=reduction)

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(dim=1) == labels).sum()


def image_model(experiment: Experiment, num_classes: int, in_channels: int) -> ResNet18:
    """The network with this experiment's initial weights; leaves the global generator as it is."""
    with seeded(experiment.seed):
        coarse = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(experiment.precision)
        return resnet18(num_classes, in_channels, experiment.width, experiment.stem, coarse)


def load_task(experiment: Experiment, device: str | torch.device | None = None):
    """Load the experiment's task onto the device; check that data, device and settings agree.

    Raises:
        ValueError, FileNotFoundError: as :func:`hybrid_lib.run` does.
    """
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # fails if the device is missing or unusable
    except (RuntimeError, AssertionError, ImportError) as error:  # varies by backend
        reason = f"use cpu, cuda or cuda:N ({first_line(error)})"
        raise ValueError(f"device={str(device)!r}: {reason}") from None
    if experiment.precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision='tf32' needs an NVIDIA GPU, not {device.type!r}; use float32")
    if experiment.dataset == "python-docs":
        return load_text(experiment, device)
    limits = experiment.train_limit, experiment.test_limit, experiment.validation_limit
    images = data.load(experiment.dataset, *limits)
    ImageClassification(experiment, images).check()
    return ImageClassification(experiment, images.to(device))
