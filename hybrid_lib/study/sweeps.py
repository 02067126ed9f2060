"""Sweeps: a grid or random draws over any setting of an experiment, and one tidy table of the runs.

A sweep is a few lines of YAML, in a file, on the command line or in a notebook's parameter::

    optimizer: atmo
    scale: demo
    seeds: 0-2
    fixed: {epochs: 6}
    grid:
      lr: [0.003, 0.03]
      lambda_sgd: [0, 0.5, 1]

Command line: ``hybrid-sweep FILE.yaml`` or ``hybrid-sweep '{grid: {momentum: [0, 0.9]}}'``.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from zlib import crc32

import pandas as pd
import yaml
from pydantic import BaseModel, Field, model_validator
from scipy.stats import qmc

from hybrid_lib.optim.rules import SGD
from hybrid_lib.study import planning, statistics
from hybrid_lib.study.parameters import reason, seed_list
from hybrid_lib.training import data
from hybrid_lib.training.experiments import Experiment, did_you_mean, get_experiment
from hybrid_lib.training.history import History

FIELDS = {f.name for f in dataclasses.fields(Experiment)} - {"name", "dataset", "seed"}
LAST = ("test_accuracy", "test_loss", "train_accuracy", "train_loss")  # of the last epoch
CHOOSING = ("validation_accuracy", "validation_loss")  # likewise, if there is a validation set
MEASURED = ("seed", "status", "epochs done", *LAST, "best_test_accuracy", "train_seconds")
Values = Annotated[list, Field(min_length=1)]


class Range(BaseModel, frozen=True, extra="forbid"):
    """From ``low`` to ``high``, both included; integers between integer bounds, unless ``log``."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _check_bounds(self):
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low={self.low}, high={self.high}: use low < high, above 0 for log")
        return self

    def at(self, share: float) -> float:
        """The value below which ``share`` of the range lies.

        >>> Range(low=1, high=100, log=True).at(0.5), Range(low=1, high=4).at(0.99)
        (10.0, 4)
        """
        if self.log:
            return self.low * (self.high / self.low) ** share
        if isinstance(self.low, int) and isinstance(self.high, int):
            return self.low + int(share * (self.high + 1 - self.low))
        return self.low + share * (self.high - self.low)


class Sweep(BaseModel, frozen=True, extra="forbid", coerce_numbers_to_str=True):
    """The settings to vary, and those to start from.

    Attributes:
        optimizer: the method whose settings are the starting point; "optimizer" may also be varied.
        scale, dataset: as for :func:`hybrid_lib.study.planning.plan`.
        seeds: as in "0,3" or "0-4"; each point runs with all of them.
        fixed: settings of every run, by their names in :class:`hybrid_lib.Experiment`, or
            ``lambda_sgd``, the weight of SGD; the adaptive rule gets the rest.
        grid: lists of values; every combination is run.
        random, draws, draw_seed: lists or ranges (``{low: 0.001, high: 1, log: true}``), how many
            combinations to draw from them, evenly spread (Halton), and the seed of the draws. With
            a grid, each draw runs at each grid point.
    """

    optimizer: str = "sgd"
    scale: str = "demo"
    dataset: str = "digits"
    seeds: str = "0"
    fixed: dict[str, Any] = {}
    grid: dict[str, Values] = {}
    random: dict[str, Values | Range] = {}
    draws: Annotated[int, Field(ge=1)] = 10
    draw_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _check_settings(self):
        given = [*self.varied, *self.fixed]
        if not self.varied:
            raise ValueError("grid or random: name at least one setting to vary")
        for name in given:
            if name not in FIELDS | {"lambda_sgd"}:
                raise ValueError(f"{name} is not a setting{did_you_mean(name, FIELDS)}")
            if given.count(name) > 1:
                raise ValueError(f"{name} is given more than once in fixed, grid and random")
        if {"lambda_sgd", "lambda_start"} <= {*given}:
            raise ValueError("lambda_sgd and lambda_start set the same weights: give one of them")
        planning.plan(self.scale, self.dataset, [self.optimizer], seed_list(self.seeds))
        return self

    @property
    def varied(self) -> list[str]:
        """The names of the settings that are varied."""
        return [*self.grid, *self.random]

    def points(self) -> list[dict]:
        """The settings of each point, without ``fixed``.

        >>> Sweep(grid={"lr": [0.1, 0.2], "width": [4]}).points()
        [{'lr': 0.1, 'width': 4}, {'lr': 0.2, 'width': 4}]
        """
        from sklearn.model_selection import ParameterGrid

        drawn: list[dict] = [{}]
        if self.random:  # evenly spread: a few independent draws would leave corners out
            shares = qmc.Halton(len(self.random), rng=self.draw_seed).random(self.draws)
            drawn = [dict(zip(self.random, map(_at, self.random.values(), row)))
                     for row in shares.tolist()]  # fmt: skip
        return [{**point, **draw} for draw in drawn for point in ParameterGrid(self.grid)]

    def plan(self) -> tuple[list[Experiment], list[str]]:
        """The experiments, named after their settings, and a line per impossible point.

        ValueError if every point is impossible.
        """
        planned, refused, points = {}, [], self.points()
        usual = {"optimizer": self.optimizer, **self.fixed}
        names = [_name(str((usual | point)["optimizer"]), point) for point in points]
        distinct = Counter(name for name, _ in set(zip(names, map(repr, points))))
        for name, point in zip(names, points):
            if distinct[name] > 1:  # numbers that agree to six digits, say
                name = f"{name[:71]}-{crc32(repr(point).encode()):08x}"
            settings = usual | point
            optimizer = str(settings.pop("optimizer"))
            try:
                if "lambda_sgd" in settings:
                    sgd = float(settings.pop("lambda_sgd"))
                    if not _ends_in_sgd(get_experiment(optimizer)):
                        raise ValueError(f"lambda_sgd: {optimizer} is not a rule merged with SGD")
                    settings["lambda_start"] = (1 - sgd, sgd)
                for e in planning.plan(self.scale, self.dataset, [optimizer],
                                       seed_list(self.seeds), **settings):  # fmt: skip
                    planned[name, e.seed] = dataclasses.replace(e, name=name)
            except (TypeError, ValueError) as error:
                refused.append(f"{name}: refused, {reason(error)}")
        if not planned:
            raise ValueError(f"every point of the sweep is impossible: {'; '.join(refused)}")
        return list(planned.values()), refused


def read(space: str | Path, **given) -> Sweep:
    """Read a sweep from a YAML file, or from YAML text; ``given`` overrides what it says.

    >>> read("{optimizer: atmo, grid: {lr: [0.01, 0.1]}}", scale="toy").scale
    'toy'

    ValueError, with every fault on one line, for an invalid sweep; FileNotFoundError for no file.
    """
    try:
        is_file = str(space).endswith((".yaml", ".yml"))
        content = yaml.safe_load(Path(space).read_text("utf-8") if is_file else space)
        if not isinstance(content, dict):
            raise ValueError("give FILE.yaml, or text: {optimizer: atmo, grid: {lr: [0.01, 0.1]}}")
        return Sweep(**{**content, **given})
    except (yaml.YAMLError, TypeError, ValueError) as error:
        kind = "not YAML: " if isinstance(error, yaml.YAMLError) else ""
        raise ValueError(f"{space}: {kind}{reason(error)}") from None


def sweep_from(params: SimpleNamespace) -> Sweep:
    """A notebook's sweep: ``params.space``; scale, dataset and epochs override it unless None."""
    given = {k: v for k in ("scale", "dataset") if (v := getattr(params, k)) is not None}
    if params.epochs is not None:
        given["fixed"] = {**read(params.space, **given).fixed, "epochs": params.epochs}
    return read(params.space, **given)


def default_out(space: str | Path, *overrides) -> Path:
    """The default folder of a sweep: runs/sweep-FILE, or runs/sweep-CHECKSUM of its text, followed
    by what overrides it, if not None."""
    is_file = str(space).endswith((".yaml", ".yml"))
    name = Path(space).stem if is_file else f"{crc32(space.encode()):08x}"
    given = [re.sub(r"[^A-Za-z0-9._]+", "_", str(word)) for word in overrides if word is not None]
    return data.PROJECT / "runs" / "-".join(["sweep", name, *given])


def table(histories: Iterable[History]) -> pd.DataFrame:
    """One row per run: the settings in which the runs differ, then what was measured.

    Weights of a rule and SGD that sum to 1 are shown as ``lambda_sgd``. Accuracies and losses are
    those of the last epoch, "best" the best epoch's; they are missing if a run did not finish.
    """
    settings, measured = [], []
    for h in histories:
        setting = dataclasses.asdict(h.experiment)
        if not h.experiment.is_hybrid:
            del setting["lambda_start"]
        elif _ends_in_sgd(h.experiment) and abs(sum(setting["lambda_start"]) - 1) < 1e-9:
            setting["lambda_sgd"] = setting.pop("lambda_start")[1]
        settings.append({"run": setting.pop("name"), "seed": setting.pop("seed")} | setting)
        last, best = ({}, {}) if h.status != "complete" else (h.final, h.best)
        measured.append({
            "status": h.status, "epochs done": len(h.rows), **{k: last.get(k) for k in LAST},
            "best_test_accuracy": best.get("test_accuracy"),
            "train_seconds": sum(row["train_seconds"] for row in h.rows),
            **{k: last[k] for k in CHOOSING if k in last},
        })  # fmt: skip
    given = pd.DataFrame(settings, dtype=object).set_index("run")
    given = given.where(given.notna(), None)
    differing = [k for k in given if k != "seed" and given[k].map(repr).nunique() > 1]
    runs = pd.DataFrame(measured, index=given.index).astype(dict.fromkeys(MEASURED[3:], float))
    given = given[[*differing, "seed"]]  # numbers as such, unless one is None
    given = given.apply(lambda column: column if column.isna().any() else column.infer_objects())
    return pd.concat([given, runs], axis=1)


def over_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per point of :func:`table`: mean test accuracy, ± (95 %, Student), and counts.

    Best first, by validation accuracy if there is one. Points with a run that diverged come last:
    their mean is that of the lucky seeds.
    """
    groups = runs.assign(diverged=runs["status"] == "diverged").groupby("run", sort=False)
    settings = [column for column in runs if column not in (*MEASURED, *CHOOSING)]
    points, accuracies = groups[settings].first(), groups["test_accuracy"]
    points["test_accuracy"], points["±"] = accuracies.mean(), accuracies.agg(statistics.margin)
    points["seeds"], points["diverged"] = accuracies.count(), groups["diverged"].sum()
    chosen_by = CHOOSING[0] if CHOOSING[0] in runs else "test_accuracy"
    points[chosen_by] = groups[chosen_by].mean()
    order = points.assign(lucky=points["diverged"] > 0, worst=-points[chosen_by])
    return points.loc[order.sort_values(["lucky", "worst"]).index]


def _ends_in_sgd(experiment: Experiment) -> bool:
    """Whether it is a hybrid of two rules, the second of which is SGD."""
    rules = experiment.method.rules
    return len(rules) == 2 and rules[1] is SGD


def _at(values: list | Range, share: float):
    return values.at(share) if isinstance(values, Range) else values[int(share * len(values))]


def _name(optimizer: str, point: dict) -> str:
    """A name that lists the settings, in characters that folder names may have."""
    words = [f"{k}{v:.6g}" if isinstance(v, float) else f"{k}{v}"
             for k, v in point.items() if k != "optimizer"]  # fmt: skip
    words = [re.sub(r"[^A-Za-z0-9._-]+", "_", word).strip("_") for word in (optimizer, *words)]
    text = "-".join(words)
    return text if len(text) <= 80 else f"{text[:71]}-{crc32(text.encode()):08x}"
