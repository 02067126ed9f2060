"""A live figure of runs: loss and accuracy as they come, the schedules of η and λ below them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hybrid_lib.optim import methods
from hybrid_lib.study import figures, tables
from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.history import History

LOSS_TICKS = [digit * 10.0**power for power in range(-7, 3) for digit in (1, 2, 5)]
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")
GREY = "#808080"


def live_figure(width: int) -> go.FigureWidget:
    """The figure before there is anything to draw; ``width`` in pixels."""
    figure = make_subplots(
        4, 1, shared_xaxes=True, vertical_spacing=0.05, row_heights=[0.35, 0.35, 0.13, 0.17]
    )
    figure.update_yaxes(title_text="loss (nats)", type="log", tickvals=LOSS_TICKS, row=1)
    figure.update_yaxes(title_text="accuracy", row=2)
    figure.update_yaxes(title_text="rate η", rangemode="tozero", nticks=3, row=3)
    figure.update_yaxes(title_text="weights λ", range=[-0.08, 1.08], dtick=0.5, row=4)
    figure.update_xaxes(title_text="epoch", title_standoff=8, row=4)
    below = {"orientation": "h", "x": 0, "y": -0.1, "yanchor": "top", "traceorder": "reversed"}
    beside = {"orientation": "h", "x": 1, "xanchor": "right", "y": 0.145, "yanchor": "bottom"}
    figures.apply_style(figure, "", height=740)
    figure.update_layout(width=width, legend=below, legend2=beside)
    return go.FigureWidget(figure.update_layout(margin={"l": 70, "r": 10, "t": 66, "b": 110}))


def draw(
    figure: go.FigureWidget, runs: Mapping[str, History], planned: Experiment, report: str = ""
) -> None:
    """Bring a :func:`live_figure` up to date.

    Args:
        runs: by the names that the legend gives them; the first one lies on top.
        planned: the experiment whose schedules are drawn.
        report: a name of ``EXPERIMENTS``, for the report's accuracies of it.
    """
    lines, taken = [], []
    for (name, history), symbol in zip(runs.items(), itertools.cycle(SYMBOLS)):
        # Each run has its method's colour, or a free one where that is taken.
        usual = (methods.look(history.experiment.name)[0], methods.BLUE, methods.VERMILLION,
                 methods.GREEN, methods.PURPLE)  # fmt: skip
        taken.append(next((colour for colour in usual if colour not in taken), GREY))
        lines = _curves(name, history, taken[-1], symbol) + lines
    points = [_report_points(report)] if report else []
    _put(figure, _schedules(planned) + lines + points)
    last = [planned.epochs, *(history.experiment.epochs for history in runs.values())]
    if not runs:  # the report's runs are longer: they would press ours to the edge
        last += [epoch for _, line in points for epoch in line["x"]]
    epochs = max(last)
    margin, title = max(0.3, 0.02 * epochs), "No run yet: press Start"
    for first in list(runs.values())[:1]:
        title = f"{first.label}, {first.dataset}<br><sup>solid: test, dotted: training</sup>"
    with figure.batch_update():
        figure.update_xaxes(range=[1 - margin, epochs + margin], dtick=1 if epochs <= 12 else None)
        figure.layout.title.text = title


def _put(figure: go.FigureWidget, lines: list[tuple[int, dict]]) -> None:
    """(row, trace) pairs into a figure; lines that are there already grow in place."""
    looks = [(trace.name, trace.line.color) for trace in figure.data]
    if looks != [(line["name"], line["line"]["color"]) for _, line in lines]:
        figure.data = []
        traces = [go.Scatter(**line) for _, line in lines]
        figure.add_traces(traces, rows=[row for row, _ in lines], cols=[1] * len(lines))
        return
    for trace, (_, line) in zip(figure.data, lines):
        # One at a time: what one update leaves alone in some of its traces, views opened later lack
        with figure.batch_update():
            trace.update({key: line[key] for key in ("mode", "x", "y")})


def _line(row: int, name: str, x, y, line: dict, **more) -> tuple[int, dict]:
    """A row of the figure, and a trace for it."""
    trace = {"x": list(x), "y": list(y), "name": name, "line": line, "mode": "lines"}
    return row, trace | more


def _schedules(experiment: Experiment) -> list[tuple[int, dict]]:
    """η and every rule's λ."""
    epochs, steps = range(1, experiment.epochs + 1), {"shape": "hvh", "width": 2}
    rates, weights = experiment.learning_rates(), map(experiment.lambdas(), range(epochs[-1]))
    lines = [_line(3, "η", epochs, rates, {"color": methods.GREEN, **steps}, showlegend=False)]
    looks = ({"color": methods.VERMILLION}, {"color": methods.BLUE, "dash": "dash"})
    for rule, values, look in zip(experiment.method.rules, zip(*weights), looks):
        name = f"λ of {rule.__name__}"
        lines.append(_line(4, name, epochs, values, {**look, **steps}, legend="legend2"))
    return lines


def _curves(name: str, history: History, colour: str, symbol: str) -> list[tuple[int, dict]]:
    """A run's loss and accuracy, test solid, training dotted; empty before its 1st epoch."""
    rows = history.rows
    return [
        _line(
            row, f"{name}: {history.label}, {history.dataset}", [r["epoch"] for r in rows],
            [r[f"{part}_{what}"] for r in rows], {"color": colour, "width": width, "dash": dash},
            mode="lines+markers" if len(rows) <= 30 else "lines",
            marker={"symbol": symbol, "size": 6}, legendgroup=name,
            showlegend=row == 1 and part == "test",
            hovertemplate=f"epoch %{{x}}: {part} {what} %{{y:.4f}}<extra>{name}</extra>",
        )
        for row, what in ((1, "loss"), (2, "accuracy"))
        for part, dash, width in (("train", "dot", 1.5), ("test", "solid", 2.5))
    ]  # fmt: skip


def _report_points(method: str) -> tuple[int, dict]:
    points = tables.paper("milestones").query("optimizer == @method")
    name = "report, test (CIFAR-10)" if len(points) else "the report has no such method"
    marker = {"symbol": "diamond-open", "size": 9, "color": GREY}
    return _line(2, name, points["epoch"], points["test_accuracy"], {"color": GREY},
                 mode="markers", marker=marker)  # fmt: skip
