"""Experiments that take seconds, and what is compared between two runs."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from hybrid_lib.training.experiments import Experiment, get_experiment
from hybrid_lib.training.history import History
from hybrid_lib.training.loop import run


def toy(name: str = "sgd", epochs: int = 3, **changes) -> Experiment:
    """Three steps per epoch, on 40 digits."""
    settings = dict(dataset="digits", width=2, batch_size=16, train_limit=40, test_limit=30)
    return replace(get_experiment(name).scaled(epochs), **settings | changes)


def trained(e: Experiment, out: Path | None = None, **how) -> History:
    return run(e, out, "cpu", **{"progress": False, **how})


def numbers(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def after(steps: int):
    """A ``should_stop`` that returns True after that many steps."""
    left = iter([False] * steps)
    return lambda: next(left, True)


def image_folder(root: Path, pixels=None, classes=("cat", "dog"), n=3, suffix=".png") -> Path:
    """Images in root/train/CLASS and root/test/CLASS; ``pixels(part, label, i)`` draws them."""
    rng = np.random.default_rng(0)
    for part, (label, name), i in product(("train", "test"), enumerate(classes), range(n)):
        (root / part / name).mkdir(parents=True, exist_ok=True)
        image = pixels(part, label, i) if pixels else rng.integers(0, 256, (8, 8, 3), "u1")
        Image.fromarray(image).save(root / part / name / f"{i}{suffix}")
    return root
