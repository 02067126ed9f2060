"""What a merged step is made of: directions and step sizes, recorded while an optimizer uses them.

The numbers behind the playground and behind the notebook on the optimizers. Nothing here computes
a direction a second time: :func:`record` lets the rules of a :class:`~hybrid_lib.Hybrid` note
what they answer, and the optimizer moves the weights as always.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import pandas as pd
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_lib.optim import methods
from hybrid_lib.optim.curvature import hessian_diagonal, rademacher
from hybrid_lib.optim.hybrid import Hybrid
from hybrid_lib.study import figures
from hybrid_lib.training import data
from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.models import seeded


@dataclass
class Recorded:
    """A rule that notes its answers: to the optimizer it is the rule itself.

    Attributes:
        rule: what answers.
        answers: (direction, step size), one pair per call, that is per parameter and step.
    """

    rule: object
    answers: list[tuple[Tensor, float]] = field(default_factory=list)

    @property
    def needs_hessian(self) -> bool:
        return self.rule.needs_hessian

    def init(self, w):
        return self.rule.init(w)

    def corrections(self, t):
        return self.rule.corrections(t)

    def propose(self, *seen):
        d, η = self.rule.propose(*seen)
        self.answers.append((d.clone(), η))  # d may be a buffer, which the next step overwrites
        return d, η


def record(group: dict) -> list[Recorded]:
    """Let the rules of a parameter group note their answers, from the next step on.

    >>> from hybrid_lib import atmo
    >>> w = torch.tensor([1.0])
    >>> optimizer = atmo([w], lr=0.1, weight_decay=0.0)
    >>> adam, sgd = record(optimizer.param_groups[0])
    >>> w.grad = torch.tensor([4.0])
    >>> optimizer.step()
    >>> [(round(d.item(), 3), round(eta, 3)) for d, eta in adam.answers + sgd.answers]
    [(0.1, 1.0), (4.0, 0.1)]
    """
    group["rules"] = tuple(Recorded(r) for r in group["rules"])
    return list(group["rules"])


def step_sizes(make_optimizer: Callable[[list[Tensor]], Hybrid], at: Iterable[int]) -> pd.Series:
    """The merged step size in units of the learning rate, at the steps ``at``, counted from 1.

    It depends on the step alone, not on gradients: the rules are asked on a single weight.

    >>> from hybrid_lib import atmo
    >>> step_sizes(atmo, [1, 10]).round(2).to_dict()
    {1: 5.5, 10: 1.27}
    """
    w, at = torch.zeros(1), sorted(at)
    w.grad = torch.ones(1)
    optimizer = make_optimizer([w])
    (group,) = optimizer.param_groups
    recorded = record(group)
    for _ in range(at[-1]):
        optimizer.step(hess_diag=[torch.ones(1)])
    merged = {
        step: sum(λ * r.answers[step - 1][1] for λ, r in zip(group["lambdas"], recorded))
        for step in at
    }
    return pd.Series(merged, name="step") / group["lr"]


def logistic_regression() -> nn.Module:
    """The smallest network for the digits: 64 pixels, 10 classes, 650 parameters."""
    with seeded(0):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def perceptron() -> nn.Module:
    """One hidden layer of 64 units: 4,810 parameters, and no convexity any more."""
    with seeded(0):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def check(chosen) -> None:
    """Refuse what the notebook on the optimizers cannot work with.

    Raises:
        ValueError: for a number outside its range.
    """
    if chosen.steps < 1:
        raise ValueError(f"steps={chosen.steps}: must be at least 1")
    if chosen.probes < 8:
        raise ValueError(f"probes={chosen.probes}: must be at least 8, or there is nothing to pair")
    if not (math.isfinite(chosen.lr) and chosen.lr > 0):
        raise ValueError(f"lr={chosen.lr}: must be a finite number above 0")


def digit_batch(step: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Normalised images and labels of the digits; the same ones for the same step."""
    digits = data.load("digits")
    picked = data.order(len(digits.train_images), seed=0, epoch=step)[:size]
    return data.normalised(digits.train_images[picked], digits), digits.train_labels[picked]


def dissected(
    model: nn.Module, make_optimizer: Callable[[list[Tensor]], Hybrid], steps: int
) -> pd.DataFrame:
    """Train on the digits with a hybrid of two rules and take every step apart.

    Returns:
        A row per step: ``adaptive`` and ``sgd``, the lengths of the two directions; ``cosine``,
        between them; ``product``, the length of the step taken, a product of sums; ``sum``, the
        length of the other merge, the sum of the rules' own steps.
    """
    params = list(model.parameters())
    optimizer = make_optimizer(params)
    (group,) = optimizer.param_groups
    recorded, rows, probes = record(group), [], torch.Generator().manual_seed(0)
    for step in range(steps):
        x, y = digit_batch(step)
        loss = F.cross_entropy(model(x), y)
        if optimizer.needs_hessian:
            grads, hess_diag = hessian_diagonal(loss, params, 1, probes)
        else:
            grads, hess_diag = torch.autograd.grad(loss, params), None
        for p, g in zip(params, grads):
            p.grad = g
        optimizer.step(hess_diag=hess_diag)

        λ = group["lambdas"]
        d = [torch.cat([part.flatten() for part, _ in r.answers]) for r in recorded]
        η = [r.answers[0][1] for r in recorded]
        for r in recorded:
            r.answers.clear()
        product = sum(a * b for a, b in zip(λ, η)) * sum(a * b for a, b in zip(λ, d))
        rows.append(
            {
                "adaptive": d[0].norm().item(),
                "sgd": d[1].norm().item(),
                "cosine": F.cosine_similarity(d[0], d[1], dim=0).item(),
                "product": product.norm().item(),
                "sum": sum(a * b * c for a, b, c in zip(λ, η, d)).norm().item(),
            }
        )
    return pd.DataFrame(rows, index=pd.RangeIndex(1, steps + 1, name="step"))


def probe_cosines(model: nn.Module, n_probes: int = 64) -> dict[int, float]:
    """How well two estimates of the Hessian diagonal agree, by the number of probes in each.

    One batch of digits, ``n_probes`` probes; neighbouring groups of 1, 2, 4, … of them are
    averaged. 1 would be two equal estimates, 0 two that have nothing in common.
    """
    x, y = digit_batch(0)
    params, generator = list(model.parameters()), torch.Generator().manual_seed(0)
    diagonals = []
    for _ in range(n_probes):
        _, diag = hessian_diagonal(F.cross_entropy(model(x), y), params, 1, generator)
        diagonals.append(torch.cat([D.flatten() for D in diag]))
    estimates, cosines, size = torch.stack(diagonals), {}, 1
    while len(estimates) >= 8:  # fewer pairs than four are an anecdote
        cosine = F.cosine_similarity(estimates[0::2], estimates[1::2], dim=1)
        cosines[size] = cosine.mean().item()
        estimates, size = (estimates[0::2] + estimates[1::2]) / 2, 2 * size
    return cosines


def what_v_tracks(model: nn.Module, n_probes: int = 200) -> pd.DataFrame:
    r"""Each parameter's curvature, three ways: what AdaHessian asks for, and what it gets.

    Its second moment averages the square of one probe's D, and
    :math:`E[D_i^2] = H_{ii}^2 + \sum_{j \ne i} H_{ij}^2`: the whole row of the Hessian.

    Returns:
        A row per parameter: ``diagonal`` (:math:`|H_{ii}|`) and ``row`` (the row's norm), both
        exact, so take a small model; ``tracked``, the root of the mean of :math:`D^2`.
    """
    x, y = digit_batch(0)
    params = list(model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), params, create_graph=True)
    g = torch.cat([part.flatten() for part in grads])

    def product(z: Tensor) -> Tensor:
        Hz = torch.autograd.grad(g, params, z, retain_graph=True)
        return torch.cat([part.flatten() for part in Hz])

    hessian = torch.stack([product(e) for e in torch.eye(len(g))])
    generator = torch.Generator().manual_seed(0)
    zs = [rademacher([g], generator)[0] for _ in range(n_probes)]
    squares = torch.stack([(z * product(z)) ** 2 for z in zs])
    return pd.DataFrame(
        {
            "diagonal": hessian.diagonal().abs(),
            "row": hessian.norm(dim=1),
            "tracked": squares.mean(dim=0).sqrt(),
        }
    )


def lines(
    series: Mapping[str, pd.Series],
    title: str,
    x: str,
    y: str,
    shape: str = "linear",
    level: float | None = None,
) -> go.Figure:
    """A figure with one line per series over its index.

    Args:
        series: by name; methods of the report have their own colour, dash and label.
        title, x, y: of the figure and its axes; the title names the data set, if there is one.
        shape: "linear", or "hv" for values that hold until the next.
        level: a height to compare with, a dotted line.
    """
    figure, spare = go.Figure(), iter(SPARE)
    for name, values in series.items():
        colour, dash = (
            methods.look(name) if name.removeprefix("dyn_") in methods.METHODS else next(spare)
        )
        figure.add_scatter(
            x=values.index, y=values, mode="lines", name=methods.label(name),
            line={"color": colour, "dash": dash, "width": 2, "shape": shape},
        )  # fmt: skip
    if level is not None:
        figure.add_hline(level, line={"color": "#808080", "dash": "dot"})
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return figures.apply_style(figure, title).update_layout(legend_itemwidth=60)


def weights_of_sgd(schedules: dict, epochs: int, title: str) -> go.Figure:
    """A line per schedule: λ of SGD in every epoch, counted from 1."""
    index = pd.RangeIndex(1, epochs + 1)
    series = {
        name: pd.Series([schedule(epoch - 1)[1] for epoch in index], index)
        for name, schedule in schedules.items()
    }
    return lines(series, title, "epoch", "λ of SGD", shape="hv")


def directions(experiment: Experiment) -> dict[str, Experiment]:
    """A hybrid's experiment three times, with nothing but the weights changed.

    Raises:
        ValueError: for a method of one rule.

    >>> from hybrid_lib import EXPERIMENTS
    >>> released = directions(EXPERIMENTS["atmo"])["released"]
    >>> [round(released.lambdas()(epoch)[1], 2) for epoch in (0, 1, 349, 350)]
    [0.0, 1.0, 0.0, 0.0]
    """
    dynamic = {"lambda_schedule": "linear", "lambda_start": (1, 0), "lambda_end": (0, 1)}
    changes = {
        "constant": {"lambda_schedule": "constant", "lambda_start": (0.5, 0.5)},
        "report": {**dynamic, "lambda_direction": "report"},
        "released": {**dynamic, "lambda_direction": "released"},
    }
    return {
        key: replace(experiment, name=f"{experiment.name}_{key}", **settings)
        for key, settings in changes.items()
    }


def curvatures(table: pd.DataFrame, title: str) -> go.Figure:
    """What AdaHessian's second moment tracks, against the diagonal and against the row's norm."""
    figure = go.Figure()
    for column, colour, symbol, label in (
        ("diagonal", figures.VERMILLION, "x-thin", "diagonal of the Hessian, |Hᵢᵢ|"),
        ("row", figures.BLUE, "circle-open", "norm of the Hessian's row"),
    ):
        figure.add_scatter(
            x=table[column], y=table["tracked"], mode="markers", name=label,
            marker={"color": colour, "symbol": symbol, "size": 6, "line_width": 1.2,
                    "line_color": colour},
        )  # fmt: skip
    ends = [table["diagonal"].min(), table["tracked"].max()]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", name="equal", line={"color": "#808080", "dash": "dash"}
    )
    figure.update_xaxes(title_text="exact curvature", type="log", dtick=1)
    figure.update_yaxes(title_text="what v tracks: √E[D²]", type="log", dtick=1)
    return figures.apply_style(figure, title)


def source(*functions: Callable):
    """The code of functions, for a notebook to show; without docstrings."""
    from IPython.display import Markdown  # imported where used: only notebooks have it

    code = []
    for function in functions:
        lines = textwrap.dedent(inspect.getsource(function)).splitlines()
        if function.__doc__:
            docstring = ast.parse("\n".join(lines)).body[0].body[0]
            del lines[docstring.lineno - 1 : docstring.end_lineno]
        code.append("\n".join([f"# {function.__qualname__}", *lines]))
    block = "```python\n" + "\n\n".join(code) + "\n```"
    # nbconvert's pages have no typewriter face for code in an output
    return Markdown(f'<div style="font-family: monospace">\n\n{block}\n\n</div>')


SPARE = (
    (figures.GREEN, "solid"), (figures.BLUE, "dash"), (figures.VERMILLION, "dot"),
    (figures.PURPLE, "dashdot"), ("#808080", "solid"), (figures.BLUE, "longdash"),
)  # fmt: skip
