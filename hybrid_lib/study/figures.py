"""Figures and tables of histories: interactive Plotly figures, pandas tables.

Every figure names its data set. A method has one colour and one dash style everywhere, so that
lines can be told apart without colour. With several seeds, lines are means and bands go from the
lowest to the highest seed.
"""

from __future__ import annotations

import base64
import collections
import functools
import io
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hybrid_lib.optim import methods
from hybrid_lib.optim.methods import BLUE, GREEN, PURPLE, VERMILLION, look
from hybrid_lib.study import statistics
from hybrid_lib.study.statistics import group_by_method
from hybrid_lib.training import data
from hybrid_lib.training.experiments import EXPERIMENTS, Experiment
from hybrid_lib.training.history import History

MARKERS = {"solid": "circle-open", "dash": "diamond-open", "dot": "square-open",
           "dashdot": "triangle-up-open"}  # fmt: skip
AXES = {
    "train_loss": "train loss (nats)",
    "test_loss": "test loss (nats)",
    "train_accuracy": "train accuracy",
    "test_accuracy": "test accuracy",
}
SETTINGS = {"lr": "learning rate η", "lambda_sgd": "weight λ of SGD"}
GRID = "rgba(128,128,128,0.3)"  # visible on light and on dark pages
_INSTALLED = Path(__file__).parents[1] / "paper"  # where a wheel puts data/paper
PAPER = _INSTALLED if _INSTALLED.is_dir() else data.PROJECT / "data" / "paper"


def paper(name: str) -> pd.DataFrame:
    """The report's own numbers: "table3", "runs" or "milestones" (``data/paper``).

    >>> float(paper("table3")["test_accuracy"].max())
    0.8997
    """
    table = pd.read_csv(PAPER / f"{name}.csv")
    return table if name == "milestones" else table.set_index("optimizer")


def curves(histories: Sequence[History], column: str = "test_accuracy", title: str = ""):
    """One line per method over the epochs, and the report's own test accuracies as markers.

    Markers are drawn for CIFAR-10 and copies of it: at the report's epochs where runs have its
    length; else at theirs in proportion, and hidden until the legend's entry is clicked.

    Args:
        histories: any number of methods and seeds, all on one data set.
        column: a key of the rows.
        title: stands before the data set's name.

    Raises:
        ValueError: for no history, or for histories of several data sets.
    """
    figure = go.Figure()
    for name, group in group_by_method(histories).items():
        _add_lines(figure, name, group, column)
    if column == "test_accuracy":
        _add_report(figure, histories)
    _epoch_axis(figure, histories)
    figure.update_yaxes(title_text=AXES.get(column, column))
    return apply_style(figure, f"{title or AXES.get(column, column)}, {subject(histories)}")


def panels(histories: Sequence[History]):
    """Figure 1: loss and accuracy, training and test, of every method; markers as in curves()."""
    columns = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    figure = make_subplots(2, 2, shared_xaxes=True, vertical_spacing=0.06, horizontal_spacing=0.13)
    for i, column in enumerate(columns):
        row, col = i // 2 + 1, i % 2 + 1
        for name, group in group_by_method(histories).items():
            _add_lines(figure, name, group, column, row=row, col=col, legend=i == 0)
        figure.update_yaxes(title_text=AXES[column], row=row, col=col)
        if column.endswith("loss"):
            figure.update_yaxes(type="log", nticks=4, tickformat="~g", row=row, col=col)
    _add_report(figure, histories, row=2, col=2)
    _epoch_axis(figure, histories, row=2)
    return apply_style(figure, f"Loss and accuracy, {subject(histories)}", height=640)


def epoch_seconds(histories: Sequence[History]):
    """Figure 2: seconds per epoch of training and test pass; ratio to SGD, beside the report's.

    Medians over epochs; the first epoch of a run, which warms up, is left out where there are more.
    """
    table = seconds_table(histories)
    figure = go.Figure()
    for column, colour, label in (
        ("train", BLUE, "training pass"),
        ("test", VERMILLION, "test pass"),
    ):
        figure.add_bar(
            x=table[f"{column} seconds"], y=table.index, name=label, orientation="h",
            marker_color=colour, marker_pattern_shape="" if column == "train" else "/",
            hovertemplate="%{y}: %{x:.3g} s<extra>" + label + "</extra>",
        )  # fmt: skip
    for label, row in table.iterrows():
        ours, theirs = row["ratio to SGD"], row["report's ratio"]
        notes = [
            "" if pd.isna(ours) else f"{ours:.1f} × SGD",
            "" if pd.isna(theirs) else f"report: {theirs:.1f} ×",
        ]
        figure.add_annotation(
            x=row["train seconds"] + row["test seconds"], y=label, showarrow=False, xanchor="left",
            text="  " + ", ".join(filter(None, notes)),
        )  # fmt: skip
    figure.update_layout(barmode="stack", legend_traceorder="normal")
    figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True)
    longest = (table["train seconds"] + table["test seconds"]).max()
    figure.update_xaxes(title_text="seconds per epoch (median)", range=[0, longest * 1.45])
    device = ", ".join(sorted({h.environment.get("device_name", "?") for h in histories}))
    return apply_style(figure, f"Time per epoch on {device}, {subject(histories)}")


def step_parts(seconds: Mapping[str, Mapping[str, float]], subject: str):
    """Stacked bars of what :func:`hybrid_lib.study.timing.step_seconds` measured, one per method.

    Args:
        seconds: by experiment name, then by part.
        subject: data set and machine, for the title.
    """
    figure = go.Figure()
    labels = [methods.label(name) for name in seconds]
    looks = {"gradient": (BLUE, ""), "Hessian": (VERMILLION, "/"), "step": (GREEN, "x"),
             "evaluation": (PURPLE, ".")}  # fmt: skip
    for part, (colour, pattern) in looks.items():
        figure.add_bar(
            x=[1000 * parts[part] for parts in seconds.values()], y=labels, name=part,
            orientation="h", marker_color=colour, marker_pattern_shape=pattern,
            hovertemplate="%{y}: %{x:.3g} ms<extra>" + part + "</extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack", legend_traceorder="normal")
    figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True)
    figure.update_xaxes(title_text="milliseconds per step (median)")
    return apply_style(figure, f"Where a step's time goes, {subject}")


def schedules(experiments: Iterable[Experiment], title: str = ""):
    """Learning rate and weight of SGD in every epoch: a column of two panels per experiment.

    Of experiments that differ in their seed alone, the first is shown.
    """
    shown = list({e.name: e for e in reversed(list(experiments))}.values())[::-1]
    figure = make_subplots(
        2, len(shown), shared_xaxes=True, shared_yaxes=True, vertical_spacing=0.08,
        horizontal_spacing=0.015, column_titles=[e.label.replace(" ", "<br>") for e in shown],
    )  # fmt: skip
    figure.update_annotations(font_size=12)
    for col, e in enumerate(shown, start=1):
        colour, dash = look(e.name)
        epochs, weights = list(range(1, e.epochs + 1)), e.lambdas()
        alone = 1.0 if e.optimizer == "sgd" else 0.0
        sgd = [weights(epoch - 1)[1] if e.is_hybrid else alone for epoch in epochs]
        for row, values, label in ((1, e.learning_rates(), "η"), (2, sgd, "λ of SGD")):
            figure.add_scatter(
                x=np.asarray(epochs), y=np.asarray(values), mode="lines", name=e.label,
                showlegend=False,
                line={"color": colour, "dash": dash, "shape": "hvh"}, row=row, col=col,
                hovertemplate="epoch %{x}: " + label + " = %{y:.3g}<extra></extra>",
            )  # fmt: skip
    # A cosine ends near 0, far below what matters on a logarithmic axis.
    figure.update_yaxes(type="log", range=[-5.3, 0], dtick=1, exponentformat="power", row=1)
    figure.update_yaxes(tickfont_size=10, row=1)  # plotly draws powers larger
    figure.update_yaxes(title_text="learning rate η", row=1, col=1)
    figure.update_yaxes(range=[-0.05, 1.05], row=2)
    figure.update_yaxes(title_text="weight λ of SGD", row=2, col=1)
    figure.update_xaxes(nticks=4)
    figure.update_xaxes(title_text="epoch", row=2, col=(len(shown) + 1) // 2)
    title = title or f"Schedules, {data.title(shown[0].dataset)}"
    return apply_style(figure, title, height=430).update_layout(margin_t=90)


def heat_map(runs: pd.DataFrame, x: str, y: str, subject: str):
    """Mean test accuracy over two settings of a grid, in colour and in numbers.

    Args:
        runs: of :func:`hybrid_lib.study.sweeps.table`.
        x, y: two of its columns; the mean is over seeds and all other settings.
        subject: the data set's name, for the title.
    """
    axes = {name: _axis(runs[name]) for name in (y, x)}
    groups = runs.assign(**axes).groupby([y, x])["test_accuracy"]
    means, failed = groups.mean().unstack(), groups.apply(lambda a: a.isna().sum()).unstack()
    text = [
        ["" if np.isnan(n) else "none finished" if np.isnan(a) else
         f"{a:.3f}" + (f"<br>{n:.0f} failed" if n else "") for a, n in zip(*rows)]
        for rows in zip(means.to_numpy(), failed.to_numpy())
    ]  # fmt: skip
    figure = go.Figure(
        go.Heatmap(
            z=means, x=[str(v) for v in means.columns], y=[str(v) for v in means.index], text=text,
            texttemplate="%{text}", colorscale="Cividis", colorbar_title_text="test<br>accuracy",
            hovertemplate=f"{x} %{{x}}, {y} %{{y}}: %{{z:.4f}}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title_text=SETTINGS.get(x, x), type="category", showgrid=False)
    figure.update_yaxes(title_text=SETTINGS.get(y, y), type="category", showgrid=False)
    return apply_style(figure, f"Test accuracy after the last epoch, {subject}")


def parallel(runs: pd.DataFrame, settings: Sequence[str], subject: str):
    """Parallel coordinates: a line per finished run through its settings to its test accuracy."""
    done = runs[runs["test_accuracy"].notna()]
    accuracy = done["test_accuracy"]
    figure = go.Figure(
        go.Parcoords(
            dimensions=[*(_dimension(done[name]) for name in settings),
                        {"label": "test accuracy", "values": accuracy}],
            line={"color": accuracy, "colorscale": "Cividis", "showscale": False},
        )
    )  # fmt: skip
    title = f"Settings and test accuracy after the last epoch, {subject}"
    return apply_style(figure, title).update_layout(margin={"l": 60, "r": 60, "t": 110})


def _axis(column: pd.Series) -> pd.Series:
    """Numbers as they are, anything else as text: None, names, pairs of weights."""
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    return column if numeric and column.notna().all() else column.astype(object).map(str)


def _dimension(column: pd.Series) -> dict:
    """An axis: numbers where they are, on a logarithmic scale if they span it; else a rank each."""
    column = _axis(column)
    values = sorted(column.unique())
    if column.dtype == object or len(values) < 2 or isinstance(values[0], str):
        places = {v: i for i, v in enumerate(values)}
    elif values[0] > 0 and values[-1] / values[0] >= 50:
        places = {v: np.log10(v) for v in values}
    else:
        places = {v: v for v in values}
    ticks = values if len(values) <= 12 else values[:: len(values) // 6]
    return {
        "label": SETTINGS.get(column.name, column.name),
        "values": [places[v] for v in column],
        "tickvals": [places[v] for v in ticks],
        "ticktext": [f"{v:.3g}" if isinstance(v, float) else str(v) for v in ticks],
    }


def accuracy_table(histories: Sequence[History]) -> pd.DataFrame:
    """Table III, redone: the report's accuracy beside final and best ones.

    Columns are mean test accuracies over the seeds; ± is their standard deviation, and
    "95 % from" and "to" bound the bootstrap interval of "final" (with one seed there is neither).
    "best" is chosen by the test set, epoch by epoch: it flatters, so it never stands alone. Means
    are over complete runs, "seeds" counts them, and "status" says what became of the others; a
    method that has no complete run is here with the last good epochs of those it has.
    """
    report, rows = paper("table3")["test_accuracy"], {}
    for name, group in group_by_method(histories).items():
        complete = [h for h in group if h.status == "complete"]
        done = complete or [h for h in group if h.rows]
        statuses = collections.Counter(h.status for h in group)
        final = pd.Series([h.final["test_accuracy"] for h in done])
        best = pd.Series([h.best["test_accuracy"] for h in done])
        last = pd.Series([h.frame()["test_accuracy"].tail(10).mean() for h in done])
        low, high = statistics.interval(final)
        rows[group[0].label] = {
            "report (CIFAR-10)": report.get(name),
            "final": final.mean(),
            "± final": final.std(),
            "95 % from": low,
            "to": high,
            "mean of last 10": last.mean(),
            "best": best.mean(),
            "epochs": max((h.final["epoch"] for h in done), default=0),
            "seeds": len(done),
            "status": ", ".join(
                f"{n} {s}" if len(statuses) > 1 else s for s, n in sorted(statuses.items())
            ),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(subject(histories))


def final_accuracies(histories: Sequence[History]):
    """Every seed's test accuracy after the last epoch, and its mean with the interval at 95 %.

    Beside each method stands the interval of its rank, if there are seeds enough to have one.
    """
    scores, table = statistics.finals(histories), statistics.ranks(histories)
    figure = go.Figure()
    for name, row in table.iterrows():
        colour, label = look(name)[0], methods.label(name)
        of_seeds = scores[name][np.isfinite(scores[name])]
        figure.add_scatter(
            x=of_seeds, y=[label] * len(of_seeds), mode="markers", showlegend=False,
            marker={"color": colour, "symbol": "circle-open", "size": 8}, text=of_seeds.index,
            hovertemplate="seed %{text}: %{x:.4f}<extra>" + label + "</extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=[row["mean"]], y=[label], mode="markers", showlegend=False,
            marker={"color": colour, "symbol": "line-ns-open", "size": 18},
            error_x={"symmetric": False, "array": [row["to"] - row["mean"]],
                     "arrayminus": [row["mean"] - row["from"]], "thickness": 2},
            hovertemplate="mean %{x:.4f}<extra>" + label + "</extra>",
        )  # fmt: skip
        figure.add_annotation(
            x=1.01, xref="paper", xanchor="left", y=label, showarrow=False, text=_rank(row)
        )
    figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True)
    figure.update_xaxes(title_text="test accuracy after the last epoch")
    title = f"Final accuracy by seed, mean and 95 % interval, {subject(histories)}"
    return apply_style(figure, title).update_layout(margin={"l": 120, "r": 120})


def _rank(row: pd.Series) -> str:
    failed = f"<br>{row['diverged']:.0f} diverged" if row["diverged"] else ""
    if np.isnan(row["rank from"]):
        return f"rank {row['rank']:.0f}{failed}"
    low, high = int(row["rank from"]), int(row["rank to"])
    return f"rank {low}{failed}" if low == high else f"rank {low} to {high}{failed}"


def seconds_table(histories: Sequence[History]) -> pd.DataFrame:
    """Seconds per epoch of every method, and its ratio to SGD beside the report's."""
    named, report, rows = subject(histories), paper("runs")["seconds_per_epoch"], {}
    for name, group in group_by_method(histories).items():
        rows_ = [row for h in group for row in (h.rows[1:] or h.rows)]
        rows[name] = {
            "train seconds": pd.Series([row["train_seconds"] for row in rows_]).median(),
            "test seconds": pd.Series([row["test_seconds"] for row in rows_]).median(),
            "report's ratio": report.get(name, float("nan")) / report["sgd"],
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    total = table["train seconds"] + table["test seconds"]
    table.insert(2, "ratio to SGD", total / total.get("sgd", float("nan")))
    return table.rename(index=lambda name: methods.label(name)).rename_axis(named)


def show(figure) -> None:
    """Show a figure in a notebook; without a front end, also as an image for static readers."""
    from IPython.display import display  # imported where used: figures exist outside notebooks
    from PIL import Image

    if is_interactive():
        figure.show()
        return
    still = without_hidden(figure).update_layout(width=900)
    bundle = {"application/vnd.plotly.v1+json": json.loads(_light(still).to_json())}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # plotly's, of options it does not pass on
            image = Image.open(io.BytesIO(still.to_image("png"))).quantize(64)
        _start_browser()  # after one has drawn: without any, starting one would wait for ever
    except Exception:  # kaleido draws with an installed Chrome or Chromium; there may be none
        bundle["text/html"] = still.to_html(full_html=False, include_plotlyjs="cdn")
    else:
        small = io.BytesIO()
        image.save(small, "png", optimize=True)
        bundle["image/png"] = base64.b64encode(small.getvalue()).decode("ascii")
    display(bundle, raw=True)


def without_hidden(figure) -> go.Figure:
    """A copy for where nobody can click: what waits for a click in the legend is left out."""
    return go.Figure([t for t in figure.data if t.visible != "legendonly"], figure.layout)


def _light(figure: go.Figure) -> go.Figure:
    """The figure in few bytes: plain lines of at most 60 points, coordinates in single precision.

    An executed notebook holds it beside the image, which shows every point.
    """
    light = go.Figure(figure)
    for line in light.select_traces({"type": "scatter"}):
        if line.x is None or not len(line.x):
            continue
        n = len(line.x) if line.mode == "lines" and line.customdata is None else 0
        kept = np.linspace(0, n - 1, 60).round().astype(int) if n > 60 else slice(None)
        for axis in ("x", "y"):
            values = np.asarray(line[axis])[kept]
            if values.dtype.kind not in "iuf":
                continue  # names, on an axis of categories
            line[axis] = None  # an equal tuple would stay, and be written number by number
            if values.dtype.kind in "iu":
                line[axis] = values.astype(np.int16 if np.abs(values).max() < 2**15 else np.int32)
            else:
                line[axis] = values.astype(np.float32)
    return light


@functools.cache
def _start_browser() -> None:
    """One browser for all further images: starting one takes ten times as long as drawing."""
    import kaleido

    kaleido.start_sync_server(silence_warnings=True)


def is_interactive() -> bool:
    """Whether a person may be looking: false under papermill and nbconvert, and without IPython."""
    from IPython import get_ipython

    shell = get_ipython()
    asks = getattr(getattr(shell, "kernel", None), "_allow_stdin", True)
    # Voilà asks nothing either, but has somebody looking; it says so in the environment.
    return shell is not None and (asks or "voila" in os.environ.get("SERVER_SOFTWARE", "").lower())


def subject(histories: Sequence[History]) -> str:
    """The data set's name, for titles.

    Raises:
        ValueError: for no history, or for histories of several data sets.
    """
    titles = sorted({h.dataset for h in histories})
    if not titles:
        raise ValueError("no history to show")
    if len(titles) > 1:
        raise ValueError(
            f"histories of several data sets ({', '.join(titles)}): show one at a time"
        )
    return titles[0]


def _add_lines(figure, name, group, column, row=None, col=None, legend=True) -> None:
    done = [h.frame()[column] for h in group if h.rows]
    if not done:
        return
    colour, dash = look(name)
    seeds = pd.concat(done, axis=1)
    mean, label = seeds.mean(axis=1), group[0].label
    where = {} if row is None else {"row": row, "col": col}
    if len(done) > 1:
        figure.add_scatter(
            x=[*mean.index, *mean.index[::-1]],
            y=[*seeds.max(axis=1), *seeds.min(axis=1)[::-1]],
            fill="toself", fillcolor=colour, opacity=0.15, line={"width": 0}, mode="lines",
            legendgroup=name, showlegend=False, hoverinfo="skip", **where,
        )  # fmt: skip
    figure.add_scatter(
        x=mean.index, y=mean, mode="lines" if len(mean) > 1 else "markers", name=label,
        line={"color": colour, "dash": dash, "width": 2}, legendgroup=name, showlegend=legend,
        hovertemplate="epoch %{x}: %{y:.4f}<extra>" + label + "</extra>", **where,
    )  # fmt: skip


def _add_report(figure, histories: Sequence[History], **where) -> None:
    """The report's test accuracies on CIFAR-10, where ``histories`` are of the same data set."""
    titles = {h.dataset.partition(",")[0].partition(" (")[0] for h in histories}
    if titles != {"CIFAR-10"}:  # as it is, as the JPEG copy, or of published runs
        return
    points = dict(list(paper("milestones").groupby("optimizer")))
    found = {name: group[0] for name, group in group_by_method(histories).items() if name in points}
    same = all(h.experiment.epochs == EXPERIMENTS[name].epochs for name, h in found.items())
    for i, (name, h) in enumerate(found.items()):
        shrunk = h.experiment.epochs / EXPERIMENTS[name].epochs
        colour, dash = look(name)
        figure.add_scatter(
            x=points[name]["epoch"] * shrunk, y=points[name]["test_accuracy"], mode="markers",
            name="report (CIFAR-10)" if same else "report (CIFAR-10),<br>epochs in proportion",
            marker={"color": colour, "symbol": MARKERS[dash], "size": 7}, legendgroup="report",
            showlegend=i == 0, visible=True if same else "legendonly",
            hovertemplate=f"epoch %{{x}}: %{{y}}<extra>report, {h.label}</extra>", **where,
        )  # fmt: skip


def _epoch_axis(figure, histories: Sequence[History], **where) -> None:
    longest = max((len(h.rows) for h in histories), default=0)
    figure.update_xaxes(title_text="epoch", **where)
    figure.update_xaxes(dtick=1 if longest <= 12 else None)  # no ticks at fractions of an epoch


def apply_style(figure, title: str, height: int = 460):
    """The house style: a title, margins, colours that work on light and on dark pages."""
    figure.update_layout(
        title={"text": title, "x": 0, "xref": "paper", "font": {"size": 16}},
        template="none",  # plotly's own would add 7 KB to each figure of a notebook
        height=height,
        margin={"l": 70, "r": 20, "t": 60, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#767676", "size": 13},
        legend={"itemwidth": 40},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#767676", "activecolor": BLUE},
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False)
    figure.update_yaxes(gridcolor=GRID, zeroline=False)
    return figure


def lines(
    series: Mapping[str, pd.Series], title: str, x: str, y: str, shape: str = "linear",
    level: float | None = None,
):  # fmt: skip
    """One line per series, over its index.

    Args:
        series: by name; a method has its own colour, dash and label.
        title, x, y: of the figure and its axes; the title names the data set, if there is one.
        shape: "linear", or "hv" for values that hold until the next.
        level: a height to compare with, a dotted line.
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
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return apply_style(figure, title).update_layout(legend_itemwidth=60)
