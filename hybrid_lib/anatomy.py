"""What a merged step is made of: directions and step sizes, recorded while an optimizer uses them.

The numbers behind the playground and behind the notebook on the optimizers. Nothing here computes
a direction a second time: :func:`record` lets the rules of a :class:`~hybrid_lib.Hybrid` note
what they answer, and the optimizer moves the weights as always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_lib import data, plots
from hybrid_lib.curvature import hessian_diagonal, rademacher
from hybrid_lib.hybrid import Hybrid
from hybrid_lib.models import resnet18


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

    def propose(self, seen, buffers, lr, t):
        d, η = self.rule.propose(seen, buffers, lr, t)
        self.answers.append((d.clone(), η))  # d may be a buffer, which the next step overwrites
        return d, η


def record(optimizer: Hybrid) -> list[Recorded]:
    """Let the rules of an optimizer with one parameter group note their answers.

    >>> from hybrid_lib import atmo
    >>> w = torch.tensor([1.0])
    >>> optimizer = atmo([w], lr=0.1, weight_decay=0.0)
    >>> adam, sgd = record(optimizer)
    >>> w.grad = torch.tensor([4.0])
    >>> optimizer.step()
    >>> [(round(d.item(), 3), round(eta, 3)) for d, eta in adam.answers + sgd.answers]
    [(0.1, 1.0), (4.0, 0.1)]
    """
    (group,) = optimizer.param_groups
    group["rules"] = tuple(Recorded(r) for r in group["rules"])
    return list(group["rules"])


def step_sizes(make_optimizer: Callable[[list[Tensor]], Hybrid], steps: int) -> list[float]:
    """The merged step size in units of the learning rate, at steps 1 to ``steps``.

    It depends on the step alone, not on gradients: the rules are asked on a single weight.

    >>> from hybrid_lib import atmo
    >>> [round(ratio, 2) for ratio in step_sizes(atmo, 10)[::9]]
    [5.5, 1.27]
    """
    w = torch.zeros(1)
    w.grad = torch.ones(1)
    optimizer = make_optimizer([w])
    recorded = record(optimizer)
    for _ in range(steps):
        optimizer.step(hess_diag=[torch.ones(1)])
    (group,) = optimizer.param_groups
    answers = zip(*(r.answers for r in recorded))
    return [
        sum(λ * η for λ, (_, η) in zip(group["lambdas"], of_rules)) / group["lr"]
        for of_rules in answers
    ]


def logistic_regression() -> nn.Module:
    """The smallest network for the digits: 64 pixels, 10 classes, 650 parameters."""
    with torch.random.fork_rng(devices=[]):  # the global generator is left as it was
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def small_resnet() -> nn.Module:
    """ResNet18 at width 4, for the digits: 44 thousand parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return resnet18(num_classes=10, in_channels=1, width=4)


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
    recorded, rows, probes = record(optimizer), [], torch.Generator().manual_seed(0)
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

        λ = optimizer.param_groups[0]["lambdas"]
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
    while len(estimates) >= 2:
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
    zs = [rademacher(g, generator) for _ in range(n_probes)]
    squares = torch.stack([(z * product(z)) ** 2 for z in zs])
    return pd.DataFrame(
        {
            "diagonal": hessian.diagonal().abs(),
            "row": hessian.norm(dim=1),
            "tracked": squares.mean(dim=0).sqrt(),
        }
    )


def lines(series: dict[str, pd.Series], title: str, x: str, y: str, names: dict | None = None):
    """A figure with one line per series over its index.

    Args:
        series: by name; names of methods have their colour and dash.
        title, x, y: of the figure and its axes. The title names the data set, if there is one.
        names: what the legend calls the series, where it is not their name.
    """
    figure, spare = go.Figure(), iter(zip(SPARE, ("solid", "dash", "dot", "dashdot", "longdash")))
    for name, values in series.items():
        colour, dash = plots.STYLES.get(name) or next(spare)
        figure.add_scatter(
            x=values.index, y=values, mode="lines", name=(names or {}).get(name, name),
            line={"color": colour, "dash": dash, "width": 2},
        )  # fmt: skip
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return plots._finished(figure, title)


SPARE = (plots.GREEN, plots.BLUE, plots.VERMILLION, plots.PURPLE, "#808080")
