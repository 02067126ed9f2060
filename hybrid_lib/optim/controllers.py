"""Self-adjusting λ: a controller sets the next step's weights from what the rules propose.

Given to :class:`~hybrid_lib.Hybrid`, it sets λ per parameter group: all parameters of a group share
λ, so pass one group per parameter to give each its own. A controller is a frozen dataclass, like a
rule, with

- ``start(group)``: returns its memory between steps, a dict of numbers; raises ValueError for a
  group that it cannot control,
- ``init(w, rules)``: returns its buffers for one parameter, a dict of tensors of its shape,
- ``observe(seen, step_sizes, directions, buffers)``: updates the buffers in place and returns
  0-dimensional tensors, to be summed over the parameters. Write it like a rule's ``propose``,
- ``update(group, states, sums)``: called once per step, after the weights have moved; sets
  ``group["lambdas"]`` and ``group["memory"]`` to Python numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hybrid_lib.optim.rules import SGD, Seen, flat, zeros


@dataclass(frozen=True)
class Hedge:
    r"""Raise the weight of rules whose last direction aligns with the next gradient.

    A rule's gain is the cosine between the direction it proposed one step ago and the current
    gradient, over all parameters of the group:

    .. math:: a_i = \frac{\langle d_i^{(t-1)}, g_t \rangle}{\|d_i^{(t-1)}\| \, \|g_t\|}, \qquad
              \lambda_i \leftarrow (1 - s) \frac{\lambda_i e^{r a_i}}{\sum_j \lambda_j e^{r a_j}}
              + \frac{s}{n}

    To first order, :math:`a_i` is what one more unit-length step along :math:`d_i` would gain,
    relative to the best direction, on a batch that did not contribute to :math:`d_i`.
    Multiplicative weights (Freund and Schapire 1997) collect nearly as much gain as the best rule;
    spreading a share s evenly at each step lets them follow changes of the best rule (fixed share,
    Herbster and Warmuth 1998). Costs one buffer per rule and no extra pass.

    Args:
        rate: r > 0. A rule whose gain exceeds another's by .1 doubles its odds in 7 / r steps.
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
        """Return an empty memory: the weights hold all that is needed."""
        if not any(group["lambdas"]):
            raise ValueError("lambdas are all 0: Hedge multiplies them, so one must be above 0")
        return {}

    def init(self, w: Tensor, rules) -> dict[str, Tensor]:
        """Return a buffer for the last direction of each rule."""
        return {f"direction_{i}": zeros(w) for i, _ in enumerate(rules)}

    def observe(self, seen: Seen, step_sizes, directions, buffers: dict) -> list:
        """Return ⟨d, g⟩ and ⟨d, d⟩ for each rule's last direction d, and finally ⟨g, g⟩."""
        g, products = flat(seen.g), []
        for last, d in zip(buffers.values(), directions):
            before = flat(last)
            products += [before.dot(g), before.dot(before)]
            last.copy_(d)
        return [*products, g.dot(g)]

    def update(self, group: dict, states: list[dict], sums: list[float]) -> None:
        """Multiply the weights and spread the share, so that they sum to one."""
        *products, g2 = sums
        weights = [float(λ) for λ in group["lambdas"]]
        gains = [_ratio(along, math.sqrt(d2 * g2)) if d2 * g2 >= 0 else 0.0
                 for along, d2 in zip(products[::2], products[1::2])]  # fmt: skip
        best = max(gains)  # only differences matter; without this, exp could overflow
        grown = [λ * math.exp(self.rate * (a - best)) for λ, a in zip(weights, gains)]
        if sum(grown) > 0:
            even = self.share / len(grown)
            group["lambdas"] = tuple((1 - self.share) * x / sum(grown) + even for x in grown)


@dataclass(frozen=True)
class SWATS:
    r"""Switch once from Adam to SGD, at a rate found from Adam's steps (Keskar and Socher 2017).

    SGD's step at this rate, projected on Adam's step p, equals p:

    .. math:: \gamma_t = \frac{\langle p_t, p_t \rangle}{-\langle p_t, g_t \rangle}, \quad
              s_t = \beta_2 s_{t-1} + (1 - \beta_2) \gamma_t, \quad
              \Lambda_t = \frac{s_t}{1 - \beta_2^t}

    Once :math:`|\Lambda_t - \gamma_t| < \epsilon` (and :math:`\Lambda_t > 0`), SGD takes over at
    the rate :math:`\Lambda_t`: λ becomes :math:`(0, \Lambda_t / \eta)`, so that a schedule of η
    continues, and SGD's momentum starts at zero (a parameter whose first gradient comes after the
    switch begins as SGD usually does). Needs ``merge="sum"`` and two rules, the first with
    ``betas``, the second :class:`~hybrid_lib.optim.rules.SGD`, whose momentum and dampening are
    :math:`\beta_1` in the paper. g includes SGD's weight decay. ``memory["switched_at"]`` is the
    step of the switch, or 0 before it.

    Args:
        tolerance: :math:`\epsilon > 0`, a difference of learning rates.
    """

    tolerance: float = 1e-9

    def __post_init__(self):
        if not self.tolerance > 0:
            raise ValueError(f"tolerance={self.tolerance!r}: must be above 0")

    def start(self, group: dict) -> dict:
        """Return the initial memory: average rate, step count and step of the switch."""
        rules, λ = group["rules"], tuple(group["lambdas"])
        supported = len(rules) == 2 and hasattr(rules[0], "betas") and isinstance(rules[1], SGD)
        if not supported or λ != (1, 0):
            given = f"{' + '.join(type(r).__name__ for r in rules)} with lambdas={λ}"
            raise ValueError(f"{given}: SWATS needs (a rule with betas, SGD) and lambdas (1, 0)")
        if group["merge"] != "sum":
            raise ValueError(f"merge={group['merge']!r}: SWATS sets SGD's own rate, so use 'sum'")
        return {"average": 0.0, "steps": 0, "switched_at": 0}

    def init(self, w: Tensor, rules) -> dict[str, Tensor]:
        """Return no buffers."""
        return {}

    def observe(self, seen: Seen, step_sizes, directions, buffers: dict) -> list:
        """Return ⟨p, p⟩, -⟨p, g⟩ and -⟨p, w⟩ for the adaptive rule's step p."""
        η, d = step_sizes[0], flat(directions[0])
        return [η * η * d.dot(d), η * d.dot(flat(seen.g)), η * d.dot(flat(seen.w))]

    def update(self, group: dict, states: list[dict], sums: list[float]) -> None:
        """Update the average rate; switch to SGD once it has settled."""
        memory, sgd = group["memory"], group["rules"][1]
        if memory["switched_at"]:
            return
        pp, pg, pw = sums
        t = memory["steps"] = memory["steps"] + 1
        rate = _ratio(pp, pg + sgd.weight_decay * pw)
        if rate == 0:  # this step determines no rate
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
    """Return a / b, or 0 if b is 0 or either is not finite."""
    return a / b if b != 0 and math.isfinite(a) and math.isfinite(b) else 0.0
