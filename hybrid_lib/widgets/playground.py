"""The playground: paths of optimizers over a landscape of two weights, changed by hand.

:func:`draw` makes a figure of what :mod:`hybrid_lib.widgets.walks` computes, :func:`playground` is
the widget.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from hybrid_lib.optim import methods
from hybrid_lib.optim.schedules import SHAPES
from hybrid_lib.study import figures
from hybrid_lib.widgets.anatomy import lines
from hybrid_lib.widgets.surfaces import SURFACES, Surface
from hybrid_lib.widgets.walks import (
    ADAPTIVE,
    METHODS,
    STEPS,
    TOLERANCE,
    Path,
    Setup,
    scan,
    summary,
)

GREY = "#808080"
# The adaptive direction is often the shortest: it comes last, on top.
ARROWS = {"sgd": figures.BLUE, "merged": figures.GREEN, "adaptive": figures.VERMILLION}
# A veil per level: they add up, and at the bottom the page shows through, light or dark.
VEIL = "rgba(100,125,165,0.035)"


def draw(setup: Setup, arrows_of: str | None = None, step: int = 0) -> go.Figure:
    """The paths on a map of the surface; beside it, loss and weight of SGD at every step.

    Args:
        setup: what to draw.
        arrows_of: the method whose directions to show, or None.
        step: on which of its steps.
    """
    picture, walked = Picture(go.Figure), setup.paths()
    picture.show_map(SURFACES[setup.surface])
    picture.show_paths(setup, walked)
    picture.show_arrows(setup, walked.get(arrows_of), arrows_of, step)
    return picture.figure


def draw_scan(setup: Setup) -> go.Figure:
    """What :func:`scan` finds: a line per hybrid, a gap where it does not settle."""
    title = f"Steps until settled: {SURFACES[setup.surface].title} surface, η = {setup.lr:g}"
    figure = lines(scan(setup), title, "λ of SGD", f"steps until the loss stays below {TOLERANCE}")
    figure.update_traces(mode="lines+markers").update_xaxes(range=[-0.02, 1.02])
    return figure.update_yaxes(range=[0, STEPS + 5])


class Picture:
    """The playground's figure, made once and then only filled, so that a live one stays quick.

    Args:
        kind: ``go.Figure`` or ``go.FigureWidget``.
    """

    def __init__(self, kind: type):
        plain = make_subplots(
            2, 2, specs=[[{"rowspan": 2}, {}], [None, {}]], column_widths=[0.6, 0.4],
            horizontal_spacing=0.1, vertical_spacing=0.12,
        )  # fmt: skip
        self.figure = plain if kind is go.Figure else kind(plain)
        self.traces = {}
        self._axes()
        self._add(
            "map", go.Contour, colorscale=[[0, VEIL], [1, VEIL]], showscale=False, ncontours=20,
            hoverinfo="skip", line={"color": "rgba(128,128,128,0.35)", "width": 0.7},
            showlegend=False,
        )  # fmt: skip
        for name, symbol in (("start", "circle-open"), ("minimum", "star")):
            marker = {
                "symbol": symbol,
                "size": 12,
                "color": GREY,
                "line": {"width": 2, "color": GREY},
            }
            self._add(name, name=name, mode="markers", marker=marker,
                      hovertemplate=name + " (%{x:.2f}, %{y:.2f})<extra></extra>")  # fmt: skip
        for name in METHODS:
            self._add_method(name)
        grey = {"color": GREY, "width": 2}
        self._add("weight", panel=2, mode="lines", line=grey, showlegend=False,
                  hovertemplate="step %{x}: λ of SGD %{y:.2f}<extra></extra>")  # fmt: skip
        quiet = {"showlegend": False, "hoverinfo": "skip"}
        self._add("between", mode="lines", line={**grey, "dash": "dot"}, **quiet)
        for role, colour in ARROWS.items():
            self._add(
                role, mode="lines+markers", line={"color": colour, "width": 4}, hoverinfo="skip",
                marker={"symbol": "arrow", "size": [0, 17], "angleref": "previous",
                        "color": colour, "opacity": 1, "line": {"width": 0}},
                legend="legend2",
            )  # fmt: skip
        spot = {"size": 9, "color": "white", "line": {"width": 2.5, "color": GREY}}
        for panel in range(3):
            self._add(f"here {panel}", panel=panel, mode="markers", marker=spot, **quiet)

    def _add(self, role: str, kind: type = go.Scatter, panel: int = 0, **settings) -> None:
        """Add an empty trace to the map (panel 0), to the losses (1) or to the weights (2)."""
        where = [(1, 1), (1, 2), (2, 2)][panel]
        self.figure.add_trace(kind(**settings), *where)
        self.traces[role] = self.figure.data[-1]

    def _add_method(self, name: str) -> None:
        (colour, dash), label = methods.look(name), methods.label(name)
        line = {"color": colour, "dash": dash, "width": 2}
        shared = {"name": label, "mode": "lines", "line": line, "legendgroup": name}
        self._add(
            f"{name} path", **shared,
            hovertemplate="step %{pointNumber}: (%{x:.3f}, %{y:.3f})<extra>" + label + "</extra>",
        )  # fmt: skip
        self._add(
            f"{name} loss", panel=1, **shared, showlegend=False,
            hovertemplate="step %{x}: loss %{y:.3g}<extra>" + label + "</extra>",
        )  # fmt: skip

    def _axes(self) -> None:
        figure = self.figure
        figures.apply_style(figure, "", height=600)
        figure.update_layout(
            width=920,  # a live figure does not fit itself to the page
            margin={"l": 50, "r": 15, "t": 80, "b": 85}, title_y=0.98,
            legend={"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom", "itemwidth": 40},
            legend2={"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top", "itemwidth": 40},
        )  # fmt: skip
        plane = {"showgrid": False, "constrain": "domain", "row": 1, "col": 1}
        figure.update_xaxes(title_text="first weight", **plane)
        figure.update_yaxes(title_text="second weight", scaleanchor="x", **plane)
        figure.update_yaxes(
            title_text="loss", type="log", exponentformat="power", dtick=1,
            tickfont_size=10, row=1, col=2,  # powers are drawn larger than other numbers
        )  # fmt: skip
        figure.update_xaxes(range=[0, STEPS], row=1, col=2)
        figure.update_xaxes(title_text="step", range=[0, STEPS], row=2, col=2)
        figure.update_yaxes(title_text="λ of SGD", range=[-0.05, 1.05], row=2, col=2)
        figure.add_hline(TOLERANCE, line={"color": GREY, "width": 1, "dash": "dot"}, row=1, col=2)

    @contextlib.contextmanager
    def at_once(self):
        """Every change within becomes one message to the page."""
        with self.figure.batch_update():
            yield
            # What one trace changes and another keeps, plotly sends as undefined for the other;
            # views opened later would then be without it.
            edits = self.figure._batch_trace_edits
            for key in sorted(set().union(*edits.values())):
                for index in edits:
                    trace = self.figure.data[index]
                    if key not in edits[index] and key in trace and trace[key] is not None:
                        edits[index][key] = trace[key]

    def show_map(self, surface: Surface) -> None:
        x, y, heights = surface.grid(61)
        # Logarithmic levels: else the walls of a valley are all there is to see.
        z = torch.log10(heights + heights.median() / 60)
        self.traces["map"].update(x=_small(x), y=_small(y), z=_small(z))
        for name, places in (("start", [surface.start]), ("minimum", surface.minima)):
            self.traces[name].update(x=[p[0] for p in places], y=[p[1] for p in places])
        self.figure.update_xaxes(range=surface.bounds[0], row=1, col=1)
        self.figure.update_yaxes(range=surface.bounds[1], row=1, col=1)
        top = math.log10(surface(torch.tensor(surface.start)).item()) + 1
        self.figure.update_yaxes(range=[-4.5, top], row=1, col=2)

    def show_paths(self, setup: Setup, walked: Mapping[str, Path]) -> None:
        for name in METHODS:
            points, losses = np.empty((0, 2)), np.empty(0)
            if name in walked:
                last = walked[name].left
                points, losses = walked[name].points[:last], walked[name].losses[:last]
            shown = name in walked
            self.traces[f"{name} path"].update(
                x=_small(points[:, 0]), y=_small(points[:, 1]), visible=shown
            )
            self.traces[f"{name} loss"].update(y=_small(losses), visible=shown)
        weights = next((walked[name].lambdas[:, 1] for name in ADAPTIVE if name in walked), [])
        self.traces["weight"].update(y=_small(weights))
        noise = f", noise σ = {setup.noise:g}" if setup.noise else ""
        title = f"{SURFACES[setup.surface].title} surface, η = {setup.lr:g}{noise}"
        self.figure.update_layout(title_text=title)

    def show_arrows(self, setup: Setup, path: Path | None, name: str | None, step: int) -> None:
        """At one step: the rules' directions and, between the tips of the two, the merged one.

        The arrows point downhill, where the step goes; their lengths are in proportion.
        """
        arrows, tips, spots = {}, [], {}
        if path is not None and step < (path.left or STEPS):
            here, directions = path.points[step], path.directions[step]
            (x0, x1), _ = SURFACES[setup.surface].bounds
            scale = 0.25 * (x1 - x0) / max(np.linalg.norm(directions, axis=1).max(), 1e-300)
            arrows["merged"] = "merged", here - scale * path.merged[step]
            spots = {0: here, 1: (step, path.losses[step])}
            if name in ADAPTIVE:
                tips = here - scale * directions
                arrows["adaptive"], arrows["sgd"] = zip((ADAPTIVE[name], "SGD"), tips)
                spots[2] = (step, path.lambdas[step, 1])
        # Every trace is set once: in a batch, a second value is compared with what it replaces.
        for role, trace in ((role, self.traces[role]) for role in ARROWS):
            label, tip = arrows.get(role, ("", None))
            x, y = zip(here, tip) if role in arrows else ([], [])
            trace.update(x=x, y=y, name=f"{label} direction", visible=role in arrows)
        self.traces["between"].update(x=[tip[0] for tip in tips], y=[tip[1] for tip in tips])
        for panel in range(3):
            spot = spots.get(panel)
            x, y = ([], []) if spot is None else ([spot[0]], [spot[1]])
            self.traces[f"here {panel}"].update(x=x, y=y)
        colour = methods.look(name)[0] if name else GREY
        self.traces["merged"].update(line_color=colour, marker_color=colour)


def _small(values) -> np.ndarray:
    """Half the bytes on their way to the browser, and enough for a screen."""
    return np.asarray(values, dtype=np.float32)


def describe(path: Path, name: str, step: int) -> str:
    """The arrows of one step in words.

    >>> way = Setup(methods="atmo").paths()["atmo"]
    >>> describe(way, "atmo", 0)[:58]
    "ATMO, step 0: Adam's direction is 0.141 long, SGD's 6.27 ("
    """
    label = methods.label(name)
    if step >= (path.left or len(path.directions)):
        return f"{label} has left the map before step {step}."
    d, size = path.directions[step], path.merged_step_sizes[step] / path.lr
    lengths = np.linalg.norm(d, axis=1)
    ending = f"the step size is {size:.3g} η."
    if name not in ADAPTIVE:
        return f"{label}, step {step}: the direction is {lengths[0]:.3g} long; {ending}"
    cosine = float(np.clip(d[0] @ d[1] / max(lengths.prod(), 1e-300), -1, 1))
    weights = " and ".join(f"{λ:.2g}" for λ in path.lambdas[step])
    merged = np.linalg.norm(path.merged[step])
    return (
        f"{label}, step {step}: {ADAPTIVE[name]}'s direction is {lengths[0]:.3g} long, SGD's "
        f"{lengths[1]:.3g} ({math.degrees(math.acos(cosine)):.0f}° apart). Weighted by {weights} "
        f"and summed they are {merged:.3g} long; {ending}"
    )


def playground(setup: Setup | None = None):
    """The playground as a notebook shows it; without a front end, a picture and a table.

    Args:
        setup: what to begin with; None: the defaults.

    Returns:
        The widget to show, or None where nobody could move it.
    """
    setup = setup or Setup()
    if not figures.is_interactive():
        from IPython.display import display  # there is a notebook, so there is IPython

        figures.show(draw(setup, _first_hybrid(setup)))
        display(summary(setup.paths()))
        return None
    try:
        from google.colab import output
    except ImportError:
        pass
    else:
        output.enable_custom_widget_manager()  # Colab shows no plotly widget without
    return Playground(setup).box


class Playground:
    """Controls, figure and a table below it, tied together.

    Attributes:
        box: what a notebook shows.
        controls: the widget of each field of :class:`Setup` (``methods``: one per method, by
            name), and of ``arrows_of`` and ``step``.
        messages: what is wrong, beside the control where it is wrong; by field.
        picture: the figure.
        status: the words below it.
    """

    def __init__(self, setup: Setup):
        import ipywidgets  # imported where used: training needs no widgets

        self.widgets, self.known, self.held = ipywidgets, {}, False
        self.setup, self.walked = setup, {}
        self.picture = Picture(go.FigureWidget)
        self.status = ipywidgets.HTML()
        self.messages = {name: ipywidgets.HTML() for name in ("methods", "lr", "sgd_weight")}
        self.controls = self._make_controls()
        self.box = self._arranged()
        self.picture.show_map(SURFACES[setup.surface])
        self._walk()
        self._complain({}, setup.methods)
        for name, control in self.controls.items():
            answer = self._on_arrows if name in ("arrows_of", "step") else self._on_change
            for widget in control.values() if name == "methods" else [control]:
                widget.observe(answer, "value")

    def _make_controls(self) -> dict:
        w, setup = self.widgets, self.setup
        style = {"description_width": "105px"}
        look = {"style": style, "layout": {"width": "250px"}}
        brief = {"style": style, "layout": {"width": "180px"}}  # a slider stands beside it
        surfaces = [(surface.title, key) for key, surface in SURFACES.items()]
        share = {"min": 0, "max": 1, "step": 0.05, **brief}
        return {
            "surface": w.Dropdown(
                options=surfaces, value=setup.surface, description="Surface", **look
            ),
            "methods": {
                name: w.Checkbox(
                    name in setup.methods, description=methods.label(name), indent=False,
                    layout={"width": "120px"},
                )
                for name in METHODS
            },
            "lr": w.FloatText(setup.lr, step=0.001, description="Learning rate η", **brief),
            "noise": w.BoundedFloatText(
                setup.noise, min=0, max=1e6, step=0.1, description="Noise σ", **look
            ),
            "seed": w.BoundedIntText(
                setup.seed, min=0, max=2**31 - 1, description="Noise seed", **look
            ),
            "schedule": w.Dropdown(
                options=["constant", *SHAPES], value=setup.schedule,
                description="Schedule of λ", **look,
            ),
            "sgd_weight": w.BoundedFloatText(setup.sgd_weight, description="λ of SGD", **share),
            "sgd_weight_end": w.BoundedFloatText(
                setup.sgd_weight_end, description="λ at the end", **share
            ),
            "arrows_of": w.Dropdown(description="Arrows of", **look),
            "step": w.BoundedIntText(0, min=0, max=STEPS - 1, description="Step", **brief),
        }  # fmt: skip

    def _arranged(self):
        w, c, says = self.widgets, self.controls, self.messages

        def row(text, kind, **ends):
            looks = {"readout": False, "layout": {"width": "120px"}}
            slider = kind(tooltip=text.description, **looks, **ends)
            _tie(text, slider)
            return w.HBox([text, slider])

        def column(title, *children):
            head = w.HTML(f"<b>{title}</b>")
            return w.VBox([head, *children], layout={"width": "310px", "margin": "0 10px 8px 0"})

        wrapped = {"flex_flow": "row wrap"}
        methods = w.Box(list(c["methods"].values()), layout=wrapped)
        share = {"min": 0, "max": 1, "step": 0.01}
        top = w.Box(
            [
                column(
                    "Landscape", c["surface"], row(c["lr"], w.FloatLogSlider, min=-4, max=0),
                    says["lr"], c["noise"], c["seed"],
                ),
                column("Methods", methods, says["methods"]),
                column(
                    "Weights", c["schedule"], row(c["sgd_weight"], w.FloatSlider, **share),
                    row(c["sgd_weight_end"], w.FloatSlider, **share), says["sgd_weight"],
                ),
            ],
            layout=wrapped,
        )  # fmt: skip
        steps = row(c["step"], w.IntSlider, min=0, max=STEPS - 1)
        steps.children[1].layout.width = "400px"
        below = w.Box([c["arrows_of"], steps], layout=wrapped)
        return w.VBox([top, self.picture.figure, below, self.status])

    def _on_change(self, change) -> None:
        if self.held:
            return
        c = self.controls
        if change["owner"] is c["surface"]:
            self.held = True  # one answer to the two changes
            c["lr"].value = SURFACES[c["surface"].value].lr
            self.held = False
        values = {f.name: c[f.name].value for f in fields(Setup) if f.name != "methods"}
        values["methods"] = tuple(name for name in METHODS if c["methods"][name].value)
        faults = Setup.faults(**values)
        self._complain(faults, values["methods"])
        if not faults:
            before, self.setup = self.setup, Setup(**values)
            with self.picture.at_once():
                if self.setup.surface != before.surface:
                    self.picture.show_map(SURFACES[self.setup.surface])
                self._walk()

    def _complain(self, faults: dict, methods: tuple) -> None:
        hints = {}
        if not set(methods) & set(ADAPTIVE):
            hints["sgd_weight"] = "no hybrid is chosen: λ has nothing to weigh"
        for field, message in self.messages.items():
            text = faults.get(field) or hints.get(field)
            message.value = _ALERT.format(text) if text else ""

    def _on_arrows(self, change) -> None:
        if not self.held:
            with self.picture.at_once():
                self._point()

    def _walk(self) -> None:
        if len(self.known) > 300:  # some 20 KB each
            self.known.clear()
        self.walked = self.setup.paths(self.known)
        self.picture.show_paths(self.setup, self.walked)
        c = self.controls
        c["sgd_weight_end"].disabled = self.setup.schedule == "constant"
        wished = c["arrows_of"].value
        self.held = True  # new options change the value on their way
        c["arrows_of"].options = [(methods.label(name), name) for name in self.walked]
        c["arrows_of"].value = wished if wished in self.walked else _first_hybrid(self.setup)
        self.held = False
        self._point()

    def _point(self) -> None:
        name, step = self.controls["arrows_of"].value, self.controls["step"].value
        self.picture.show_arrows(self.setup, self.walked[name], name, step)
        table = summary(self.walked).reset_index()
        rows = [(_HEAD, table.columns), *((_CELL, row) for row in table.to_numpy())]
        body = "".join(f"<tr>{' '.join(map(cell.format, row))}</tr>" for cell, row in rows)
        words = describe(self.walked[name], name, step)
        self.status.value = f'<div role="status"><p>{words}</p><table>{body}</table></div>'


_HEAD = '<th style="text-align: left; padding: 2px 20px 2px 0">{}</th>'
_CELL = '<td style="padding: 2px 20px 2px 0">{}</td>'
_ALERT = '<span role="alert" style="color:#D55E00">{}</span>'


def _tie(text, slider) -> None:
    """Let a slider move a number and move with it; only the number has a label and every value."""
    low, high = slider.min, slider.max
    if hasattr(slider, "base"):  # a logarithmic one: its ends are exponents
        low, high = slider.base**low, slider.base**high

    def to_text(change):
        if change["new"] != text.value:  # else the text moved the slider
            text.value = float(f"{change['new']:.3g}")

    def to_slider(change):
        if low <= change["new"] <= high:  # what it cannot show it leaves to the text
            slider.value = change["new"]

    to_slider({"new": text.value})
    slider.observe(to_text, "value")
    text.observe(to_slider, "value")


def _first_hybrid(setup: Setup) -> str:
    """The first hybrid that is shown, else the first method."""
    shown = [name for name in METHODS if name in setup.methods]
    return next((name for name in shown if name in ADAPTIVE), shown[0])
