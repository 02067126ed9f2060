"""Schedules of the weights λ: pure functions of the epoch.

A schedule is a frozen dataclass. Called with the 0-based epoch, it returns that epoch's weights in
rule order: (adaptive, SGD). It can be plotted, compared and tested without an optimizer and has no
state to save: the epoch is the state.

The report counts epochs from 1, so its epoch e uses ``schedule(e - 1)``: the first epoch uses
``start``, and ``end`` is reached in epoch ``epochs + 1`` and kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Weights = tuple[float, ...]


@dataclass(frozen=True)
class Constant:
    """The same weights in every epoch.

    >>> Constant((0.5, 0.5))(100)
    (0.5, 0.5)
    """

    lambdas: Weights

    def __post_init__(self):
        object.__setattr__(self, "lambdas", _checked_weights("lambdas", self.lambdas))

    def __call__(self, epoch: int) -> Weights:
        return self.lambdas


@dataclass(frozen=True)
class Linear:
    """Linear from ``start`` to ``end`` over ``epochs`` epochs, then ``end``; as in the report.

    The other shapes differ only in :meth:`progress`.

    Args:
        start, end: first and last weights, one per rule; the default is the report's, from the
            adaptive rule to SGD.
        epochs: the horizon, at least 1.

    Raises:
        ValueError: if weights are negative, not finite or of unequal number, or the horizon is
            below 1.

    >>> [Linear(epochs=2)(epoch) for epoch in range(4)]
    [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (0.0, 1.0)]
    """

    start: Weights = (1.0, 0.0)
    end: Weights = (0.0, 1.0)
    epochs: int = 100

    def __post_init__(self):
        start, end = _checked_weights("start", self.start), _checked_weights("end", self.end)
        if len(start) != len(end):
            raise ValueError(f"start={start} and end={end}: both need one weight per rule")
        if not (math.isfinite(self.epochs) and self.epochs >= 1):
            raise ValueError(f"epochs={self.epochs!r}: the horizon must be at least 1 epoch")
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "end", end)

    def __call__(self, epoch: int) -> Weights:
        done = self.progress(min(max(epoch / self.epochs, 0.0), 1.0))
        return tuple((1 - done) * a + done * b for a, b in zip(self.start, self.end))

    def progress(self, u: float) -> float:
        """Share of the way from start to end at share u of the horizon; maps 0 to 0 and 1 to 1."""
        return u


@dataclass(frozen=True)
class Cosine(Linear):
    """Half a cosine: slow at both ends, fast in the middle.

    >>> [round(Cosine(epochs=100)(epoch)[1], 3) for epoch in (0, 10, 50, 90, 100)]
    [0.0, 0.024, 0.5, 0.976, 1.0]
    """

    def progress(self, u: float) -> float:
        return (1 - math.cos(math.pi * u)) / 2


@dataclass(frozen=True)
class Step(Linear):
    """A hard switch at the end of the horizon (as in SWATS).

    >>> [Step(epochs=2)(epoch) for epoch in range(3)]
    [(1.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
    """

    def progress(self, u: float) -> float:
        return float(u >= 1)


@dataclass(frozen=True)
class Exponential(Linear):
    """Fast at first: the speed falls by the factor exp(-rate) over the horizon.

    >>> round(Exponential(epochs=100, rate=5.0)(50)[1], 3)
    0.924
    """

    rate: float = 5.0

    def __post_init__(self):
        super().__post_init__()
        _check_above_zero(rate=self.rate)

    def progress(self, u: float) -> float:
        return math.expm1(-self.rate * u) / math.expm1(-self.rate)


@dataclass(frozen=True)
class Sigmoid(Linear):
    """A soft switch in the middle of the horizon; a larger ``steepness`` makes it sharper.

    >>> Sigmoid(epochs=100)(50)
    (0.5, 0.5)
    """

    steepness: float = 12.0

    def __post_init__(self):
        super().__post_init__()
        _check_above_zero(steepness=self.steepness)

    def progress(self, u: float) -> float:
        # tanh is an odd, rescaled sigmoid; dividing by its end value makes both ends exact.
        half = self.steepness / 4
        return (1 + math.tanh(half * (2 * u - 1)) / math.tanh(half)) / 2


SHAPES = {
    "linear": Linear, "cosine": Cosine, "step": Step, "exponential": Exponential,
    "sigmoid": Sigmoid,
}  # fmt: skip


@dataclass(frozen=True)
class Released(Linear):
    """The dynamic weights of ATMO and PADAM-SGD in the report's released code.

    Its scheduler acts at the end of an epoch and drives SGD's weight from 1 to 0, while the
    optimizer begins with the adaptive rule alone. So epoch 1 uses ``first``, epoch 2 is almost
    purely SGD, and the weights then return to the adaptive rule; ``start`` is never used. The
    report describes the opposite direction, :class:`Linear`.

    >>> schedule = Released(epochs=100)
    >>> [tuple(round(w, 2) for w in schedule(epoch)) for epoch in (0, 1, 2, 100, 150)]
    [(1.0, 0.0), (0.01, 0.99), (0.02, 0.98), (1.0, 0.0), (1.0, 0.0)]
    """

    start: Weights = (0.0, 1.0)
    end: Weights = (1.0, 0.0)
    epochs: int = 100
    first: Weights = (1.0, 0.0)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "first", _checked_weights("first", self.first))

    def __call__(self, epoch: int) -> Weights:
        return self.first if epoch < 1 else super().__call__(epoch)


def _checked_weights(name: str, weights) -> Weights:
    try:
        weights = tuple(float(w) for w in weights)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={weights!r}: must be numbers, one per rule") from None
    if not weights or not all(math.isfinite(w) and w >= 0 for w in weights):
        raise ValueError(f"{name}={weights}: weights must be finite and at least 0")
    return weights


def _check_above_zero(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r}: must be a finite number above 0")
