"""The playground: a self-contained page with paths of optimizers on surfaces of two weights.

``playground.html`` computes and draws in the browser, without a kernel or a network. Surfaces and
methods are written into it when it is built.
"""

from __future__ import annotations

import html
import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import torch
from plotly.subplots import make_subplots
from pydantic import Field

from hybrid_lib.optim import methods
from hybrid_lib.optim.hybrid import MERGES
from hybrid_lib.optim.schedules import SHAPES, Constant
from hybrid_lib.study import figures
from hybrid_lib.widgets.surfaces import FAR, STEPS, SURFACES, TOLERANCE, settled, walk

# The page sets λ, so methods with a controller are left out.
METHODS = {k: m for k, m in methods.METHODS.items() if "controller" not in m.defaults}
TEMPLATE = Path(__file__).with_suffix(".html")


class Settings(pydantic.BaseModel, extra="forbid"):
    """A page's initial settings; a ValidationError names the invalid ones and what is allowed."""

    surface: Literal[tuple(SURFACES)] = "beale"
    methods: list[Literal[tuple(METHODS)]] = Field(["sgd", "adam", "atmo"], min_length=1)
    lr: float | None = Field(None, ge=1e-6, le=1e3)  # for all methods; None: the surface's
    schedule: Literal[("constant", *SHAPES)] = "constant"  # of SGD's λ, between the next two fields
    sgd_weight: float = Field(0.1, ge=0, le=1)
    sgd_weight_end: float = Field(1.0, ge=0, le=1)
    noise: float = Field(0.0, ge=0, le=1e6)  # standard deviation per gradient component
    seed: int = Field(0, ge=0, le=2**31 - 3)  # of the noise
    merge: Literal[tuple(MERGES)] = "product"
    start: tuple[pydantic.FiniteFloat, pydantic.FiniteFloat] | None = None  # None: the surface's
    step: int = Field(3, ge=0, lt=STEPS)  # the one whose arrows are shown

    @pydantic.field_validator("methods", mode="before")
    @classmethod
    def _names(cls, given):
        return given.replace(",", " ").split() if isinstance(given, str) else given

    @pydantic.model_validator(mode="after")
    def _rate(self):
        self.lr = SURFACES[self.surface].lr if self.lr is None else self.lr
        return self


def page(**settings) -> str:
    """Return the self-contained page; the settings are those of :class:`Settings`."""
    rules = {}
    for name, method in METHODS.items():
        (group,) = method([torch.zeros(2)], weight_decay=0.0).param_groups
        rules[name] = [{"rule": type(rule).__name__, **asdict(rule)} for rule in group["rules"]]
    data = {
        "SURFACES": {k: {"title": s.title, "minima": s.minima, "start": s.start, "at": f"<{k}>",
                         "bounds": s.bounds, "lr": s.lr} for k, s in SURFACES.items()},
        "METHODS": {k: {"label": m.label, "colour": m.colour, "dash": m.dash, "rules": rules[k]}
                    for k, m in METHODS.items()},
        "INITIAL": Settings(**settings).model_dump(),
        "STEPS": STEPS, "TOLERANCE": TOLERANCE, "FAR": FAR,
    }  # fmt: skip
    text = json.dumps(data)
    for name, surface in SURFACES.items():
        text = text.replace(f'"<{name}>"', surface.javascript())
    return TEMPLATE.read_text("utf-8").replace("= DATA;", f"= {text};")


def show(**settings) -> None:
    """Show the page in a notebook's frame, or a static figure where it cannot be interactive."""
    from IPython.display import display  # there is a notebook, so there is IPython

    if not figures.is_interactive():
        return figures.show(still(**settings))
    source = html.escape(page(**settings))
    style = "width: 100%; height: 1000px; border: 0"  # the page corrects the height where it can
    how = f'style="{style}" title="The playground" allow="clipboard-write"'
    frame = f'<iframe srcdoc="{source}" {how}></iframe>'
    display({"text/html": frame, "text/plain": "The playground"}, raw=True)


def paths(**settings) -> dict[str, np.ndarray]:
    """Compute the path of every method in Python (:func:`~hybrid_lib.widgets.surfaces.walk`)."""
    s = Settings(**settings)
    ends = [(1 - λ, λ) for λ in (s.sgd_weight, s.sgd_weight_end)]
    weights = Constant(ends[0]) if s.schedule == "constant" else SHAPES[s.schedule](*ends, STEPS)
    common = (s.lr, weights, s.merge, s.noise, s.seed, s.start)
    return {name: walk(s.surface, name, *common) for name in s.methods}


def still(**settings):
    """Return a static figure: the paths on the map, and the losses beside it."""
    s, figure = Settings(**settings), make_subplots(1, 2, column_widths=[0.57, 0.43])
    surface = SURFACES[s.surface]
    x, y = (np.linspace(*ends, 61) for ends in surface.bounds)
    levels = np.log10((heights := surface.at(*np.meshgrid(x, y))[0]) + np.median(heights) / 60)
    veil = [[0, "rgba(100,125,165,0.035)"], [1, "rgba(100,125,165,0.035)"]]  # one layer per level
    figure.add_contour(x=x, y=y, z=levels.astype(np.float32), colorscale=veil, showscale=False,
                       ncontours=20, line_width=0.5)  # fmt: skip
    for name, path in paths(**settings).items():
        (colour, dash), steps = figures.look(name), settled(path)
        fate = f"within {TOLERANCE} after {f'more than {STEPS}' if steps is None else steps} steps"
        if len(path) <= STEPS:
            path, fate = path[:-1], f"left the map after {len(path) - 1} steps"
        line = {"mode": "lines", "line": {"color": colour, "dash": dash}, "legendgroup": name}
        figure.add_scatter(
            x=path[:, 0], y=path[:, 1], name=f"{METHODS[name].label}: {fate}", **line
        )
        steps = np.arange(len(path))
        figure.add_scatter(x=steps, y=path[:, 2], **line, showlegend=False, xaxis="x2", yaxis="y2")
    x, y = zip(*surface.minima)
    star = {"symbol": "star", "size": 12, "color": "#808080"}
    figure.add_scatter(x=x, y=y, mode="markers", marker=star, name="lowest loss")
    end = "" if s.schedule == "constant" else f" to {s.sgd_weight_end:g}"
    title = f"{surface.title} surface, η = {s.lr:g}, λ of SGD {s.sgd_weight:g}{end}"
    return figures.apply_style(figure, title, height=560).update_layout(
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"}, margin_b=130,
        xaxis={"title": "first weight", "range": surface.bounds[0]},
        yaxis={"title": "second weight", "range": surface.bounds[1]}, xaxis2_title="step",
        yaxis2={"title": "loss", "type": "log", "range": [-4.5, 3], "exponentformat": "power"},
    )  # fmt: skip
