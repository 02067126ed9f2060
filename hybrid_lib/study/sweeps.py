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
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from zlib import crc32

import pandas as pd
import yaml
from pydantic import BaseModel, Field, model_validator
from scipy import stats

from hybrid_lib.study import planning, statistics
from hybrid_lib.study.parameters import did_you_mean, reason, seed_list
from hybrid_lib.training import data
from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.history import History

FIELDS = {f.name for f in dataclasses.fields(Experiment)} - {"name", "dataset", "seed"}
LAST = ("test_accuracy", "test_loss", "train_accuracy", "train_loss")  # of the last epoch
MEASURED = ("seed", "status", "epochs done", *LAST, "best_test_accuracy", "train_seconds")
Values = Annotated[list, Field(min_length=1)]


class Range(BaseModel, frozen=True, extra="forbid"):
    """From ``low`` to ``high``, evenly, or with ``log`` evenly in the logarithm; both can be drawn.

    Between whole numbers draws are whole, but for a logarithm.
    """

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _is_one(self):
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low={self.low}, high={self.high}: low < high, and above 0 for log")
        return self

    def rvs(self, random_state):
        """A draw, by the name under which scikit-learn looks for one."""
        if self.log:
            return stats.loguniform.rvs(self.low, self.high, random_state=random_state)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return stats.randint.rvs(self.low, self.high + 1, random_state=random_state)
        return stats.uniform.rvs(self.low, self.high - self.low, random_state=random_state)


class Sweep(BaseModel, frozen=True, extra="forbid", coerce_numbers_to_str=True):
    """What to vary, and around what.

    Attributes:
        optimizer: whose settings everything starts from; "optimizer" may also be varied.
        scale, dataset: as for :func:`hybrid_lib.study.planning.plan`.
        seeds: as in "0,3" or "0-4": each point runs with all of them.
        fixed: settings of every run, by their names in :class:`hybrid_lib.Experiment`, or
            ``lambda_sgd``: the weight of SGD, with the rest for the adaptive rule.
        grid: lists of values; every combination is run.
        random, draws, draw_seed: lists or ranges (``{low: 0.001, high: 1, log: true}``), and how
            many combinations to draw of them. With a grid, each draw runs at each of its points.
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
    def _is_possible(self):
        given = [*self.varied, *self.fixed]
        if not self.varied:
            raise ValueError("grid or random: name at least one setting to vary")
        for name in given:
            if name not in FIELDS | {"lambda_sgd"}:
                raise ValueError(f"{name} is no setting{did_you_mean(name, FIELDS)}")
            if given.count(name) > 1:
                raise ValueError(f"{name} is given twice in fixed, grid and random together")
        if {"lambda_sgd", "lambda_start"} <= {*given}:
            raise ValueError("lambda_sgd and lambda_start are the same weights: give one of them")
        planning.plan(self.scale, self.dataset, [self.optimizer], seed_list(self.seeds))
        return self

    @property
    def over_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per point of :func:`table`: mean test accuracy, ± (95 %, Student), and counts.

    The best first; last those with a run that diverged, whose mean is that of the lucky seeds.
    """
    groups = runs.assign(diverged=runs["status"] == "diverged").groupby("run", sort=False)
    points, accuracies = groups[varied(runs)].first(), groups["test_accuracy"]
    points["test_accuracy"], points["±"] = accuracies.mean(), accuracies.agg(statistics.margin)
    points["seeds"], points["diverged"] = accuracies.count(), groups["diverged"].sum()
    order = points.assign(lucky=points["diverged"] > 0, worst=-points["test_accuracy"])
    return points.loc[order.sort_values(["lucky", "worst"]).index]


def _name(optimizer: str, point: dict) -> str:
    """A name that tells the settings, made of what folders may be called."""
    words = [f"{k}{v:.6g}" if isinstance(v, float) else f"{k}{v}"
             for k, v in point.items() if k != "optimizer"]  # fmt: skip
    words = [re.sub(r"[^A-Za-z0-9._-]+", "_", word).strip("_") for word in (optimizer, *words)]
    text = "-".join(words)
    return text if len(text) <= 80 else f"{text[:71]}-{crc32(text.encode()):08x}"
