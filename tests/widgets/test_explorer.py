"""The explorer without a browser: its widgets are set from Python, its thread trains for real."""

import dataclasses
import json
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from ipywidgets.embed import dependency_state, embed_data

import hybrid_lib as hl
from hybrid_lib.study import planning
from hybrid_lib.widgets import explorer as module
from hybrid_lib.widgets.explorer import FIELDS, METHODS, RUN, Explorer, explore

ROOT = Path(__file__).resolve().parents[2]
TINY = {"epochs": 3, "width": 2, "batch_size": 32, "train_limit": 160, "test_limit": 80}
WEIGHED = {"lambda_on", "lambda_schedule", "lambda_start", "merge"}  # settings of every hybrid


@pytest.fixture
def open_explorer(tmp_path):
    """Make explorers that keep their runs in one folder; stop those that still train."""
    opened = []

    def make(method="padam_sgd", **start):
        opened.append(Explorer(tmp_path / "runs", method, **(start or TINY)))
        return opened[-1]

    yield make
    for explorer in opened:
        explorer.stop()
        explorer.wait(60)


def press(explorer, name):
    """Press a button as a person can: not while it is disabled."""
    button = explorer.buttons[["Start", "Stop", "Reset"].index(name)]
    assert not button.disabled, f"{name} is disabled"
    button.click()


def set_to(explorer, **values):
    for field, value in values.items():
        explorer.controls[field].value = value


def train(explorer, **values):
    """Set controls, press Start and wait."""
    set_to(explorer, **values)
    press(explorer, "Start")
    explorer.wait()
    return explorer.history


def can_start(explorer):
    return not explorer.buttons[0].disabled


def drawn(explorer):
    """The runs in the figure."""
    return explorer.figure.data["runs"]


def all_widgets(view):
    """All widgets of a view."""
    return [view, *(w for child in getattr(view, "children", ()) for w in all_widgets(child))]


def cell(explorer, field):
    """The box that holds a control and the messages below it."""
    control = explorer.controls[field]
    return next(w for w in all_widgets(explorer.view) if control in getattr(w, "children", ()))


def problems(explorer):
    """The fields with a fault, which a message below the control explains."""
    faulty = {field for field, message in explorer.messages.items() if message}
    for field in explorer.controls:
        below = "".join(message.value for message in cell(explorer, field).children[1:])
        assert ('role="alert"' in below) == (field in faulty)
    return faulty


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def numbers(history):
    """The rows without their times."""
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in history.rows]


# A run: start, watch, stop, go on.


def test_a_run_from_start_to_reset(open_explorer, tmp_path):
    explorer = open_explorer()
    assert drawn(explorer) == []
    press(explorer, "Start")
    assert not can_start(explorer)  # this run is training already
    explorer.wait()
    history = explorer.history
    assert history.status == "complete"
    assert f"complete: test accuracy {history.final['test_accuracy']:.4f}" in explorer.status.value
    assert explorer.buttons[1].disabled
    assert can_start(explorer)
    (run,) = drawn(explorer)
    assert run["epoch"] == [1, 2, 3]
    for column in ("train_loss", "test_loss", "train_accuracy", "test_accuracy", "lr"):
        assert run[column] == pytest.approx(list(history.frame()[column]), rel=1e-4)
    assert run["label"] == explorer.figure.data["title"] == "PADAM-SGD, handwritten digits"
    assert hl.History.load(tmp_path / "runs" / "padam_sgd-1").rows == history.rows
    assert explorer.earlier.options == ()  # the run shown is not an earlier one
    press(explorer, "Reset")
    assert (explorer.history, drawn(explorer)) == (None, [])
    assert explorer.controls["run_name"].value == "padam_sgd-2"
    assert [name for _, name in explorer.earlier.options] == ["padam_sgd-1"]
    assert hl.History.load(tmp_path / "runs" / "padam_sgd-1").rows == history.rows


def test_stop_acts_at_once_and_start_resumes_to_the_same_numbers(open_explorer, tmp_path):
    explorer, seconds = open_explorer(epochs=6, width=8, batch_size=32, train_limit=640), []
    for kept in range(1, 4):
        press(explorer, "Start")
        until(lambda: explorer.history is not None and len(explorer.history.rows) >= kept)  # noqa: B023
        time.sleep(0.03)  # into the next epoch
        before, pressed = numbers(explorer.history), time.perf_counter()
        press(explorer, "Stop")
        explorer.wait(30)
        seconds.append(time.perf_counter() - pressed)
        assert explorer.history.status == "stopped"
        assert "Start resumes" in explorer.status.value
        assert numbers(explorer.history)[: len(before)] == before
        assert numbers(hl.History.load(explorer.folder)) == numbers(explorer.history)
    print(f"\nStop answered after {statistics.median(seconds):.3f} s (median of {len(seconds)})")
    assert max(seconds) < 2
    train(explorer)
    straight = hl.run(explorer.experiment(), tmp_path / "straight", progress=False)
    assert numbers(explorer.history) == numbers(straight)


@pytest.fixture
def held(monkeypatch):
    """Until this event is set, every step takes half a second."""
    gate, run = threading.Event(), module.run

    def held_run(*arguments, should_stop, **how):
        def slowly():
            gate.wait(0.5)
            return should_stop()

        return run(*arguments, should_stop=slowly, **how)

    monkeypatch.setattr(module, "run", held_run)
    return gate


def test_queued_runs_wait_for_their_turn_and_stay_in_view(open_explorer, held):
    explorer = open_explorer(**TINY)
    press(explorer, "Start")
    queued = []
    for changes in ({"seed": 1}, {"method": "sgd"}):
        set_to(explorer, **changes, epochs=2)
        assert explorer.buttons[0].description == "Queue"
        queued.append(explorer.experiment())
        press(explorer, "Start")
        assert not can_start(explorer)  # it is queued already
    until(lambda: "then padam_sgd-2, sgd-1" in explorer.status.value)
    held.set()
    explorer.wait()
    assert explorer.buttons[0].description == "Start"
    assert explorer.history.experiment == queued[1]
    assert explorer.earlier.value == ("padam_sgd-1", "padam_sgd-2")
    assert [len(run["epoch"]) for run in drawn(explorer)] == [2, 3, 2]
    assert explorer.figure.data["epochs"] == 3  # the longest run fits
    assert len({run["colour"] for run in drawn(explorer)}) == 3
    assert len({run["dash"] for run in drawn(explorer)}) == 3
    assert hl.History.load(explorer.runs / "padam_sgd-2").experiment == queued[0]


def test_a_finished_run_stays_in_view_when_the_next_one_starts(open_explorer, held):
    explorer = open_explorer(**TINY)
    held.set()
    train(explorer)
    held.clear()
    set_to(explorer, seed=1)
    press(explorer, "Start")
    assert explorer.earlier.value == ("padam_sgd-1",)
    assert [len(run["epoch"]) for run in drawn(explorer)] == [3]
    held.set()
    explorer.wait()
    assert [len(run["epoch"]) for run in drawn(explorer)] == [3, 3]


def test_without_milestones_those_of_the_report_keep_their_share(open_explorer):
    explorer = open_explorer(**TINY | {"epochs": 20})
    set_to(explorer, lr_milestones="")
    assert explorer.experiment().lr_milestones == (10, 15)


def test_curves_grow_during_a_run_and_stop_empties_the_queue(open_explorer):
    explorer = open_explorer(epochs=400, width=2, batch_size=32)
    press(explorer, "Start")
    seen, turns = set(), 0
    while len(seen) < 4:
        seen.add(len(drawn(explorer)[0]["epoch"]) if drawn(explorer) else 0)
        turns += 1  # the main thread is free: another cell could run in this loop
        time.sleep(0.005)
    assert turns > 20
    assert "of 400, step " in explorer.status.value
    explorer.start()  # a second click, before the browser has disabled the button
    set_to(explorer, seed=1)
    press(explorer, "Start")
    press(explorer, "Stop")
    explorer.wait(30)
    assert explorer.history.status == "stopped"
    assert "already" not in explorer.status.value
    assert "is training" not in explorer.status.value
    assert not (explorer.runs / "padam_sgd-2").exists()
    kept = len(explorer.history.rows)
    set_to(explorer, seed=0, run_name="padam_sgd-1")
    press(explorer, "Start")  # Stop has no effect on later runs
    until(lambda: len(explorer.history.rows) > kept)


def test_a_run_that_fails_on_its_data_leaves_the_queue_untouched(open_explorer, held):
    explorer = open_explorer()
    many = {"dataset": "digits", "train_limit": "", "batch_size": 1201}
    right = {"batch_size": 32, "train_limit": "160", "seed": 1, "epochs": 1}
    for changes in ({}, {"dataset": "folder:/no"}, many, right):
        set_to(explorer, **changes)
        press(explorer, "Start")
    held.set()
    explorer.wait()
    assert (explorer.history.status, explorer.history.experiment.seed) == ("complete", 1)
    assert "complete" in explorer.status.value  # and earlier failures are still shown
    assert "padam_sgd-2: FileNotFoundError" in explorer.status.value
    assert "padam_sgd-3: ValueError: batch_size=1201" in explorer.status.value
    assert explorer.status.value.count('role="alert"') == 2


# Choices: which go together, and what the explorer says about the others.


@pytest.mark.parametrize(
    ("method", "enabled"),
    [
        ("sgd", {"momentum", "weight_decay"}),
        ("adam", {"weight_decay"}),
        ("atmo", {"momentum", "weight_decay", *WEIGHED}),
        ("padam", {"partial", "weight_decay", "lr_milestones"}),
        ("dyn_padam_sgd", {"momentum", "weight_decay", "partial", "lr_milestones", *WEIGHED,
                           "lambda_end", "lambda_epochs", "lambda_direction"}),
        ("adahessian", {"weight_decay", "hessian_power", "lr_milestones"}),
        ("adahessian+adam", {"weight_decay", "hessian_power", *WEIGHED}),
        ("swats", {"momentum", "weight_decay", *WEIGHED, "lambda_per", "lambda_tolerance"}),
    ],
)  # fmt: skip
def test_controls_that_a_method_does_not_have_are_disabled(open_explorer, method, enabled):
    explorer = open_explorer("sgd", **TINY)
    set_to(explorer, method=method)
    always = {"lr", "lr_schedule", *RUN}
    assert {f for f in FIELDS if not explorer.controls[f].disabled} - always == enabled


def test_a_method_brings_its_own_settings_and_keeps_those_of_the_run(open_explorer):
    explorer = open_explorer()
    set_to(explorer, seed=7)
    changes = []
    explorer.python.observe(changes.append, "value")
    set_to(explorer, method="dyn_padam_sgd")
    assert len(changes) == 1  # checked once, not for every control that changes
    row = hl.EXPERIMENTS["dyn_padam_sgd"].scaled(3)
    assert explorer.experiment() == dataclasses.replace(row, **TINY, dataset="digits", seed=7)
    assert explorer.controls["run_name"].value == "dyn_padam_sgd-1"
    set_to(explorer, lambda_epochs="")
    assert explorer.experiment().lambda_epochs == 3  # all of them, not the 100 of the table
    set_to(explorer, lambda_schedule="constant")
    assert explorer.controls["lambda_end"].disabled
    set_to(explorer, lr_schedule="constant")
    assert explorer.controls["lr_milestones"].disabled
    assert explorer.experiment().lr_milestones == ()


@pytest.mark.parametrize(
    "values",
    [
        {"lr": -1.0}, {"lr": float("nan")}, {"lambda_start": "1, nan"}, {"lambda_start": "1,2,3"},
        {"lambda_start": "one half"}, {"lambda_end": "-1, 2"}, {"lambda_epochs": "0"},
        {"epochs": 0}, {"width": 0}, {"batch_size": 0}, {"seed": -1}, {"momentum": "a lot"},
        {"partial": "3"}, {"train_limit": "some"}, {"dataset": "digit"}, {"dataset": "folder:"},
        {"lr_milestones": "9, 6"}, {"batch_size": 161}, {"run_name": "../x"}, {"run_name": "/x"},
        {"run_name": ""}, {"lr": 0, "dataset": "cifar", "run_name": "a b"},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_choices_are_explained_beside_their_controls(open_explorer, values):
    explorer = open_explorer("dyn_padam_sgd", **TINY)
    right, command = {f: explorer.controls[f].value for f in values}, explorer.papermill.value
    set_to(explorer, **values)
    assert problems(explorer) == set(values)
    assert not can_start(explorer)
    assert explorer.papermill.value == command  # only commands that would run are offered
    set_to(explorer, **right)
    assert problems(explorer) == set()
    assert can_start(explorer)


def test_conflicting_choices_are_explained_beside_one_of_the_two(open_explorer):
    explorer = open_explorer("dyn_padam_sgd", **TINY)
    for changes in ({"protocol": "released", "lambda_schedule": "sigmoid"}, {"lr": 0.02}):
        set_to(explorer, **changes)
        assert problems(explorer) == {"lambda_schedule"}
    set_to(explorer, lambda_direction="report")
    assert problems(explorer) == set()


@pytest.mark.parametrize(
    ("shape", "setting"), [("exponential", "lambda_rate"), ("sigmoid", "lambda_steepness")]
)
def test_a_shape_s_own_setting_appears_with_it(open_explorer, shape, setting):
    explorer = open_explorer("dyn_padam_sgd", **TINY)
    for now, display in (("linear", "none"), (shape, ""), ("linear", "none")):
        set_to(explorer, lambda_schedule=now)
        assert cell(explorer, setting).layout.display == display
    set_to(explorer, lambda_schedule=shape, **{setting: "3"})
    assert getattr(explorer.experiment(), setting) == 3
    set_to(explorer, **{setting: "-3"})
    assert problems(explorer) == {setting}
    set_to(explorer, lambda_schedule="linear")
    assert problems(explorer) == set()


def test_an_earlier_run_is_never_overwritten(open_explorer, tmp_path):
    (tmp_path / "runs" / "broken").mkdir(parents=True)
    (tmp_path / "runs" / "broken" / "history.json").write_text("{")
    explorer = open_explorer(**TINY | {"epochs": 1})
    assert explorer.earlier.options == ()  # what cannot be read cannot be compared
    train(explorer)
    name = explorer.folder.name
    set_to(explorer, seed=1)  # a proposed name advances by itself
    assert explorer.controls["run_name"].value == "padam_sgd-2"
    for taken in (name, "broken"):
        set_to(explorer, run_name=taken)  # a typed one does not
        assert problems(explorer) == {"run_name"}
        assert not can_start(explorer)
    set_to(explorer, seed=0, run_name=name)  # the same experiment may resume
    assert problems(explorer) == set()
    assert can_start(explorer)


def test_the_schedules_of_the_next_run_are_drawn(open_explorer):
    explorer = open_explorer("dyn_padam_sgd", **TINY | {"epochs": 4})
    set_to(explorer, lambda_epochs="4")
    planned = explorer.figure.data["planned"]
    assert planned["lambdas"] == {"Padam": [1, 0.75, 0.5, 0.25], "SGD": [0, 0.25, 0.5, 0.75]}
    assert planned["lr"] == pytest.approx(explorer.experiment().learning_rates())
    set_to(explorer, method="adam")
    assert explorer.figure.data["planned"]["lambdas"] == {"Adam": [1] * 4}


# Comparing and repeating.


def test_earlier_runs_and_the_report_are_overlaid(open_explorer):
    explorer = open_explorer(**TINY | {"epochs": 2})
    train(explorer)
    explorer.reset()
    train(explorer, method="sgd")
    explorer.earlier.value = ["padam_sgd-1"]
    assert [(run["name"], run["label"]) for run in drawn(explorer)] == [
        ("this run", "SGD, handwritten digits"), ("padam_sgd-1", "PADAM-SGD, handwritten digits"),
    ]  # fmt: skip
    explorer.report.value = True
    report = explorer.figure.data["report"]
    assert "CIFAR-10" in report["label"]  # not to be taken for the digits' own
    assert report["test_accuracy"][0] == pytest.approx(0.6093)
    assert explorer.figure.data["epochs"] == 2  # the report's curves do not squeeze the runs
    explorer.reset()
    explorer.earlier.value = []
    assert explorer.figure.data["epochs"] == max(report["epoch"])  # all the report's
    assert drawn(explorer) == []


def test_an_earlier_run_that_diverged_at_once_is_an_empty_line(open_explorer):
    explorer = open_explorer(**TINY | {"lr": 1e30})
    history = train(explorer)
    assert (history.status, history.rows) == ("diverged", [])
    explorer.reset()
    explorer.earlier.value = ["padam_sgd-1"]
    assert train(explorer, method="sgd").status == "complete"


def test_every_method_can_be_started_and_copied(open_explorer):
    explorer = open_explorer()
    for _, method in METHODS:
        set_to(explorer, method=method, lr=0.003, momentum="0.7", lr_schedule="multistep",
               lr_milestones="2")  # fmt: skip
        assert can_start(explorer), method
        assert (explorer.experiment().epochs, explorer.experiment().lr) == (3, 0.003)
        what = explorer.experiment(), explorer.folder
        assert explorer.python.value == planning.as_python(*what)
        assert explorer.papermill.value == planning.as_papermill(*what)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["python", "papermill"])
def test_the_copied_command_repeats_the_run(open_explorer, tmp_path, way):
    explorer = open_explorer("dyn_padam_sgd", **TINY)
    first = train(explorer, lr=0.02, lr_schedule="constant", lambda_schedule="sigmoid", seed=5,
                  lambda_start="0.9, 0.1", lambda_end="0.25, 0.75", lambda_epochs="2",
                  momentum="0.8", weight_decay="0", partial="0.25",
                  merge="sum")  # fmt: skip
    shutil.move(explorer.folder, explorer.folder.with_name("moved"))
    words = ["-c", explorer.python.value]
    if way == "papermill":
        words = ["-m", *shlex.split(explorer.papermill.value)]
        words[3] = str(tmp_path / words[3])
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    repeated = hl.History.load(explorer.folder)
    assert repeated.experiment == first.experiment
    assert numbers(repeated) == numbers(first)


# Other places to run.


@pytest.fixture
def colab(monkeypatch):
    """A stand-in for google.colab that records what happens."""
    events = []
    package = types.ModuleType("google.colab")
    package.output = types.ModuleType("google.colab.output")
    package.output.enable_custom_widget_manager = lambda: events.append("widget manager")
    for module_ in (types.ModuleType("google"), package, package.output):
        monkeypatch.setitem(sys.modules, module_.__name__, module_)
    return events


def test_in_colab_start_trains_in_the_foreground_until_an_interrupt(tmp_path, colab, monkeypatch):
    monkeypatch.setattr(module, "is_interactive", lambda: True)
    monkeypatch.setattr(module, "display", colab.append)
    explorer, real = explore(tmp_path / "runs", "padam_sgd", **TINY), hl.run
    assert colab[-1] is explorer.view
    assert "widget manager" in colab  # enabled by anywidget

    def interrupted(*arguments, should_stop, **more):
        calls = iter(range(1000))

        def stop():
            if next(calls) == 8:  # in the second epoch of five steps
                signal.raise_signal(signal.SIGINT)
            return should_stop()

        return real(*arguments, should_stop=stop, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, "run", interrupted)
        press(explorer, "Start")  # and the interrupt stays within the cell
    assert "Start resumes" in explorer.status.value
    assert len(explorer.history.rows) == 1
    press(explorer, "Start")  # returns when it is done
    straight = hl.run(explorer.experiment(), tmp_path / "straight", progress=False)
    assert numbers(explorer.history) == numbers(straight)


def test_every_control_has_a_label_and_colab_can_show_and_save_the_view(open_explorer):
    explorer = open_explorer(**TINY | {"epochs": 30})
    train(explorer)
    assert {*FIELDS, "method", "run_name"} == set(explorer.controls) == set(explorer.messages)
    labels = {control.description for control in explorer.controls.values()} - {""}
    assert len(labels) == len(explorer.controls)
    # A front end for ipywidgets 7 cannot create an Output; a view that holds one stays blank.
    found = all_widgets(explorer.view)
    assert {explorer.figure, *explorer.controls.values()} <= set(found)
    assert "Output" not in [type(widget).__name__ for widget in found]
    state = json.dumps(embed_data([explorer.view], state=dependency_state([explorer.view])))
    print(f"\nstate of the explorer's widgets: {len(state) / 1e3:.0f} KB")
    assert explorer.figure.model_id in state
    assert len(state) < 100_000


def test_the_explorer_trains_on_text_too(open_explorer):
    explorer = open_explorer("adam", dataset="python-docs", train_limit=64, test_limit=10, epochs=2,
                             width=8, batch_size=32)  # fmt: skip
    history = train(explorer)
    assert (history.status, len(history.rows)) == ("complete", 2)
    (shown,) = drawn(explorer)
    assert shown["test_loss"] == pytest.approx([row["test_loss"] for row in history.rows], rel=1e-3)
    assert "documentation" in explorer.figure.data["title"]


@pytest.mark.parametrize("on", ["all", "norms_and_head"])
def test_a_look_inside_shows_every_layer_and_changes_nothing(open_explorer, tmp_path, on):
    explorer = open_explorer("adasgd", **TINY, lambda_on=on)
    plain = train(explorer)
    assert explorer.figure.data["inside"] is None
    press(explorer, "Reset")
    explorer.look.value = True
    seen = train(explorer)
    drop = ("inside", "hessian_age")
    rows = [{k: v for k, v in row.items() if k not in drop} for row in seen.rows]
    assert numbers(hl.History(seen.experiment, rows)) == numbers(plain)
    shown = explorer.figure.data["inside"]
    assert (shown["run"], shown["epoch"]) == ("this run", [1, 2, 3])
    one, other, cosine, step, curvature = shown["measures"]
    for i, name in enumerate(shown["layers"]):
        is_convolution = re.search(r"conv\d|shortcut\.0|stem\.0", name)
        merged = on == "all" or not is_convolution
        for j, row in enumerate(seen.rows):
            layer = row["inside"][name]
            assert [one["values"][i][j], other["values"][i][j]] == (
                layer["shares"] if merged else [0, 1]
            )
            assert cosine["values"][i][j] == (layer["cosines"][0] if merged else None)
            assert step["values"][i][j] == layer["step_size"]
            assert curvature["values"][i][j] == (layer["curvature"][-1] if merged else None)
    explorer.look.value = False  # that of an earlier run is shown as well
    press(explorer, "Reset")
    explorer.earlier.value = [explorer.earlier.options[-1][1]]
    assert explorer.figure.data["inside"]["measures"] == shown["measures"]


def test_a_long_run_is_shown_in_at_most_a_hundred_columns(open_explorer):
    explorer = open_explorer("sgd", **TINY)
    explorer.look.value = True
    (row, *_) = train(explorer).rows
    long = hl.History(explorer.history.experiment, [row | {"epoch": i + 1} for i in range(350)])
    explorer.figure.draw({"long": long}, long.experiment)
    shown = explorer.figure.data["inside"]
    assert shown["epoch"] == [*range(1, 351, 4)]
    (measure,) = shown["measures"]  # a single rule has neither shares nor cosines
    assert {len(values) for values in measure["values"]} == {88}


def test_initial_settings_may_be_any_field_of_an_experiment(open_explorer):
    explorer = open_explorer("sgd", seed=3, test_limit=50, nesterov=True, momentum=0.5)
    e = explorer.experiment()
    assert (e.seed, e.test_limit, e.nesterov, e.momentum) == (3, 50, True, 0.5)
    assert len(set(dict(METHODS))) == len(METHODS), "no two methods look the same"


def test_a_hybrid_of_three_rules_with_adaptive_weights_can_be_opened(open_explorer):
    """It is not in the list of methods, and its weights cannot be drawn in advance."""
    explorer = open_explorer("adam+lion+sgd", **TINY, lambda_schedule="hedge", lambda_rate=2.0)
    assert explorer.controls["lambda_rate"].value == "2.0"
    assert explorer.figure.data["planned"]["lambdas"] == {}
    assert explorer.experiment().lambda_start == (1 / 3,) * 3
    explorer.start()
    explorer.wait()
    assert explorer.history.status == "complete"
    drawn = explorer.figure.data["runs"][0]["lambdas"]
    assert [len(λ) for λ in drawn] == [3] * len(explorer.history.rows)
