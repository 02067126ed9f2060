r"""Two-dimensional test functions: landscapes on which an optimizer's path can be drawn.

Each is a :class:`Surface` in :data:`SURFACES`: a function of tensors of shape (..., 2), smooth and
differentiable twice by autograd, with its minima and a start from which the methods differ.
Every minimum listed here has the value 0, so a loss is also its distance from the best one.

=============  =========================================================  =======================
surface        f(x, y)                                                    minima
=============  =========================================================  =======================
"rosenbrock"   :math:`(1-x)^2 + 100 (y-x^2)^2`                            (1, 1)
"rastrigin"    :math:`20 + x^2 - 10\cos 2\pi x + y^2 - 10\cos 2\pi y`     (0, 0); a local one near
                                                                          every pair of integers
"saddle"       :math:`x^2/2 + (y^2-1)^2/4`                                (0, 1), (0, -1); between
                                                                          them a saddle at (0, 0)
"ravine"       :math:`(x^2 + 50 y^2)/2`                                   (0, 0)
"beale"        :math:`(1.5-x+xy)^2 + (2.25-x+xy^2)^2 + (2.625-x+xy^3)^2`  (3, 1/2)
"himmelblau"   :math:`(x^2+y-11)^2 + (x+y^2-7)^2`                         (3, 2) and three others
=============  =========================================================  =======================

>>> rosenbrock = SURFACES["rosenbrock"]
>>> rosenbrock(torch.tensor([[1.0, 1.0], [0.0, 0.0], [-1.0, 1.0]]))
tensor([0., 1., 4.])
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Point = tuple[float, float]


@dataclass(frozen=True)
class Surface:
    """A function of two numbers, and what is needed to walk on it and to draw it.

    Attributes:
        title: the name that figures show.
        f: the function of x and y, two tensors of one shape (or two symbols of sympy).
        minima: its global minima, all of value 0.
        start: a point from which the paths of the methods differ.
        bounds: ((x from, to), (y from, to)) of the part to draw, a square.
        lr: a learning rate at which the methods differ.
    """

    title: str
    f: Callable[[Tensor, Tensor], Tensor]
    minima: tuple[Point, ...]
    start: Point
    bounds: tuple[Point, Point]
    lr: float

    def __call__(self, xy: Tensor) -> Tensor:
        """The heights at ``xy``, of shape (..., 2); the result has shape (...).

        Raises:
            ValueError: if the last dimension is not 2.
        """
        if xy.shape[-1:] != (2,):
            raise ValueError(f"xy has shape {tuple(xy.shape)}: the last dimension must be 2")
        return self.f(*xy.unbind(-1))

    def slopes(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradients and Hessian diagonals at ``points``, of shape (n, 2), each of that shape.

        The derivatives are worked out once, as formulas. Autograd gives the same numbers, but on
        tensors of two weights it is ten times slower than the optimizers' own steps.

        >>> gradients, diagonals = SURFACES["ravine"].slopes(np.array([[2.0, -1.0]]))
        >>> gradients.tolist(), diagonals.tolist()
        ([[2.0, -50.0]], [[1.0, 50.0]])
        """
        columns = np.empty((4, len(points)))
        for column, derivative in zip(columns, self._derivatives(*points.T)):
            column[:] = derivative  # a constant one is a single number
        return columns[:2].T, columns[2:].T

    @functools.cached_property
    def _derivatives(self) -> Callable:
        import sympy  # imported where used; torch brings it

        x, y = sympy.symbols("x y")
        f = self.f(x, y)
        return sympy.lambdify((x, y), [f.diff(x), f.diff(y), f.diff(x, 2), f.diff(y, 2)], cse=True)

    def grid(self, n: int = 121) -> tuple[Tensor, Tensor, Tensor]:
        """x, y (each n values between the bounds) and the heights, one row per y.

        >>> x, y, heights = SURFACES["saddle"].grid(5)
        >>> x.shape, heights.shape
        (torch.Size([5]), torch.Size([5, 5]))
        """
        x, y = (torch.linspace(a, b, n, dtype=torch.float64) for a, b in self.bounds)
        return x, y, self(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1))


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    """A curved valley: easy to enter, slow to follow (Rosenbrock 1960)."""
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def rastrigin(x: Tensor, y: Tensor) -> Tensor:
    """A bowl full of dents: which of them does a method end in? (Rastrigin 1974)."""
    return 20 + x**2 + y**2 - 10 * (_cos(2 * math.pi * x) + _cos(2 * math.pi * y))


def saddle(x: Tensor, y: Tensor) -> Tensor:
    """Two basins and the pass between them, where the gradient almost vanishes."""
    return x**2 / 2 + (y**2 - 1) ** 2 / 4


def ravine(x: Tensor, y: Tensor) -> Tensor:
    """Fifty times steeper across than along: what momentum and scaling are for."""
    return (x**2 + 50 * y**2) / 2


def beale(x: Tensor, y: Tensor) -> Tensor:
    """A flat plateau behind cliffs (Beale 1958)."""
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def himmelblau(x: Tensor, y: Tensor) -> Tensor:
    """Four minima of equal depth (Himmelblau 1972)."""
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


def _cos(u):
    if isinstance(u, Tensor):
        return torch.cos(u)
    import sympy

    return sympy.cos(u)


SURFACES: dict[str, Surface] = {
    "rosenbrock": Surface(
        "Rosenbrock", rosenbrock, ((1.0, 1.0),), (-1.2, 1.0), ((-2.0, 2.0), (-1.0, 3.0)), 0.001,
    ),
    "rastrigin": Surface(
        "Rastrigin", rastrigin, ((0.0, 0.0),), (2.3, -3.4), ((-4.0, 4.0), (-4.0, 4.0)), 0.005,
    ),
    "saddle": Surface(
        "Saddle", saddle, ((0.0, 1.0), (0.0, -1.0)), (2.0, 0.01), ((-2.2, 2.2), (-2.2, 2.2)), 0.01,
    ),
    "ravine": Surface(
        "Ravine", ravine, ((0.0, 0.0),), (-2.5, 1.0), ((-3.0, 3.0), (-3.0, 3.0)), 0.01,
    ),
    "beale": Surface(
        "Beale", beale, ((3.0, 0.5),), (1.0, -1.0), ((-1.0, 4.5), (-2.75, 2.75)), 0.01,
    ),
    "himmelblau": Surface(
        "Himmelblau", himmelblau,
        ((3.0, 2.0), (-2.805118, 3.131313), (-3.779310, -3.283186), (3.584428, -1.848127)),
        (-1.0, -1.0), ((-5.5, 5.5), (-5.5, 5.5)), 0.005,
    ),
}  # fmt: skip
