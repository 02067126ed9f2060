"""Figures and tables show the right numbers and labels, whatever state the runs are in."""

import base64
import io
import json
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
from PIL import Image

from hybrid_lib.optim import methods
from hybrid_lib.study import figures, tables
from hybrid_lib.training.experiments import EXPERIMENTS, get_experiment
from hybrid_lib.training.history import History

COLUMNS = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")


def history(name="sgd", seed=0, epochs=3, dataset="Some images", status="complete", **columns):
    """A history with the given columns; the others are made up."""
    rows = []
    for i in range(epochs):
        made_up = {c: 0.1 * (seed + 1) + 0.01 * i for c in (*COLUMNS, "train_seconds")}
        row = {"epoch": i + 1, "lr": 0.1, "lambdas": (1.0,), "test_seconds": 0.25, **made_up}
        rows.append(row | {c: values[i] for c, values in columns.items()})
    experiment = EXPERIMENTS.get(name) or replace(EXPERIMENTS["sgd"], name=name)
    environment = {"dataset": dataset, "device_name": "abacus"}
    return History(replace(experiment, seed=seed), rows, environment, status)


def schedules(runs):
    return figures.schedules(replace(h.experiment, dataset="folder:Some images") for h in runs)


def loss(runs):
    return figures.curves(runs, "train_loss", "Loss")


OF_EPOCHS = [figures.curves, loss, figures.panels]
FIGURES = [*OF_EPOCHS, figures.epoch_seconds, schedules]
TABLES = [tables.accuracies, tables.seconds]
ALL = [history(name, seed) for name, seed in product(EXPERIMENTS, (0, 1))]


def any_of(functions):
    return pytest.mark.parametrize("make", functions, ids=lambda make: make.__name__)


# --- What every figure has. ---


@any_of(FIGURES)
def test_every_figure_names_its_data_set_and_axes_with_units_and_is_transparent(make):
    figure = make(ALL)
    assert "Some images" in figure.layout.title.text
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    titles = {a.title.text for a in [*figure.select_xaxes(), *figure.select_yaxes()]} - {None}
    unitless = {"epoch", "train accuracy", "test accuracy", "learning rate η", "weight λ of SGD"}
    assert all(t in unitless or "nats" in t or "seconds per" in t for t in titles), titles
    bars = any(isinstance(t.y[0], str) for t in figure.data if len(t.y))  # they name the methods
    assert any(a.title.text for a in figure.select_xaxes())
    assert bars or all(a.title.text or a.matches for a in figure.select_yaxes())


@any_of([figures.curves, figures.panels, schedules])
def test_every_method_has_its_own_look(make):
    looks = {}
    for trace in make(ALL).data:
        if trace.fill is None:
            looks.setdefault(trace.name, set()).add((trace.line.color, trace.line.dash))
    assert len(looks) == 9
    assert all(len(look) == 1 for look in looks.values()), "the same in every panel"
    assert len(set.union(*looks.values())) == 9
    own = make([history("mine"), history("yours"), history("sgd")]).data
    assert len({(trace.line.color, trace.line.dash) for trace in own}) == 3


# --- Runs of every state. ---


@any_of([figures.curves, figures.panels, figures.epoch_seconds, *TABLES])
def test_no_history_and_several_data_sets_are_refused(make):
    with pytest.raises(ValueError, match=r"several data sets \(CIFAR-10, Some images\)"):
        make([history(), history("adam", dataset="CIFAR-10")])
    with pytest.raises(ValueError, match="no history"):
        make([])


@any_of([*FIGURES, *TABLES])
@pytest.mark.parametrize(
    "runs",
    [[history(epochs=1)], [history(epochs=0, status="diverged")],
     [history(epochs=0, status="diverged"), history("adam")],
     [history("adam", epochs=0, status="diverged"), history("adam", seed=1)],
     [history("adam"), history("adam", seed=1, epochs=1, status="stopped")], [history("my-own")]],
    ids=["one epoch", "none", "one failed", "one seed failed", "one stopped", "own name"],
)  # fmt: skip
def test_runs_of_any_state_can_be_shown(make, runs):
    shown = make(runs)
    if isinstance(shown, go.Figure):
        assert shown.to_json()
        assert "null" not in shown.layout.title.text
    else:
        assert len(shown) == len({h.experiment.name for h in runs})


# --- What the figures draw. ---


def test_curves_are_means_with_bands_of_student_s_interval():
    runs = [
        history("adam", 0, test_accuracy=[0.1, 0.5, 0.9]),
        history("adam", 1, test_accuracy=[0.3, 0.4, 0.8]),
        history("adam", 2, epochs=2, status="stopped", test_accuracy=[0.2, 0.6]),
        history("adam", 3, epochs=1, status="stopped", test_accuracy=[0.2]),
        history("sgd", test_accuracy=[0.2, 0.2, 0.3]),
    ]
    sgd, band, adam = figures.curves(runs).data
    assert (sgd.name, adam.name) == ("SGD", "Adam"), "the report's order"
    assert list(adam.x) == [1, 2, 3]
    assert list(adam.y) == pytest.approx([0.2, 0.5, 0.85])
    assert list(band.x) == [1, 2, 3, 3, 2, 1]
    t, deviations, n = (3.182, 4.303, 12.706), (0.0816497, 0.1, 0.0707107), (4, 3, 2)
    half = [a * b / c**0.5 for a, b, c in zip(t, deviations, n)]
    above = [a + b for a, b in zip(adam.y, half)]
    below = [a - b for a, b in zip(adam.y, half)]
    assert list(band.y) == pytest.approx([*above, *below[::-1]], rel=1e-3)
    assert list(sgd.y) == [0.2, 0.2, 0.3]
    caption = figures.curves(runs).layout.title.subtitle.text
    assert caption.endswith("1 or 4 seeds; incomplete runs: 2")
    unsteady = [history("adam", seed, train_loss=[x] * 3) for seed, x in enumerate((0.1, 1))]
    assert min(figures.curves(unsteady, "train_loss").data[0].y) > 0, "for a logarithmic axis"
    clip = figures.curves(runs).layout.yaxis.autorangeoptions
    assert clip.clipmin < 0.1 < 0.9 < clip.clipmax < 1, "the panel fits the runs"


def test_the_four_panels_show_their_own_columns_and_one_legend():
    values = {column: [i + 0.1, i + 0.2, i + 0.3] for i, column in enumerate(COLUMNS)}
    figure = figures.panels([history(**values)])
    shown = {figure.layout[f"yaxis{trace.yaxis[1:]}"].title.text: trace for trace in figure.data}
    for column in COLUMNS:
        assert list(shown[figures.AXES[column]].y) == values[column]
    assert [trace.showlegend for trace in figure.data].count(True) == 1
    assert [axis.type for axis in figure.select_yaxes()] == ["log", "log", None, None]
    modes = [trace.mode for trace in figures.panels([history(epochs=1)]).data]
    assert modes == ["markers"] * 4, "one epoch is a point, not an invisible line"


@any_of([figures.curves, figures.panels])
def test_the_report_s_accuracies_are_marked_on_cifar10(make):
    def marks(runs):
        return [t for t in runs if t.legendgroup == "report"]

    copy = "CIFAR-10 (JPEG copy)"
    full = [history(name, dataset=copy) for name in ("sgd", "adahessian")]
    sgd, adahessian = marks(make(full).data)
    assert (sgd.showlegend, adahessian.showlegend) == (True, False)
    assert dict(zip(sgd.x, sgd.y))[350] == 0.8539
    assert dict(zip(adahessian.x, adahessian.y))[160] == 0.8372
    shorter = [History(h.experiment.scaled(9), h.rows, h.environment) for h in full]
    assert not marks(make(shorter).data), "only at the report's length"
    for name, marked in ((copy, True), ("CIFAR-10", True), ("CIFAR-100", False), ("X", False)):
        h = history(dataset=name)
        h.environment["published"] = True
        assert bool(marks(make([h]).data)) == marked
        assert f"{name}, published runs" in make([h]).layout.title.text
    assert not marks(figures.curves(full, "test_loss").data)


def test_the_seconds_are_medians_without_the_first_epoch():
    runs = [
        history("sgd", train_seconds=[9, 1, 3], test_seconds=[9, 1, 1]),
        history("adahessian", train_seconds=[9, 7, 9], test_seconds=[9, 2, 2]),
    ]
    figure = figures.epoch_seconds([*runs, history("my-own")])
    train, test = figure.data
    assert list(train.y) == ["SGD", "AdaHessian", "my-own"]
    assert list(train.x)[:2] == [2, 8]
    assert list(test.x)[:2] == [1, 2]
    assert list(test.text)[:2] == ["1.0 × SGD, report: 1.0 ×", "3.3 × SGD, report: 3.7 ×"]
    assert test.text[2] == "0.1 × SGD", "the report has no such method"
    assert "abacus" in figure.layout.title.text


def test_the_figure_of_schedules_shows_those_of_the_experiment():
    e = EXPERIMENTS["dyn_padam_sgd"].scaled(8)
    rates, weights = figures.schedules([e]).data
    assert list(rates.x) == list(range(1, 9))
    assert list(rates.y) == e.learning_rates()
    assert list(weights.y) == [e.lambdas()(epoch)[1] for epoch in range(8)]
    fast = figures.schedules([replace(e, lr=20.0)])
    assert 10 ** fast.layout.yaxis.range[1] > 20, "no line is cut off"
    without_hybrids = figures.schedules([EXPERIMENTS["sgd"], EXPERIMENTS["adam"]]).data
    assert {trace.y[0] for trace in without_hybrids if trace.yaxis in ("y3", "y4")} == {1.0, 0.0}
    others = [replace(get_experiment(name), lambda_start=(0.25, 0.75), lambda_schedule="constant")
              for name in ("sgd+adam", "adam+adahessian")]  # fmt: skip
    weights = [trace.y[0] for trace in figures.schedules(others).data[1::2]]
    assert weights == [0.25, 0.0], "the weight of SGD, wherever it is"


# --- Tables, against sums done by hand. ---


def test_the_accuracy_table_by_hand():
    long = [0.5 + 0.01 * i for i in range(12)]
    runs = [
        history("adam", 0, 12, test_accuracy=[0.8, *long[1:]]),
        history("adam", 1, 12, test_accuracy=[0.9, *long[1:-1], 0.63]),
        history("adam", 2, 1, status="diverged", test_accuracy=[0.1]),
        history("adam", 3, 1, status="running", test_accuracy=[0.2]),
        history("sgd", 0, 2, status="stopped", test_accuracy=[0.7, 0.6]),
        history("padam", 0, 2, test_accuracy=[0.1, 0.2]),
        history("atmo", 0, 0, status="diverged"),
    ]
    table = tables.accuracies(runs)
    assert list(table.index) == ["SGD", "Adam", "ATMO", "Padam"]
    assert table.index.name == "Some images"
    adam, sgd, atmo = table.loc["Adam"], table.loc["SGD"], table.loc["ATMO"]
    assert adam["report (CIFAR-10)"] == 0.8370
    assert adam["final"] == pytest.approx(0.62), "of complete runs"
    assert adam["±"] == pytest.approx(12.706 * 0.01, rel=1e-3)
    assert adam["mean of last 10"] == pytest.approx(statistics.mean(long[2:]) + 0.001)
    assert adam["best"] == pytest.approx((0.8 + 0.9) / 2)
    assert (adam["epochs"], adam["seeds"]) == (12, 2)
    assert adam["status"] == "2 complete, 1 diverged, 1 running"
    assert (sgd["final"], sgd["best"], sgd["status"]) == (0.6, 0.7, "stopped")
    assert sgd["mean of last 10"] == pytest.approx(0.65)
    assert table["±"].isna().tolist() == [True, False, True, True], "one seed has no interval"
    assert atmo[["final", "best"]].isna().all()
    assert (atmo["epochs"], atmo["seeds"], atmo["status"]) == (0, 0, "diverged")
    assert pd.isna(table.loc["Padam", "report (CIFAR-10)"]), "not in the report"
    assert tables.paper("table3")["test_accuracy"]["padam_sgd"] == 0.8997
    assert set(tables.paper("milestones")["optimizer"]) == set(EXPERIMENTS) - {"padam"}


def test_the_seconds_table_by_hand():
    runs = [
        history("adasgd", train_seconds=[9, 7, 9], test_seconds=[9, 2, 2]),
        history("sgd", 0, train_seconds=[9, 1, 3], test_seconds=[9, 1, 1]),
        history("sgd", 1, train_seconds=[9, 5, 5], test_seconds=[9, 1, 1]),
    ]
    table = tables.seconds(runs)
    assert list(table.index) == ["SGD", "AdaSGD"]
    assert table["train seconds"].tolist() == [4, 8]  # medians of 1, 3, 5, 5 and of 7, 9
    assert table["test seconds"].tolist() == [1, 2]
    assert table["ratio to SGD"].tolist() == [1, 2]
    assert table["report's ratio"].tolist() == pytest.approx([1, 148.4 / 40.4])
    assert tables.seconds(runs[:1])["ratio to SGD"].isna().all(), "without SGD there is none"


# --- Shown in notebooks. ---


@pytest.fixture
def displayed(monkeypatch):
    """What show() hands to IPython; no browser is started, and drawing fails."""
    bundles = []
    monkeypatch.setattr("kaleido.start_sync_server", lambda **_: None)
    monkeypatch.setattr(go.Figure, "to_image", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def test_an_interactive_reader_gets_the_figure_and_others_a_static_twin(displayed, monkeypatch):
    figures.show(figures.curves([history()]))  # without Chromium: HTML
    drawn = io.BytesIO()
    Image.new("RGB", (900, 460), "white").save(drawn, "png")
    monkeypatch.setattr(go.Figure, "to_image", lambda self, form: drawn.getvalue())
    figures.show(figures.curves([history()]))
    twins = [bundle.keys() - {"application/vnd.plotly.v1+json"} for bundle in displayed]
    assert twins == [{"text/html"}, {"image/png"}]
    shown = []
    monkeypatch.setattr(figures, "is_interactive", lambda: True)
    monkeypatch.setattr(go.Figure, "show", lambda self: shown.append(self))
    figures.show(figures.curves([history()]))
    assert (len(shown), len(displayed)) == (1, 2)


@pytest.mark.parametrize("n", [350, 20])
def test_figures_kept_in_notebooks_are_small_and_as_drawn(displayed, n):
    rising = [[i / n + seed for i in range(n)] for seed in (0, 1)]
    figure = figures.curves([history("sgd", s, n, test_accuracy=a) for s, a in enumerate(rising)])
    figures.show(figure)
    kept = displayed[0]["application/vnd.plotly.v1+json"]
    assert len(json.dumps(kept)) < 4000
    for thick, thin in zip(figure.data, kept["data"], strict=True):  # the band, then the mean
        drawn = {x: [b for a, b in zip(thick.x, thick.y) if a == x] for x in thick.x}
        x, y = (np.frombuffer(base64.b64decode(thin[a]["bdata"]), thin[a]["dtype"]) for a in "xy")
        assert len(x) == min(len(thick.x), 60)
        assert (x[0], x[-1]) == (thick.x[0], thick.x[-1])
        assert all(min(abs(b - c) for b in drawn[a]) < 1e-5 for a, c in zip(x, y))
    assert len(figure.data[1].x) == n, "the figure itself is as it was"
    figures.show(go.Figure(go.Scatter(x=[0.5, 0.25], y=["ATMO", "SGD"], mode="markers")))
    (kept,) = displayed[1]["application/vnd.plotly.v1+json"]["data"]
    assert kept["y"] == ["ATMO", "SGD"], "names on an axis of categories are kept"
    figures.show(go.Figure(go.Scatter(y=list(range(100)), mode="lines")))
    (kept,) = displayed[2]["application/vnd.plotly.v1+json"]["data"]
    assert len(base64.b64decode(kept["y"]["bdata"])) == 2 * 100, "without x, places number points"


NO_BROWSER = """
import plotly.graph_objects as go
import IPython.display
from hybrid_lib.study import figures
IPython.display.display = lambda bundle, raw: print(*sorted(bundle))
figures.show(go.Figure())
"""


def test_without_a_browser_nothing_waits_for_one():
    done = subprocess.run(
        [sys.executable, "-c", NO_BROWSER], capture_output=True, text=True, timeout=60,
        env={**os.environ, "BROWSER_PATH": os.devnull},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["application/vnd.plotly.v1+json", "text/html"]


def test_lines_have_the_looks_of_their_methods_and_others_one_each():
    names = ["atmo", "dyn_atmo", *"abcdef"]
    figure = figures.lines({n: pd.Series([1.0, 2.0]) for n in names}, "title", "x", "y", level=1.5)
    looks = [(line.line.color, line.line.dash) for line in figure.data]
    assert looks[:2] == [methods.look("atmo"), methods.look("dyn_atmo")]
    assert len(set(looks[2:])) == 6
    assert figure.layout.shapes[0].y0 == 1.5


def test_seconds_in_another_precision_or_on_another_engine_have_no_ratio():
    runs = [history("sgd"), history("adam"), history("atmo"), history("padam")]
    for h in runs:
        h.environment["engine"] = "eager"
    runs[1].experiment = replace(runs[1].experiment, precision="bfloat16")
    runs[2].environment["engine"] = "compiled"
    missing = tables.seconds(runs)["ratio to SGD"].isna().to_dict()
    assert missing == {"SGD": False, "Adam": True, "ATMO": True, "Padam": False}
