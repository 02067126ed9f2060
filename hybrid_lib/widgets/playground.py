"""The playground: paths of optimizers over a landscape of two weights, as a page of its own.

``playground.html`` computes and draws in the browser, without a kernel and without a network.
What it knows of surfaces and methods is printed into it when it is built.
"""

from __future__ import annotations

import html
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from plotly.subplots import make_subplots

from hybrid_lib.optim.hybrid import MERGES
from hybrid_lib.optim.methods import METHODS
from hybrid_lib.optim.schedules import SHAPES, Constant
from hybrid_lib.study import figures
from hybrid_lib.study.parameters import one_of
from hybrid_lib.widgets.surfaces import FAR, STEPS, SURFACES, TOLERANCE, settled, walk

TEMPLATE = Path(__file__).with_suffix(".html")


def checked(
    surface="beale", methods="sgd, adam, atmo", lr=None, schedule="constant", sgd_weight=0.1,
    sgd_weight_end=1.0, noise=0.0, seed=0, merge="product", start=None, step=3,
) -> dict:  # fmt: skip
    """The settings that a page begins with.

    Args:
        surface, methods: keys of ``SURFACES`` and, in a list or as in "sgd, atmo", of ``METHODS``.
        lr, start: learning rate of all methods and (x, y) where they begin; None: the surface's.
        schedule: of λ of SGD: "constant" (``sgd_weight`` on every step) or one of ``SHAPES``, from
            ``sgd_weight`` to ``sgd_weight_end``.
        noise, seed: standard deviation and seed of the noise in the gradient.
        merge: one of ``MERGES``.
        step: whose arrows are shown.

    Raises:
        ValueError: naming every value that is impossible, and what is allowed.
    """
    given = dict(locals())
    if isinstance(methods, str):
        given["methods"] = methods.replace(",", " ").split()
    known = {"surface": SURFACES, "schedule": ("constant", *SHAPES), "merge": MERGES}
    faults = [f"{name}={given[name]!r}: must be {one_of(allowed, given[name])}"
              for name, allowed in known.items() if given[name] not in allowed]  # fmt: skip
    if not given["methods"] or not METHODS.keys() >= set(given["methods"]):
        faults.append(f"methods={methods!r}: must be some of {', '.join(METHODS)}")
    ranges = {"lr": (1e-6, 1e3), "sgd_weight": (0, 1), "sgd_weight_end": (0, 1), "noise": (0, 1e6),
              "seed": (0, 2**31 - 3), "step": (0, STEPS - 1)}  # fmt: skip
    faults += [f"{name}={given[name]!r}: must lie between {low:g} and {high:g}"
               for name, (low, high) in ranges.items()
               if given[name] is not None and not low <= given[name] <= high]  # fmt: skip
    if start is not None and not (len(start) == 2 and all(map(math.isfinite, start))):
        faults.append(f"start={start!r}: must be two numbers, or None")
    if faults:
        raise ValueError("; ".join(faults))
    return given | {"lr": SURFACES[surface].lr if lr is None else lr}


def page(**settings) -> str:
    """The page, complete in itself; settings as in :func:`checked`."""
    rules = {}
    for name, method in METHODS.items():
        (group,) = method([torch.zeros(2)], weight_decay=0.0).param_groups
        rules[name] = [{"rule": type(rule).__name__, **asdict(rule)} for rule in group["rules"]]
    data = {
        "SURFACES": {k: {"title": s.title, "minima": s.minima, "start": s.start, "at": f"<{k}>",
                         "bounds": s.bounds, "lr": s.lr} for k, s in SURFACES.items()},
        "METHODS": {k: {"label": m.label, "colour": m.colour, "dash": m.dash, "rules": rules[k]}
                    for k, m in METHODS.items()},
        "STEPS": STEPS, "TOLERANCE": TOLERANCE, "FAR": FAR, "INITIAL": checked(**settings),
    }  # fmt: skip
    text = json.dumps(data)
    for name, surface in SURFACES.items():
        text = text.replace(f'"<{name}>"', surface.javascript())
    return TEMPLATE.read_text("utf-8").replace("= DATA;", f"= {text};")


def show(**settings) -> None:
    """The page in a frame of a notebook; where nobody could move it, a picture."""
    from IPython.display import display  # there is a notebook, so there is IPython

    source = html.escape(page(**settings))
    if not figures.is_interactive():
        figures.show(still(**settings))
        return
    style = "width: 100%; height: 1100px; border: 0"
    frame = f'<iframe srcdoc="{source}" style="{style}" allow="clipboard-write"></iframe>'
    display({"text/html": frame, "text/plain": "The playground"}, raw=True)


def paths(**settings) -> dict[str, np.ndarray]:
    """The path of every method (:func:`~hybrid_lib.widgets.surfaces.walk`), from Python."""
    chosen = checked(**settings)
    ends = [(1 - λ, λ) for λ in (chosen["sgd_weight"], chosen["sgd_weight_end"])]
    shape = chosen["schedule"]
    weights = Constant(ends[0]) if shape == "constant" else SHAPES[shape](*ends, STEPS)
    common = {name: chosen[name] for name in ("surface", "lr", "merge", "noise", "seed", "start")}
    return {name: walk(method=name, weights=weights, **common) for name in chosen["methods"]}


def still(**settings):
    """A figure of the paths on their map, and of the losses beside it."""
    chosen, figure = checked(**settings), make_subplots(1, 2, column_widths=[0.57, 0.43])
    surface = SURFACES[chosen["surface"]]
    x, y = (np.linspace(*ends, 61) for ends in surface.bounds)
    levels = np.log10((heights := surface.at(*np.meshgrid(x, y))[0]) + np.median(heights) / 60)
    veil = [[0, "rgba(100,125,165,0.035)"], [1, "rgba(100,125,165,0.035)"]]  # one per level
    figure.add_contour(x=x, y=y, z=levels.astype(np.float32), colorscale=veil, showscale=False,
                       ncontours=20, line_width=0.5)  # fmt: skip
    for name, path in paths(**settings).items():
        colour, dash = figures.look(name)
        left = len(path) <= STEPS and f"left the map after {len(path) - 1} steps"
        fate = left or f"settled after {settled(path) or f'more than {STEPS}'} steps"
        line = {"mode": "lines", "line": {"color": colour, "dash": dash}, "legendgroup": name}
        on_map = path[: len(path) - bool(left)]
        figure.add_scatter(x=on_map[:, 0], y=on_map[:, 1], name=f"{METHODS[name].label}: {fate}",
                           **line)  # fmt: skip
        figure.add_scatter(y=on_map[:, 2], **line, showlegend=False, xaxis="x2", yaxis="y2")
    star = {"mode": "markers", "marker": {"symbol": "star", "size": 12, "color": "#808080"}}
    figure.add_scatter(x=[m[0] for m in surface.minima], y=[m[1] for m in surface.minima],
                       name=f"lowest loss; settled: within {TOLERANCE} of it", **star)  # fmt: skip
    title = f"{surface.title} surface, η = {chosen['lr']:g}"
    if any(METHODS[name].is_hybrid for name in chosen["methods"]):
        end = f" to {chosen['sgd_weight_end']:g}" if chosen["schedule"] != "constant" else ""
        title += f", λ of SGD {chosen['sgd_weight']:g}{end}"
    figures.apply_style(figure, title, height=560).update_layout(
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"}, margin_b=130,
        xaxis={"title": "first weight", "range": surface.bounds[0]},
        yaxis={"title": "second weight", "range": surface.bounds[1]}, xaxis2_title="step",
        yaxis2={"title": "loss", "type": "log", "range": [-4.5, 3], "exponentformat": "power"},
    )  # fmt: skip
    return figure
