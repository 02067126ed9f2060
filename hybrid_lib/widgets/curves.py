"""The data of the explorer's live figure, which ``curves.js`` draws."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path

import anywidget
import traitlets

from hybrid_lib.optim import methods
from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.history import COLUMNS, History
from hybrid_lib.training.inside import QUANTILES

COLOURS = (methods.BLUE, methods.VERMILLION, methods.GREEN, methods.PURPLE, "#808080")
DASHES = ("", "7 4", "2 3", "10 3 2 3")  # stroke-dasharray in SVG; the first is solid
COLUMNS_INSIDE = 100  # at most this many in the layer map; longer runs skip epochs


class Curves(anywidget.AnyWidget):
    """Live curves of runs, the next experiment's schedules of η and λ, and a map of layers.

    Attributes:
        data: the figure as numbers and lists: ``title``; ``epochs``, the length of the axis;
            ``runs``, each with ``name``, ``label``, ``colour``, ``dash`` and the columns of its
            history; ``planned``, the schedules; ``report``, the report's points or None;
            ``inside``, what :func:`~hybrid_lib.look_inside` recorded in the first run that used
            it, or None.
    """

    _esm = Path(__file__).with_suffix(".js").read_text("utf-8")
    data = traitlets.Dict().tag(sync=True)

    def draw(self, runs: Mapping[str, History], planned: Experiment, report: str = "") -> None:
        """Show ``runs`` by name, the first one on top, and the schedules of ``planned``.

        If ``report`` names a row of ``EXPERIMENTS``, show its accuracies in the report, too.
        """
        points = _report(report) if report else None
        lengths = [planned.epochs, *(history.experiment.epochs for history in runs.values())]
        if points and not runs:  # the report's runs are longer and would squeeze ours
            lengths += points["epoch"]
        drawn, taken = [], []
        for (name, run), dash in zip(runs.items(), itertools.cycle(DASHES)):
            # Each run gets its method's colour or, if that is taken, a free one.
            choices = (methods.look(run.experiment.name)[0], *COLOURS)
            taken.append(next((colour for colour in choices if colour not in taken), COLOURS[-1]))
            look = {"label": f"{run.label}, {run.dataset}", "colour": taken[-1], "dash": dash}
            columns = {c: [row[c] for row in run.rows] for c in COLUMNS if "seconds" not in c}
            drawn.append({"name": name, **look, **columns})
        rules = [rule.__name__ for rule in planned.method.rules]
        # Adaptive weights have no planned schedule; the table shows those of each run.
        planned_epochs = range(0 if planned.chooses_lambdas else planned.epochs)
        weights = zip(*map(planned.lambdas(), planned_epochs))
        schedules = {"lr": planned.learning_rates(), "lambdas": dict(zip(rules, weights))}
        epochs = [*range(1, planned.epochs + 1)]
        self.data = _rounded({
            "title": drawn[0]["label"] if drawn else "No run yet: press Start",
            "epochs": max(lengths), "runs": drawn, "planned": {"epoch": epochs, **schedules},
            "report": points,
            "inside": next(filter(None, itertools.starmap(_inside, runs.items())), None),
        })  # fmt: skip


def _report(method: str) -> dict:
    from hybrid_lib.study import tables  # imports pandas: only when needed

    points = tables.paper("milestones").query("optimizer == @method")
    label = "test accuracies, CIFAR-10" if len(points) else "does not have this method"
    columns = {column: points[column].tolist() for column in ("epoch", "test_accuracy")}
    return {"name": "the report", "label": label, **columns}


def _inside(name: str, history: History) -> dict | None:
    """Return every measure by layer and shown epoch, with its colour range, or None."""
    seen = [row for row in history.rows if "inside" in row]
    every = math.ceil(len(seen) / COLUMNS_INSIDE)
    seen = seen[:: every or 1]
    if not seen:
        return None
    rules = [rule.__name__ for rule in history.experiment.method.rules]
    layers, pairs = [*seen[0]["inside"]], [*itertools.combinations(rules, 2)]

    def values(key: str, place: int, of: int) -> list[list]:
        """Return a row per layer; in unmerged layers the last rule's share is 1."""

        def value(layer: dict):
            given = layer.get(key)
            if not isinstance(given, list):
                return given
            absent = [0.0] * (of - len(given)) if key == "shares" else []
            return (*absent, *given, *[None] * of)[place]

        return [[value(row["inside"][layer]) for row in seen] for layer in layers]

    n, measures = len(rules), []
    for i, rule in enumerate(rules) if n > 1 else ():
        share = {"name": f"share of {rule} in the movement", "low": 0, "high": 1}
        measures.append({**share, "values": values("shares", i, n)})
    for i, (one, other) in enumerate(pairs):
        cosine = {"name": f"cosine of {one} and {other}", "low": -1, "high": 1}
        measures.append({**cosine, "values": values("cosines", i, len(pairs))})
    measures.append({"name": "movement ÷ gradient", "values": values("step_size", 0, 1)})
    if any("curvature" in layer for layer in seen[0]["inside"].values()):
        last = len(QUANTILES) - 1
        rows = values("curvature", last, len(QUANTILES))
        measures.append({"name": f"curvature: {QUANTILES[last]:.0%} quantile of D", "values": rows})
    return {"run": name, "epoch": [row["epoch"] for row in seen], "every": every, "layers": layers,
            "measures": measures}  # fmt: skip


def _rounded(data: dict) -> dict:
    """Round all numbers to five digits; a screen shows no more."""
    return json.loads(json.dumps(data), parse_float=lambda text: float(f"{float(text):.5g}"))
