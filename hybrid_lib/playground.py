"""The playground: paths of optimizers over a landscape of two weights.

:func:`paths` computes, :func:`draw` makes a figure of it, :func:`playground` is the widget.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from hybrid_lib import hybrid, plots, schedules
from hybrid_lib.anatomy import lines, record
from hybrid_lib.experiments import LABELS, SCHEDULES
from hybrid_lib.surfaces import SURFACES, Surface

METHODS = ("sgd", "adam", "adahessian", "atmo", "padam_sgd", "adasgd")
ADAPTIVE = {"atmo": "Adam", "padam_sgd": "Padam", "adasgd": "AdaHessian"}  # the hybrids' first rule
STEPS = 250
TOLERANCE = 0.01  # of the loss; the lowest point of every surface has the value 0
FAR = 2.0  # a path has left the map once it is that many widths away from its centre
GREY = "#808080"
# The adaptive direction is often the shortest: it comes last, on top.
ARROWS = {"sgd": plots.BLUE, "merged": plots.GREEN, "adaptive": plots.VERMILLION}
# A veil per level: they add up, and at the bottom the page shows through, light or dark.
VEIL = "rgba(100,125,165,0.035)"


@dataclass(frozen=True, eq=False)
class Path:
    """One method's way over a surface of ``steps`` steps.

    Attributes:
        points: (steps + 1, 2), the start first.
        losses: (steps + 1,), the heights there.
        directions: (steps, rules, 2), what each rule answered; a step goes against them.
        step_sizes: (steps, rules).
        lambdas: (steps, rules), the weights in force.
        lr: the learning rate.
        left: the step after which the path was far outside of the map, or None.
    """

    points: np.ndarray
    losses: np.ndarray
    directions: np.ndarray
    step_sizes: np.ndarray
    lambdas: np.ndarray
    lr: float
    left: int | None

    @property
    def merged(self) -> np.ndarray:
        """(steps, 2): the directions, weighted and summed."""
        return (self.lambdas[:, :, None] * self.directions).sum(axis=1)

    @property
    def merged_step_sizes(self) -> np.ndarray:
        """(steps,): the step sizes, weighted and summed."""
        return (self.lambdas * self.step_sizes).sum(axis=1)

    def settled(self, tolerance: float = TOLERANCE) -> int | None:
        """The number of steps after which the loss stays below ``tolerance``; None: never."""
        (above,) = np.nonzero(~(self.losses < tolerance))  # nan is above
        first = 0 if len(above) == 0 else int(above[-1]) + 1
        return None if self.left is not None or first == len(self.losses) else first


def method(name: str, lr: float) -> Callable[[list[Tensor]], hybrid.Hybrid]:
    """A method of Table I on a surface: its own settings, the rate ``lr``, no weight decay.

    Weight decay would move the minima.
    """
    return functools.partial(getattr(hybrid, name), lr=lr, weight_decay=0.0)


def paths(
    surface: Surface,
    optimizers: Mapping[str, Callable[[list[Tensor]], hybrid.Hybrid]],
    lambdas: Callable[[int], tuple] | Mapping[str, Callable[[int], tuple]] | None = None,
    steps: int = STEPS,
    noise: float = 0.0,
    seed: int = 0,
) -> dict[str, Path]:
    """Walk over a surface with several optimizers at once.

    The optimizers move the weights, each its own; what their rules answer is noted on the way
    (:func:`hybrid_lib.anatomy.record`). Where a rule wants the Hessian diagonal, it gets the exact
    one, not Hutchinson's estimate.

    Args:
        surface: where.
        optimizers: functions of a list of parameters, by name.
        lambdas: a schedule, called with the 0-based step, for all optimizers with two rules, or
            one for each name. None: the optimizers' own weights.
        steps: how many.
        noise: standard deviation of what is added to the gradient, the same for every optimizer:
            they are compared on the same draws.
        seed: of the noise.

    Raises:
        ValueError: for no optimizer, no step, or noise that is negative or not finite.

    >>> ravine = SURFACES["ravine"]
    >>> way = paths(ravine, {"adam": method("adam", lr=0.1)}, steps=100)["adam"]
    >>> way.points.shape, way.settled()
    ((101, 2), 63)
    """
    if not optimizers:
        raise ValueError("no optimizer to walk with")
    if steps < 1:
        raise ValueError(f"steps={steps!r}: must be at least 1")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise={noise!r}: must be a finite number, at least 0")
    names = list(optimizers)
    here = torch.tensor([surface.start] * len(names), dtype=torch.float64)  # a row each
    gradients, draws = torch.zeros_like(here), torch.Generator().manual_seed(seed)
    draws = noise * torch.randn(steps, 2, generator=draws, dtype=torch.float64)
    groups = []
    for make, w, g in zip(optimizers.values(), here, gradients):
        w.grad = g
        groups += make([w]).param_groups
    # All in one optimizer, a parameter group each: one call moves them.
    crowd = hybrid.Hybrid(groups, groups[0]["rules"], groups[0]["lr"])
    recorded = [record(group) for group in crowd.param_groups]
    if not isinstance(lambdas, Mapping):
        lambdas = dict.fromkeys(names, lambdas)
    timetables = [
        lambdas.get(name) if len(rules) == 2 else None for name, rules in zip(names, recorded)
    ]

    points, in_force = [here.clone()], []
    with np.errstate(all="ignore"):  # a path that has left the map may overflow
        for step in range(steps):
            slopes, hess_diag = map(torch.from_numpy, surface.slopes(here.numpy()))
            torch.add(slopes, draws[step], out=gradients)
            for group, timetable in zip(crowd.param_groups, timetables):
                if timetable is not None:
                    group["lambdas"] = timetable(step)
            in_force.append([group["lambdas"] for group in crowd.param_groups])
            crowd.step(hess_diag=hess_diag)
            points.append(here.clone())

    points = torch.stack(points)
    losses = surface(points).numpy()
    return {
        name: _path(
            surface, points[:, i].numpy(), losses[:, i], recorded[i],
            [weights[i] for weights in in_force], crowd.param_groups[i]["lr"],
        )
        for i, name in enumerate(names)
    }  # fmt: skip


def _path(surface, points, losses, recorded, lambdas, lr) -> Path:
    answers = [r.answers for r in recorded]
    directions = torch.stack([torch.stack([d for d, _ in of_rule]) for of_rule in answers], 1)
    step_sizes = np.array([[η for _, η in of_rule] for of_rule in answers]).T
    (x0, x1), (y0, y1) = surface.bounds
    away = np.abs(points - [(x0 + x1) / 2, (y0 + y1) / 2]) / [x1 - x0, y1 - y0]
    (outside,) = np.nonzero(~(away < FAR).all(axis=1))  # nan is outside
    left = int(outside[0]) if len(outside) else None
    return Path(points, losses, directions.numpy(), step_sizes, np.array(lambdas), lr, left)


@dataclass(frozen=True)
class Setup:
    """Everything that decides a picture of the playground.

    Attributes:
        surface: a key of :data:`hybrid_lib.surfaces.SURFACES`.
        methods: names among ``METHODS``, or text as in "sgd, atmo".
        lr: the learning rate of all methods; None: the surface's.
        schedule: "constant" (``sgd_weight`` on every step) or a key of
            :data:`hybrid_lib.experiments.SCHEDULES`, from ``sgd_weight`` to ``sgd_weight_end``.
        sgd_weight, sgd_weight_end: λ of SGD, in [0, 1]; the adaptive rule has the rest.
        noise, seed: of the gradient, as :func:`paths` takes them.

    Raises:
        ValueError: naming every value that is impossible.
    """

    surface: str = "beale"
    methods: tuple[str, ...] | str = ("sgd", "adam", "atmo")
    lr: float | None = None
    schedule: str = "constant"
    sgd_weight: float = 0.1
    sgd_weight_end: float = 1.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.methods, str):
            names = tuple(self.methods.replace(",", " ").split())
            object.__setattr__(self, "methods", names)
        faults = self.faults(**{f.name: getattr(self, f.name) for f in fields(self)})
        if faults:
            raise ValueError("; ".join(faults.values()))
        if self.lr is None:
            object.__setattr__(self, "lr", SURFACES[self.surface].lr)

    @staticmethod
    def faults(surface, methods, lr, schedule, sgd_weight, sgd_weight_end, noise, seed) -> dict:
        """What is wrong, as one message per field."""
        found, shapes = {}, ("constant", *SCHEDULES)
        if surface not in SURFACES:
            found["surface"] = f"surface={surface!r}: must be one of {', '.join(SURFACES)}"
        strangers = [name for name in methods if name not in METHODS]
        if strangers or not methods:
            given = ", ".join(strangers) or "none"
            found["methods"] = f"methods: {given} given; choose among {', '.join(METHODS)}"
        if lr is not None and not (math.isfinite(lr) and lr > 0):
            found["lr"] = f"lr={lr!r}: must be a finite number above 0"
        if schedule not in shapes:
            found["schedule"] = f"schedule={schedule!r}: must be one of {', '.join(shapes)}"
        for field, weight in (("sgd_weight", sgd_weight), ("sgd_weight_end", sgd_weight_end)):
            if not 0 <= weight <= 1:
                found[field] = f"{field}={weight!r}: must lie between 0 and 1"
        if not (math.isfinite(noise) and noise >= 0):
            found["noise"] = f"noise={noise!r}: must be a finite number, at least 0"
        if not 0 <= seed < 2**63:
            found["seed"] = f"seed={seed!r}: must be at least 0"
        return found

    def lambdas(self):
        """The schedule of the weights (adaptive, SGD): a function of the 0-based step."""
        first, last = self.sgd_weight, self.sgd_weight_end
        if self.schedule == "constant":
            return schedules.Constant((1 - first, first))
        return SCHEDULES[self.schedule]((1 - first, first), (1 - last, last), STEPS)

    def paths(self, known: dict | None = None) -> dict[str, Path]:
        """The paths of all methods; those in ``known`` are taken from there, new ones put there.

        λ changes hybrids only: what has one rule is then known already.
        """
        known = {} if known is None else known
        keys = {
            name: (self.surface, name, self.lr, self.noise, self.seed,
                   self.lambdas() if name in ADAPTIVE else None)
            for name in METHODS if name in self.methods
        }  # fmt: skip
        missing = {name: method(name, self.lr) for name, key in keys.items() if key not in known}
        if missing:
            surface = SURFACES[self.surface]
            new = paths(surface, missing, self.lambdas(), STEPS, self.noise, self.seed)
            known.update({keys[name]: path for name, path in new.items()})
        return {name: known[key] for name, key in keys.items()}


def scan(setup: Setup, weights: int = 21) -> pd.DataFrame:
    """Steps until each hybrid has settled, for evenly spaced constant λ of SGD; nan: not at all."""
    surface, values = SURFACES[setup.surface], np.linspace(0, 1, weights).round(4).tolist()
    table = {}
    for name in ADAPTIVE:
        walked = paths(
            surface, {λ: method(name, setup.lr) for λ in values},
            {λ: schedules.Constant((1 - λ, λ)) for λ in values}, STEPS, setup.noise, setup.seed,
        )  # fmt: skip
        table[name] = {λ: path.settled() for λ, path in walked.items()}
    return pd.DataFrame(table, dtype=float)


def draw_scan(setup: Setup) -> go.Figure:
    """What :func:`scan` finds: a line per hybrid, a gap where it does not settle."""
    title = f"Steps until settled: {SURFACES[setup.surface].title} surface, η = {setup.lr:g}"
    figure = lines(scan(setup), title, "λ of SGD", f"steps until the loss stays below {TOLERANCE}")
    figure.update_traces(mode="lines+markers").update_xaxes(range=[-0.02, 1.02])
    return figure.update_yaxes(range=[0, STEPS + 5])


def summary(walked: Mapping[str, Path]) -> pd.DataFrame:
    """Per method: steps until its loss stays below the tolerance, and its last loss."""
    rows = {
        LABELS[name]: {
            f"steps until the loss stays below {TOLERANCE}": _settled(path),
            "loss at the end": "–" if path.left else f"{path.losses[-1]:.2g}",
        }
        for name, path in walked.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def _settled(path: Path) -> str:
    if path.left is not None:
        return f"leaves the map in step {path.left}"
    steps = path.settled()
    return f"more than {len(path.losses) - 1}" if steps is None else str(steps)


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
        (colour, dash), label = plots.STYLES[name], LABELS[name]
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
        plots.finished(figure, "", height=600)
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
        colour, _ = plots.STYLES.get(name, (GREY, ""))
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
    label = LABELS[name]
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
    if not plots.watched():
        from IPython.display import display  # there is a notebook, so there is IPython

        plots.show(draw(setup, _first_hybrid(setup)))
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
                    name in setup.methods, description=LABELS[name], indent=False,
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
                options=["constant", *SCHEDULES], value=setup.schedule,
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
        c["arrows_of"].options = [(LABELS[name], name) for name in self.walked]
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
