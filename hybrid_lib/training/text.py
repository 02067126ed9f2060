"""Character prediction on Python's own documentation: a task beside images.

Adaptive optimizers and SGD are meant to differ here: symbols differ in frequency, and a transformer
has different kinds of layers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_lib.training import data
from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.models import seeded

WINDOW = 64  # the most characters that a prediction can see
HEADS = 4
TEST_BATCH = 100


class Block(nn.Module):
    """Causal self-attention and a perceptron, each after a layer norm and with a shortcut."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        heads = self.queries_keys_values(self.norm1(x)).view(n, length, 3, HEADS, width // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        # Written out: fused attention has no second derivative.
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // HEADS)
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        seen = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + self.mixed(seen.transpose(1, 2).reshape(n, length, width))
        return x + self.perceptron(self.norm2(x))


class CharacterModel(nn.Module):
    """A transformer of two blocks; 117,479 parameters for 103 symbols at width 64."""

    def __init__(self, symbols: int, width: int):
        super().__init__()
        self.symbol, self.place = nn.Embedding(symbols, width), nn.Embedding(WINDOW, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor, statistics: list | None = None) -> Tensor:
        """Logits of the next symbol at every position, (n, WINDOW, symbols)."""
        # A product, not a look-up: every way of differentiating it is plain linear algebra.
        symbols = F.one_hot(x, self.symbol.num_embeddings).to(self.symbol.weight.dtype)
        embedded = symbols @ self.symbol.weight + self.place.weight
        return self.head(self.norm(self.blocks(embedded)))

    def absorb(self, statistics: list) -> None:
        """Do nothing: layer norm keeps no running statistics."""


@dataclass(frozen=True)
class CharacterPrediction:
    """Predict the next character. Items are windows of 64 characters; the last tenth is the test.

    The text comes with the running Python; other versions differ, and the title names the version.
    """

    experiment: Experiment
    train: Tensor  # int64, (characters,)
    validation: Tensor  # the text after train
    test: Tensor
    symbols: str

    @property
    def device(self) -> torch.device:
        return self.train.device

    @property
    def n_train(self) -> int:
        return windows(len(self.train))

    @property
    def environment(self) -> dict:
        text = [part.tolist() for part in (self.train, self.validation, self.test)]
        checksum = hashlib.sha256(repr((self.symbols, text)).encode()).hexdigest()
        return {
            "dataset": data.title("python-docs"),
            "dataset_checksum": checksum[:16],
            "train_images": self.n_train,
            "validation_images": windows(len(self.validation)),
            "test_images": windows(len(self.test)),
        }

    def build_model(self) -> CharacterModel:
        with seeded(self.experiment.seed):
            return CharacterModel(len(self.symbols), self.experiment.width)

    def training_batches(self, epoch: int, layout: torch.memory_format) -> Iterator[tuple]:
        e = self.experiment
        shift = 0
        if e.augment:
            drawn = data.generator("augmentation", e.seed, epoch)
            shift = int(torch.randint(WINDOW, (), generator=drawn))
        shifted = self._windows(self.train, shift)
        for part in data.order(self.n_train, e.seed, epoch).to(self.device).split(e.batch_size):
            yield _pair(shifted[part])

    def validation_batches(self, layout: torch.memory_format) -> Iterator[tuple]:
        yield from map(_pair, self._windows(self.validation, 0).split(TEST_BATCH))

    def test_batches(self, layout: torch.memory_format) -> Iterator[tuple]:
        yield from map(_pair, self._windows(self.test, 0).split(TEST_BATCH))

    def loss(self, logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction=reduction)

    def right(self, logits: Tensor, y: Tensor) -> Tensor:
        return (logits.argmax(dim=-1) == y).sum()

    def _windows(self, text: Tensor, shift: int) -> Tensor:
        """Consecutive windows, each with the character after it: (n, WINDOW + 1). Every shift gives
        the same n."""
        n = windows(len(text))
        return text[shift:].unfold(0, WINDOW + 1, WINDOW)[:n] if n else text.view(0, 1)


def load_text(experiment: Experiment, device: torch.device) -> CharacterPrediction:
    """Load the task. Limits count windows: the first ones for training, the last of these for
    validation (which costs training one more, where the text is cut), and the first ones of the
    test text for tests.

    Raises:
        ValueError: for settings that only images have, or that do not fit the text.
    """
    from pydoc_data.topics import topics  # what help("lambda") shows

    e = experiment
    for name, usual in {"protocol": "clean", "stem": "cifar", "test_mode": "protocol"}.items():
        if (given := getattr(e, name)) != usual:
            raise ValueError(f"{name}={given!r}: for images only; dataset={e.dataset!r} is text")
    if e.precision not in ("float32", "tf32"):
        raise ValueError(f"precision={e.precision!r}: for convolutions only; use float32 or tf32")
    if e.width % HEADS:
        raise ValueError(f"width={e.width}: must be a multiple of the {HEADS} heads")
    text = "\n".join(topics[name] for name in sorted(topics))
    symbols = "".join(sorted(set(text)))
    codes = torch.tensor([symbols.index(c) for c in text])
    cut = len(codes) * 9 // 10
    train = _first(codes[:cut], e.train_limit, "train")
    test = _first(codes[cut:], e.test_limit, "test")
    held = 0 if e.validation_limit is None else (e.validation_limit + 1) * WINDOW
    kept = train[: max(0, len(train) - held)]
    if e.batch_size > (n := windows(len(kept))):
        left = f" left by validation_limit={e.validation_limit}" * bool(held)
        raise ValueError(f"batch_size={e.batch_size}: there are only {n} windows{left}")
    parts = kept, train[len(kept) :], test
    return CharacterPrediction(e, *(part.to(device) for part in parts), symbols)


def windows(characters: int) -> int:
    """Number of windows, each with a character after it, wherever the first one begins."""
    return max(0, characters // WINDOW - 1)


def _first(text: Tensor, limit: int | None, name: str) -> Tensor:
    n = windows(len(text))
    if limit is not None and limit > n:
        raise ValueError(f"{name}_limit={limit}: there are {n} windows of {WINDOW} characters")
    return text if limit is None else text[: (limit + 1) * WINDOW]


def _pair(windows: Tensor) -> tuple[Tensor, Tensor]:
    return windows[:, :-1], windows[:, 1:]
