"""Loss surfaces of two weights, and the paths of optimizers on them.

Every minimum in :data:`SURFACES` has the value 0, so a loss is also its excess over the lowest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import sympy
import torch

from hybrid_lib.optim.methods import METHODS

Point = tuple[float, float]
STEPS = 250
TOLERANCE = 0.01  # a path has settled once its loss stays below this
FAR = 2.0  # a path has left the map once it is this many widths from the centre


@dataclass(frozen=True)
class Surface:
    """A function of two weights, with what is needed to walk on it and to draw it.

    Attributes:
        title, f: the name in figures; the function of two sympy symbols.
        minima, start: its global minima; where paths begin.
        bounds: ((x from, to), (y from, to)) of the part to draw, a square.
        lr: a learning rate at which the methods differ.
    """

    title: str
    f: Callable[[sympy.Expr, sympy.Expr], sympy.Expr]
    minima: tuple[Point, ...]
    start: Point
    bounds: tuple[Point, Point]
    lr: float

    @functools.cached_property
    def formulas(self) -> list[sympy.Expr]:
        """f, df/dx, df/dy, d²f/dx² and d²f/dy²."""
        x, y = sympy.symbols("x y")
        f = self.f(x, y)
        return [f, f.diff(x), f.diff(y), f.diff(x, 2), f.diff(y, 2)]

    @functools.cached_property
    def at(self) -> Callable:
        """The values of the formulas as a function of x and y.

        >>> SURFACES["ravine"].at(2.0, -1.0)
        [27.0, 2.0, -50.0, 1, 50]
        """
        return sympy.lambdify(["x", "y"], self.formulas, cse=True)

    def javascript(self) -> str:
        """Return :attr:`at` as a JavaScript function."""
        shared, formulas = sympy.cse(self.formulas)
        constants = "".join(f"const {name} = {sympy.jscode(part)}; " for name, part in shared)
        return f"(x, y) => {{ {constants}return [{', '.join(map(sympy.jscode, formulas))}]; }}"


def walk(
    surface: str,
    method: str,
    lr: float | None = None,
    weights: Callable[[int], tuple] | None = None,
    merge: str = "product",
    noise: float = 0.0,
    seed: int = 0,
    start: Point | None = None,
) -> np.ndarray:
    """Compute a method's path without weight decay; AdaHessian gets the exact Hessian diagonal.

    Args:
        surface, method: keys of :data:`SURFACES` and :data:`~hybrid_lib.optim.methods.METHODS`.
        lr, start: those of the surface if None.
        weights: a schedule of lambdas, called with the 0-based step, for methods of two rules.
        merge: a key of :data:`~hybrid_lib.optim.hybrid.MERGES`.
        noise, seed: standard deviation and seed of the noise added to the gradient.

    Returns:
        A row (x, y, loss) per point: STEPS + 1 rows, or fewer if the last point is off the map.
    """
    landscape, draws = SURFACES[surface], normal(seed)
    centre, width = np.mean(landscape.bounds, axis=1), np.ptp(landscape.bounds[0])
    w = torch.tensor(start or landscape.start, dtype=torch.float64)
    rate = landscape.lr if lr is None else lr
    optimizer = METHODS[method]([w], lr=rate, weight_decay=0.0, merge=merge)
    path = []
    for step in range(STEPS + 1):
        loss, *slopes = landscape.at(*w.tolist())
        path.append((*w.tolist(), loss))
        if not abs(w.numpy() - centre).max() < FAR * width:  # nan is outside
            break
        if weights and METHODS[method].is_hybrid:
            optimizer.param_groups[0]["lambdas"] = weights(step)
        g, D = torch.tensor(slopes, dtype=torch.float64).view(2, 2)
        w.grad = g + noise * torch.tensor([next(draws), next(draws)], dtype=torch.float64)
        optimizer.step(hess_diag=[D])
    return np.array(path)


def normal(seed: int):
    """Yield the page's normal numbers: Lehmer's generator and the Box–Muller transform."""
    state = (seed + 1) * 48271**20 % 2147483647  # consecutive seeds begin alike: skip 20
    while True:
        radius = math.sqrt(-2 * math.log(state / 2147483647))
        angle = 2 * math.pi * (state := state * 48271 % 2147483647) / 2147483647
        state = state * 48271 % 2147483647
        yield from (radius * math.cos(angle), radius * math.sin(angle))


def settled(path: np.ndarray) -> int | None:
    """Return the number of steps after which the loss stays below TOLERANCE, or None."""
    (above,) = np.nonzero(~(path[:, 2] < TOLERANCE))
    first = int(above[-1]) + 1 if len(above) else 0
    return first if first < len(path) else None


SURFACES: dict[str, Surface] = {
    "rosenbrock": Surface(  # a curved valley
        "Rosenbrock", lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2,
        ((1.0, 1.0),), (-1.2, 1.0), ((-2.0, 2.0), (-1.0, 3.0)), 0.001,
    ),
    "rastrigin": Surface(  # a local minimum near every pair of integers
        "Rastrigin",
        lambda x, y: 20 + x**2 + y**2 - 10 * sum(sympy.cos(2 * sympy.pi * u) for u in (x, y)),
        ((0.0, 0.0),), (2.3, -3.4), ((-4.0, 4.0), (-4.0, 4.0)), 0.005,
    ),
    "saddle": Surface(  # between its two basins, at (0, 0)
        "Saddle", lambda x, y: x**2 / 2 + (y**2 - 1) ** 2 / 4,
        ((0.0, 1.0), (0.0, -1.0)), (2.0, 0.01), ((-2.2, 2.2), (-2.2, 2.2)), 0.01,
    ),
    "ravine": Surface(  # fifty times steeper across than along
        "Ravine", lambda x, y: (x**2 + 50 * y**2) / 2,
        ((0.0, 0.0),), (-2.5, 1.0), ((-3.0, 3.0), (-3.0, 3.0)), 0.01,
    ),
    "beale": Surface(  # a plateau behind cliffs
        "Beale", lambda x, y: sum((c - x + x * y**n) ** 2
                                  for n, c in ((1, 1.5), (2, 2.25), (3, 2.625))),
        ((3.0, 0.5),), (1.0, -1.0), ((-1.0, 4.5), (-2.75, 2.75)), 0.01,
    ),
    "himmelblau": Surface(
        "Himmelblau", lambda x, y: (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2,
        ((3.0, 2.0), (-2.805118, 3.131313), (-3.779310, -3.283186), (3.584428, -1.848127)),
        (-1.0, -1.0), ((-5.5, 5.5), (-5.5, 5.5)), 0.005,
    ),
}  # fmt: skip
