"""The explorer: choose an experiment with widgets, watch it train, keep and compare runs."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
import threading
import time
from pathlib import Path

import ipywidgets as widgets
import plotly.graph_objects as go
from IPython.display import display
from plotly.subplots import make_subplots
from pydantic import ValidationError

from hybrid_lib import data, plots, study
from hybrid_lib.experiments import EXPERIMENTS, RULES, SCHEDULES, Experiment, faults
from hybrid_lib.history import FILE, History
from hybrid_lib.train import run

METHODS = [(e.label, name) for name, e in EXPERIMENTS.items()]
METHODS += [(f"{a} + {b}", f"{a}+{b}") for a, b in itertools.permutations(RULES, 2)]
# (field of Experiment, label, kind, choices); an empty text means: as in Tables I and II.
CONTROLS = [
    ("dataset", "Data set", widgets.Combobox, data.NAMES),
    ("train_limit", "Training images", widgets.Text, None),
    ("width", "Network width", widgets.IntText, None),
    ("epochs", "Epochs", widgets.IntText, None),
    ("batch_size", "Batch size", widgets.IntText, None),
    ("seed", "Seed", widgets.IntText, None),
    ("protocol", "Protocol", widgets.Dropdown, ("clean", "released")),
    ("lr", "Learning rate η", widgets.FloatText, None),
    ("lr_schedule", "Schedule of η", widgets.Dropdown, ("constant", "cosine", "multistep")),
    ("lr_milestones", "Milestones of η", widgets.Text, None),
    ("momentum", "Momentum μ", widgets.Text, None),
    ("weight_decay", "Weight decay γ", widgets.Text, None),
    ("partial", "Padam's p", widgets.Text, None),
    ("hessian_power", "Hessian power k", widgets.Text, None),
    ("lambda_schedule", "Schedule of λ", widgets.Dropdown, ("constant", *SCHEDULES)),
    ("lambda_start", "λ at the start", widgets.Text, None),
    ("lambda_end", "λ at the end", widgets.Text, None),
    ("lambda_epochs", "λ's horizon (epochs)", widgets.Text, None),
]
KEPT = ("dataset", "train_limit", "width", "epochs", "batch_size", "seed", "protocol")
STATUS_EVERY = 0.2  # seconds between two updates of the line below the buttons


class Explorer:
    """Widgets around :func:`hybrid_lib.run`.

    Training runs in a thread, so that other cells can be used meanwhile; in Colab, which ignores
    what threads draw, it runs in the cell and is stopped by interrupting it.

    Args:
        runs: the folder below which runs are kept, one folder per name.
        method: a name of ``EXPERIMENTS`` or "RULE+RULE".
        start: fields of Experiment to begin with; the others are those of the demo scale.

    Attributes:
        controls: the input widgets, by field of Experiment; also ``method`` and ``run_name``.
        view: everything, as one widget.
        history: of the current run, None before the first.
    """

    def __init__(self, runs: str | Path, method: str = "dyn_padam_sgd", **start):
        self.runs = Path(runs)
        self.history: History | None = None
        self.foreground = "google.colab" in sys.modules
        self._stop, self._thread, self._error = threading.Event(), None, None
        self._filling = False

        self.controls = {"method": _control(widgets.Dropdown, "Method", METHODS)}
        for field, label, kind, choices in CONTROLS:
            self.controls[field] = _control(kind, label, choices)
        self.controls["run_name"] = _control(widgets.Text, "Name of the run", None)
        self.messages = {field: widgets.HTML() for field in self.controls}
        self.start_button = widgets.Button(description="Start", button_style="primary")
        self.stop_button = widgets.Button(description="Stop", disabled=True)
        self.reset_button = widgets.Button(description="Reset")
        self.status = widgets.HTML()
        self.earlier = widgets.SelectMultiple(description="Earlier runs", rows=5, **_STYLE)
        self.report = widgets.Checkbox(description="the report's points (CIFAR-10)", indent=False)
        self.papermill = widgets.Textarea(description="As papermill", rows=4, **_WIDE)
        self.python = widgets.Textarea(description="As Python", rows=8, **_WIDE)
        self.output = widgets.Output()
        self.preview, self.curves = _preview_figure(), _curves_figure()
        self.view = self._arranged()

        self._fill(study.plan("demo", only=[method], **start)[0], self.controls)
        self.controls["method"].value = method
        self.controls["run_name"].value = self._free_name()
        for field, control in self.controls.items():
            control.observe(lambda change, field=field: self._changed(field), "value")
        self.earlier.observe(lambda change: self._draw(), "value")
        self.report.observe(lambda change: self._draw(), "value")
        self.start_button.on_click(lambda button: self.start())
        self.stop_button.on_click(lambda button: self.stop())
        self.reset_button.on_click(lambda button: self.reset())
        self._list_earlier()
        self._changed("epochs")

    def experiment(self) -> Experiment:
        """The experiment that the controls describe.

        Raises:
            pydantic.ValidationError, ValueError: if there is none.
        """
        values = {f: self.controls[f].value for f, *_ in CONTROLS if not self.controls[f].disabled}
        if values.get("lambda_epochs") == "":
            values["lambda_epochs"] = values["epochs"]
        if values["lr_schedule"] != "multistep":
            values["lr_milestones"] = ()
        chosen = {field: value for field, value in values.items() if value != ""}
        return dataclasses.replace(study.row(self.controls["method"].value), **chosen)

    @property
    def folder(self) -> Path:
        """Where the run is kept.

        Raises:
            ValueError: for a name that is no plain folder name.
        """
        name = self.controls["run_name"].value
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
            raise ValueError(f"run_name={name!r}: use letters, digits, '.', '_' and '-'")
        return self.runs / name

    def start(self) -> None:
        """Train the chosen experiment, or go on with it if its folder holds a part of it."""
        if self._thread is not None and self._thread.is_alive():
            return
        experiment, folder = self.experiment(), self.folder
        self._stop.clear()
        self.start_button.disabled, self.stop_button.disabled = True, False
        self.status.value = f"loading {experiment.dataset} …"
        if self.foreground:
            with self.output:
                self._train(experiment, folder)
        else:
            self._thread = threading.Thread(
                target=self._train, args=(experiment, folder), daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Stop after the current step; what was finished is kept, Start goes on."""
        self._stop.set()

    def reset(self) -> None:
        """Stop, clear the curves and choose a new name; finished runs stay on disk."""
        self.stop()
        self.wait()
        self.history = None
        self.controls["run_name"].value = self._free_name()
        self.status.value = ""
        self._draw()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until training has ended."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def show(self) -> None:
        """Show the widgets; without a front end, what they would show as still figures."""
        if self.foreground:
            from google.colab import output  # only there

            output.enable_custom_widget_manager()
        if plots.watched():
            display(self.view)
        else:
            plots.show(self.preview)
            plots.show(self.curves)

    def _train(self, experiment: Experiment, folder: Path) -> None:
        steps = itertools.count(1)
        shown = time.monotonic()

        def should_stop() -> bool:
            nonlocal shown
            step = next(steps)
            if time.monotonic() - shown > STATUS_EVERY:
                shown = time.monotonic()
                done = len(self.history.rows) if self.history else 0
                self.status.value = f"epoch {done + 1} of {experiment.epochs}, step {step} in all"
            return self._stop.is_set()

        try:
            self.history = run(
                experiment, folder, progress=self.foreground, should_stop=should_stop,
                on_epoch=self._arrived,
            )  # fmt: skip
            note = "; Start goes on" if self.history.status == "stopped" else ""
            self.status.value = f"{self.history.status} {self.history.note}{note}"
        except KeyboardInterrupt:
            self.status.value = "stopped; Start goes on"
        except Exception as error:  # shown beside the buttons: a thread has nobody to raise to
            self.status.value = _warning(f"{type(error).__name__}: {error}")
        finally:
            self.start_button.disabled, self.stop_button.disabled = False, True
            self._list_earlier()
            self._draw()

    def _arrived(self, history: History) -> None:
        self.history = history
        self._draw()

    def _changed(self, field: str) -> None:
        if self._filling:
            return
        if field == "method":
            method = study.row(self.controls["method"].value)
            epochs = max(1, self.controls["epochs"].value)
            others = [f for f, *_ in CONTROLS if f not in KEPT]
            self._fill(method.scaled(epochs), others)
        available = study.row(self.controls["method"].value).settings()
        for name in ("momentum", "weight_decay", "partial", "hessian_power"):
            self.controls[name].disabled = name not in available
        hybrid = study.row(self.controls["method"].value).is_hybrid
        constant = self.controls["lambda_schedule"].value == "constant"
        self.controls["lambda_schedule"].disabled = not hybrid
        self.controls["lambda_start"].disabled = not hybrid
        for name in ("lambda_end", "lambda_epochs"):
            self.controls[name].disabled = not hybrid or constant
        self.controls["lr_milestones"].disabled = self.controls["lr_schedule"].value != "multistep"
        self._check()

    def _check(self) -> None:
        """Say beside each control what is wrong with it; preview what is right."""
        problems: list[str] = []
        try:
            experiment = self.experiment()
        except ValidationError as error:
            problems += faults(error)
        try:
            folder = self.folder
        except ValueError as error:
            problems.append(str(error))
        found = {field: [] for field in self.messages}
        for line in problems:
            field = re.match(r"\w*", line).group()
            found[field if field in found else "method"].append(line)
        for field, lines in found.items():
            self.messages[field].value = _warning("; ".join(lines)) if lines else ""
        running = self._thread is not None and self._thread.is_alive()
        self.start_button.disabled = bool(problems) or running
        if not problems:
            self.papermill.value = study.as_papermill(experiment, folder)
            self.python.value = study.as_python(experiment, folder)
            self._draw_preview(experiment)

    def _draw_preview(self, experiment: Experiment) -> None:
        epochs, weights = list(range(1, experiment.epochs + 1)), experiment.lambdas()
        with self.preview.batch_update():
            self.preview.data[0].x, self.preview.data[0].y = epochs, experiment.learning_rates()
            for i, trace in enumerate(self.preview.data[1:]):
                pairs = [weights(epoch - 1) for epoch in epochs]
                trace.x, trace.y = epochs, [pair[i] for pair in pairs if len(pair) > i]
            self.preview.layout.title.text = f"Schedules of {experiment.label}"

    def _draw(self) -> None:
        lines = []
        if self.history is not None and self.history.rows:
            lines += _lines(self.history, self.history.label, width=3)
        for name in self.earlier.value:
            try:
                earlier = History.load(self.runs / name)
            except (OSError, ValueError):
                continue  # removed or damaged since the list was made
            lines += _lines(earlier, f"{name} ({earlier.dataset})", width=1.5)
        if self.report.value:
            lines += _report_points(self.controls["method"].value)
        with self.curves.batch_update():
            self.curves.data = []
            for row, line in lines:
                self.curves.add_trace(line, row=row, col=1)
            if self.history is not None:
                text = f"{self.history.label}, {self.history.dataset}"
                self.curves.layout.title.text = text

    def _fill(self, experiment: Experiment, fields) -> None:
        self._filling = True
        for field, *_ in CONTROLS:
            if field in fields:
                value = getattr(experiment, field)
                if isinstance(value, tuple):
                    value = ", ".join(f"{v:g}" for v in value)
                text = isinstance(self.controls[field], (widgets.Text, widgets.Combobox))
                if text:
                    value = "" if value is None else str(value)
                self.controls[field].value = value
        self._filling = False

    def _free_name(self) -> str:
        names = (
            f"{self.controls['method'].value.replace('+', '-')}-{i}" for i in itertools.count(1)
        )
        return next(name for name in names if not (self.runs / name).exists())

    def _list_earlier(self) -> None:
        kept = self.earlier.value
        names = [file.parent.name for file in sorted(self.runs.glob(f"*/{FILE}"))]
        self.earlier.options = names
        self.earlier.value = [name for name in kept if name in names]

    def _arranged(self) -> widgets.Widget:
        rows = [
            widgets.HBox([control, self.messages[field]])
            for field, control in self.controls.items()
            if field != "run_name"
        ]
        name = widgets.HBox([self.controls["run_name"], self.messages["run_name"]])
        buttons = widgets.HBox([self.start_button, self.stop_button, self.reset_button])
        left = widgets.VBox([*rows, self.preview], layout={"width": "44%", "min_width": "420px"})
        right = widgets.VBox(
            [name, buttons, self.status, self.curves, self.earlier, self.report, self.papermill,
             self.python, self.output],
            layout={"width": "55%", "min_width": "480px"},
        )  # fmt: skip
        return widgets.HBox([left, right], layout={"flex_flow": "row wrap"})


_STYLE = {"style": {"description_width": "140px"}, "layout": {"width": "340px"}}
_WIDE = {"style": {"description_width": "140px"}, "layout": {"width": "98%"}}


def _control(kind, label: str, choices) -> widgets.Widget:
    options = {} if choices is None else {"options": list(choices)}
    if kind in (widgets.Text, widgets.IntText, widgets.FloatText, widgets.Combobox):
        options["continuous_update"] = False  # judged when complete, not while it is typed
    return kind(description=label, **options, **_STYLE)


def _warning(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<span role="alert" style="color:{plots.VERMILLION}">{escaped}</span>'


def _preview_figure() -> go.FigureWidget:
    figure = make_subplots(1, 2, horizontal_spacing=0.16)
    lines = [
        ("η", plots.GREEN, "solid", 1),
        ("λ of the first rule", plots.VERMILLION, "solid", 2),
        ("λ of the second rule", plots.BLUE, "dash", 2),
    ]
    for name, colour, dash, col in lines:
        line = {"shape": "hvh", "width": 2, "color": colour, "dash": dash}
        figure.add_scatter(name=name, line=line, mode="lines", row=1, col=col)
    figure.update_xaxes(title_text="epoch")
    figure.update_yaxes(title_text="learning rate η", col=1)
    figure.update_yaxes(title_text="weight λ", range=[-0.05, 1.05], col=2)
    plots.finished(figure, "Schedules", height=300)
    figure.update_layout(legend={"orientation": "h", "y": -0.3})
    return go.FigureWidget(figure)


def _curves_figure() -> go.FigureWidget:
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    figure.update_yaxes(title_text="loss (nats)", type="log", nticks=6, row=1)
    figure.update_yaxes(title_text="accuracy", row=2)
    figure.update_xaxes(title_text="epoch", row=2)
    return go.FigureWidget(plots.finished(figure, "No run yet", height=460))


def _lines(history: History, label: str, width: float) -> list[tuple[int, go.Scatter]]:
    colour = plots.STYLES.get(history.experiment.name, ("#808080", "solid"))[0]
    table = history.frame()
    return [
        (
            row,
            go.Scatter(
                x=table.index,
                y=table[f"{part}_{what}"],
                name=f"{label}, {part}",
                mode="lines" if len(table) > 1 else "markers",
                showlegend=row == 1,
                legendgroup=f"{label}, {part}",
                line={"color": colour, "width": width, "dash": dash},
            ),
        )
        for row, what in ((1, "loss"), (2, "accuracy"))
        for part, dash in (("train", "dot"), ("test", "solid"))
    ]


def _report_points(method: str) -> list[tuple[int, go.Scatter]]:
    points = plots.paper("milestones").query("optimizer == @method")
    figure = go.Scatter(
        x=points["epoch"], y=points["test_accuracy"], name="report, test (CIFAR-10)",
        mode="markers", marker={"symbol": "diamond-open", "size": 9, "color": "#808080"},
    )  # fmt: skip
    return [(2, figure)]
