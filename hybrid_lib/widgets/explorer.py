"""The explorer: choose an experiment with widgets, watch it train, keep and compare runs."""

from __future__ import annotations

import contextlib
import html
import itertools
import math
import re
import sys
import threading
import time
import typing
from dataclasses import fields, replace
from pathlib import Path

import ipywidgets as widgets
from IPython.display import display
from pydantic import ValidationError

from hybrid_lib.optim import methods, schedules
from hybrid_lib.optim.controllers import CONTROLLERS
from hybrid_lib.study import planning
from hybrid_lib.study.progress import is_interactive
from hybrid_lib.training import data
from hybrid_lib.training.experiments import EXPERIMENTS, Experiment, get_experiment
from hybrid_lib.training.history import FILE, History
from hybrid_lib.training.inside import look_inside
from hybrid_lib.training.loop import run
from hybrid_lib.widgets.curves import Curves

NAMES = [*EXPERIMENTS, *methods.METHODS, *map("+".join, itertools.permutations(methods.RULES, 2))]
METHODS = [(get_experiment(name).label, name) for name in dict.fromkeys(NAMES)]
# Per section, by field of Experiment: label, and as placeholder a default or an example.
STEP = {
    "lr": ("Learning rate η",), "weight_decay": ("Weight decay γ", "default"),
    "lr_schedule": ("Schedule of η",), "lr_milestones": ("Milestones", "epochs: 6, 9"),
    "momentum": ("Momentum μ", "default"), "partial": ("Padam's p", "1/8"),
    "hessian_power": ("Hessian power", "1"),
}  # fmt: skip
WEIGHTS = {
    "lambda_schedule": ("Schedule of λ",), "lambda_epochs": ("over epochs", "all"),
    "lambda_start": ("λ at the start", "0.5, 0.5"), "lambda_end": ("λ at the end", "0, 1"),
    "lambda_direction": ("Direction of λ",), "merge": ("Merge",),
    "lambda_rate": ("Rate", "5; hedge: 0.1"), "lambda_steepness": ("Steepness", "12"),
    "lambda_share": ("Share", "0.001"), "lambda_tolerance": ("Tolerance", "1e-9"),
    "lambda_on": ("Merged layers",), "lambda_per": ("One λ per",),
}  # fmt: skip
RUN = {
    "dataset": ("Data set",), "train_limit": ("Training images", "all"),
    "test_limit": ("Test images", "all"), "width": ("Network width",), "epochs": ("Epochs",),
    "batch_size": ("Batch size",), "seed": ("Seed",), "protocol": ("Protocol",),
}  # fmt: skip
FIELDS, HINTS = STEP | WEIGHTS | RUN, typing.get_type_hints(Experiment)
# Settings of some schedules of λ; hidden for the others.
OF_ONE_SHAPE = {"lambda_rate", "lambda_steepness", "lambda_share", "lambda_tolerance", "lambda_per"}
LEFT, RIGHT = 430, 500  # column widths in pixels; the curves may grow
WHEN_COMPLETE = {"continuous_update": False}  # checks wait for complete input


class Explorer:
    """Widgets around :func:`hybrid_lib.run`.

    Training runs in a thread, so that other cells stay usable. Colab ignores what threads draw, so
    there training runs in the cell, and interrupting the cell stops it.

    Args:
        runs: the parent folder of all runs; each run has a subfolder of its name.
        method: a name of ``EXPERIMENTS``, a method or "RULE+RULE".
        start: initial fields of Experiment; the others are those of the demo scale. Fields
            without a control never change.

    Attributes:
        controls: the input widgets by field of Experiment, plus ``method`` and ``run_name``.
        messages: the error below each control; empty if there is none.
        figure, view: the curves; the whole explorer as one widget.
        history: of the current run; None before the first run.
    """

    def __init__(self, runs: str | Path, method: str = "dyn_padam_sgd", **start):
        self.runs = Path(runs)
        self.history: History | None = None
        self.foreground = "google.colab" in sys.modules
        self._name: str | None = None  # of the run in ``history``
        # The running job, then the queued ones: (experiment, whether to look inside) by folder.
        self._jobs: dict[Path, tuple[Experiment, bool]] = {}
        self.messages = dict.fromkeys(("method", "run_name", *FIELDS), "")
        self._failures: list[str] = []  # errors since Start was pressed
        self._stop, self._thread = threading.Event(), threading.Thread()
        self._lock = threading.RLock()  # controls and the training thread both draw
        self._filling, self._proposed = False, ""
        self._fixed = {field: value for field, value in start.items() if field not in FIELDS}
        self._valid = _planned(method, **start)  # the last valid choice
        self._make_widgets(method)
        self._fill({field: getattr(self._valid, field) for field in FIELDS})
        self._propose_name()
        for field, control in self.controls.items():
            control.observe(lambda change, field=field: self._changed(field), "value")
        for choice in (self.earlier, self.report):
            choice.observe(lambda change: self._draw(), "value")
        self._list_earlier()
        self._changed("run_name")

    def experiment(self) -> Experiment:
        """Build the experiment that the controls describe, or raise a ``ValidationError``."""
        method = get_experiment(self.controls["method"].value)
        enabled = {f: self.controls[f].value for f in FIELDS if not self.controls[f].disabled}
        values = {"lr_milestones": (), **enabled}
        if values.get("lambda_epochs") == "" and method.lambda_epochs is not None:
            values["lambda_epochs"] = values["epochs"]
        if values["lr_milestones"] == "":
            values["lr_milestones"] = method.scaled(max(1, values["epochs"])).lr_milestones
        given = {field: value for field, value in values.items() if value != ""}
        return replace(method, **self._fixed, **given)

    @property
    def folder(self) -> Path:
        """The run's folder; raises a ``ValueError`` if the name is not a plain folder name."""
        name = self.controls["run_name"].value
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
            raise ValueError(f"{name!r}: use letters, digits, '.', '_' and '-'")
        return self.runs / name

    def start(self) -> None:
        """Train or resume the experiment; queue it if another one is training."""
        with self._lock:
            if self.folder in self._jobs:  # a second click, before the button is disabled
                return
            self._jobs[self.folder] = self.experiment(), self.look.value
            queued = len(self._jobs) > 1
        self._check()
        if not queued:
            self._failures.clear()
            if self._name not in (None, self.folder.name):  # the run shown is now an earlier one
                shown, self.history, self._name = self._name, None, None
                self._list_earlier(also=shown)
            self._say(f"loading {self._valid.dataset} …")
            self._thread = threading.Thread(target=self._work, daemon=True)
            (self._thread.run if self.foreground else self._thread.start)()

    def stop(self) -> None:
        """Stop after the current step and empty the queue; Start resumes from what was kept."""
        with self._lock:
            if self._jobs:
                self._say("stopping …")
                self._stop.set()
            self._jobs = dict(itertools.islice(self._jobs.items(), 1))

    def reset(self) -> None:
        """Stop, clear the curves and propose a new name; finished runs stay on disk."""
        self.stop()
        self.wait()
        self.history, self._name = None, None
        self._failures.clear()
        self._propose_name()
        self._say("")
        self._list_earlier()
        self._check()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until training ends."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _work(self) -> None:
        """Train the queued experiments one after another."""
        more = True
        while more:
            folder, (experiment, look) = next(iter(self._jobs.items()))
            self._train(experiment, folder, {"watch": look_inside} if look else {})
            with self._lock:
                del self._jobs[folder]
                more = bool(self._jobs)
                self._stop.clear()
            if more:  # the finished run is now an earlier one
                self.history, self._name = None, None
            self._list_earlier(also=folder.name if more else "")
            self._check()

    def _train(self, experiment: Experiment, folder: Path, options: dict) -> None:
        steps, last_message = itertools.count(), time.monotonic()

        def should_stop() -> bool:
            nonlocal last_message
            step = next(steps)
            if time.monotonic() - last_message > 0.2 and not self._stop.is_set():
                last_message = time.monotonic()
                n = math.ceil(self.history.environment["train_images"] / experiment.batch_size)
                epoch = f"epoch {len(self.history.rows) + 1} of {experiment.epochs}"
                waiting = ", ".join(folder.name for folder in [*self._jobs][1:])
                then = f"; then {waiting}" if waiting else ""
                self._say(f"{epoch}, step {step % n + 1} of {n}{then}")
            return self._stop.is_set()

        def keep(history: History) -> None:
            self.history, self._name = history, folder.name
            self._draw()

        try:
            keep(run(experiment, folder, progress=False, should_stop=should_stop, on_epoch=keep,
                     **options))  # fmt: skip
            self._say(_outcome(self.history))
        except KeyboardInterrupt:
            self._say("stopped by an interrupt; Start resumes after the last finished epoch")
        except Exception as error:  # nothing would catch it in a thread
            self._failures.append(f"{folder.name}: {type(error).__name__}: {error}")
            self._say("")

    def _changed(self, field: str) -> None:
        """Update the controls that depend on this one, then check them all."""
        if self._filling:
            return
        method = get_experiment(self.controls["method"].value)
        if field == "method":
            scaled = method.scaled(max(1, self.controls["epochs"].value))
            self._fill({field: getattr(scaled, field) for field in STEP | WEIGHTS})
            if self.controls["run_name"].value == self._proposed:
                self._propose_name()
        used = {"lr", "lr_schedule"} | RUN.keys() | method.method.settings.keys()
        if self.controls["lr_schedule"].value == "multistep":
            used.add("lr_milestones")
        if method.is_hybrid:
            used |= {"lambda_schedule", "lambda_start", "lambda_on", "merge"}
            chosen = self.controls["lambda_schedule"].value
            if shape := (schedules.SHAPES | CONTROLLERS).get(chosen):
                used.add("lambda_per" if chosen in CONTROLLERS else "lambda_direction")
                used |= {f"lambda_{f.name}" for f in fields(shape)} & FIELDS.keys()
        for name in FIELDS:
            self.controls[name].disabled = name not in used
        for name in OF_ONE_SHAPE:
            self._cells[name].layout.display = "" if name in used else "none"
        self._check()

    def _check(self) -> None:
        """Show errors below their controls or, without any, update the code to copy; redraw."""
        experiment, problems = None, []
        try:  # Experiment checks the data set only once every number is valid
            data.check_name(self.controls["dataset"].value)
        except ValueError as unknown:
            problems.append(("dataset", str(unknown)))
        try:
            experiment = self.experiment()
        except ValidationError as error:
            for fault in error.errors():
                text = str(fault.get("ctx", {}).get("error", fault["msg"]))
                # An error about several fields has no location; its text begins with one of them.
                place = (*fault["loc"], *re.findall(r"\w+", text))[0]
                problems.append((place if place in self.controls else "method", text))
        try:
            if self._is_taken(self.folder, experiment):
                if self.folder.name != self._proposed:
                    raise ValueError("another experiment has this name; choose another name")
                self._propose_name()
        except ValueError as error:
            problems.append(("run_name", str(error)))
        for field, cell in self._cells.items():
            message = "; ".join(dict.fromkeys(text for place, text in problems if place == field))
            if message != self.messages[field]:
                for old in cell.children[1:]:
                    old.close()
                self.messages[field] = message
                below = [widgets.HTML(_warning(message))] if message else []
                cell.children = [self.controls[field], *below]
        start, stop, _ = self.buttons
        start.description = "Queue" if self._jobs else "Start"
        start.disabled = bool(problems) or self.folder in self._jobs
        stop.disabled = not self._jobs
        if not problems:
            self._valid = experiment
            self.papermill.value = planning.as_papermill(experiment, self.folder)
            self.python.value = planning.as_python(experiment, self.folder)
        self._draw()

    def _is_taken(self, folder: Path, experiment: Experiment | None) -> bool:
        """Return whether the folder belongs to another experiment, saved or queued."""
        try:
            job = self._jobs.get(folder)
            kept = job[0] if job else History.load(folder).experiment
            return experiment is not None and kept != experiment
        except FileNotFoundError:
            return False
        except (OSError, ValueError):  # damaged: do not overwrite
            return True

    def _draw(self) -> None:
        """Draw this run, earlier ones, the report's points if wanted, and the schedules."""
        with self._lock:
            runs = {} if self.history is None else {"this run": self.history}
            for name in self.earlier.value:
                with contextlib.suppress(OSError, ValueError):  # deleted or damaged since
                    runs[name] = History.load(self.runs / name)
            report = self.controls["method"].value if self.report.value else ""
            self.figure.draw(runs, self._valid, report)

    def _fill(self, values: dict) -> None:
        """Set controls without updating those that depend on them."""
        self._filling = True
        for field, value in values.items():
            if isinstance(value, tuple):
                value = ", ".join(map(_in_full, value))
            if isinstance(self.controls[field], widgets.Text):  # a Combobox is one
                value = "" if value is None else str(value)
            self.controls[field].value = value
        self._filling = False

    def _propose_name(self) -> None:
        """Propose the first free name METHOD-1, METHOD-2, …"""
        method = self.controls["method"].value.replace("+", "-")
        folders = (self.runs / f"{method}-{i}" for i in itertools.count(1))
        self._proposed = next(f.name for f in folders if f not in self._jobs and not f.exists())
        self._fill({"run_name": self._proposed})

    def _list_earlier(self, also: str = "") -> None:
        """List the runs on disk; keep the selection and add ``also`` to it."""
        options, chosen = [], {*self.earlier.value, also}
        for file in sorted(self.runs.glob(f"*/{FILE}")):
            if file.parent.name != self._name:
                with contextlib.suppress(OSError, ValueError):
                    name, run = file.parent.name, History.load(file)
                    accuracy = f", test {run.final['test_accuracy']:.4f}" if run.rows else ""
                    text = f"{name}: {len(run.rows)} epochs{accuracy}, {run.label}, {run.dataset}"
                    options.append((text, name))
        self.earlier.options = options
        self.earlier.value = [name for _, name in options if name in chosen]

    def _say(self, text: str) -> None:
        failures = "".join(map(_warning, self._failures))
        self.status.value = f'<div role="status">{html.escape(text)}&nbsp;</div>{failures}'

    def _make_widgets(self, method: str) -> None:
        """Make the controls, in cells with room for a message, the buttons and the outputs."""
        listed = method in (name for _, name in METHODS)
        others = [] if listed else [(get_experiment(method).label, method)]
        self.controls = {
            "method": _labelled(widgets.Dropdown, "Method", options=METHODS + others, value=method),
            "run_name": _labelled(widgets.Text, "Name of the run", **WHEN_COMPLETE),
            **{field: _control(field, *words) for field, words in FIELDS.items()},
        }
        self._cells = {
            field: widgets.VBox([control], layout={"width": "50%" if field in FIELDS else "100%"})
            for field, control in self.controls.items()
        }
        self.buttons = []
        for text, act in (("Start", self.start), ("Stop", self.stop), ("Reset", self.reset)):
            self.buttons.append(widgets.Button(description=text, layout={"width": "100px"}))
            self.buttons[-1].on_click(lambda button, act=act: act())
        self.buttons[0].button_style = "primary"
        self.status, self.figure = widgets.HTML(), Curves()
        self.earlier = _labelled(widgets.SelectMultiple, "Earlier runs", rows=4)
        self.report = _labelled(
            widgets.Checkbox, "the report's accuracies for this method (CIFAR-10)"
        )
        self.look = _labelled(widgets.Checkbox, "look inside: what the rules propose, by layer")
        self.papermill = _labelled(widgets.Textarea, "With papermill", rows=4)
        self.python = _labelled(widgets.Textarea, "With Python", rows=9)

        wrap, left, form = {"flex_flow": "row wrap"}, {"width": f"{LEFT}px"}, []
        sections = {"The step": STEP, "The weights λ": WEIGHTS, "The run": RUN}
        sections = {title: [self._cells[f] for f in fields] for title, fields in sections.items()}
        copy = "Copy as code: click, Ctrl+A, Ctrl+C (Mac: ⌘)"
        for title, cells in {**sections, copy: [self.papermill, self.python]}.items():
            heading = widgets.HTML(f'<div style="margin-top: 8px"><b>{title}</b></div>')
            form += [heading, widgets.Box(cells, layout=wrap)]
        right = widgets.VBox([self.figure, self.look, self.earlier, self.report])
        right.layout = {"flex": f"1 1 {RIGHT}px", "max_width": "900px", "margin": "0 0 0 10px"}
        names = widgets.VBox([self._cells["method"], self._cells["run_name"]], layout=left)
        actions = widgets.VBox([widgets.HBox(self.buttons), self.status])
        # The curves come first, to the right; where both do not fit, they stay just below Start.
        below = widgets.Box([right, widgets.VBox(form, layout=left)])
        below.layout = {"flex_flow": "row-reverse wrap", "justify_content": "flex-end"}
        self.view = widgets.VBox([widgets.Box([names, actions], layout=wrap), below])
        self.view.add_class("hybrid-explorer")


def explore(runs: str | Path, method: str = "dyn_padam_sgd", **start) -> Explorer | None:
    """Show and return an :class:`Explorer`; without a front end, plot its schedules instead."""
    if not is_interactive():
        from hybrid_lib.study import figures  # imported here, to open quickly

        figures.show(figures.schedules([_planned(method, **start)]))
        return None
    explorer = Explorer(runs, method, **start)
    display(explorer.view)
    return explorer


def _planned(method: str, seed: int = 0, **start) -> Experiment:
    return planning.plan("demo", only=[method], seeds=[seed], **start)[0]


def _control(field: str, label: str, placeholder: str = "") -> widgets.Widget:
    """Make the widget that suits the field's type."""
    if typing.get_origin(HINTS[field]) is typing.Literal:
        return _labelled(widgets.Dropdown, label, options=typing.get_args(HINTS[field]))
    kinds = {int: widgets.IntText, float: widgets.FloatText, str: widgets.Combobox}
    kind = kinds.get(HINTS[field], widgets.Text)
    extra = {widgets.Combobox: {"options": data.NAMES}, widgets.Text: {"placeholder": placeholder}}
    return _labelled(kind, label, **extra.get(kind, {}), **WHEN_COMPLETE)


def _labelled(kind, label: str, **options) -> widgets.Widget:
    looks = {"style": {"description_width": "110px"}, "layout": {"width": "98%"}}
    return kind(description=label, **looks, **options)


def _in_full(number: float) -> str:
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def _outcome(history: History) -> str:
    if history.status != "complete":
        kept = f"{len(history.rows)} finished epochs are kept"
        resume = "; Start resumes" if history.status == "stopped" else ""
        return f"{history.status}, {history.note}; {kept}{resume}"
    final, best = history.final["test_accuracy"], history.best
    which = "best by validation" if "validation_accuracy" in best else "highest"
    highest = f"{which}: {best['test_accuracy']:.4f}, epoch {best['epoch']}"
    return f"complete: test accuracy {final:.4f} in the last epoch ({highest})"


def _warning(text: str) -> str:
    colour = f"var(--jp-error-color1, {methods.VERMILLION})"  # JupyterLab's follows its theme
    return f'<div role="alert" style="color:{colour};line-height:1.3">⚠ {html.escape(text)}</div>'
