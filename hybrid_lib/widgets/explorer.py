"""The explorer: choose an experiment with widgets, watch it train, keep and compare runs."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import itertools
import math
import re
import sys
import threading
import time
from pathlib import Path

import comm
import ipywidgets as widgets
import plotly.graph_objects as go
import torch
from IPython.display import display
from plotly.subplots import make_subplots
from pydantic import ValidationError

from hybrid_lib.optim import methods
from hybrid_lib.optim.schedules import SHAPES
from hybrid_lib.study import figures, planning
from hybrid_lib.training import data
from hybrid_lib.training.experiments import (
    EXPERIMENTS,
    Experiment,
    error_messages,
    get_experiment,
)
from hybrid_lib.training.history import FILE, History
from hybrid_lib.training.loop import run

METHODS = [(e.label, name) for name, e in EXPERIMENTS.items()]
METHODS += [(m.label, name) for name, m in methods.METHODS.items() if name not in EXPERIMENTS]
PAIRS = ("+".join(pair) for pair in itertools.permutations(methods.RULES, 2))
METHODS += [(methods.get_method(pair).label, pair) for pair in PAIRS]
# Per section: (field of Experiment, label, kind, choices, what an empty text means).
SECTIONS = {
    "The step": [
        ("lr", "Learning rate η", widgets.FloatText, None, ""),
        ("weight_decay", "Weight decay γ", widgets.Text, None, "default"),
        ("lr_schedule", "Schedule of η", widgets.Dropdown, ("constant", "cosine", "multistep"), ""),
        ("lr_milestones", "Milestones", widgets.Text, None, "epochs: 6, 9"),
        ("momentum", "Momentum μ", widgets.Text, None, "default"),
        ("partial", "Padam's p", widgets.Text, None, "1/8"),
        ("hessian_power", "Hessian power", widgets.Text, None, "1"),
    ],
    "The weights λ": [
        ("lambda_schedule", "Schedule of λ", widgets.Dropdown, ("constant", *SHAPES), ""),
        ("lambda_epochs", "over epochs", widgets.Text, None, "all"),
        ("lambda_start", "λ at the start", widgets.Text, None, "0.5, 0.5"),
        ("lambda_end", "λ at the end", widgets.Text, None, "0, 1"),
    ],
    "The run": [
        ("dataset", "Data set", widgets.Combobox, data.NAMES, ""),
        ("train_limit", "Training images", widgets.Text, None, "all"),
        ("width", "Network width", widgets.IntText, None, ""),
        ("epochs", "Epochs", widgets.IntText, None, ""),
        ("batch_size", "Batch size", widgets.IntText, None, ""),
        ("seed", "Seed", widgets.IntText, None, ""),
        ("protocol", "Protocol", widgets.Dropdown, ("clean", "released"), ""),
    ],
}
FIELDS = [field for section in SECTIONS.values() for field, *_ in section]
KEPT = [field for field, *_ in SECTIONS["The run"]]  # these do not follow the method
MEANT = {  # where the general message would speak of tuples
    "lambda_start": "two numbers of at least 0, as in 0.5, 0.5",
    "lambda_end": "two numbers of at least 0, as in 0, 1",
    "lr_milestones": "increasing epochs, as in 6, 9",
}
STATUS_EVERY = 0.2  # seconds between two updates of the line below the buttons
LEFT, RIGHT = 410, 545  # widths in pixels
LOSS_TICKS = [digit * 10.0**power for power in range(-7, 3) for digit in (1, 2, 5)]
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")


class Explorer:
    """Widgets around :func:`hybrid_lib.run`.

    Training runs in a thread, so that other cells can be used meanwhile; in Colab, which ignores
    what threads draw, it runs in the cell and is stopped by interrupting it.

    Args:
        runs: the folder below which runs are kept, one folder per name.
        method: a name of ``EXPERIMENTS`` or "RULE+RULE".
        start: fields of Experiment to begin with; the others are those of the demo scale. Those
            without a control stay as they are.

    Attributes:
        controls: the input widgets, by field of Experiment; also ``method`` and ``run_name``.
        messages: beside each control, what is wrong with it; empty if nothing is.
        view: everything, as one widget.
        history: of the current run, None before the first.
    """

    def __init__(self, runs: str | Path, method: str = "dyn_padam_sgd", **start):
        self.runs = Path(runs)
        self.history: History | None = None
        self.foreground = "google.colab" in sys.modules
        self._shown: str | None = None  # the name of the run in ``history``
        self._stop, self._thread, self._running = threading.Event(), None, False
        self._drawing = threading.RLock()  # controls draw, and so does the training thread
        self._filling, self._proposed = False, ""
        self._fixed = {field: value for field, value in start.items() if field not in FIELDS}
        first = planning.plan("demo", only=[method], **start)[0]
        with contextlib.nullcontext() if figures.is_interactive() else _unheard():
            self._make_widgets(method)

        self._fill(first, FIELDS)
        self._propose_name()
        for field, control in self.controls.items():
            control.observe(lambda change, field=field: self._changed(field), "value")
        self.earlier.observe(lambda change: self._draw(), "value")
        self.report.observe(lambda change: self._draw(), "value")
        self.start_button.on_click(lambda button: self.start())
        self.stop_button.on_click(lambda button: self.stop())
        self.reset_button.on_click(lambda button: self.reset())
        self._list_earlier()
        self._changed("epochs")
        self._draw()

    def experiment(self) -> Experiment:
        """The experiment that the controls describe.

        Raises:
            pydantic.ValidationError: if there is none.
        """
        method = get_experiment(self.controls["method"].value)
        values = {f: self.controls[f].value for f in FIELDS if not self.controls[f].disabled}
        if values.get("lambda_epochs") == "" and method.lambda_epochs is not None:
            values["lambda_epochs"] = values["epochs"]
        if values["lr_schedule"] != "multistep":
            values["lr_milestones"] = ()
        chosen = {field: value for field, value in values.items() if value != ""}
        return dataclasses.replace(method, **self._fixed, **chosen)

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
        if self._running:
            return
        experiment, folder = self.experiment(), self.folder
        self._stop.clear()
        self._running = True
        self.start_button.disabled, self.stop_button.disabled = True, False
        self._say(f"loading {experiment.dataset} …")
        if self.foreground:
            self._train(experiment, folder)
        else:
            self._thread = threading.Thread(
                target=self._train, args=(experiment, folder), daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Stop after the current step; what was finished is kept, Start goes on."""
        if self._running:
            self._say("stopping …")
        self._stop.set()

    def reset(self) -> None:
        """Stop, clear the curves and choose a new name; finished runs stay on disk."""
        self.stop()
        self.wait()
        self.history, self._shown, self._proposed = None, None, ""
        self._propose_name()
        self._say("")
        self._list_earlier()
        self._check()
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
        if figures.is_interactive():
            display(self.view)
            return
        figures.show(self.preview)
        if self.curves.data:
            figures.show(self.curves)

    def _train(self, experiment: Experiment, folder: Path) -> None:
        steps = itertools.count()
        shown = time.monotonic()

        def should_stop() -> bool:
            nonlocal shown
            step = next(steps)
            if time.monotonic() - shown > STATUS_EVERY:
                shown = time.monotonic()
                done, images = len(self.history.rows), self.history.environment["train_images"]
                per_epoch = math.ceil(images / experiment.batch_size)
                self._say(
                    f"epoch {done + 1} of {experiment.epochs}, "
                    f"step {step % per_epoch + 1} of {per_epoch}"
                )
            return self._stop.is_set()

        def arrived(history: History) -> None:
            self.history, self._shown = history, folder.name
            self._draw()

        try:
            arrived(
                run(experiment, folder, progress=False, should_stop=should_stop, on_epoch=arrived)
            )
            self._say(_outcome(self.history))
        except KeyboardInterrupt:
            self._say("stopped by an interrupt; Start goes on after the last finished epoch")
        except Exception as error:  # shown beside the buttons: a thread has nobody to raise to
            self.status.value = _warning(f"{type(error).__name__}: {error}")
        finally:
            self._running, self.stop_button.disabled = False, True
            self._list_earlier()
            self._check()

    def _changed(self, field: str) -> None:
        if self._filling:
            return
        method = get_experiment(self.controls["method"].value)
        if field == "method":
            epochs = max(1, self.controls["epochs"].value)
            self._fill(method.scaled(epochs), [f for f in FIELDS if f not in KEPT])
        available = method.method.settings
        for name in ("momentum", "weight_decay", "partial", "hessian_power"):
            self.controls[name].disabled = name not in available
        constant = self.controls["lambda_schedule"].value == "constant"
        for name in ("lambda_schedule", "lambda_start"):
            self.controls[name].disabled = not method.is_hybrid
        for name in ("lambda_end", "lambda_epochs"):
            self.controls[name].disabled = not method.is_hybrid or constant
        self.controls["lr_milestones"].disabled = self.controls["lr_schedule"].value != "multistep"
        self._check()

    def _check(self) -> None:
        """Say beside each control what is wrong with it; preview what is right."""
        experiment, problems = None, []
        try:
            experiment = self.experiment()
        except ValidationError as error:
            problems += error_messages(error)
            try:  # Experiment looks at the data set only once every number is right
                data.check_name(self.controls["dataset"].value)
            except ValueError as unknown:
                problems.append(str(unknown))
        if self.controls["run_name"].value == self._proposed:
            self._propose_name(experiment)
        try:
            folder = self.folder
            if experiment is not None and _holds_another(folder, experiment):
                problems.append("run_name='…': another experiment is kept under this name")
        except ValueError as error:
            problems.append(str(error))
        found = {field: [] for field in self.messages}
        for line in problems:
            field = re.match(r"\w*", line).group()
            beside = field if field in found else "method"
            text = MEANT.get(field) or re.sub(r"^\w+=('[^']*'|\S+): ", "", line)
            found[beside] += [] if text in found[beside] else [text]
        for field, lines in found.items():
            self.messages[field].value = _warning("; ".join(lines)) if lines else ""
            self.messages[field].layout.display = "" if lines else "none"
        self.start_button.disabled = bool(problems) or self._running
        if not problems:
            self.papermill.value = planning.as_papermill(experiment, folder)
            self.python.value = planning.as_python(experiment, folder)
            self._draw_preview(experiment)

    def _draw_preview(self, experiment: Experiment) -> None:
        epochs, weights = list(range(1, experiment.epochs + 1)), experiment.lambdas()
        rules = _rule_names(experiment)
        lines = [(1, _schedule_line("η", epochs, experiment.learning_rates(), figures.GREEN))]
        if len(rules) > 1:
            pairs = list(zip(*(weights(epoch - 1) for epoch in epochs)))
            looks = ((figures.VERMILLION, "solid"), (figures.BLUE, "dash"))
            for rule, values, look in zip(rules, pairs, looks):
                lines.append((2, _schedule_line(f"λ of {rule}", epochs, list(values), *look)))
        alone = "" if len(rules) > 1 else f"{rules[0]} alone: nothing to weigh"
        with self._drawing:
            _put(self.preview, lines)
            with self.preview.batch_update():
                self.preview.layout.annotations[0].text = alone
                self.preview.update_xaxes(range=_epoch_range(experiment.epochs))
                self.preview.update_xaxes(dtick=1 if experiment.epochs <= 12 else None)

    def _draw(self) -> None:
        """The current run, the chosen earlier ones and, if wished, the report's points."""
        with self._drawing:
            histories = {}
            if self.history is not None and self.history.rows:
                histories["this run"] = self.history
            for name in self.earlier.value:
                with contextlib.suppress(OSError, ValueError):  # gone or damaged by now
                    histories[name] = History.load(self.runs / name)
            longest = max([h.experiment.epochs for h in histories.values()], default=1)
            lines = []
            looks = zip(_colours(histories.values()), itertools.cycle(SYMBOLS))
            for (name, history), look in zip(histories.items(), looks):
                lines = _lines(name, history, *look) + lines  # this run on top of the others
            if self.report.value:
                points = _report_points(self.controls["method"].value)
                lines.append(points)
                longest = longest if histories else max([1, *points[1]["x"]])
            _put(self.curves, lines)
            with self.curves.batch_update():
                self.curves.update_xaxes(range=_epoch_range(longest))
                self.curves.update_xaxes(dtick=1 if longest <= 12 else None)
                self.curves.layout.title.text = _title(self.history)

    def _fill(self, experiment: Experiment, fields) -> None:
        self._filling = True
        for field in fields:
            control, value = self.controls[field], getattr(experiment, field)
            if isinstance(value, tuple):
                value = ", ".join(f"{v:g}" for v in value)
            if isinstance(control, (widgets.Text, widgets.Combobox)):
                value = "" if value is None else str(value)
            control.value = value
        self._filling = False

    def _propose_name(self, experiment: Experiment | None = None) -> None:
        """A name after the method that is free, or holds a part of this very experiment."""
        method = self.controls["method"].value.replace("+", "-")
        fits = re.fullmatch(rf"{re.escape(method)}-\d+", self._proposed)
        if not fits or (experiment and _holds_another(self.runs / self._proposed, experiment)):
            names = (f"{method}-{i}" for i in itertools.count(1))
            self._proposed = next(name for name in names if not (self.runs / name).exists())
        self._filling = True
        self.controls["run_name"].value = self._proposed
        self._filling = False

    def _list_earlier(self) -> None:
        kept, options = self.earlier.value, []
        for file in sorted(self.runs.glob(f"*/{FILE}")):
            name = file.parent.name
            if name != self._shown:
                with contextlib.suppress(OSError, ValueError):
                    options.append((_summary(name, History.load(file)), name))
        self.earlier.options = options
        self.earlier.value = [name for _, name in options if name in kept]

    def _say(self, text: str) -> None:
        self.status.value = f'<div role="status">{html.escape(text)}&nbsp;</div>'

    def _make_widgets(self, method: str) -> None:
        wide = {"style": {"description_width": "110px"}, "layout": {"width": f"{LEFT - 10}px"}}
        self.controls = {
            "method": widgets.Dropdown(
                options=METHODS, value=method, description="Method", **wide
            ),
            "run_name": widgets.Text(
                description="Name of the run", continuous_update=False, **wide
            ),
        }  # fmt: skip
        for section in SECTIONS.values():
            for field, *description in section:
                self.controls[field] = _control(*description)
        self.messages = {
            field: widgets.HTML(layout={"display": "none", "width": control.layout.width})
            for field, control in self.controls.items()
        }
        button = {"layout": {"width": "100px"}}
        self.start_button = widgets.Button(description="Start", button_style="primary", **button)
        self.stop_button = widgets.Button(description="Stop", disabled=True, **button)
        self.reset_button = widgets.Button(description="Reset", **button)
        self.status = widgets.HTML()
        look = {"style": {"description_width": "110px"}, "layout": {"width": f"{RIGHT - 30}px"}}
        self.earlier = widgets.SelectMultiple(description="Earlier runs", rows=4, **look)
        self.report = widgets.Checkbox(
            description="the report's accuracies of this method (CIFAR-10)",
            indent=False, layout={"width": f"{RIGHT - 120}px", "margin": "0 0 0 118px"},
        )  # fmt: skip
        look = {"style": {"description_width": "110px"}}
        self.papermill = widgets.Textarea(
            description="With papermill", rows=3, layout={"width": f"{LEFT + RIGHT}px"}, **look
        )
        self.python = widgets.Textarea(
            description="With Python", rows=8, layout={"width": f"{LEFT + RIGHT}px"}, **look
        )
        self.preview, self.curves = _preview_figure(), _curves_figure()
        self.view = self._arranged()

    def _arranged(self) -> widgets.Widget:
        cells = {
            field: widgets.VBox([control, self.messages[field]])
            for field, control in self.controls.items()
        }
        buttons = widgets.HBox([self.start_button, self.stop_button, self.reset_button])
        gap = {"margin": "0 0 0 10px"}
        top = widgets.Box(
            [
                widgets.VBox([cells["method"], cells["run_name"]]),
                widgets.VBox([buttons, self.status], layout=gap),
            ],
            layout={"flex_flow": "row wrap"},
        )
        left = []
        for title, section in SECTIONS.items():
            left.append(widgets.HTML(f"<b>{title}</b>", layout={"margin": "8px 0 0 0"}))
            wrapped = {"flex_flow": "row wrap"}
            left.append(widgets.Box([cells[field] for field, *_ in section], layout=wrapped))
            if title == "The weights λ":
                left.append(self.preview)
        right = [self.curves, self.earlier, self.report]
        # The curves come first, and to the right: where both do not fit, they stay below Start.
        columns = widgets.Box(
            [
                widgets.VBox(right, layout={"width": f"{RIGHT}px", **gap}),
                widgets.VBox(left, layout={"width": f"{LEFT}px"}),
            ],
            layout={"flex_flow": "row-reverse wrap", "justify_content": "flex-end"},
        )
        again = widgets.HTML("<b>The same again</b> (click into a box, Ctrl+A, Ctrl+C)")
        return widgets.VBox(
            [top, columns, again, self.papermill, self.python],
        )  # fmt: skip


@contextlib.contextmanager
def _unheard():
    """Widgets made in here talk to nobody: an executed notebook would keep their state for ever."""
    real, comm.create_comm = comm.create_comm, comm.DummyComm
    try:
        yield
    finally:
        comm.create_comm = real


def _control(label: str, kind, choices, empty: str) -> widgets.Widget:
    options = {} if choices is None else {"options": list(choices)}
    if kind is widgets.Text:
        options["placeholder"] = empty
    if kind is not widgets.Dropdown:
        options["continuous_update"] = False  # judged when complete, not while it is typed
    style, layout = {"description_width": "110px"}, {"width": f"{LEFT // 2 - 5}px"}
    return kind(description=label, style=style, layout=layout, **options)


def _put(figure: go.FigureWidget, lines: list[tuple[int, dict]]) -> None:
    """(row, trace) pairs into a figure; lines that are there already grow in place."""
    looks = [(trace.name, trace.line.color) for trace in figure.data]
    if looks != [(line["name"], line["line"]["color"]) for _, line in lines]:
        figure.data = []
        traces = [go.Scatter(**line) for _, line in lines]
        figure.add_traces(traces, rows=[row for row, _ in lines], cols=[1] * len(lines))
        return
    changed = {
        i: line
        for i, (_, line) in enumerate(lines)
        if (list(figure.data[i].x), list(figure.data[i].y)) != (line["x"], line["y"])
    }
    if changed:
        # Not batch_update(): it would also empty what stays as it is, in views opened later.
        for key in ("mode", "x", "y"):
            figure.plotly_restyle({key: [line[key] for line in changed.values()]}, list(changed))


def _schedule_line(name: str, epochs: list, values: list, colour: str, dash: str = "solid") -> dict:
    line = {"shape": "hvh", "width": 2, "color": colour, "dash": dash}
    shown = name != "η"  # the axis says so
    return {"x": epochs, "y": values, "name": name, "mode": "lines", "line": line,
            "showlegend": shown}  # fmt: skip


def _holds_another(folder: Path, experiment: Experiment) -> bool:
    """Whether a run of another experiment is kept there."""
    if not (folder / FILE).exists():
        return False
    try:
        return History.load(folder).experiment != experiment
    except (OSError, ValueError):  # damaged: not to be written over
        return True


def _rule_names(experiment: Experiment) -> list[str]:
    optimizer = experiment.build_optimizer([torch.zeros(1, requires_grad=True)])
    return [type(rule).__name__ for rule in optimizer.param_groups[0]["rules"]]


def _summary(name: str, history: History) -> str:
    accuracy = f", test {history.final['test_accuracy']:.4f}" if history.rows else ""
    return f"{name}: {len(history.rows)} epochs{accuracy}, {history.label}, {history.dataset}"


def _outcome(history: History) -> str:
    done = len(history.rows)
    if history.status == "stopped":
        return f"stopped {history.note}; {done} finished epochs are kept, Start goes on"
    if history.status == "diverged":
        return f"diverged: {history.note}; {done} epochs are kept"
    return (
        f"complete: test accuracy {history.final['test_accuracy']:.4f} in the last epoch "
        f"(highest: {history.best['test_accuracy']:.4f}, epoch {history.best['epoch']})"
    )


def _warning(text: str) -> str:
    colour = f"var(--jp-error-color1, {figures.VERMILLION})"  # JupyterLab's own fits its theme
    return f'<div role="alert" style="color:{colour};line-height:1.3">⚠ {html.escape(text)}</div>'


def _preview_figure() -> go.FigureWidget:
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.1)
    figure.update_xaxes(title_text="epoch", title_standoff=8, row=2)
    figure.update_yaxes(title_text="η", row=1, rangemode="tozero")
    figure.update_yaxes(title_text="λ", range=[-0.08, 1.08], dtick=0.5, row=2)
    figures.apply_style(figure, "", height=270)
    figure.add_annotation(x=0.5, y=0.2, xref="paper", yref="paper", showarrow=False, text="")
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    margin = {"l": 60, "r": 10, "t": 34, "b": 40}
    return go.FigureWidget(figure.update_layout(width=LEFT - 10, legend=legend, margin=margin))


def _curves_figure() -> go.FigureWidget:
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06)
    figure.update_yaxes(title_text="loss (nats)", type="log", tickvals=LOSS_TICKS, row=1)
    figure.update_yaxes(title_text="accuracy", row=2)
    figure.update_xaxes(title_text="epoch", title_standoff=8, row=2)
    figures.apply_style(figure, "", height=560)
    legend = {"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top", "traceorder": "reversed"}
    margin = {"l": 70, "r": 10, "t": 76, "b": 110}
    return go.FigureWidget(figure.update_layout(width=RIGHT - 10, legend=legend, margin=margin))


def _title(history: History | None) -> str:
    if history is None:
        return "No run yet: press Start"
    return f"{history.label}, {history.dataset}<br><sup>solid: test, dotted: training</sup>"


def _epoch_range(epochs: int) -> list[float]:
    margin = max(0.3, 0.02 * epochs)
    return [1 - margin, epochs + margin]


def _colours(histories) -> list[str]:
    """Each run its method's colour, or a free one where that is taken."""
    taken: list[str] = []
    for history in histories:
        own = methods.look(history.experiment.name)[0]
        palette = (own, figures.BLUE, figures.VERMILLION, figures.GREEN, figures.PURPLE)
        taken.append(next((colour for colour in palette if colour not in taken), "#808080"))
    return taken


def _lines(name: str, history: History, colour: str, symbol: str) -> list[tuple[int, dict]]:
    """(row of the figure, trace) of a run: test solid, training dotted; only the first is named."""
    table = history.frame()
    label = f"{name}: {history.label}, {history.dataset}"
    return [
        (
            row,
            {
                "x": list(table.index),
                "y": list(table[f"{part}_{what}"]),
                "name": label,
                "mode": "lines+markers" if len(table) <= 30 else "lines",
                "marker": {"symbol": symbol, "size": 6},
                "line": {"color": colour, "width": width, "dash": dash},
                "showlegend": row == 1 and part == "test",
                "legendgroup": name,
                "hovertemplate": f"epoch %{{x}}: {part} {what} %{{y:.4f}}<extra>{name}</extra>",
            },
        )
        for row, what in ((1, "loss"), (2, "accuracy"))
        for part, dash, width in (("train", "dot", 1.5), ("test", "solid", 2.5))
    ]


def _report_points(method: str) -> tuple[int, dict]:
    points = figures.paper("milestones").query("optimizer == @method")
    there = "report, test (CIFAR-10)" if len(points) else "the report has no such method"
    grey = "#808080"
    return 2, {
        "x": list(points["epoch"]),
        "y": list(points["test_accuracy"]),
        "name": there,
        "mode": "markers",
        "marker": {"symbol": "diamond-open", "size": 9, "color": grey},
        "line": {"color": grey},
    }
