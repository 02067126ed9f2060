"""Figures say what they show and tables compute what they say, whatever state the runs are in."""

import base64
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from hybrid_lib.optim import methods
from hybrid_lib.study import figures
from hybrid_lib.training.experiments import EXPERIMENTS
from hybrid_lib.training.history import History

COLUMNS = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")


def history(name="sgd", seed=0, epochs=3, dataset="Some images", status="complete", **columns):
    """A history whose columns are lists, or made up."""
    rows = []
    for i in range(epochs):
        made_up = {c: 0.1 * (seed + 1) + 0.01 * i for c in (*COLUMNS, "train_seconds")}
        row = {"epoch": i + 1, "lr": 0.1, "lambdas": (1.0,), "test_seconds": 0.25, **made_up}
        rows.append(row | {c: values[i] for c, values in columns.items()})
    experiment = EXPERIMENTS.get(name) or replace(EXPERIMENTS["sgd"], name=name)
    environment = {"dataset": dataset, "device_name": "abacus"}
    return History(replace(experiment, seed=seed), rows, environment, status)


FIGURES = {
    "curves": figures.curves,
    "curves of the loss": lambda runs: figures.curves(runs, "train_loss", "Loss"),
    "panels": figures.panels,
    "final_accuracies": figures.final_accuracies,
    "epoch_seconds": figures.epoch_seconds,
    "step_parts": lambda runs: figures.step_parts(
        {h.experiment.name: dict.fromkeys(("gradient", "Hessian", "step", "evaluation"), 0.1)
         for h in runs}, figures.subject(runs)),
    "schedules": lambda runs: figures.schedules(
        replace(h.experiment, dataset="folder:Some images") for h in runs),
}  # fmt: skip
TABLES = {"accuracy_table": figures.accuracy_table, "seconds_table": figures.seconds_table}
every_figure = pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
every_output = pytest.mark.parametrize(
    "make", [*FIGURES.values(), *TABLES.values()], ids=[*FIGURES, *TABLES]
)
of_histories = pytest.mark.parametrize(
    "make", [FIGURES["curves"], figures.panels, figures.epoch_seconds, *TABLES.values()]
)
ALL = [history(name, seed) for name, seed in product(EXPERIMENTS, (0, 1))]


# --- What every figure has. ---


@every_figure
def test_the_title_names_the_data_set(make):
    assert "Some images" in make(ALL).layout.title.text


@every_figure
def test_axes_have_titles_with_units(make):
    figure = make(ALL)
    titles = {a.title.text for a in [*figure.select_xaxes(), *figure.select_yaxes()]} - {None}
    unitless = {"epoch", "train accuracy", "test accuracy", "learning rate η", "weight λ of SGD",
                "test accuracy after the last epoch"}  # fmt: skip
    assert all(t in unitless or "nats" in t or "seconds per" in t for t in titles), titles
    bars = any(isinstance(t.y[0], str) for t in figure.data if len(t.y))  # they name the methods
    assert any(a.title.text for a in figure.select_xaxes())
    assert bars or all(a.title.text or a.matches for a in figure.select_yaxes())


@every_figure
def test_it_is_drawn_for_light_and_dark_pages(make):
    layout = make(ALL).layout
    assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0,0,0,0)"


@pytest.mark.parametrize("make", [figures.curves, figures.panels, FIGURES["schedules"]])
def test_every_method_has_a_look_of_its_own(make):
    looks = {}
    for trace in make(ALL).data:
        if trace.fill is None:
            looks.setdefault(trace.name, set()).add((trace.line.color, trace.line.dash))
    assert len(looks) == 9
    assert all(len(of_one) == 1 for of_one in looks.values()), "the same in every panel"
    assert len(set.union(*looks.values())) == 9


def test_methods_of_one_s_own_can_be_told_apart():
    data = figures.curves([history("mine"), history("yours"), history("sgd")]).data
    assert len({(trace.line.color, trace.line.dash) for trace in data}) == 3


@pytest.mark.parametrize(
    "colour", sorted({colour for colour, _ in (methods.look(name) for name in methods.METHODS)})
)
def test_colours_stand_out_from_white(colour):
    """Contrast of at least 3:1, by the formula of the Web Content Accessibility Guidelines."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear))
    assert 1.05 / (luminance + 0.05) >= 2.95


# --- Runs of every state. ---


@of_histories
def test_several_data_sets_are_refused_by_name(make):
    with pytest.raises(ValueError, match=r"several data sets \(CIFAR-10, Some images\)"):
        make([history(), history("adam", dataset="CIFAR-10")])


@of_histories
def test_no_history_is_refused(make):
    with pytest.raises(ValueError, match="no history"):
        make([])


@every_output
@pytest.mark.parametrize(
    "runs",
    [
        [history(epochs=1)],
        [history(epochs=0, status="diverged")],
        [history(epochs=0, status="diverged"), history("adam")],
        [history("adam", epochs=0, status="diverged"), history("adam", seed=1)],
        [history("adam"), history("adam", seed=1, epochs=1, status="stopped")],
        [history("my-own")],
    ],
    ids=["one epoch", "none", "one failed", "one seed failed", "one stopped", "own name"],
)
def test_runs_of_any_state_can_be_shown(make, runs):
    shown = make(runs)
    if isinstance(shown, go.Figure):
        assert shown.to_json()
        assert "null" not in shown.layout.title.text
    else:
        assert len(shown) == len({h.experiment.name for h in runs})


def test_one_epoch_is_a_point_not_an_invisible_line():
    assert [trace.mode for trace in figures.curves([history(epochs=1)]).data] == ["markers"]


# --- What the figures draw. ---


def test_curves_are_means_with_bands_from_lowest_to_highest():
    runs = [
        history("adam", 0, test_accuracy=[0.1, 0.5, 0.9]),
        history("adam", 1, test_accuracy=[0.3, 0.4, 0.8]),
        history("sgd", test_accuracy=[0.2, 0.2, 0.3]),
    ]
    sgd, band, adam = figures.curves(runs).data
    assert (sgd.name, adam.name) == ("SGD", "Adam"), "the report's order"
    assert list(adam.x) == [1, 2, 3]
    assert list(adam.y) == pytest.approx([0.2, 0.45, 0.85])
    assert list(band.x) == [1, 2, 3, 3, 2, 1]
    assert list(band.y) == [0.3, 0.5, 0.9, 0.8, 0.4, 0.1]
    assert list(sgd.y) == [0.2, 0.2, 0.3]


def test_the_four_panels_show_their_own_columns_and_one_legend():
    values = {column: [i + 0.1, i + 0.2, i + 0.3] for i, column in enumerate(COLUMNS)}
    figure = figures.panels([history(**values)])
    shown = {figure.layout[f"yaxis{trace.yaxis[1:]}"].title.text: trace for trace in figure.data}
    for column in COLUMNS:
        assert list(shown[figures.AXES[column]].y) == values[column]
    assert [trace.showlegend for trace in figure.data].count(True) == 1


@pytest.mark.parametrize("make", [figures.curves, figures.panels])
def test_the_report_s_accuracies_are_marked_on_cifar10(make):
    copy = "CIFAR-10 (JPEG copy)"
    full = [history(name, dataset=copy) for name in ("sgd", "adahessian")]
    sgd, adahessian = [t for t in make(full).data if t.legendgroup == "report"]
    assert (sgd.visible, sgd.showlegend, adahessian.showlegend) == (True, True, False)
    assert dict(zip(sgd.x, sgd.y))[350] == 0.8539
    assert dict(zip(adahessian.x, adahessian.y))[160] == 0.8372
    assert figures.without_hidden(make(full)) == make(full)

    tenth = [History(h.experiment.scaled(h.experiment.epochs // 10), h.rows, h.environment)
             for h in full]  # fmt: skip
    sgd, adahessian = [t for t in make(tenth).data if t.legendgroup == "report"]
    assert (sgd.x[-1], sgd.visible, adahessian.visible) == (35, "legendonly", "legendonly")
    assert "in proportion" in sgd.name
    assert not [t for t in figures.without_hidden(make(tenth)).data if t.legendgroup == "report"]

    named = [history("sgd", dataset=f"{name}, published runs") for name in (copy, "CIFAR-10")]
    assert all("report" in [t.legendgroup for t in make([h]).data] for h in named)
    for other in ("Some images", "CIFAR-100"):
        figure = make([history(dataset=other)])
        assert not [t for t in figure.data if t.legendgroup == "report"]
    assert not [t for t in figures.curves(full, "test_loss").data if t.legendgroup == "report"]


def test_the_seconds_are_medians_without_the_first_epoch():
    runs = [
        history("sgd", train_seconds=[9, 1, 3], test_seconds=[9, 1, 1]),
        history("adahessian", train_seconds=[9, 7, 9], test_seconds=[9, 2, 2]),
    ]
    figure = figures.epoch_seconds(runs)
    train, test = figure.data
    assert list(train.y) == ["SGD", "AdaHessian"]
    assert list(train.x) == [2, 8]
    assert list(test.x) == [1, 2]
    texts = [a.text.strip() for a in figure.layout.annotations]
    assert texts == ["1.0 × SGD, report: 1.0 ×", "3.3 × SGD, report: 3.7 ×"]
    assert "abacus" in figure.layout.title.text


def test_the_parts_of_a_step_are_milliseconds():
    seconds = {"gradient": 0.010, "Hessian": 0.020, "step": 0.003, "evaluation": 0.004}
    figure = figures.step_parts({"adasgd": seconds}, "Some images, abacus")
    assert {trace.name: trace.x[0] for trace in figure.data} == pytest.approx(
        {"gradient": 10, "Hessian": 20, "step": 3, "evaluation": 4}
    )
    assert list(figure.data[0].y) == ["AdaSGD"]


def test_schedules_are_the_experiment_s_own():
    e = EXPERIMENTS["dyn_padam_sgd"].scaled(8)
    rates, weights = figures.schedules([e]).data
    assert list(rates.x) == list(range(1, 9))
    assert list(rates.y) == e.learning_rates()
    assert list(weights.y) == [e.lambdas()(epoch)[1] for epoch in range(8)]
    of_one_rule = figures.schedules([EXPERIMENTS["sgd"], EXPERIMENTS["adam"]]).data
    assert {trace.y[0] for trace in of_one_rule if trace.yaxis in ("y3", "y4")} == {1.0, 0.0}


def test_every_seed_is_a_point_beside_the_mean_and_a_failed_one_is_named():
    runs = [history("adam", i, test_accuracy=[0, 0, a]) for i, a in enumerate((0.5, 0.7, 0.9))]
    runs += [history("sgd", i, test_accuracy=[0, 0, 0.3]) for i in range(2)]
    runs += [history("sgd", 2, epochs=1, status="diverged")]
    figure = figures.final_accuracies(runs)
    seeds, mean, of_sgd, _ = figure.data
    assert (list(seeds.x), seeds.y[0]) == ([0.5, 0.7, 0.9], "Adam")
    assert mean.x[0] == pytest.approx(0.7)
    assert mean.error_x.array[0] > 0 < mean.error_x.arrayminus[0]
    assert list(of_sgd.x) == [0.3, 0.3]
    assert [a.text for a in figure.layout.annotations] == ["rank 1", "rank 2<br>1 diverged"]


# --- Tables, against sums done by hand. ---


def test_the_report_s_tables_are_read():
    assert figures.paper("table3")["test_accuracy"]["padam_sgd"] == 0.8997
    assert figures.paper("runs")["seconds_per_epoch"]["adasgd"] == 148.4
    assert set(figures.paper("milestones")["optimizer"]) == set(EXPERIMENTS) - {"padam"}


def test_the_accuracy_table_by_hand():
    long = [0.5 + 0.01 * i for i in range(12)]
    runs = [
        history("adam", 0, 12, test_accuracy=long),
        history("adam", 1, 12, test_accuracy=[0.9, *long[1:]]),
        history("sgd", 0, 2, status="stopped", test_accuracy=[0.7, 0.6]),
        history("padam", 0, 2, test_accuracy=[0.1, 0.2]),
        history("atmo", 0, 0, status="diverged"),
    ]
    table = figures.accuracy_table(runs)
    assert list(table.index) == ["SGD", "Adam", "ATMO", "Padam"]
    assert table.index.name == "Some images"
    adam, sgd, atmo = table.loc["Adam"], table.loc["SGD"], table.loc["ATMO"]
    assert adam["report (CIFAR-10)"] == 0.8370
    assert adam["final"] == pytest.approx(0.61)
    assert adam["± final"] == 0
    assert adam["mean of last 10"] == pytest.approx(statistics.mean(long[2:]))
    assert adam["best"] == pytest.approx((0.61 + 0.9) / 2)
    assert (adam["epochs"], adam["seeds"], adam["status"]) == (12, 2, "complete")
    assert (sgd["final"], sgd["best"], sgd["status"]) == (0.6, 0.7, "stopped")
    assert sgd["mean of last 10"] == pytest.approx(0.65)
    assert math.isnan(sgd["± final"]), "one seed has no deviation"
    assert math.isnan(atmo["final"])
    assert (atmo["epochs"], atmo["seeds"], atmo["status"]) == (0, 0, "diverged")
    assert pd.isna(table.loc["Padam", "report (CIFAR-10)"]), "not in the report"


def test_means_are_over_complete_runs():
    runs = [history("sgd", i, 2, test_accuracy=[0.5, 0.9]) for i in range(2)]
    runs += [history("sgd", 2, 1, status="diverged", test_accuracy=[0.1])]
    runs += [history("sgd", 3, 1, status="running", test_accuracy=[0.2])]
    row = figures.accuracy_table(runs).loc["SGD"]
    assert (row["final"], row["best"], row["seeds"], row["epochs"]) == (0.9, 0.9, 2, 2)
    assert row["mean of last 10"] == pytest.approx(0.7)
    assert row["status"] == "2 complete, 1 diverged, 1 running"


def test_the_deviation_is_over_seeds():
    finals = [0.5, 0.6, 0.8]
    runs = [history("sgd", i, 1, test_accuracy=[a]) for i, a in enumerate(finals)]
    row = figures.accuracy_table(runs).loc["SGD"]
    assert row["final"] == pytest.approx(statistics.mean(finals))
    assert row["± final"] == pytest.approx(statistics.stdev(finals))


def test_the_seconds_table_by_hand():
    runs = [
        history("adasgd", train_seconds=[9, 7, 9], test_seconds=[9, 2, 2]),
        history("sgd", 0, train_seconds=[9, 1, 3], test_seconds=[9, 1, 1]),
        history("sgd", 1, train_seconds=[9, 5, 5], test_seconds=[9, 1, 1]),
    ]
    table = figures.seconds_table(runs)
    assert list(table.index) == ["SGD", "AdaSGD"]
    assert table["train seconds"].tolist() == [4, 8]  # of 1, 3, 5, 5 and of 7, 9
    assert table["test seconds"].tolist() == [1, 2]
    assert table["ratio to SGD"].tolist() == [1, 2]
    assert table["report's ratio"].tolist() == pytest.approx([1, 148.4 / 40.4])


def test_without_sgd_there_is_no_ratio():
    table = figures.seconds_table([history("adam")])
    assert table["ratio to SGD"].isna().all()
    assert table["report's ratio"].tolist() == [1]


# --- Shown in notebooks. ---


@pytest.fixture
def displayed(monkeypatch):
    """What show() hands to IPython; no browser is started."""
    bundles = []
    monkeypatch.setattr(figures, "_start_browser", lambda: None, raising=False)
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def test_without_a_reader_the_figure_comes_with_a_static_twin(displayed, monkeypatch):
    from io import BytesIO

    from PIL import Image

    drawn = BytesIO()
    Image.new("RGB", (900, 460), "white").save(drawn, "png")
    monkeypatch.setattr(go.Figure, "to_image", lambda self, form: drawn.getvalue())
    figures.show(figures.curves([history()]))
    (bundle,) = displayed
    assert set(bundle) == {"application/vnd.plotly.v1+json", "image/png"}


@pytest.mark.parametrize("n", [350, 20])
def test_what_a_notebook_keeps_is_light_and_as_drawn(displayed, monkeypatch, n):
    monkeypatch.setattr(go.Figure, "to_image", lambda self, form: 1 / 0)
    rising = [[i / n + seed for i in range(n)] for seed in (0, 1)]
    figure = figures.curves([history("sgd", s, n, test_accuracy=a) for s, a in enumerate(rising)])
    figures.show(figure)
    kept = displayed[0]["application/vnd.plotly.v1+json"]
    assert len(json.dumps(kept)) < 4000
    for thick, thin in zip(figure.data, kept["data"], strict=True):  # the band, then the mean
        drawn = {x: [b for a, b in zip(thick.x, thick.y) if a == x] for x in thick.x}
        points = [*zip(decoded(thin["x"]), decoded(thin["y"]))]
        assert len(points) == min(len(thick.x), 60)
        assert (points[0][0], points[-1][0]) == (thick.x[0], thick.x[-1])
        assert all(any(y == pytest.approx(b, abs=1e-6) for b in drawn[x]) for x, y in points)
    assert len(figure.data[1].x) == n, "the figure itself is as it was"


def decoded(values: dict) -> list:
    """Coordinates as plotly writes them: bytes and their type."""
    return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()


def test_what_a_notebook_keeps_has_its_names(displayed, monkeypatch):
    """On an axis of categories: figures of ranks have the methods there."""
    monkeypatch.setattr(go.Figure, "to_image", lambda *_, **__: 1 / 0)
    figure = go.Figure(go.Scatter(x=[0.5, 0.25], y=["ATMO", "SGD"], mode="markers"))
    figures.show(figure)
    (bundle,) = displayed
    (kept,) = bundle["application/vnd.plotly.v1+json"]["data"]
    assert kept["y"] == ["ATMO", "SGD"]


def test_without_a_chromium_there_is_a_page_instead_of_an_image(displayed, monkeypatch):
    def fails(self, form):
        raise RuntimeError("no Chrome here")

    monkeypatch.setattr(go.Figure, "to_image", fails)
    figures.show(figures.curves([history()]))
    (bundle,) = displayed
    assert set(bundle) == {"application/vnd.plotly.v1+json", "text/html"}


NO_BROWSER = """
import plotly.graph_objects as go
import IPython.display
from hybrid_lib.study import figures
IPython.display.display = lambda bundle, raw: print(*sorted(bundle))
figures.show(go.Figure())
"""


def test_where_no_browser_starts_nothing_waits_for_one():
    done = subprocess.run(
        [sys.executable, "-c", NO_BROWSER], capture_output=True, text=True, timeout=60,
        env={**os.environ, "BROWSER_PATH": os.devnull},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["application/vnd.plotly.v1+json", "text/html"]


def test_a_reader_gets_the_figure_itself(displayed, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "is_interactive", lambda: True)
    monkeypatch.setattr(go.Figure, "show", lambda self: shown.append(self))
    figure = figures.curves([history()])
    figures.show(figure)
    assert shown == [figure]
    assert displayed == []


def test_lines_have_their_methods_looks_and_others_one_each():
    names = ["atmo", "dyn_atmo", *"abcdef"]
    figure = figures.lines({n: pd.Series([1.0, 2.0]) for n in names}, "title", "x", "y", level=1.5)
    looks = [(line.line.color, line.line.dash) for line in figure.data]
    assert looks[:2] == [methods.look("atmo"), methods.look("dyn_atmo")]
    assert len(set(looks[2:])) == 6
    assert [line.name for line in figure.data][:3] == ["ATMO", "Dyn. ATMO", "a"]
    assert [shape.y0 for shape in figure.layout.shapes] == [1.5]
