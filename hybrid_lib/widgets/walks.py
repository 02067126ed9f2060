"""Paths of optimizers over a landscape of two weights: what the playground shows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hybrid_lib.optim import methods, schedules
from hybrid_lib.optim.hybrid import Hybrid
from hybrid_lib.optim.schedules import SHAPES
from hybrid_lib.widgets.anatomy import record
from hybrid_lib.widgets.surfaces import SURFACES, Surface

METHODS = ("sgd", "adam", "adahessian", "atmo", "padam_sgd", "adasgd")
ADAPTIVE = {"atmo": "Adam", "padam_sgd": "Padam", "adasgd": "AdaHessian"}  # the hybrids' first rule
STEPS = 250
TOLERANCE = 0.01  # of the loss; the lowest point of every surface has the value 0
FAR = 2.0  # a path has left the map once it is that many widths away from its centre


@dataclass(frozen=True, eq=False)
class Path:
    """One method's way over a surface of ``steps`` steps.

    Attributes:
        points: (steps + 1, 2), the start first.
        losses: (steps + 1,), the heights there.
        directions: (steps, rules, 2), what each rule answered; a step goes against them.
        step_sizes: (steps, rules).
        lambdas: (steps, rules), the weights in force.
        lr: the learning rate.
        left: the step after which the path was far outside of the map, or None.
    """

    points: np.ndarray
    losses: np.ndarray
    directions: np.ndarray
    step_sizes: np.ndarray
    lambdas: np.ndarray
    lr: float
    left: int | None

    @property
    def merged(self) -> np.ndarray:
        """(steps, 2): the directions, weighted and summed."""
        return (self.lambdas[:, :, None] * self.directions).sum(axis=1)

    @property
    def merged_step_sizes(self) -> np.ndarray:
        """(steps,): the step sizes, weighted and summed."""
        return (self.lambdas * self.step_sizes).sum(axis=1)

    def settled(self, tolerance: float = TOLERANCE) -> int | None:
        """The number of steps after which the loss stays below ``tolerance``; None: never."""
        (above,) = np.nonzero(~(self.losses < tolerance))  # nan is above
        first = 0 if len(above) == 0 else int(above[-1]) + 1
        return None if self.left is not None or first == len(self.losses) else first


def method(name: str, lr: float) -> Callable[[list[Tensor]], Hybrid]:
    """A method of Table I on a surface: its own settings, the rate ``lr``, no weight decay.

    Weight decay would move the minima.
    """
    return functools.partial(getattr(methods, name), lr=lr, weight_decay=0.0)


def paths(
    surface: Surface,
    optimizers: Mapping[str, Callable[[list[Tensor]], Hybrid]],
    lambdas: Callable[[int], tuple] | Mapping[str, Callable[[int], tuple]] | None = None,
    steps: int = STEPS,
    noise: float = 0.0,
    seed: int = 0,
) -> dict[str, Path]:
    """Walk over a surface with several optimizers at once.

    The optimizers move the weights, each its own; what their rules answer is noted on the
    way (:func:`hybrid_lib.widgets.anatomy.record`). Where a rule wants the Hessian diagonal, it
    gets the exact one, not Hutchinson's estimate.

    Args:
        surface: where.
        optimizers: functions of a list of parameters, by name.
        lambdas: a schedule, called with the 0-based step, for all optimizers with two rules, or
            one for each name. None: the optimizers' own weights.
        steps: how many.
        noise: standard deviation of what is added to the gradient, the same for every optimizer:
            they are compared on the same draws.
        seed: of the noise.

    Raises:
        ValueError: for no optimizer, no step, or noise that is negative or not finite.

    >>> ravine = SURFACES["ravine"]
    >>> way = paths(ravine, {"adam": method("adam", lr=0.1)}, steps=100)["adam"]
    >>> way.points.shape, way.settled()
    ((101, 2), 63)
    """
    if not optimizers:
        raise ValueError("no optimizer to walk with")
    if steps < 1:
        raise ValueError(f"steps={steps!r}: must be at least 1")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise={noise!r}: must be a finite number, at least 0")
    names = list(optimizers)
    here = torch.tensor([surface.start] * len(names), dtype=torch.float64)  # a row each
    gradients, draws = torch.zeros_like(here), torch.Generator().manual_seed(seed)
    draws = noise * torch.randn(steps, 2, generator=draws, dtype=torch.float64)
    groups = []
    for make, w, g in zip(optimizers.values(), here, gradients):
        w.grad = g
        groups += make([w]).param_groups
    # All in one optimizer, a parameter group each: one call moves them.
    crowd = Hybrid(groups, groups[0]["rules"], groups[0]["lr"])
    recorded = [record(group) for group in crowd.param_groups]
    if not isinstance(lambdas, Mapping):
        lambdas = dict.fromkeys(names, lambdas)
    timetables = [
        lambdas.get(name) if len(rules) == 2 else None for name, rules in zip(names, recorded)
    ]

    points, in_force = [here.clone()], []
    with np.errstate(all="ignore"):  # a path that has left the map may overflow
        for step in range(steps):
            slopes, hess_diag = map(torch.from_numpy, surface.slopes(here.numpy()))
            torch.add(slopes, draws[step], out=gradients)
            for group, timetable in zip(crowd.param_groups, timetables):
                if timetable is not None:
                    group["lambdas"] = timetable(step)
            in_force.append([group["lambdas"] for group in crowd.param_groups])
            crowd.step(hess_diag=hess_diag)
            points.append(here.clone())

    points = torch.stack(points)
    losses = surface(points).numpy()
    return {
        name: _path(
            surface, points[:, i].numpy(), losses[:, i], recorded[i],
            [weights[i] for weights in in_force], crowd.param_groups[i]["lr"],
        )
        for i, name in enumerate(names)
    }  # fmt: skip


def _path(surface, points, losses, recorded, lambdas, lr) -> Path:
    answers = [r.answers for r in recorded]
    directions = torch.stack([torch.stack([d for d, _ in of_rule]) for of_rule in answers], 1)
    step_sizes = np.array([[η for _, η in of_rule] for of_rule in answers]).T
    (x0, x1), (y0, y1) = surface.bounds
    away = np.abs(points - [(x0 + x1) / 2, (y0 + y1) / 2]) / [x1 - x0, y1 - y0]
    (outside,) = np.nonzero(~(away < FAR).all(axis=1))  # nan is outside
    left = int(outside[0]) if len(outside) else None
    return Path(points, losses, directions.numpy(), step_sizes, np.array(lambdas), lr, left)


@dataclass(frozen=True)
class Setup:
    """Everything that decides a picture of the playground.

    Attributes:
        surface: a key of :data:`hybrid_lib.widgets.surfaces.SURFACES`.
        methods: names among ``METHODS``, or text as in "sgd, atmo".
        lr: the learning rate of all methods; None: the surface's.
        schedule: "constant" (``sgd_weight`` on every step) or a key of
            :data:`hybrid_lib.training.experiments.SHAPES`, from ``sgd_weight`` to
            ``sgd_weight_end``.
        sgd_weight, sgd_weight_end: λ of SGD, in [0, 1]; the adaptive rule has the rest.
        noise, seed: of the gradient, as :func:`paths` takes them.

    Raises:
        ValueError: naming every value that is impossible.
    """

    surface: str = "beale"
    methods: tuple[str, ...] | str = ("sgd", "adam", "atmo")
    lr: float | None = None
    schedule: str = "constant"
    sgd_weight: float = 0.1
    sgd_weight_end: float = 1.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.methods, str):
            names = tuple(self.methods.replace(",", " ").split())
            object.__setattr__(self, "methods", names)
        faults = self.faults(**{f.name: getattr(self, f.name) for f in fields(self)})
        if faults:
            raise ValueError("; ".join(faults.values()))
        if self.lr is None:
            object.__setattr__(self, "lr", SURFACES[self.surface].lr)

    @staticmethod
    def faults(surface, methods, lr, schedule, sgd_weight, sgd_weight_end, noise, seed) -> dict:
        """What is wrong, as one message per field."""
        found, shapes = {}, ("constant", *SHAPES)
        if surface not in SURFACES:
            found["surface"] = f"surface={surface!r}: must be one of {', '.join(SURFACES)}"
        strangers = [name for name in methods if name not in METHODS]
        if strangers or not methods:
            given = ", ".join(strangers) or "none"
            found["methods"] = f"methods: {given} given; choose among {', '.join(METHODS)}"
        if lr is not None and not (math.isfinite(lr) and lr > 0):
            found["lr"] = f"lr={lr!r}: must be a finite number above 0"
        if schedule not in shapes:
            found["schedule"] = f"schedule={schedule!r}: must be one of {', '.join(shapes)}"
        for field, weight in (("sgd_weight", sgd_weight), ("sgd_weight_end", sgd_weight_end)):
            if not 0 <= weight <= 1:
                found[field] = f"{field}={weight!r}: must lie between 0 and 1"
        if not (math.isfinite(noise) and noise >= 0):
            found["noise"] = f"noise={noise!r}: must be a finite number, at least 0"
        if not 0 <= seed < 2**63:
            found["seed"] = f"seed={seed!r}: must be at least 0"
        return found

    def lambdas(self):
        """The schedule of the weights (adaptive, SGD): a function of the 0-based step."""
        first, last = self.sgd_weight, self.sgd_weight_end
        if self.schedule == "constant":
            return schedules.Constant((1 - first, first))
        return SHAPES[self.schedule]((1 - first, first), (1 - last, last), STEPS)

    def paths(self, known: dict | None = None) -> dict[str, Path]:
        """The paths of all methods; those in ``known`` are taken from there, new ones put there.

        λ changes hybrids only: what has one rule is then known already.
        """
        known = {} if known is None else known
        keys = {
            name: (self.surface, name, self.lr, self.noise, self.seed,
                   self.lambdas() if name in ADAPTIVE else None)
            for name in METHODS if name in self.methods
        }  # fmt: skip
        missing = {name: method(name, self.lr) for name, key in keys.items() if key not in known}
        if missing:
            surface = SURFACES[self.surface]
            new = paths(surface, missing, self.lambdas(), STEPS, self.noise, self.seed)
            known.update({keys[name]: path for name, path in new.items()})
        return {name: known[key] for name, key in keys.items()}


def scan(setup: Setup, weights: int = 21) -> pd.DataFrame:
    """Steps until each hybrid has settled, for evenly spaced constant λ of SGD; nan: not at all."""
    surface, values = SURFACES[setup.surface], np.linspace(0, 1, weights).round(4).tolist()
    table = {}
    for name in ADAPTIVE:
        walked = paths(
            surface, {λ: method(name, setup.lr) for λ in values},
            {λ: schedules.Constant((1 - λ, λ)) for λ in values}, STEPS, setup.noise, setup.seed,
        )  # fmt: skip
        table[name] = {λ: path.settled() for λ, path in walked.items()}
    return pd.DataFrame(table, dtype=float)


def summary(walked: Mapping[str, Path]) -> pd.DataFrame:
    """Per method: steps until its loss stays below the tolerance, and its last loss."""
    rows = {
        methods.label(name): {
            f"steps until the loss stays below {TOLERANCE}": _settled(path),
            "loss at the end": "–" if path.left else f"{path.losses[-1]:.2g}",
        }
        for name, path in walked.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def _settled(path: Path) -> str:
    if path.left is not None:
        return f"leaves the map in step {path.left}"
    steps = path.settled()
    return f"more than {len(path.losses) - 1}" if steps is None else str(steps)
