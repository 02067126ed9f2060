"""Diagnostics of a hybrid during training: once per epoch, per layer, without a second pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hybrid_lib.optim.hybrid import MERGES, Hybrid
from hybrid_lib.optim.rules import flat

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the Hessian diagonal D


def look_inside(model: nn.Module, optimizer: Hybrid) -> Callable[[], dict]:
    """For ``run(…, watch=look_inside)``: add what the rules proposed to every epoch's row.

    A hook on the optimizer's steps measures the first step of each epoch. It calls the rules on
    copies of their buffers, so that nothing changes. ``row["inside"]`` has, for each layer as named
    in ``model.named_modules()``,

    - ``cosines``: between each pair of directions, in the order (1, 2), (1, 3), …, (2, 3), …;
    - ``shares``: of each rule in the step, projected on it; they sum to one. None if nothing moved;
    - ``step_size``: the step's length, without decoupled weight decay, divided by the gradient's:
      the rate at which plain SGD would have moved as far;
    - ``curvature``: the quantiles :data:`QUANTILES` of D, if a rule uses it.

    A parameter that is not merged follows the last rule, whose share comes last. Cosines are those
    of the merged parameters; a layer without any has none. ``row["hessian_age"]`` is the age of D
    in steps, or None if it was estimated before the run resumed from a checkpoint. Gradients that a
    closure computes, as in ``step(closure)``, come too late to be measured.
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
            measure(hess_diag)
        return arguments, {**keywords, "hess_diag": hess_diag}

    def measure(hess_diag) -> None:
        layers: dict[str, list] = {name: [] for name in layer_of.values()}
        for p, proposal in optimizer.proposals(hess_diag):
            layers[layer_of[p]].append((p, *proposal))
        found = {name: _measure_layer(parts) for name, parts in layers.items() if parts}
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


def _measure_layer(parts: list[tuple]) -> dict:
    """Measure one layer, given its parameters with group, directions, step sizes and D."""
    n = max(len(d) for _, _, d, *_ in parts)
    products, along, moved, gradient = torch.zeros(n, n), torch.zeros(n), 0.0, 0.0
    for p, group, d, η, _ in parts:
        directions = torch.stack([*map(flat, d)])
        steps = torch.stack([*map(flat, _contributions(group, d, η))])
        whole = steps.sum(0)
        if len(d) == n:
            products += (directions @ directions.T).cpu()
        along[n - len(d) :] += (steps @ whole).cpu()  # unmerged parameters lack the first rules
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
        D = D[:: D.numel() // 2**24 + 1]  # older versions of torch accept no more
        places = torch.tensor(QUANTILES, device=D.device)
        answer["curvature"] = [_short(x) for x in D.quantile(places).tolist()]
    return answer


def _contributions(group: dict, d: list[Tensor], η: list[float]) -> list[Tensor]:
    """What each rule contributes to the step; the contributions sum to it."""
    λ, merge = [float(λi) for λi in group["lambdas"]], group["merge"]
    if merge == "product":  # a sum of steps that share the merged step size
        η, merge = [sum(λi * ηi for λi, ηi in zip(λ, η))] * len(d), "sum"
    alone = [[λi if i == j else 0.0 for i, λi in enumerate(λ)] for j in range(len(d))]
    steps = [MERGES[merge](only, η, d) for only in alone]
    return [torch.zeros_like(d[0]) if step is None else step for step in steps]


def _short(x: float) -> float | None:
    """Round to four digits, since histories are read as a whole; None if not finite."""
    return float(f"{x:.4g}") if math.isfinite(x) else None
