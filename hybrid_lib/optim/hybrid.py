"""One optimizer for all hybrids: rules propose, their directions and step sizes are merged.

The merge of the report (Algorithms 2 and 4) is a product of sums,

    w  <-  w - (sum of lambda_i * eta_i) * (sum of lambda_i * d_i),

not the sum of the rules' own steps. :class:`Hybrid` is that line; :func:`atmo`, :func:`padam`,
:func:`padam_sgd`, :func:`adahessian` and :func:`adasgd` are the report's choices of rules.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, is_dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from hybrid_lib.optim import rules as rule
from hybrid_lib.optim.fused import FusedStep
from hybrid_lib.optim.rules import Number, Seen, state_dtype


class Hybrid(Optimizer):
    r"""Merge the proposals of several rules into one step.

    With rules i that answer a direction :math:`d_i` and a step size :math:`\eta_i`:

    .. math:: w \leftarrow w (1 - \eta\gamma)
              - \Big(\sum_i \lambda_i \eta_i\Big) \Big(\sum_i \lambda_i d_i\Big)

    ``lr`` and ``lambdas`` live in ``param_groups``: change them there at any time, by hand or with
    a scheduler of :mod:`torch.optim.lr_scheduler`. All rules move their buffers on every step,
    whatever their weight, so a rule that is faded in later is warm.

    Buffers have the dtype of their parameter, but never less than float32.

    Args:
        params: parameters or parameter groups; a group may override every argument below.
        rules: the rules, adaptive ones first by convention.
        lr: learning rate :math:`\eta > 0`, handed to every rule.
        lambdas: one weight per rule, in their order: finite, at least 0. They need not sum to 1.
        decoupled_weight_decay: :math:`\gamma \ge 0`; weights shrink before they move (Algorithm 3).
        maximize: ascend instead of descend.
        compile: from the second step on, let ``torch.compile`` fuse the step of all parameters:
            each tensor is then read and written once. Worth its compilation (seconds to a minute)
            for thousands of steps. The same numbers up to rounding; ``lr`` and ``lambdas`` may
            change at every step without another compilation.

    A compiled step never waits for a GPU (checked on meta tensors), as a CUDA graph demands that
    captures it after two steps. Hold ``lr`` and ``lambdas`` as tensors on the device then
    (``lambdas`` of shape (number of rules,)): a replay sees what is written into them, and not a
    number that replaces them.

    Raises:
        ValueError: at construction and in ``add_param_group`` for anything outside its range, and
            in ``step`` for weights or rates that were changed to something impossible.
        TypeError: for complex parameters, and for rules that are not rules.
        CannotCompile: in the first step that was to be compiled (of every group the second) and
            cannot be; groups before the one that failed have moved then.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = Hybrid([w], [rule.Adam(), rule.SGD()], lr=0.1, lambdas=(0.5, 0.5))
        >>> (w**2).sum().backward()
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([ 0.4225, -0.8725], requires_grad=True)

        At the first step Adam answers :math:`d = 0.1\,\mathrm{sign}(g)` and
        :math:`\eta = 0.1 / (1 - 0.9) = 1`; SGD answers g and 0.1. The merge moves the first weight
        by (0.5 * 1 + 0.5 * 0.1) * (0.5 * 0.1 + 0.5 * 2) = 0.5775.
    """

    def __init__(
        self,
        params,
        rules: Sequence,
        lr: float,
        lambdas: Sequence[float] = (1.0,),
        decoupled_weight_decay: float = 0.0,
        maximize: bool = False,
        compile: bool = False,
    ):
        defaults = dict(
            lr=lr,
            lambdas=_weights(lambdas),
            rules=tuple(rules),
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            compile=compile,
        )
        super().__init__(params, defaults)
        self._fused: dict[int, FusedStep] = self._no_steps()  # by group

    def __setstate__(self, state: dict) -> None:
        """Of a copy, or of a loaded state: the buffers are others now."""
        super().__setstate__(state)
        self._fused = self._no_steps()
        for i, group in enumerate(self.param_groups):
            self._fused[i].moved_eagerly(group["rules"])

    @staticmethod
    def _no_steps() -> dict[int, FusedStep]:
        return collections.defaultdict(lambda: FusedStep(Hybrid._move))

    @property
    def needs_hessian(self) -> bool:
        """Whether any rule of any group asks for ``hess_diag``."""
        return any(r.needs_hessian for group in self.param_groups for r in group["rules"])

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters with settings of their own; what is not given is taken from the defaults.

        Raises:
            ValueError, TypeError: as at construction; the optimizer is then left as it was.
        """
        group = {**self.defaults, **param_group}
        group["rules"], group["lambdas"] = tuple(group["rules"]), _weights(group["lambdas"])
        for r in group["rules"]:
            is_rule = hasattr(r, "propose") and hasattr(r, "needs_hessian") and is_dataclass(r)
            if isinstance(r, type) or not is_rule:
                raise TypeError(f"rules: {r!r} is not a rule; use those of rules, as in SGD()")
        if not group["lr"] > 0:
            raise ValueError(f"lr={group['lr']!r}: must be a finite number above 0")
        _check_rates(group)
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                self.param_groups.pop()
                raise TypeError(
                    f"a parameter of dtype {p.dtype}: complex numbers have no order, so the "
                    "second moment and |D| are undefined; pass torch.view_as_real(parameter)"
                )

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        hess_diag: Iterable[Tensor | None] | None = None,
    ):
        """Move all parameters that have a gradient, once.

        Args:
            closure: evaluates the model again, sets the gradients and returns the loss.
            hess_diag: one tensor per parameter, in the order of ``param_groups``, each of its
                parameter's shape, as :func:`~hybrid_lib.hessian_diagonal` returns them. None, for
                all or for one, uses the last again. Ignored where no rule needs it.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for sparse gradients, or where a rule needs ``hess_diag`` and never had
                one. Nothing has moved then.
            ValueError: if ``hess_diag`` does not fit the parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        fresh = {} if hess_diag is None else self._matched(list(hess_diag))
        moving = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for i, (group, params) in enumerate(zip(self.param_groups, moving)):
            known = self._fused[i].knows(params, group, self.state)
            self._check_ready(group, params, fresh, known)
        for p, D in fresh.items():  # a copy: "the last again" must not change with the caller's
            kept = self.state[p].get("hess_diag")
            if kept is not None and kept.device == D.device and kept.dtype == state_dtype(p):
                kept.copy_(D)  # where a captured step finds it
            else:
                self.state[p]["hess_diag"] = D.detach().to(state_dtype(p), copy=True)
        for i, (group, params) in enumerate(zip(self.param_groups, moving)):
            if not (group["compile"] and self._fused[i].move(params, group, self.state)):
                self._move_each(params, group)
                self._fused[i].moved_eagerly(group["rules"])
        return loss

    def _move_each(self, params: list[Tensor], group: dict) -> None:
        η, λ, rules = group["lr"], group["lambdas"], group["rules"]
        γ, maximize = group["decoupled_weight_decay"], group["maximize"]
        for w in params:
            state = self.state[w]
            state["step"] = t = int(state.get("step", 0)) + 1
            buffers = state.setdefault("rules", [{} for _ in rules])
            self._move(w, w.grad, state.get("hess_diag"), buffers, t, η, λ, rules, γ, maximize)

    @staticmethod
    def _move(
        w: Tensor, g: Tensor, D: Tensor | None, buffers: list[dict], t: Number, η: Number,
        λ: Sequence[Number], rules: tuple, γ: float, maximize: bool, corrections=None,
    ) -> None:  # fmt: skip
        """The step of one parameter tensor: Algorithms 2 and 4, line by line."""
        # Under bfloat16 the arithmetic is float32's; otherwise x is w itself.
        x, g = w.to(state_dtype(w)), g.to(state_dtype(w))
        # D enters squared: its sign is free.
        seen = Seen(x, -g if maximize else g, D, corrections)
        answers = [r.propose(seen, b, η, t) for r, b in zip(rules, buffers)]

        d_merged = sum(_weighed(λi, d) for λi, (d, _) in zip(λ, answers))
        η_merged = sum(λi * ηi for λi, (_, ηi) in zip(λ, answers))
        if isinstance(γ, Tensor) or γ != 0:
            x.mul_(1 - η * γ)
        x.sub_(η_merged * d_merged)
        if x is not w:
            w.copy_(x)

    def _matched(self, hess_diag: list[Tensor | None]) -> dict[Tensor, Tensor]:
        """The given tensors by parameter, where a rule needs them."""
        params = [p for group in self.param_groups for p in group["params"]]
        if len(hess_diag) != len(params):
            raise ValueError(
                f"hess_diag holds {len(hess_diag)} tensors, the optimizer {len(params)} "
                "parameters: pass one per parameter, in the order of param_groups"
            )
        for i, (p, D) in enumerate(zip(params, hess_diag)):
            if D is not None and D.shape != p.shape:
                raise ValueError(
                    f"hess_diag[{i}] has shape {tuple(D.shape)}, its parameter {tuple(p.shape)}"
                )
            if D is not None and (D.device != p.device or not D.is_floating_point()):
                raise ValueError(
                    f"hess_diag[{i}] is {D.dtype} on {D.device}, its parameter {p.dtype} on "
                    f"{p.device}: the diagonal must be real and on its parameter's device"
                )
        needing = {
            p
            for group in self.param_groups
            if any(r.needs_hessian for r in group["rules"])
            for p in group["params"]
        }
        return {p: D for p, D in zip(params, hess_diag) if D is not None and p in needing}

    def _check_ready(
        self, group: dict, moving: list[Tensor], fresh: dict[Tensor, Tensor], known: bool
    ) -> None:
        _check_rates(group)
        for p in moving:
            if p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"a gradient of layout {p.grad.layout}: the rules keep dense averages; "
                    "use dense gradients (for an embedding: sparse=False)"
                )
        if known:
            return
        needs_hessian = any(r.needs_hessian for r in group["rules"])
        for p in moving:
            state = self.state.get(p, {})
            if len(state.get("rules", group["rules"])) != len(group["rules"]):
                raise RuntimeError(
                    "rules were added or removed after the first step: their buffers are not "
                    "there; make a new optimizer, or weigh a rule with 0 until it is wanted"
                )
            if needs_hessian and p not in fresh and "hess_diag" not in state:
                raise RuntimeError(
                    "AdaHessian needs the Hessian diagonal at its first step: "
                    "grads, diag = hessian_diagonal(loss, params), then step(hess_diag=diag)"
                )

    def state_dict(self) -> dict:
        """As in :class:`torch.optim.Optimizer`; rules become dicts of numbers and strings.

        The result holds tensors and primitives only, so that ``torch.load(...,
        weights_only=True)`` reads it back.
        """
        packed = super().state_dict()
        packed["state"] = {
            key: {**state, "step": int(state["step"])} if "step" in state else state
            for key, state in packed["state"].items()
        }
        for group in packed["param_groups"]:
            group["lr"] = _float(group["lr"])
            group["lambdas"] = tuple(map(_float, group["lambdas"]))
            group["rules"] = [{"rule": type(r).__name__, **asdict(r)} for r in group["rules"]]
            group.update(_plain(group))
        return packed

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore a ``state_dict()``, copied: later steps do not write into it.

        Raises:
            ValueError: if it belongs to other rules or to other parameters.
        """
        saved_groups = []
        for saved, group in zip(state_dict["param_groups"], self.param_groups):
            theirs = [r["rule"] for r in saved.get("rules", [])]
            ours = [type(r).__name__ for r in group["rules"]]
            if theirs != ours:
                raise ValueError(
                    f"the saved state belongs to {' + '.join(theirs) or 'another optimizer'}, "
                    f"this optimizer is {' + '.join(ours)}"
                )
            restored = tuple(
                replace(r, **{k: v for k, v in packed.items() if k != "rule"})
                for r, packed in zip(group["rules"], saved["rules"])
            )
            ours = {"rules": restored, "lambdas": tuple(saved["lambdas"])}
            # How to compute is this optimizer's own, whatever the saved one did.
            saved_groups.append({**saved, **ours, "compile": group["compile"]})
        saved_groups += state_dict["param_groups"][len(saved_groups) :]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, params):
            for name, shape in _shapes(state_dict["state"].get(key, {})):
                if shape != p.shape:
                    raise ValueError(
                        f"the saved state of parameter {key} ({name}) has shape {tuple(shape)}, "
                        f"the parameter {tuple(p.shape)}"
                    )
        super().load_state_dict({**state_dict, "param_groups": saved_groups})
        # torch rounds every buffer to its parameter's dtype; under bfloat16 ours are float32.
        for key, p in zip(keys, params):
            if key in state_dict["state"]:
                self.state[p] = _copied(state_dict["state"][key], p)


def _weighed(λ: Number, d: Tensor) -> Number:
    """λ d, and 0 for λ = 0 even where a direction that nobody wants is not finite."""
    if isinstance(λ, Tensor):
        return torch.where(λ != 0, λ * d, 0.0)
    return λ * d if λ != 0 else 0.0


def sgd(
    params,
    lr: float = 0.01,
    momentum: float = 0.95,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 5e-4,
    maximize: bool = False,
    compile: bool = False,
) -> Hybrid:
    """SGD alone, with the defaults of Table I; the same steps as :class:`torch.optim.SGD`."""
    alone = rule.SGD(momentum, dampening, nesterov, weight_decay)
    return Hybrid(params, (alone,), lr, maximize=maximize, compile=compile)


def adam(
    params,
    lr: float = 0.001,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 5e-4,
    amsgrad: bool = False,
    maximize: bool = False,
    compile: bool = False,
) -> Hybrid:
    """Adam alone, with the defaults of Table I; the same steps as :class:`torch.optim.Adam`."""
    alone = rule.Adam(betas, eps, weight_decay, amsgrad)
    return Hybrid(params, (alone,), lr, maximize=maximize, compile=compile)


def atmo(
    params,
    lr: float = 0.01,
    lambdas: Sequence[float] = (0.5, 0.5),
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.95,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 5e-4,
    weight_decay_in: str = "both",
    amsgrad: bool = False,
    maximize: bool = False,
    compile: bool = False,
) -> Hybrid:
    """ATMO, Adam + SGD (Algorithm 2; Landro et al. 2021), with the defaults of Table I.

    Args:
        lambdas: (weight of Adam, weight of SGD).
        weight_decay: L2 term. Algorithm 2 has it in SGD alone: ``weight_decay_in="sgd"``. The
            released code has it in both rules, and so has the default.

    Other arguments: :class:`rules.Adam`, :class:`rules.SGD` and :class:`Hybrid`.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = atmo(model.parameters(), lambdas=(0.8, 0.2))
        >>> optimizer.param_groups[0]["lambdas"]
        (0.8, 0.2)
    """
    adam = rule.Adam(betas, eps, _unless_sgd_only(weight_decay, weight_decay_in), amsgrad)
    sgd = rule.SGD(momentum, dampening, nesterov, weight_decay)
    return Hybrid(params, (adam, sgd), lr, lambdas, maximize=maximize, compile=compile)


def padam(
    params,
    lr: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 5e-4,
    amsgrad: bool = True,
    partial: float = 1 / 8,
    bias_correction: str = "released",
    maximize: bool = False,
    compile: bool = False,
) -> Hybrid:
    """Padam (Algorithm 1; Chen et al. 2018). Arguments: :class:`rules.Padam`, :class:`Hybrid`.

    The report lists no settings for Padam alone; lr and weight decay are those of its paper.
    """
    alone = rule.Padam(betas, eps, weight_decay, amsgrad, partial, bias_correction)
    return Hybrid(params, (alone,), lr, maximize=maximize, compile=compile)


def padam_sgd(
    params,
    lr: float = 0.01,
    lambdas: Sequence[float] = (0.5, 0.5),
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.025,
    weight_decay_in: str = "both",
    amsgrad: bool = False,
    partial: float = 1 / 8,
    bias_correction: str = "released",
    maximize: bool = False,
    compile: bool = False,
) -> Hybrid:
    """PADAM-SGD, Padam + SGD merged as in Algorithm 2, with the defaults of Table I.

    As released: no AMSGrad maximum, p = 1/8, L2 in both rules (``weight_decay_in="sgd"``: in SGD
    alone). Arguments: :class:`rules.Padam`, :class:`rules.SGD` and :class:`Hybrid`; ``lambdas`` is
    (weight of Padam, weight of SGD).
    """
    decay = _unless_sgd_only(weight_decay, weight_decay_in)
    adaptive = rule.Padam(betas, eps, decay, amsgrad, partial, bias_correction)
    sgd = rule.SGD(momentum, dampening, nesterov, weight_decay)
    return Hybrid(params, (adaptive, sgd), lr, lambdas, maximize=maximize, compile=compile)


def adahessian(
    params,
    lr: float = 0.15,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 5e-4,
    hessian_power: float = 1.0,
    spatial_average: str | int | None = None,
    signed_average: bool = False,
    maximize: bool = False,
    compile: bool = False,
) -> Hybrid:
    """AdaHessian (Algorithm 3; Yao et al. 2020), with the defaults of Table I.

    ``weight_decay`` is decoupled, as in the algorithm. Arguments: :class:`rules.AdaHessian` and
    :class:`Hybrid`. Every step wants a Hessian diagonal:

    Example:
        >>> from hybrid_lib import hessian_diagonal
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
        >>> optimizer = adahessian([w], lr=0.5, weight_decay=0.0)
        >>> grads, diag = hessian_diagonal((torch.tensor([1.0, 10.0]) * w**2).sum(), [w])
        >>> w.grad = grads[0]
        >>> optimizer.step(hess_diag=diag)
        >>> w.data.round(decimals=4)  # curvature 2 and 20, the same relative step: Newton's, halved
        tensor([ 1.5000, -0.5000])
    """
    alone = rule.AdaHessian(betas, eps, hessian_power, spatial_average, signed_average)
    return Hybrid(params, (alone,), lr, (1.0,), weight_decay, maximize, compile)


def adasgd(
    params,
    lr: float = 0.1,
    lambdas: Sequence[float] = (0.5, 0.5),
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.95,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 5e-4,
    weight_decay_in: str = "sgd",
    hessian_power: float = 1.0,
    spatial_average: str | int | None = None,
    signed_average: bool = False,
    maximize: bool = False,
    compile: bool = False,
) -> Hybrid:
    """AdaSGD, AdaHessian + SGD (Algorithm 4), with the defaults of Table I.

    Args:
        lambdas: (weight of AdaHessian, weight of SGD).
        weight_decay: L2 term of the SGD rule, as released. Algorithm 4 decays both:
            ``weight_decay_in="both"`` adds AdaHessian's own, decoupled decay.

    Other arguments: :class:`rules.AdaHessian`, :class:`rules.SGD` and :class:`Hybrid`.
    """
    adaptive = rule.AdaHessian(betas, eps, hessian_power, spatial_average, signed_average)
    sgd = rule.SGD(momentum, dampening, nesterov, weight_decay)
    decoupled = _unless_sgd_only(weight_decay, weight_decay_in)
    return Hybrid(params, (adaptive, sgd), lr, lambdas, decoupled, maximize, compile)


def _unless_sgd_only(weight_decay: float, weight_decay_in: str) -> float:
    """The adaptive rule's share of the weight decay."""
    if weight_decay_in not in ("both", "sgd"):
        raise ValueError(f'weight_decay_in={weight_decay_in!r}: must be "both" or "sgd"')
    return weight_decay if weight_decay_in == "both" else 0.0


def _check_rates(group: dict) -> None:
    """lr and lambdas may be changed between steps: looked at again before each."""
    γ = group["decoupled_weight_decay"]
    lr, *lambdas = (_float_if_here(v) for v in (group["lr"], *group["lambdas"]))
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr={lr!r}: must be a finite number, at least 0")
    if not (math.isfinite(γ) and γ >= 0):
        raise ValueError(f"decoupled_weight_decay={γ!r}: must be a finite number, at least 0")
    if len(group["rules"]) == 0 or len(lambdas) != len(group["rules"]):
        raise ValueError(
            f"lambdas={tuple(lambdas)!r} for {len(group['rules'])} rules: one weight per rule"
        )
    if not all(math.isfinite(λ) and λ >= 0 for λ in lambdas):
        raise ValueError(f"lambdas={tuple(lambdas)!r}: weights must be finite and at least 0")


def _weights(lambdas) -> tuple | Tensor:
    return lambdas if isinstance(lambdas, Tensor) else tuple(lambdas)


def _float(number: Number) -> float:
    return number.item() if isinstance(number, Tensor) else number


def _float_if_here(number: Number) -> float:
    """Of a tensor elsewhere, which would have to be waited for, only that there is one."""
    elsewhere = isinstance(number, Tensor) and number.device.type != "cpu"
    return 1.0 if elsewhere else _float(number)


def _copied(value, p: Tensor):
    """A copy of one parameter's state, on its device and in the dtype its buffers have."""
    if isinstance(value, Tensor):
        return value.detach().to(p.device, state_dtype(p), copy=True)
    if isinstance(value, dict):
        return {k: _copied(v, p) for k, v in value.items()}
    if isinstance(value, list):
        return [_copied(v, p) for v in value]
    return value


def _shapes(state: dict):
    """(name, shape) of every tensor in one parameter's state."""
    for buffers in [state, *state.get("rules", [])]:
        yield from ((k, v.shape) for k, v in buffers.items() if isinstance(v, Tensor))


def _plain(value):
    """NumPy's numbers as Python's, which every loader accepts."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(v) for v in value)
    return value.item() if hasattr(value, "item") and not isinstance(value, Tensor) else value
