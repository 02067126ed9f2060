"""The step of one parameter group as one compiled function; the merge itself is handed in.

A compiled step reads and writes each tensor once. It keeps what it found in the optimizer's state
and only looks whether that is still the same, since gathering hundreds of tensors anew would cost
more than moving them.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_lib.optim import rules as rule
from hybrid_lib.optim.compiling import CannotCompile, compiled
from hybrid_lib.optim.rules import Number, state_dtype


class Part(NamedTuple):
    """Parameters of one device and dtype, and what their step takes."""

    params: list[Tensor]
    states: list[dict]
    buffers: list[dict[str, list[Tensor]]]  # of each rule, by name
    kind: str  # of parameters: which; of buffers: all that one compiled function depends on
    t: Tensor  # the counts of steps, a vector; each state's is a view of it


class Found(NamedTuple):
    """What a compiled step takes that stays the same from one step to the next."""

    params: list[Tensor]
    states: list[dict]
    held: list  # in those states, when they were looked at
    parts: list[Part]


class FusedStep:
    """Steps of one parameter group, compiled once its buffers are there.

    Args:
        move: the step of one parameter tensor: ``move(w, g, hess_diag, buffers, t, lr, lambdas,
            rules, decoupled_weight_decay, maximize, corrections)``, in place.
    """

    def __init__(self, move: Callable):
        self._move = move
        self._made_by: tuple | None = None  # the rules that made the buffers, in an eager step
        self._found: Found | None = None
        # What these rules were compiled to, by all else that torch does not look at in each call.
        self._compiled: dict[tuple, Callable] = {}

    def knows(self, params: list[Tensor], group: dict, state: dict) -> bool:
        """Whether the last step was compiled, and this one would find the same."""
        found = self._found
        if found is not None and not (
            self._made_by is group["rules"]
            and _are(params, found.params)
            and _are(map(state.get, params), found.states)
            and _are(_held(found.states), found.held)
        ):
            self._found = None
        return self._found is not None

    def moved_eagerly(self, rules: tuple) -> None:
        """To be said after an eager step: these rules have made the buffers and the counts."""
        if self._made_by is not rules:
            self._compiled.clear()
        self._made_by, self._found = rules, None

    def move(self, params: list[Tensor], group: dict, state: dict) -> bool:
        """Move parameters that have gradients, after asking :meth:`knows`.

        Returns:
            False if nothing moved, as buffers must be made first: by an eager step.

        Raises:
            CannotCompile: in one line, if so.
        """
        if self._made_by is not group["rules"]:
            return False
        found, self._found = self._found or self._look(params, group, state), None
        if found is None:
            return False
        η, λ, γ = group["lr"], group["lambdas"], group["decoupled_weight_decay"]
        rules, maximize = group["rules"], group["maximize"]
        betas = tuple({β for r in rules for β in getattr(r, "betas", ())})
        for ps, states, buffers, kind, t in found.parts:
            tensor = functools.partial(_on, t.device, t.dtype)  # numbers would be compiled in
            diagonals = [s["hess_diag"] for s in states] if "hess_diag" in states[0] else []
            alike = (kind, not diagonals, len(λ), γ == 0, maximize)
            if alike not in self._compiled:
                self._compiled[alike] = _compiled_step()
            self._compiled[alike](
                self._move, ps, [p.grad for p in ps], diagonals, buffers, t, betas, tensor(η),
                [tensor(λi) for λi in λ], rules, tensor(γ) if γ != 0 else 0, maximize,
            )  # fmt: skip
        self._found = found
        return True

    def _look(self, params: list[Tensor], group: dict, state: dict) -> Found | None:
        """What a step of these parameters takes; None if a buffer is missing."""
        states, parts = [state[p] for p in params], []
        if not _has_all(self._move, params, states, group["rules"]):
            return None
        kinds = [(p.device, state_dtype(p)) for p in params]
        for kind in dict.fromkeys(kinds):
            of_kind = [k == kind for k in kinds]
            ps = list(itertools.compress(params, of_kind))
            some = list(itertools.compress(states, of_kind))
            t = torch.stack([_on(*kind, state["step"]) for state in some])
            for state, view in zip(some, t.unbind()):
                state["step"] = view
            buffers = [
                {name: [state["rules"][j][name] for state in some] for name in first}
                for j, first in enumerate(some[0]["rules"])
            ]
            every = [b for of_rule in buffers for of_name in of_rule.values() for b in of_name]
            looks = [(b.dtype, b.device, *b.shape, b.stride()) for b in every]
            parts.append(Part(ps, some, buffers, str([*map(id, ps), *looks]), t))
        return Found(params, states, _held(states), parts)


def _are(some, others: list) -> bool:
    """Whether these are the same objects, one by one."""
    some = list(some)
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _held(states: list[dict]) -> list:
    """Everything that rules left in the states; it must stay the same objects, moved in place."""
    held = [state.get("step") for state in states]
    for state in states:
        for buffers in state.get("rules", ()):
            held += buffers.values()
    return held


def _has_all(move: Callable, params: list[Tensor], states: list[dict], rules: tuple) -> bool:
    """Whether every buffer is there that a step wants, so that a compiled one need not make it."""
    if not params or any("rules" not in state or "step" not in state for state in states):
        return False
    names = [[list(buffers) for buffers in state["rules"]] for state in states]
    values = [b for state in states for buffers in state["rules"] for b in buffers.values()]
    if any(of != names[0] for of in names) or not all(isinstance(b, Tensor) for b in values):
        return False
    like = functools.partial(torch.empty_like, device="meta")  # a step of shapes, without numbers
    w, D = like(params[0].detach()), states[0].get("hess_diag")
    wanted = [{name: like(b) for name, b in buffers.items()} for buffers in states[0]["rules"]]
    λ, D = [1.0] * len(rules), None if D is None else like(D)
    try:
        move(w, w.clone(), D, wanted, 2, 1.0, λ, rules, 0, False)
    except Exception as error:  # a rule of somebody's own, that looks at values
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CannotCompile(f"the optimizer's step cannot be compiled ({reason})") from error
    return [list(buffers) for buffers in wanted] == names[0]


def _compiled_step() -> Callable:
    # Store what several weights need, such as 1 - β^t; sizes are checked before the call.
    how = {"realize_reads_threshold": 0, "size_asserts": False}
    changing = ("params", "grads", "diagonals")
    return compiled(_move_all, "the optimizer's step", only=changing, **how)


def _move_all(move, params, grads, diagonals, buffers, t, betas, η, λ, rules, γ, maximize) -> None:
    t.add_(1)
    corrections = _corrections(betas, t)
    for i, (w, g) in enumerate(zip(params, grads)):
        mine = [{name: b[i] for name, b in of_rule.items()} for of_rule in buffers]
        known = {key: correction[i] for key, correction in corrections.items()}
        D = diagonals[i] if diagonals else None
        move(w, g, D, mine, t[i], η, λ, rules, γ, maximize, known)
        for of_rule, moved in zip(buffers, mine):
            for name, b in moved.items():  # a rule may have put another tensor in its place
                if b is not of_rule[name][i]:
                    of_rule[name][i].copy_(b)


def _on(device: torch.device, dtype: torch.dtype, number: Number) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(device, dtype)
    return torch.full((), number, device=device, dtype=dtype)  # filled there: no copy to wait for


def _corrections(betas: tuple[float, ...], t: Tensor) -> dict[tuple[float, float], Tensor]:
    """(1 - β^t)^power for all counts of steps t at once, by (β, power).

    By expm1, since in float32 β^t has lost the digits that the difference needs.
    """
    biases = {β: -torch.expm1(t * math.log(β)) if β else torch.ones_like(t) for β in betas}
    return {(β, power): c**power for β, c in biases.items() for power in rule.POWERS}
