"""Train the comparison under equal budgets: one command, resumable.

    python data/results/fair.py            # three to four hours on two cores; runs/fair
    python data/results/fair.py --list     # the status of every run
    python data/results/fair.py --publish  # data/results/fair/: a row per run, a row per epoch
    python data/results/fair.py --scale images --compile  # a part, on images: an hour and a half
    python data/results/fair.py --scale paper --device cuda   # CIFAR-10 at full width: not run yet

The report compares eight recipes. Here all contestants have the same images or text, batches,
steps and schedule of the learning rate, and equally many trials with settings drawn from spaces of
the same size, after AlgoPerf (Dahl et al. 2023): studies of five quasi-random trials each. A study
chooses the trial with the best validation accuracy in the last epoch (on text: the lowest loss);
the test set is looked at for chosen trials only. Written before anything was run, but for images:

- A contestant's score is the test accuracy (on text: loss) of its studies' chosen trials, mean over
  studies, and of the best of all its trials, run with five seeds that tuning has not seen.
- Epochs to a target: the target is what the median contestant's chosen trials reach in validation.
- The portfolio test: a hybrid contains its parts, so it must not lose to them. B trials of the
  hybrid are set against the better of its two parts with B/2 trials each, B = 10, over random
  choices from the existing trials. A hybrid *wins* if the 95 % interval of the difference lies
  above 0 and *loses* if it lies below.
- Adaptive λ (added after the ten others had run and before any of its own runs): a hybrid with
  Hedge draws Hedge's rate where the constant one draws λ. Test and verdicts are the same, with ten
  of its trials against the better of five with a constant and five with a falling λ. SWATS draws
  its tolerance; its rivals are Adam and SGD.
- Images: the same scores and portfolio test for six contestants. None has a falling λ, so a hybrid
  with Hedge faces its two parts. Added while their runs were under way: no hybrid's results had
  been seen, but some test accuracies of SGD, Adam and Padam in the log.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
from command import PUBLISHED, command

from hybrid_lib import Experiment
from hybrid_lib.optim.methods import get_method
from hybrid_lib.study.running import run_folder
from hybrid_lib.study.sweeps import Sweep
from hybrid_lib.training.history import History

TASKS = {
    "digits": {"epochs": 12, "width": 8, "batch_size": 32, "validation_limit": 240},
    "python-docs": {"epochs": 6, "width": 32, "batch_size": 32, "train_limit": 2200,
                    "test_limit": 500, "validation_limit": 200},
    "cifar10-jpeg": {"dataset": "folder:data/cifar10-jpeg", "epochs": 8, "width": 8,
                     "batch_size": 128, "train_limit": 11_000, "test_limit": 2_000,
                     "validation_limit": 1_000},
    "cifar10": {"epochs": 30, "batch_size": 128, "validation_limit": 5_000},
}  # fmt: skip
# For all contestants: schedules of the learning rate, studies, trials per study, new seeds.
SCHEDULES, STUDIES, TRIALS, FINAL_SEEDS = ("cosine", "constant"), 3, 5, range(1, 6)
PREFIXES = {"cpu": "", "images": "images-", "paper": "paper-"}  # of the published tables
# Three decades of the learning rate per method, around the rates that papers give for it.
LOW, HIGH = (1e-4, 1e-1), (1e-3, 1.0)
CONTESTANTS = {  # row with its base settings, range of the learning rate, schedule of λ
    "sgd": ("sgd", HIGH, "none"),
    "adam": ("adam", LOW, "none"),
    "padam": ("padam", HIGH, "none"),
    "adahessian": ("adahessian", HIGH, "none"),
    "atmo": ("atmo", LOW, "constant"),
    "padam_sgd": ("padam_sgd", HIGH, "constant"),
    "adasgd": ("adasgd", HIGH, "constant"),
    "dyn_atmo": ("dyn_atmo", LOW, "linear"),
    "dyn_padam_sgd": ("dyn_padam_sgd", HIGH, "linear"),
    "dyn_adasgd": ("adasgd", HIGH, "linear"),
    "hedge_atmo": ("atmo", LOW, "hedge"),
    "hedge_padam_sgd": ("padam_sgd", HIGH, "hedge"),
    "hedge_adasgd": ("adasgd", HIGH, "hedge"),
    "swats": ("swats", LOW, "swats"),
}
FIRST_ORDER = ("sgd", "adam", "padam", "atmo", "padam_sgd", "hedge_atmo")
SCALES = {  # tasks, schedules, studies, contestants
    "cpu": (("digits", "python-docs"), SCHEDULES, STUDIES, tuple(CONTESTANTS)),
    # On real images all of it would take two cores most of a day; this, an hour and a half.
    "images": (("cifar10-jpeg",), ("cosine",), 2, FIRST_ORDER),
    "paper": (("cifar10",), SCHEDULES, STUDIES, tuple(CONTESTANTS)),  # on a GPU, at full width
}
OWN = {  # what else is drawn, by schedule of λ; the falling λ is as in the report
    "constant": {"lambda_sgd": {"low": 0.0, "high": 1.0}},
    "hedge": {"lambda_rate": {"low": 0.01, "high": 1.0, "log": True}},
    "swats": {"lambda_tolerance": {"low": 1e-9, "high": 1e-3, "log": True}},
}


def trials(task: str, schedule: str, contestant: str, study: int) -> list[Experiment]:
    """Return five trials that draw rate, decay and what a hybrid's schedule of λ needs."""
    row, (low, high), λ = CONTESTANTS[contestant]
    sizes = dict(TASKS[task])
    dataset = sizes.pop("dataset", task)
    fixed = {**sizes, "lr_schedule": schedule, "lr_milestones": []}
    space = {"lr": {"low": low, "high": high, "log": True},
             "weight_decay": {"low": 1e-5, "high": 1e-2, "log": True}}  # fmt: skip
    method = get_method(row.removeprefix("dyn_"))
    if "momentum" in method.settings:
        fixed["momentum"] = 0.9
    space |= OWN.get(λ, {})
    if λ == "linear":  # from the adaptive rule to SGD, over all epochs
        fixed |= {"lambda_start": (1, 0), "lambda_epochs": None}
    elif method.is_hybrid:
        fixed["lambda_schedule"] = λ
    if λ == "hedge":
        fixed["lambda_start"] = (0.5, 0.5)
    sweep = Sweep(optimizer=row, scale="paper", dataset=dataset, fixed=fixed, random=space,
                  draws=TRIALS, draw_seed=study)  # fmt: skip
    experiments, refused = sweep.plan()
    assert (len(experiments), refused) == (TRIALS, [])
    return [replace(e, name=f"{contestant}-{study}-{i}") for i, e in enumerate(experiments)]


def studies(scale: str = "cpu") -> Iterator[tuple[str, list[Experiment]]]:
    """Yield (folder, trials): the first study of all contestants, then the second, …"""
    tasks, schedules, n, contestants = SCALES[scale]
    for study, task, schedule in itertools.product(range(n), tasks, schedules):
        for contestant in contestants:
            yield f"{task}/{schedule}", trials(task, schedule, contestant, study)


def chosen_of(histories: list[History]) -> History:
    """Return the trial with the best last-epoch validation accuracy, on text the lowest loss."""

    def goodness(h: History) -> float:
        if h.status != "complete":
            return -math.inf
        text = h.experiment.dataset == "python-docs"
        return -h.final["validation_loss"] if text else h.final["validation_accuracy"]

    if any(h.status not in ("complete", "diverged") for h in histories):
        raise FileNotFoundError("some trials are not finished: none can be chosen yet")
    return max(histories, key=goodness)


def finals(out: Path, scale: str = "cpu") -> Iterator[tuple[str, list[Experiment]]]:
    """Yield (folder, runs): a contestant's best trial of all, with seeds that no trial had."""
    tried: dict[tuple, list[History]] = {}
    for folder, experiments in studies(scale):
        of = folder.partition("/")[0], experiments[0].name.partition("-")[0]
        tried[of] = tried.get(of, []) + [History.load(run_folder(out / folder, e))
                                         for e in experiments]  # fmt: skip
    for (task, contestant), histories in tried.items():
        e = replace(chosen_of(histories).experiment, name=f"{contestant}-final")
        yield f"{task}/final", [replace(e, seed=seed) for seed in FINAL_SEEDS]


def published(out: Path, scale: str = "cpu") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a row per run, and a row per epoch: validation accuracies, on text losses."""
    runs, epochs = [], []
    for folder, experiments in itertools.chain(studies(scale), finals(out, scale)):
        task, part = folder.split("/")
        measure = "loss" if task == "python-docs" else "accuracy"
        for e in experiments:
            h = History.load(run_folder(out / folder, e))
            contestant, study, *trial = e.name.split("-")
            run = f"{folder}/{e.name}-seed{e.seed}"
            last = h.final if h.status == "complete" else {}
            runs.append({
                "run": run, "task": task, "part": part, "contestant": contestant, "study": study,
                "trial": trial[0] if trial else "", "seed": e.seed, "lr": e.lr,
                "lr_schedule": e.lr_schedule, "weight_decay": e.weight_decay,
                "lambda_sgd": e.lambda_start[1] if e.is_hybrid else None,
                "lambda_sgd_at_the_end": h.rows[-1]["lambdas"][-1]
                if h.rows and e.is_hybrid else None,
                "status": h.status, "validation": last.get(f"validation_{measure}"),
                "test": last.get(f"test_{measure}"),
                "train_seconds": sum(row["train_seconds"] for row in h.rows),
                "torch": h.environment["torch"],
            })  # fmt: skip
            epochs += [{"run": run, "epoch": row["epoch"],
                        "validation": row[f"validation_{measure}"]} for row in h.rows]  # fmt: skip
    return pd.DataFrame(runs), pd.DataFrame(epochs)


def main(arguments: list[str] | None = None) -> int:
    def stages(chosen) -> Iterator:
        yield studies(chosen.scale)
        yield finals(chosen.out, chosen.scale)

    def tables(chosen) -> dict[Path, pd.DataFrame]:
        by_name = zip(("runs", "epochs"), published(chosen.out, chosen.scale))
        return {PUBLISHED / f"{PREFIXES[chosen.scale]}{name}.csv": table for name, table in by_name}

    scale = {"choices": SCALES, "default": "cpu", "help": "default: %(default)s"}
    return command(__doc__, stages, tables, arguments, scale=scale)


if __name__ == "__main__":
    sys.exit(main())
