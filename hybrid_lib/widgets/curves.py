"""The explorer's live figure: data from here, drawn by the short script beside this file."""

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
DASHES = ("", "7 4", "2 3", "10 3 2 3")  # of SVG's lines; the first one is solid
COLUMNS_INSIDE = 100  # of a long run every so many epochs are shown layer by layer


class Curves(anywidget.AnyWidget):
    """Loss and accuracy of runs as they come; below them η and λ of the experiment to start, and
    what a look inside saw, layer by layer.

    Attributes:
        data: what is drawn, as numbers and lists: ``title``; ``epochs``, the length of the axis;
            ``runs``, with ``name``, ``label``, ``colour``, ``dash`` and the columns of their
            histories; ``planned``, schedules; ``report``, the report's points or None; ``inside``,
            what :func:`~hybrid_lib.look_inside` saw in the first run that has it, or None.
    """

    _esm = Path(__file__).with_suffix(".js").read_text("utf-8")
    data = traitlets.Dict().tag(sync=True)

    def draw(self, runs: Mapping[str, History], planned: Experiment, report: str = "") -> None:
        """Show ``runs``, by name, the first one on top, and the schedules of ``planned``.

        ``report`` is a name of ``EXPERIMENTS``, for the report's accuracies of it.
        """
        points = _report(report) if report else None
        lengths = [planned.epochs, *(history.experiment.epochs for history in runs.values())]
        if points and not runs:  # the report's runs are longer: they would press ours to the edge
            lengths += points["epoch"]
        drawn, taken = [], []
        for (name, run), dash in zip(runs.items(), itertools.cycle(DASHES)):
            # Each run has its method's colour, or a free one where that is taken.
            usual = (methods.look(run.experiment.name)[0], *COLOURS)
            taken.append(next((colour for colour in usual if colour not in taken), COLOURS[-1]))
            look = {"label": f"{run.label}, {run.dataset}", "colour": taken[-1], "dash": dash}
            columns = {c: [row[c] for row in run.rows] for c in COLUMNS if "seconds" not in c}
            drawn.append({"name": name, **look, **columns})
        rules = [rule.__name__ for rule in planned.method.rules]
        # Weights that choose themselves are not planned: each run's are in the table.
        planned_epochs = range(0 if planned.chooses_lambdas else planned.epochs)
        weights = zip(*map(planned.lambdas(), planned_epochs))
        schedules = {"lr": planned.learning_rates(), "lambdas": dict(zip(rules, weights))}
        epochs = [*range(1, planned.epochs + 1)]
        self.data = _short({
            "title": drawn[0]["label"] if drawn else "No run yet: press Start",
            "epochs": max(lengths), "runs": drawn, "planned": {"epoch": epochs, **schedules},
            "report": points,
            "inside": next(filter(None, itertools.starmap(_inside, runs.items())), None),
        })  # fmt: skip


def _report(method: str) -> dict:
    from hybrid_lib.study import tables  # with pandas: not before somebody asks for it

    points = tables.paper("milestones").query("optimizer == @method")
    label = "test accuracies, CIFAR-10" if len(points) else "has no such method"
    columns = {column: points[column].tolist() for column in ("epoch", "test_accuracy")}
    return {"name": "the report", "label": label, **columns}


def _inside(name: str, history: History) -> dict | None:
    """By measure a row of values per layer, one for each epoch in ``epoch``, and how to colour."""
    seen = [row for row in history.rows if "inside" in row]
    every = math.ceil(len(seen) / COLUMNS_INSIDE)
    seen = seen[:: every or 1]
    if not seen:
        return None
    rules = [rule.__name__ for rule in history.experiment.method.rules]
    layers, pairs = [*seen[0]["inside"]], [*itertools.combinations(rules, 2)]

    def values(key: str, place: int, of: int) -> list[list]:
        """Layers that are not merged have the last rule alone: all is its share."""

        def value(layer: dict):
            given = layer.get(key)
            if not isinstance(given, list):
                return given
            whole = [0.0] * (of - len(given)) if key == "shares" else []
            return (*whole, *given, *[None] * of)[place]

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
        of_d = values("curvature", last, len(QUANTILES))
        measures.append(
            {"name": f"curvature: {QUANTILES[last]:.0%} of D lie below", "values": of_d}
        )
    return {"run": name, "epoch": [row["epoch"] for row in seen], "every": every, "layers": layers,
            "measures": measures}  # fmt: skip


def _short(data: dict) -> dict:
    """The same with numbers of five digits: a screen shows no more of them."""
    return json.loads(json.dumps(data), parse_float=lambda text: float(f"{float(text):.5g}"))
