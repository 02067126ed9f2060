"""The explorer's live figure: data here, drawn by the short script beside this file."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import anywidget
import traitlets

from hybrid_lib.optim import methods
from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.history import COLUMNS, History

DASHES = ("", "7 4", "2 3", "10 3 2 3")  # of SVG's lines; the first one is solid
GREY = "#808080"
DRAWN = [column for column in COLUMNS if "seconds" not in column]


class Curves(anywidget.AnyWidget):
    """Loss and accuracy of runs as they come; below them η and λ of the experiment to start.

    Attributes:
        data: what is drawn, plain lists and numbers: ``title``; ``epochs``, the length of the axis;
            ``runs``, each with ``name``, ``label``, ``colour``, ``dash`` and a list per column of
            its history; ``planned``, the schedules; ``report``, points, or None.
    """

    _esm = Path(__file__).with_suffix(".js").read_text("utf-8")
    data = traitlets.Dict().tag(sync=True)

    def draw(self, runs: Mapping[str, History], planned: Experiment, report: str = "") -> None:
        """Show something else.

        Args:
            runs: by the names that the legend gives them; the first one lies on top.
            planned: the experiment whose schedules are drawn.
            report: a name of ``EXPERIMENTS``, for the report's accuracies of it.
        """
        points = _report(report) if report else None
        lengths = [planned.epochs, *(history.experiment.epochs for history in runs.values())]
        if points and not runs:  # the report's runs are longer: they would press ours to the edge
            lengths += points["epoch"]
        title = "No run yet: press Start"
        for first in list(runs.values())[:1]:
            title = f"{first.label}, {first.dataset}"
        self.data = {
            "title": title, "epochs": max(lengths), "runs": _runs(runs),
            "planned": _planned(planned), "report": points,
        }  # fmt: skip


def _runs(runs: Mapping[str, History]) -> list[dict]:
    described, taken = [], []
    for (name, history), dash in zip(runs.items(), itertools.cycle(DASHES)):
        # Each run has its method's colour, or a free one where that is taken.
        usual = (methods.look(history.experiment.name)[0], methods.BLUE, methods.VERMILLION,
                 methods.GREEN, methods.PURPLE)  # fmt: skip
        taken.append(next((colour for colour in usual if colour not in taken), GREY))
        look = {"label": f"{history.label}, {history.dataset}", "colour": taken[-1], "dash": dash}
        columns = {column: [_short(row[column]) for row in history.rows] for column in DRAWN}
        described.append({"name": name, **look, **columns})
    return described


def _planned(experiment: Experiment) -> dict:
    """η, and λ by the rule's name, in every epoch."""
    weights = zip(*map(experiment.lambdas(), range(experiment.epochs)))
    rules = [rule.__name__ for rule in experiment.method.rules]
    return {
        "epoch": list(range(1, experiment.epochs + 1)),
        "lr": _short(experiment.learning_rates()),
        "lambdas": {rule: _short(values) for rule, values in zip(rules, weights)},
    }


def _report(method: str) -> dict:
    from hybrid_lib.study import tables  # with pandas: not before somebody asks for it

    points = tables.paper("milestones").query("optimizer == @method")
    label = "test accuracies, CIFAR-10" if len(points) else "has no such method"
    columns = {column: points[column].tolist() for column in ("epoch", "test_accuracy")}
    return {"name": "the report", "label": label, **columns}


def _short(value):
    """Five digits, which a screen does not show more of."""
    return float(f"{value:.5g}") if isinstance(value, int | float) else [_short(v) for v in value]
