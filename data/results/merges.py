"""Merges and places: what the product is worth and where adaptivity is needed; resumable.

    python data/results/merges.py            # an hour on two cores; runs/merges
    python data/results/merges.py --list     # the status of every run
    python data/results/merges.py --publish  # data/results/fair/merges.csv: a row per run

Two questions on the two tasks of ``fair.py``, at its sizes, with momentum .9, a cosine rate for the
digits and a constant one for the text. Each variant is tuned with seed 0: of a few rates it gets
the best by validation. It then runs with five seeds that tuning has not seen. Written before
anything was run:

- *Merges.* ATMO, PADAM-SGD and AdaSGD with weights of one half each: the report's product, the sum
  of the rules' steps, the graft (the adaptive direction at the mean length), and the sum with the
  adaptive rule at its own rate, which is SGD's times the ratio of their best rates in ``fair.py``.
  Decay 5e-4, five rates over the three decades of ``fair.py``.
- *Places.* The adaptive rule alone on every tensor; on norms, biases and the last layer; on the
  other matrices; and nowhere. SGD gets the rest, and each rule has its own rate as above. No decay;
  SGD's best rate, a third of it and three times it.

A merge *differs* from the product, and a place from everywhere and from nowhere, if the 95 %
interval (Student) of the seed-by-seed difference excludes zero; a seed that diverged counts as the
worst of all runs on that task.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from command import PUBLISHED, command
from fair import CONTESTANTS, FINAL_SEEDS, TASKS, chosen_of

from hybrid_lib import Experiment
from hybrid_lib.study import tables
from hybrid_lib.study.running import run_folder
from hybrid_lib.training.experiments import EXPERIMENTS
from hybrid_lib.training.history import History

SCHEDULE = {"digits": "cosine", "python-docs": "constant"}
ADAPTIVE = {"atmo": "adam", "padam_sgd": "padam", "adasgd": "adahessian"}
EVEN = {"lambda_schedule": "constant", "lambda_start": (0.5, 0.5), "weight_decay": 5e-4}


def best_rate(task: str, contestant: str) -> float:
    """Return a contestant's best published rate by validation, with the task's schedule."""
    runs = tables.fair("runs")
    on_schedule = (runs["task"] == task) & (runs["part"] == SCHEDULE[task])
    here = runs[on_schedule & (runs["contestant"] == contestant)].dropna(subset="validation")
    place = here["validation"].idxmin() if task == "python-docs" else here["validation"].idxmax()
    return float(here["lr"][place])


def variants(task: str, method: str) -> Iterator[tuple[str, dict, list[float]]]:
    """Yield (name, settings, rates to choose from) for four merges, then four places."""
    sgd, ratio = best_rate(task, "sgd"), best_rate(task, ADAPTIVE[method]) / best_rate(task, "sgd")
    decades = np.geomspace(*CONTESTANTS[method][1], 5).tolist()
    for merge in ("product", "sum", "graft"):
        yield merge, {**EVEN, "merge": merge}, decades
    own_rates = {"merge": "sum", "lambda_start": (ratio / 2, 0.5)}
    yield "own_rates", {**EVEN, **own_rates}, np.geomspace(*CONTESTANTS["sgd"][1], 5).tolist()
    near = [sgd / 3, sgd, 3 * sgd]
    alone = {"merge": "sum", "lambda_schedule": "constant", "weight_decay": 0.0}
    for on in ("all", "norms_and_head", "matrices"):
        yield on, {**alone, "lambda_start": (ratio, 0), "lambda_on": on}, near
    yield "nowhere", {**alone, "lambda_start": (0, 1)}, near


def tuning(task: str) -> Iterator[list[Experiment]]:
    """Yield each variant's runs with seed 0, one per rate."""
    fixed = {**TASKS[task], "dataset": task, "lr_schedule": SCHEDULE[task], "lr_milestones": ()}
    for method in ADAPTIVE:
        row = EXPERIMENTS[method].scaled(TASKS[task]["epochs"])
        for name, settings, rates in variants(task, method):
            if name == "nowhere" and method != "atmo":  # SGD alone again
                continue
            changed = {**fixed, "momentum": 0.9, "lambda_epochs": None, **settings}
            yield [replace(row, name=f"{method}-{name}-{i}", lr=lr, **changed)
                   for i, lr in enumerate(rates)]  # fmt: skip


def finals(task: str, out: Path) -> Iterator[list[Experiment]]:
    """Yield each variant's runs with five new seeds at its best rate."""
    for experiments in tuning(task):
        best = chosen_of([History.load(run_folder(out / task, e)) for e in experiments]).experiment
        yield [replace(best, name=f"{best.name[:-2]}-final", seed=seed) for seed in FINAL_SEEDS]


def published(out: Path) -> pd.DataFrame:
    """Return a row per run: method, variant and outcome."""
    rows = []
    for task in SCHEDULE:
        measure = "loss" if task == "python-docs" else "accuracy"
        for experiments in itertools.chain(tuning(task), finals(task, out)):
            for e in experiments:
                h = History.load(run_folder(out / task, e))
                method, variant, rate = e.name.split("-")
                last = h.final if h.status == "complete" else {}
                rows.append({
                    "task": task, "method": method, "variant": variant, "rate": rate,
                    "seed": e.seed, "lr": e.lr, "lambda_adaptive": e.lambda_start[0],
                    "status": h.status, "validation": last.get(f"validation_{measure}"),
                    "test": last.get(f"test_{measure}"), "train_loss": last.get("train_loss"),
                })  # fmt: skip
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> int:
    def stages(chosen) -> Iterator:
        """Yield all runs of a task together, so that no core waits for a slow one."""
        yield [(task, [*itertools.chain(*tuning(task))]) for task in SCHEDULE]
        yield [(task, [*itertools.chain(*finals(task, chosen.out))]) for task in SCHEDULE]

    def tables(chosen) -> dict[Path, pd.DataFrame]:
        return {PUBLISHED / "merges.csv": published(chosen.out)}

    return command(__doc__, stages, tables, arguments)


if __name__ == "__main__":
    sys.exit(main())
