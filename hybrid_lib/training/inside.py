"""A look inside a hybrid while it trains, without a second pass: once an epoch, layer by layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hybrid_lib.optim.hybrid import MERGES, Hybrid
from hybrid_lib.optim.rules import flat

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of D


def look_inside(model: nn.Module, optimizer: Hybrid) -> Callable[[], dict]:
    """For ``run(…, watch=look_inside)``: adds what the rules proposed to every epoch's row.

    It hooks into the optimizer's steps and looks at the first one of each epoch: asks the rules
    what they would answer, on copies of their buffers, so that nothing changes. ``row["inside"]``
    has by layer, as in ``model.named_modules()``,

    - ``cosines``: of each pair of directions, in the order (1, 2), (1, 3), …, (2, 3), …;
    - ``shares``: of each rule in the movement, along it; they sum to one. None if nothing moved;
    - ``step_size``: the length of the movement, without decoupled weight decay, ÷ the gradient's:
      the rate at which plain SGD would have gone as far;
    - ``curvature``: the quantiles :data:`QUANTILES` of D, where a rule wants it.

    A parameter that is not merged follows the last rule, so shares end with that one's, and cosines
    are those of the merged parameters; a layer without any has none. ``row["hessian_age"]`` is how
    many steps old D was, None if it was estimated before the run went on from a checkpoint.
    Gradients that a closure makes, as in ``step(closure)``, come too late to be looked at.
    """
    layer_of = {p: name.rpartition(".")[0] or name for name, p in model.named_parameters()}
    needs_hessian, age = optimizer.needs_hessian, None
    seen: dict = {}

    def before_step(optimizer: Hybrid, arguments, keywords) -> tuple:
        nonlocal age
        hess_diag = keywords.get("hess_diag")
        if hess_diag is not None:
            hess_diag, age = list(hess_diag), 0
        elif age is not None:
            age += 1
        if not seen:
            look(hess_diag)
        return arguments, {**keywords, "hess_diag": hess_diag}

    def look(hess_diag) -> None:
        layers: dict[str, list] = {name: [] for name in layer_of.values()}
        for p, of_one in optimizer.proposals(hess_diag):
            layers[layer_of[p]].append((p, *of_one))
        found = {name: _measured(parts) for name, parts in layers.items() if parts}
        if found:
            seen["inside"] = found
            if needs_hessian:
                seen["hessian_age"] = age

    def row() -> dict:
        answer = dict(seen)
        seen.clear()
        return answer

    optimizer.register_step_pre_hook(before_step)
    return row


def _measured(parts: list[tuple]) -> dict:
    """Of one layer: its parameters with group, directions, step sizes and D."""
    n = max(len(d) for _, _, d, *_ in parts)
    products, along, moved, gradient = torch.zeros(n, n), torch.zeros(n), 0.0, 0.0
    for p, group, d, η, _ in parts:
        directions = torch.stack([*map(flat, d)])
        steps = torch.stack([*map(flat, _contributions(group, d, η))])
        whole = steps.sum(0)
        if len(d) == n:
            products += (directions @ directions.T).cpu()
        along[n - len(d) :] += (steps @ whole).cpu()  # rules are left out from the first on
        moved += whole.dot(whole).item()
        gradient += p.grad.float().square().sum().item()
    lengths = products.diagonal().sqrt()
    cosines = products / torch.outer(lengths, lengths)
    pairs = itertools.combinations(range(n), 2)
    answer = {
        "cosines": [_short(cosines[pair].item()) for pair in pairs],
        "shares": [_short(x / moved) for x in along.tolist()] if moved else None,
        "step_size": _short(math.sqrt(moved / gradient)) if gradient else None,
    }
    curvatures = [D.flatten().float() for *_, D in parts if D is not None]
    if curvatures:
        D = torch.cat(curvatures)
        D = D[:: D.numel() // 2**24 + 1]  # earlier versions of torch take no more
        places = torch.tensor(QUANTILES, device=D.device)
        answer["curvature"] = [_short(x) for x in D.quantile(places).tolist()]
    return answer


def _contributions(group: dict, d: list[Tensor], η: list[float]) -> list[Tensor]:
    """What each rule adds to the step; together they are the step."""
    λ, merge = [float(λi) for λi in group["lambdas"]], group["merge"]
    if merge == "product":  # the sum of steps at one rate, the merged one
        η, merge = [sum(λi * ηi for λi, ηi in zip(λ, η))] * len(d), "sum"
    alone = [[λi if i == j else 0.0 for i, λi in enumerate(λ)] for j in range(len(d))]
    steps = [MERGES[merge](only, η, d) for only in alone]
    return [torch.zeros_like(d[0]) if step is None else step for step in steps]


def _short(x: float) -> float | None:
    """Four digits: histories are read as a whole; None for what is no number."""
    return float(f"{x:.4g}") if math.isfinite(x) else None
