"""Seconds per epoch of every method, and their share of the device's peak arithmetic.

    python -m benchmarks.epoch [--precision bfloat16] [--images 50000] [--epochs 3]
        [--width 64] [--peak TFLOPS] [--only sgd,adahessian] [--eager] [--json]

Whole epochs of :func:`hybrid_lib.run` on random 32x32 images with the settings of Tables I and II:
training, then the test pass over a fifth as many. The first epoch, which compiles, is left out.
Given ``--peak``, the device's TFLOP/s at that precision, it prints the share that the convolutions'
multiplications reach (three products per weight and step, nine with an exact Hessian diagonal).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import machine
from hybrid_lib import EXPERIMENTS, run
from hybrid_lib.training import data, loop
from hybrid_lib.training.experiments import PAPER_METHODS
from hybrid_lib.training.tasks import image_model


def random_images(n: int) -> data.Data:
    draw = torch.Generator().manual_seed(0)

    def part(n):
        images = torch.randint(0, 256, (n, 3, 32, 32), generator=draw, dtype=torch.uint8)
        return images, torch.randint(0, 10, (n,), generator=draw)

    return data._data("random images", [str(i) for i in range(10)], part(n), part(n // 5))


def forward_flops(experiment) -> int:
    """Floating-point operations of one image's forward pass."""
    model = image_model(experiment, 10, 3).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="float32", help="float32, tf32 or bfloat16")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device at this precision")
    parser.add_argument("--only", default=",".join(PAPER_METHODS))
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    chosen = parser.parse_args()
    images = random_images(chosen.images)
    loop.data.load = lambda *_: images  # random images have no name as a data set
    rows = []
    for name in chosen.only.split(","):
        experiment = dataclasses.replace(
            EXPERIMENTS[name].scaled(chosen.epochs + 1), width=chosen.width,
            precision=chosen.precision,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            how = {"compile": not chosen.eager, "threads": torch.get_num_threads()}
            history = run(experiment, Path(folder), progress=False, **how)
        timed = history.rows[1:]
        if not timed:
            print(f"{name}: {history.status}, {history.note}")
            continue
        seconds = statistics.median(r["train_seconds"] for r in timed)
        row = {
            "name": name, "seconds": seconds, "engine": history.environment["engine"],
            "test_seconds": statistics.median(r["test_seconds"] for r in timed),
            "images_per_second": chosen.images / seconds,
        }  # fmt: skip
        if chosen.peak:
            products = 9 if experiment.needs_hessian else 3
            done = forward_flops(experiment) * products * chosen.images / seconds
            row["share_of_peak"] = done / (chosen.peak * 1e12)
        row["ratio"] = seconds / (rows[0]["seconds"] if rows else seconds)
        rows.append(row)
    if chosen.json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    print(f"{machine()}\nan epoch of {chosen.images} images, ResNet18 of width {chosen.width}, "
          f"{chosen.precision}")  # fmt: skip
    for row in rows:
        share = f", {row['share_of_peak']:.0%} of peak" if "share_of_peak" in row else ""
        print(
            f"{row['name']:16s} {row['seconds']:8.2f} s training, {row['test_seconds']:6.2f} s "
            f"test, {row['images_per_second']:9,.0f} images/s, {row['ratio']:5.2f} x "
            f"{rows[0]['name']}{share} ({row['engine']})"
        )
    hours = sum(r["seconds"] * EXPERIMENTS[r["name"]].epochs for r in rows) / 3600
    print(f"all epochs of Table II for these methods, each of {chosen.images} images, training "
          f"alone: {hours:.2f} hours")  # fmt: skip


if __name__ == "__main__":
    main()
