"""Interactive Plotly figures of histories.

Every figure names its data set. A method has the same colour and dash style everywhere, so lines
can be told apart without colour. With several seeds, lines are means and bands their 95 % intervals
(Student).
"""

import base64
import io
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hybrid_lib.optim import methods
from hybrid_lib.optim.methods import BLUE, GREEN, PURPLE, VERMILLION, look
from hybrid_lib.optim.rules import SGD
from hybrid_lib.study import statistics
from hybrid_lib.study.progress import is_interactive
from hybrid_lib.study.statistics import group_by_method
from hybrid_lib.study.tables import paper, seconds, subject
from hybrid_lib.training import data
from hybrid_lib.training.experiments import EXPERIMENTS, Experiment
from hybrid_lib.training.history import History

MARKERS = {"solid": "circle-open", "dash": "diamond-open", "dot": "square-open",
           "dashdot": "triangle-up-open"}  # fmt: skip
AXES = {"train_loss": "train loss (nats)", "test_loss": "test loss (nats)",
        "train_accuracy": "train accuracy", "test_accuracy": "test accuracy"}  # fmt: skip
CIFAR10 = {data.TITLES["cifar10"], data.FOLDER_TITLES["cifar10-jpeg"]}
GRID = "rgba(128,128,128,0.3)"  # visible on light and on dark pages


def curves(histories: Sequence[History], column: str = "test_accuracy", title: str = ""):
    """One column of the rows over the epochs, one line per method, titled "TITLE, DATA SET".

    Markers show the report's test accuracies beside runs on CIFAR-10, or a copy of it, at the
    report's length. ValueError for no history, or several data sets.
    """
    return _over_epochs(histories, [[column]], title or AXES.get(column, column))


def panels(histories: Sequence[History]):
    """Figure 1: training and test loss and accuracy of every method; markers as in curves()."""
    columns = [["train_loss", "test_loss"], ["train_accuracy", "test_accuracy"]]
    figure = _over_epochs(histories, columns, "Loss and accuracy", height=640)
    return figure.update_yaxes(type="log", nticks=4, tickformat="~g", row=1)


def _over_epochs(histories, columns: list[list[str]], title: str, height: int = 460) -> go.Figure:
    """One panel per column of the rows, with one legend."""
    title = f"{title}, {subject(histories)}"
    figure = make_subplots(len(columns), len(columns[0]), shared_xaxes="all",
                           vertical_spacing=0.06, horizontal_spacing=0.13)  # fmt: skip
    for row, row_columns in enumerate(columns, start=1):
        for col, column in enumerate(row_columns, start=1):
            where = {"row": row, "col": col}
            for name, group in group_by_method(histories).items():
                _add_lines(figure, name, group, column, row == col == 1, where)
            if column == "test_accuracy":
                _add_report(figure, histories, where)
            # Fit the panel to the lines: the intervals of few seeds may run off it.
            seen = [row[column] for h in histories for row in h.rows] or [0]
            seen += [y for t in figure.select_traces({"legendgroup": "report"}) for y in t.y]
            clip = {"clipmin": 0.95 * min(seen), "clipmax": 1.05 * max(seen)}
            figure.update_yaxes(title_text=AXES.get(column, column), autorangeoptions=clip, **where)
    longest = max(len(h.rows) for h in histories)
    figure.update_xaxes(dtick=1 if longest <= 12 else None)  # no ticks at fractions of an epoch
    figure.update_xaxes(title_text="epoch", row=len(columns))
    return apply_style(figure, title, caption(histories), height)


def _add_lines(figure, name, group, column, legend: bool, where: dict) -> None:
    done = [h.frame()[column] for h in group if h.rows]
    if not done:
        return
    colour, dash = look(name)
    seeds = pd.concat(done, axis=1)
    mean, half, label = seeds.mean(axis=1), statistics.margin(seeds.T), group[0].label
    if half.notna().any():
        # Losses and accuracies are above 0, and a logarithmic axis shows nothing else.
        low, high = (mean - half).clip(lower=mean / 100).dropna(), (mean + half).dropna()
        figure.add_scatter(
            x=[*low.index, *low.index[::-1]], y=[*high, *low[::-1]],
            fill="toself", fillcolor=colour, opacity=0.15, line={"width": 0}, mode="lines",
            legendgroup=name, showlegend=False, hoverinfo="skip", **where,
        )  # fmt: skip
    figure.add_scatter(
        x=mean.index, y=mean, mode="lines" if len(mean) > 1 else "markers", name=label,
        line={"color": colour, "dash": dash, "width": 2}, legendgroup=name, showlegend=legend,
        hovertemplate="epoch %{x}: %{y:.4f}<extra>" + label + "</extra>", **where,
    )  # fmt: skip


def _add_report(figure, histories: Sequence[History], where: dict) -> None:
    """Add the report's test accuracies on CIFAR-10 beside runs of its data set and length."""
    points = dict(list(paper("milestones").groupby("optimizer")))
    found = {h.experiment.name: h for h in histories if h.dataset in CIFAR10}
    names = [
        n for n in found if n in points and found[n].experiment.epochs == EXPERIMENTS[n].epochs
    ]
    for name in names:
        colour, dash = look(name)
        figure.add_scatter(
            x=points[name]["epoch"], y=points[name]["test_accuracy"], mode="markers",
            name="report (CIFAR-10)", legendgroup="report", showlegend=name == names[0],
            marker={"color": colour, "symbol": MARKERS[dash], "size": 7},
            hovertemplate="epoch %{x}: %{y}<extra>report, " + methods.label(name) + "</extra>",
            **where,
        )  # fmt: skip


def epoch_seconds(histories: Sequence[History]):
    """Figure 2: seconds per epoch, training and test pass, with the ratio to SGD and the report's.

    Medians over epochs, without a run's first epoch, which warms up, if there are more.
    """
    table = seconds(histories)
    names = {"train seconds": "training pass", "test seconds": "test pass"}
    figure = px.bar(
        table[[*names]].rename(columns=names), orientation="h", pattern_shape="variable",
        color_discrete_sequence=[BLUE, VERMILLION], pattern_shape_sequence=["", "/"],
    )  # fmt: skip
    figure.update_traces(hovertemplate="%{y}: %{x:.3g}<extra>%{fullData.name}</extra>")
    ours = table["ratio to SGD"].map("{:.1f} × SGD".format, na_action="ignore")
    report = table["report's ratio"].map("report: {:.1f} ×".format, na_action="ignore")
    notes = pd.concat([ours, report], axis=1).apply(lambda both: ", ".join(both.dropna()), axis=1)
    figure.update_traces(text=notes, textposition="outside", selector={"name": "test pass"})
    longest = (table["train seconds"] + table["test seconds"]).max()
    figure.update_xaxes(range=[0, longest * 1.45], title_text="seconds per epoch (median)")
    figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True, title_text=None)
    figure.update_layout(legend={"title_text": None, "traceorder": "normal"})
    devices = {e.get("device_name", "?") for h in histories for e in h.environments}
    title = f"Time per epoch on {', '.join(sorted(devices))}, {subject(histories)}"
    return apply_style(figure, title, caption(histories, "median"))


def schedules(experiments: Iterable[Experiment], title: str = ""):
    """Learning rate and weight of SGD per epoch, one column per name.

    Self-adjusting weights are drawn at their starting value.
    """
    distinct = list({e.name: e for e in reversed(list(experiments))}.values())[::-1]
    figure = make_subplots(
        2, len(distinct), shared_xaxes=True, shared_yaxes=True, vertical_spacing=0.08,
        horizontal_spacing=0.015, column_titles=[e.label.replace(" ", "<br>") for e in distinct],
    )  # fmt: skip
    figure.update_annotations(font_size=12)
    for col, e in enumerate(distinct, start=1):
        colour, dash = look(e.name)
        place = np.array([rule is SGD for rule in e.method.rules])
        sgd = [place @ e.lambdas()(i) for i in range(e.epochs)]
        for row, values, label in ((1, e.learning_rates(), "η"), (2, sgd, "λ of SGD")):
            figure.add_scatter(
                x=np.arange(1, e.epochs + 1), y=np.asarray(values), mode="lines", name=e.label,
                showlegend=False, line={"color": colour, "dash": dash, "shape": "hvh"},
                hovertemplate="epoch %{x}: " + label + " = %{y:.3g}<extra></extra>",
                row=row, col=col,
            )  # fmt: skip
    # A cosine ends near 0, far below what matters. Powers need a smaller font.
    highest = np.log10([max(e.learning_rates()) for e in distinct])
    rates = [min(-5.3, highest.min() - 0.3), max(0, highest.max() + 0.1)]
    powers = {"exponentformat": "power", "tickfont_size": 10}
    figure.update_yaxes(type="log", range=rates, dtick=1, **powers, row=1)
    figure.update_yaxes(range=[-0.05, 1.05], row=2)
    figure.update_yaxes(title_text="learning rate η", row=1, col=1)
    figure.update_yaxes(title_text="weight λ of SGD", row=2, col=1)
    figure.update_xaxes(nticks=4)
    figure.update_xaxes(title_text="epoch", row=2, col=(len(distinct) + 1) // 2)
    title = title or f"Schedules, {data.title(distinct[0].dataset)}"
    return apply_style(figure, title, height=430).update_layout(margin_t=90)


def show(figure) -> None:
    """Show a figure in a notebook; without a front end, also as an image for static viewers."""
    from IPython.display import display  # imported here: figures also work outside notebooks
    from PIL import Image

    if is_interactive():
        figure.show()
        return
    still = go.Figure(figure).update_layout(width=900)
    bundle = {"application/vnd.plotly.v1+json": json.loads(_light(still).to_json())}
    try:
        import kaleido

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # from plotly: options not passed on
            image = Image.open(io.BytesIO(still.to_image("png"))).quantize(64)
        # Keep one browser for all further images: starting it takes ten times as long as drawing.
        # Start it only now that a drawing has worked: without any browser, this waits for ever.
        kaleido.start_sync_server(silence_warnings=True)
    except Exception:  # kaleido draws with an installed Chrome or Chromium; there may be none
        bundle["text/html"] = still.to_html(full_html=False, include_plotlyjs="cdn")
    else:
        small = io.BytesIO()
        image.save(small, "png", optimize=True)
        bundle["image/png"] = base64.b64encode(small.getvalue()).decode("ascii")
    display(bundle, raw=True)


def _light(figure: go.Figure) -> go.Figure:
    """Shrink a figure: at most 60 points per plain line, four or two bytes per number.

    An executed notebook stores it beside the image, which shows every point.
    """
    light = go.Figure(figure)
    for trace in light.select_traces({"type": "scatter"}):
        axes = {axis: np.asarray(trace[axis]) for axis in "xy" if trace[axis] is not None}
        # Without those that are empty or hold names, on a category axis:
        axes = {axis: v for axis, v in axes.items() if v.dtype.kind in "iuf" and len(v)}
        plain = len(axes) == 2 and trace.mode == "lines" and trace.customdata is None
        for axis, values in axes.items():
            if plain and len(values) > 60:
                values = values[np.linspace(0, len(values) - 1, 60).round().astype(int)]
            trace[axis] = None  # else an equal tuple stays, and is written number by number
            small = values.dtype.kind != "f" and abs(values).max() < 2**15
            trace[axis] = values.astype(np.int16 if small else np.float32)
    return light


def caption(histories: Sequence[History], what: str = "mean and 95 % interval (Student)") -> str:
    """What is drawn, and over how many seeds."""
    drawn = [h for h in histories if h.rows]
    counts = sorted({len(group) for group in group_by_method(drawn).values()}) or [0]
    text = "one seed" if counts == [1] else f"{what}, {' or '.join(map(str, counts))} seeds"
    incomplete = sum(h.status != "complete" for h in drawn)
    return f"{text}; incomplete runs: {incomplete}" if incomplete else text


def apply_style(figure, title: str, caption: str = "", height: int = 460):
    """Apply the house style: a title, margins, colours that work on light and on dark pages."""
    clear, subtitle = "rgba(0,0,0,0)", {"text": caption, "font": {"size": 13}}
    figure.update_layout(
        title={"text": title, "subtitle": subtitle, "x": 0, "xref": "paper", "font": {"size": 16}},
        template="none",  # plotly's default adds 7 KB to each figure of a notebook
        height=height, margin={"l": 70, "r": 20, "t": 60, "b": 50},
        paper_bgcolor=clear, plot_bgcolor=clear, font={"color": "#767676", "size": 13},
        legend={"itemwidth": 40},
        modebar={"bgcolor": clear, "color": "#767676", "activecolor": BLUE},
    )  # fmt: skip
    figure.update_xaxes(gridcolor=GRID, zeroline=False)
    return figure.update_yaxes(gridcolor=GRID, zeroline=False)


def lines(
    series: Mapping[str, pd.Series], title: str, x: str, y: str, shape: str = "linear",
    level: float | None = None,
):  # fmt: skip
    """One line per series, over its index; methods get their own colour, dash and label.

    Use ``shape="hv"`` for values that hold until the next; ``level`` adds a dotted reference line.
    """
    colours = (GREEN, BLUE, VERMILLION, PURPLE, "#808080", BLUE)
    looks = list(zip(colours, ("solid", "dash", "dot", "dashdot", "solid", "longdash")))
    others = [name for name in series if name.removeprefix("dyn_") not in methods.METHODS]
    figure = go.Figure()
    for name, values in series.items():
        colour, dash = looks[others.index(name) % len(looks)] if name in others else look(name)
        figure.add_scatter(
            x=values.index, y=values, mode="lines", name=methods.label(name),
            line={"color": colour, "dash": dash, "width": 2, "shape": shape},
        )  # fmt: skip
    if level is not None:
        figure.add_hline(level, line={"color": "#808080", "dash": "dot"})
    figure.update_xaxes(title_text=x).update_yaxes(title_text=y)
    return apply_style(figure, title).update_layout(legend_itemwidth=60)
