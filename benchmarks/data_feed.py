"""Augmented training images per second, as a ratio to torchvision's transforms and a DataLoader.

    python -m benchmarks.data_feed [--images 10000] [--batch 256] [--rounds 5] [--json]

One epoch over random 32x32 colour images: crop with a padding of 4, mirror, normalise, batch.
``torchvision`` is the usual way: PIL images, RandomCrop, RandomHorizontalFlip, ToTensor,
Normalize and a DataLoader without worker processes; ``torchvision_2_workers`` has two.
``hybrid_lib`` gathers each batch from one resident tensor, on a GPU if there is one.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.timing import DEVICE, interleaved, show
from hybrid_lib.training import data


class Pictures(Dataset):
    """Images as torchvision's CIFAR10 serves them."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.25,) * 3),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    chosen = parser.parse_args()
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (chosen.images, 32, 32, 3), dtype=np.uint8)
    labels = draw.integers(0, 10, chosen.images)
    pictures = Pictures(pixels, labels)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    part = (images, torch.from_numpy(labels))
    resident = data._data("random images", [str(i) for i in range(10)], part, part).to(DEVICE)

    def ours():
        generator = data.generator("augmentation", 0, 0, DEVICE)
        order = data.order(chosen.images, 0, 0)
        for x, _ in data.batches(resident.train_images, resident.train_labels, order, chosen.batch):
            data.normalised(data.augmented(x, generator), resident)

    def usual(workers):
        loader = DataLoader(pictures, chosen.batch, shuffle=True, num_workers=workers)
        return lambda: [batch[0].to(DEVICE) for batch in loader]

    # As in any training process: after a large block is freed, malloc keeps smaller ones.
    torch.empty(31 * 2**20, dtype=torch.uint8).fill_(0)
    candidates = {"torchvision": usual(0), "torchvision_2_workers": usual(2), "hybrid_lib": ours}
    rows = interleaved(candidates, "torchvision", chosen.rounds)
    for row in rows:  # a rate, so inverted
        row["images_per_second"] = chosen.images / row["ms"] * 1000
        row["ratio"], row["low"], row["high"] = 1 / row["ratio"], 1 / row["high"], 1 / row["low"]
    show(rows, f"{chosen.images} augmented images, batch {chosen.batch}; ratios of images/s",
         "torchvision", chosen.json)  # fmt: skip
    if not chosen.json:
        rates = ", ".join(f"{r['name']} {r['images_per_second']:,.0f}" for r in rows)
        print(f"images per second: {rates}")


if __name__ == "__main__":
    main()
