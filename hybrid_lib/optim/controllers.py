"""λ that chooses itself: a controller sees what the rules propose and sets the next step's weights.

Given to :class:`~hybrid_lib.Hybrid`, it has the weights of a parameter group in its hands: of one
group for all parameters they share λ; with a group per parameter each has its own. A controller is
a frozen dataclass, as a rule is, with

- ``start(group)``: what it remembers between steps, numbers by name; ValueError for a group that it
  cannot steer,
- ``init(w, rules)``: its buffers for one parameter, by name,
- ``observe(seen, step_sizes, directions, buffers)``: moves them in place and answers numbers, as
  tensors of no dimension, to be summed over the parameters. Written as ``propose`` of a rule is,
- ``update(group, states, sums)``: once a step, after the weights have moved: sets
  ``group["lambdas"]`` and ``group["memory"]``, Python's numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hybrid_lib.optim.rules import SGD, Seen, flat, zeros


@dataclass(frozen=True)
class Hedge:
    r"""Weights that grow with how well a rule's last direction fits the next gradient.

    The gain of a rule is the cosine of the direction that it proposed a step ago and the gradient
    now, over all parameters of the group:

    .. math:: a_i = \frac{\langle d_i^{(t-1)}, g_t \rangle}{\|d_i^{(t-1)}\| \, \|g_t\|}, \qquad
              \lambda_i \leftarrow (1 - s) \frac{\lambda_i e^{r a_i}}{\sum_j \lambda_j e^{r a_j}}
              + \frac{s}{n}

    To first order :math:`a_i` is what one more step of unit length along :math:`d_i` would gain
    relative to the best direction, measured on a batch that had no part in :math:`d_i`.
    Multiplicative weights (Freund and Schapire 1997) collect nearly as much of it as the best rule
    does; a share s that is spread evenly at each step lets them follow a best rule that changes
    (fixed share, Herbster and Warmuth 1998). Costs a buffer per rule and no pass.

    Args:
        rate: r > 0. A rule whose gain is .1 above another's doubles its odds in 7 / r steps.
        share: s in [0, 1].
    """

    rate: float = 0.1
    share: float = 0.001

    def __post_init__(self):
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate={self.rate!r}: must be a finite number above 0")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share!r}: must lie in [0, 1]")

    def start(self, group: dict) -> dict:
        """Nothing: the weights are all that it remembers."""
        if not any(group["lambdas"]):
            raise ValueError("lambdas are all 0: Hedge multiplies them, so one must be above 0")
        return {}

    def init(self, w: Tensor, rules) -> dict[str, Tensor]:
        """The last direction of every rule."""
        return {f"direction_{i}": zeros(w) for i, _ in enumerate(rules)}

    def observe(self, seen: Seen, step_sizes, directions, buffers: dict) -> list:
        """By rule the last direction's product with the gradient and its own square; g's square."""
        g, products = flat(seen.g), []
        for last, d in zip(buffers.values(), directions):
            before = flat(last)
            products += [before.dot(g), before.dot(before)]
            last.copy_(d)
        return [*products, g.dot(g)]

    def update(self, group: dict, states: list[dict], sums: list[float]) -> None:
        """Multiply the weights and spread the share; they sum to one then."""
        *products, g2 = sums
        weights = [float(λ) for λ in group["lambdas"]]
        gains = [_ratio(along, math.sqrt(d2 * g2)) if d2 * g2 >= 0 else 0.0
                 for along, d2 in zip(products[::2], products[1::2])]  # fmt: skip
        best = max(gains)  # only differences count; larger exponents would overflow
        grown = [λ * math.exp(self.rate * (a - best)) for λ, a in zip(weights, gains)]
        if sum(grown) > 0:
            even = self.share / len(grown)
            group["lambdas"] = tuple((1 - self.share) * x / sum(grown) + even for x in grown)


@dataclass(frozen=True)
class SWATS:
    r"""From Adam to SGD, once, at a rate that Adam's own steps tell (Keskar and Socher 2017).

    Adam's step p, projected on the gradient, tells the rate at which SGD would have gone as far:

    .. math:: \gamma_t = \frac{\langle p_t, p_t \rangle}{-\langle p_t, g_t \rangle}, \quad
              s_t = \beta_2 s_{t-1} + (1 - \beta_2) \gamma_t, \quad
              \Lambda_t = \frac{s_t}{1 - \beta_2^t}

    Once :math:`|\Lambda_t - \gamma_t| < \epsilon` (and :math:`\Lambda_t > 0`), SGD goes on with the
    rate :math:`\Lambda_t`: λ becomes :math:`(0, \Lambda_t / \eta)`, so that a schedule of η goes on
    too, and its momentum starts at zero. For ``merge="sum"`` and two rules, the first with
    ``betas``, the second :class:`~hybrid_lib.optim.rules.SGD`; the paper's has momentum and
    dampening :math:`\beta_1`. g includes SGD's weight decay. ``memory["switched_at"]`` is the step,
    0 before.

    Args:
        tolerance: :math:`\epsilon > 0`, of a learning rate.
    """

    tolerance: float = 1e-9

    def __post_init__(self):
        if not self.tolerance > 0:
            raise ValueError(f"tolerance={self.tolerance!r}: must be above 0")

    def start(self, group: dict) -> dict:
        """The average of the rates, the step count, and at which step it switched."""
        rules, λ = group["rules"], tuple(group["lambdas"])
        from_to = len(rules) == 2 and hasattr(rules[0], "betas") and isinstance(rules[1], SGD)
        if not from_to or λ != (1, 0):
            given = f"{' + '.join(type(r).__name__ for r in rules)} with lambdas={λ}"
            raise ValueError(f"SWATS switches from one rule to SGD, lambdas (1, 0), not {given}")
        if group["merge"] != "sum":
            raise ValueError(f"merge={group['merge']!r}: SWATS sets a rate of SGD's own: 'sum'")
        return {"average": 0.0, "steps": 0, "switched_at": 0}

    def init(self, w: Tensor, rules) -> dict[str, Tensor]:
        """None."""
        return {}

    def observe(self, seen: Seen, step_sizes, directions, buffers: dict) -> list:
        """⟨p, p⟩, -⟨p, g⟩ and -⟨p, w⟩ for the adaptive rule's step p."""
        η, d = step_sizes[0], flat(directions[0])
        return [η * η * d.dot(d), η * d.dot(flat(seen.g)), η * d.dot(flat(seen.w))]

    def update(self, group: dict, states: list[dict], sums: list[float]) -> None:
        """Follow the rate; switch, if it has settled."""
        memory, sgd = group["memory"], group["rules"][1]
        if memory["switched_at"]:
            return
        pp, pg, pw = sums
        t = memory["steps"] = memory["steps"] + 1
        rate = _ratio(pp, pg + sgd.weight_decay * pw)
        if rate == 0:  # the gradient says nothing about it
            return
        beta2 = group["rules"][0].betas[1]
        memory["average"] += (1 - beta2) * (rate - memory["average"])
        settled = memory["average"] / (1 - beta2**t)
        if t > 1 and settled > 0 and abs(settled - rate) < self.tolerance and group["lr"] > 0:
            group["lambdas"] = (0.0, settled / float(group["lr"]))
            memory["switched_at"] = t
            for state in states:
                for buffer in state["rules"][1].values():
                    buffer.zero_()


CONTROLLERS = {"hedge": Hedge, "swats": SWATS}


def _ratio(a: float, b: float) -> float:
    """a / b, but 0 where that is no number."""
    return a / b if b != 0 and math.isfinite(a) and math.isfinite(b) else 0.0
