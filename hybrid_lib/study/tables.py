"""Tables of histories, and the report's own numbers. ± is half of a 95 % interval (Student)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from hybrid_lib.optim import methods
from hybrid_lib.study import statistics
from hybrid_lib.training import data
from hybrid_lib.training.history import History

_INSTALLED = Path(__file__).parents[1]  # where a wheel puts the tables
PAPER, FAIR = (
    _INSTALLED / name if (_INSTALLED / name).is_dir() else data.PROJECT / "data" / folder
    for name, folder in (("paper", "paper"), ("fair", "results/fair"))
)


def paper(name: str) -> pd.DataFrame:
    """The report's own numbers: "table3", "runs" or "milestones" (``data/paper``).

    >>> float(paper("table3")["test_accuracy"].max())
    0.8997
    """
    table = pd.read_csv(PAPER / f"{name}.csv")
    return table if name == "milestones" else table.set_index("optimizer")


def fair(name: str) -> pd.DataFrame:
    """Published comparisons under equal budgets (``data/results/fair``).

    "runs" and "epochs": a row per run of ``fair.py``, or per epoch of a run; "images-runs" and
    "images-epochs": the same for its scale "images". "depth" and "merges": a row per run of
    ``depth.py``, which takes PADAM-SGD apart, and of ``merges.py``.
    """
    return pd.read_csv(FAIR / f"{name}.csv")


def subject(histories: Sequence[History]) -> str:
    """The data set's name, for titles; ValueError for no history, or several data sets."""
    titles = {h.dataset + ", published runs" * h.environment.get("published", False)
              for h in histories}  # fmt: skip
    if len(titles) > 1:
        raise ValueError(f"several data sets ({', '.join(sorted(titles))}): show one at a time")
    if not titles:
        raise ValueError("no history to show")
    return titles.pop()


def accuracies(histories: Sequence[History]) -> pd.DataFrame:
    """Table III, redone: the report's accuracy beside final and best ones.

    Columns are mean test accuracies over the seeds; "±" belongs to "final" and needs two seeds.
    "best" is :attr:`~hybrid_lib.History.best`: without a validation set each run's best epoch on
    the test set, which flatters, so it never stands alone. Means are over complete runs, counted in
    "seeds"; "status" tells the state of the others. A method without a complete run shows the last
    good epochs of the runs it has.
    """
    report, rows = paper("table3")["test_accuracy"], {}
    for name, group in statistics.group_by_method(histories).items():
        complete = [h for h in group if h.status == "complete"]
        done = complete or [h for h in group if h.rows]
        final = [h.final["test_accuracy"] for h in done]
        last = [h.frame()["test_accuracy"].tail(10).mean() for h in done]
        best = [h.best["test_accuracy"] for h in done]
        n = pd.Series([h.status for h in group]).value_counts().sort_index()
        status = ", ".join(f"{n[s]} {s}" for s in n.index) if len(n) > 1 else n.index[0]
        rows[group[0].label] = {
            "report (CIFAR-10)": report.get(name), "final": pd.Series(final).mean(),
            "±": statistics.margin(final), "mean of last 10": pd.Series(last).mean(),
            "best": pd.Series(best).mean(), "epochs": max((len(h.rows) for h in done), default=0),
            "seeds": len(done), "status": status,
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(subject(histories))


def seconds(histories: Sequence[History]) -> pd.DataFrame:
    """Seconds per epoch of every method (medians), and their ratio to SGD beside the report's.

    A method that ran in another precision or on another engine than SGD has no ratio.
    """
    dataset, report, rows = subject(histories), paper("runs")["seconds_per_epoch"], {}
    groups = statistics.group_by_method(histories)
    ways = {name: (group[0].experiment.precision, group[0].environment.get("engine"))
            for name, group in groups.items()}  # fmt: skip
    for name, group in groups.items():
        epochs = pd.DataFrame([row for h in group for row in (h.rows[1:] or h.rows)])
        train, test = epochs.reindex(columns=["train_seconds", "test_seconds"]).median()
        rows[methods.label(name)] = {
            "train seconds": train, "test seconds": test,
            "ratio to SGD": train + test if ways[name] == ways.get("sgd") else np.nan,
            "report's ratio": report.get(name, np.nan) / report["sgd"],
        }  # fmt: skip
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(dataset)
    table["ratio to SGD"] /= table["ratio to SGD"].get(methods.label("sgd"), np.nan)
    return table
