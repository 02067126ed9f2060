"""One optimizer for all hybrids: rules propose, and :func:`move` merges what they answer.

The report's merge (Algorithms 2 and 4) is a product of sums, not the sum of the rules' own steps.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, is_dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from hybrid_lib.optim.compiled import compiled
from hybrid_lib.optim.rules import Number, Seen, Tensors, each, state_dtype, zeros


def product(λ: Sequence[Number], η: Sequence[Number], d: Sequence):
    """(Σ λᵢ ηᵢ) (Σ λᵢ dᵢ): Algorithms 2 and 4."""
    d_merged = _weighted_sum(λ, d)
    η_merged = sum(λi * ηi for λi, ηi in zip(λ, η))
    return None if d_merged is None else d_merged.mul_(η_merged)


def sum_of_steps(λ: Sequence[Number], η: Sequence[Number], d: Sequence):
    """Σ λᵢ ηᵢ dᵢ: what adding up the steps of finished optimizers gives."""
    return _weighted_sum(_weighed(λ, η), d)


def graft(λ: Sequence[Number], η: Sequence[Number], d: Sequence):
    """(Σ λᵢ ‖ηᵢ dᵢ‖) d₁ / ‖d₁‖ for each tensor: the first rule's direction, at the length that the
    rules agree on (Agarwal et al. 2020, at λ = (0, 1))."""
    lengths = [each(torch.linalg.vector_norm, di) for di in d]
    length = _weighted_sum(_weighed(λ, η), lengths)
    unit = d[0].div(lengths[0].clamp_min(torch.finfo(torch.float32).tiny))
    return None if length is None else unit.mul_(length)


MERGES = {"product": product, "sum": sum_of_steps, "graft": graft}


def move(w, g, D, buffers, η, λ, corrections, γ, rules, maximize, merge, controller) -> list:
    """One step, in place: the only place where weights move.

    Args:
        w, g, D: weights, gradient and Hessian diagonal (or None): a tensor or ``Tensors`` each.
        buffers, corrections: a dict, and what ``corrections`` answered, per rule; last the
            controller's dict, if there is one.
        η, λ, γ: learning rate, weights, decoupled weight decay.
        rules, maximize, merge, controller: of the parameter group.

    Returns:
        What the controller observed.
    """
    x, g = _wide(w), _wide(g)  # under bfloat16 the arithmetic is float32's; otherwise x is w
    seen = Seen(x, -g if maximize else g, D)  # D enters squared: its sign is free
    held = [dict(b) for b in buffers]
    answers = [r.propose(seen, b, η, c) for r, b, c in zip(rules, buffers, corrections)]
    d, step_sizes = zip(*answers)
    observed = controller.observe(seen, step_sizes, d, buffers[-1]) if controller else []
    if any(b[name] is not h[name] for b, h in zip(buffers, held) for name in h):
        raise TypeError("a rule must move its buffers in place, as in buffers['m'].mul_(0.9)")

    step = MERGES[merge](λ, step_sizes, d)
    if isinstance(γ, Tensor) or γ != 0:
        x.mul_(1 - η * γ)
    if step is not None:
        x.sub_(step)
    if x is not w:
        w.copy_(x)
    return observed


def move_each(params, grads, diagonals, buffers, *settings) -> list:
    """:func:`move` of several parameters, one by one, and the sums of what was observed.

    A buffer is a list here. For a compiler, too.
    """
    observed = []
    for i, (w, g) in enumerate(zip(params, grads)):
        of_this = [{name: b[i] for name, b in of_rule.items()} for of_rule in buffers]
        observed.append(move(w, g, diagonals[i], of_this, *settings))
    return _summed(observed)


class Hybrid(Optimizer):
    r"""Merge the proposals of several rules into one step.

    With rules i that answer a direction :math:`d_i` and a step size :math:`\eta_i`:

    .. math:: w \leftarrow w (1 - \eta\gamma)
              - \Big(\sum_i \lambda_i \eta_i\Big) \Big(\sum_i \lambda_i d_i\Big)

    ``lr`` and ``lambdas`` live in ``param_groups``: change them there at any time, by hand or with
    a scheduler of torch's. All rules move their buffers on every step, whatever their weight, so a
    rule that is faded in later is warm. Buffers are never coarser than float32.

    Args:
        params: parameters or parameter groups; a group may override every argument below.
        rules: the rules, adaptive ones first by convention.
        lr: learning rate :math:`\eta > 0`, handed to every rule.
        lambdas: one weight per rule, in their order: finite, at least 0. They need not sum to 1.
        decoupled_weight_decay: :math:`\gamma \ge 0`; weights shrink before they move (Algorithm 3).
        maximize: ascend instead of descend.
        compile: let ``torch.compile`` fuse the step, which then reads and writes each tensor once:
            worth its compilation (seconds to a minute) for thousands of steps. The same numbers up
            to rounding; changes of ``lr`` and ``lambdas`` compile nothing again.
        foreach: compute all parameters of a group at once, as in :mod:`torch.optim`: few kernels
            instead of many, for some memory. None: on NVIDIA GPUs, and under a controller.
        merge: "product", the report's; "sum" (:func:`sum_of_steps`) or "graft" (:func:`graft`).
        controller: sets ``lambdas`` anew after every step, by what the rules proposed
            (:mod:`~hybrid_lib.optim.controllers`); its memory is ``memory`` in the group. It reads
            a few numbers back from the device per step, so a CUDA graph cannot hold it. None: they
            stay as they are.

    Set the attribute ``capturable`` to capture ``step`` in a CUDA graph; then :meth:`advance` has
    to be called before every replay.

    Raises:
        ValueError: for anything outside its range, in ``step`` too if it was changed to that.
        TypeError: for complex parameters, and for rules that are not rules.
        CannotCompile: in a group's first step; earlier groups have already moved.

    Example:
        >>> from hybrid_lib.optim.rules import SGD, Adam
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = Hybrid([w], [Adam(), SGD()], lr=0.1, lambdas=(0.5, 0.5))
        >>> (w**2).sum().backward()
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([ 0.4225, -0.8725], requires_grad=True)

        Adam answers 0.1 sign(g) and 0.1 / (1 - 0.9), SGD g and 0.1: the first weight moves by
        (0.5 * 1 + 0.5 * 0.1) * (0.5 * 0.1 + 0.5 * 2) = 0.5775.
    """

    capturable = False

    def __init__(
        self,
        params,
        rules: Sequence,
        lr: float,
        lambdas: Sequence[float] = (1.0,),
        decoupled_weight_decay: float = 0.0,
        maximize: bool = False,
        compile: bool = False,
        foreach: bool | None = None,
        merge: str = "product",
        controller=None,
    ):
        defaults = {
            "lr": lr, "lambdas": _weights(lambdas), "rules": tuple(rules),
            "decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize,
            "compile": compile, "foreach": foreach, "merge": merge, "controller": controller,
        }  # fmt: skip
        self._forget()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict) -> None:
        """Of a copy, or of a loaded state: the buffers are others now."""
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            group.setdefault("foreach", None)  # of a pickle from before these existed
            group.setdefault("merge", "product")
            group.setdefault("controller", None)

    def _forget(self) -> None:
        self._compiled: dict[tuple, tuple] = {}  # by all that torch does not look at
        # Numbers that CUDA graphs read, by parameters that move together; and those that do.
        self._cells: dict[tuple, tuple] = {}
        self._replayed: set[tuple] = set()

    @property
    def needs_hessian(self) -> bool:
        """Whether any rule of any group asks for ``hess_diag``."""
        return any(map(_needs_hessian, self.param_groups))

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters with settings of their own; what is not given is taken from the defaults.

        Raises:
            ValueError, TypeError: as at construction; the optimizer is then left as it was.
        """
        group = {**self.defaults, **param_group}
        group["rules"], group["lambdas"] = tuple(group["rules"]), _weights(group["lambdas"])
        needed = "needs_hessian", "init", "corrections", "propose"
        for r in group["rules"]:
            if isinstance(r, type) or not is_dataclass(r) or not all(hasattr(r, n) for n in needed):
                raise TypeError(f"rules: {r!r} is not a rule; use those of rules, as in SGD()")
        if group["merge"] not in MERGES:
            raise ValueError(f"merge={group['merge']!r}: must be one of {', '.join(MERGES)}")
        _check_rates(group)
        if not group["lr"] > 0:
            raise ValueError(f"lr={group['lr']!r}: must be a finite number above 0")
        group["memory"] = {} if group["controller"] is None else group["controller"].start(group)
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                self.param_groups.pop()
                raise TypeError(f"a parameter is {p.dtype}, complex: pass torch.view_as_real of it")

    def advance(self) -> None:
        """Count the step that a CUDA graph is about to repeat, and hand it that step's numbers.

        To be called before every replay of a graph in which ``step`` was captured. Learning rates,
        weights and bias corrections are those of now; what was 0 in the capture stays 0.

        Raises:
            RuntimeError: if no step has been captured since the state was made or loaded.
            ValueError: as ``step`` does; nothing has been counted then.
        """
        if not self._replayed:
            raise RuntimeError("no step was captured since this state was made or loaded: do so")
        for group in self.param_groups:
            _check_rates(group)
        for together in self._replayed:
            group, states, cells = self._cells[together]
            t = states[0]["step"] + 1
            for state in states:
                state["step"] = t
            η, λ, corrections = group["lr"], group["lambdas"], _corrections(group, t)
            now = [η, *λ, *itertools.chain(*corrections)]
            cells.copy_(torch.tensor(now, dtype=cells.dtype), non_blocking=True)

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
            RuntimeError: for sparse gradients, where a rule needs ``hess_diag`` and never had one,
                or in the capture of a CUDA graph, but for an optimizer whose ``capturable`` is set.
                Nothing has moved then.
            ValueError: if ``hess_diag`` does not fit the parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        given = {} if hess_diag is None else self._by_parameter(list(hess_diag))
        moving = [self._checked(group, given) for group in self.param_groups]
        self._keep(given)
        for group, params in zip(self.param_groups, moving):
            states, observed = self._states(group, params), []
            # Parameters that have waited are at an earlier step: their corrections are others.
            alike: dict[tuple, list] = {}
            for p, state in zip(params, states):
                alike.setdefault((state["step"] + 1, p.device, p.dtype), []).append((p, state))
            for (t, device, dtype), part in alike.items():
                observed.append(self._move(group, *zip(*part), t, device, dtype))
                for _, state in part if not _capturing() else ():  # what is captured moves later
                    state["step"] = t
            # A step with lr = 0 only makes buffers.
            if group["controller"] is not None and states and _if_here(group["lr"]) != 0:
                numbers = [torch.stack(part).tolist() for part in observed]  # waits for a device
                known = (self.state.get(p, {}) for p in group["params"])
                everyone = [state for state in known if "rules" in state]
                group["controller"].update(group, everyone, [sum(of) for of in zip(*numbers)])
        return loss

    @torch.no_grad()
    def proposals(self, hess_diag: Iterable[Tensor | None] | None = None) -> Iterator[tuple]:
        """What the rules would answer now, asked on copies of their buffers: nothing changes.

        Args:
            hess_diag: as for :meth:`step`.

        Yields:
            ``(parameter, (group, directions, step sizes, D or None))`` for each parameter that has
            a gradient; a direction and a step size per rule.

        Raises:
            RuntimeError, ValueError: as :meth:`step` does.
        """
        given = {} if hess_diag is None else self._by_parameter(list(hess_diag))
        for group in self.param_groups:
            for p in self._checked(group, given):
                state = self.state.get(p, {})
                D = given.get(p, state.get("hess_diag"))
                D = zeros(p) if D is None and _needs_hessian(group) else D  # at lr = 0
                kept = state.get("rules") or [{}] * len(group["rules"])
                buffers = [r.init(p) | {name: b.clone() for name, b in of_rule.items()}
                           for r, of_rule in zip(group["rules"], kept)]  # fmt: skip
                g = -_wide(p.grad) if group["maximize"] else _wide(p.grad)
                asked = zip(group["rules"], buffers, _corrections(group, state.get("step", 0) + 1))
                answers = [r.propose(Seen(_wide(p), g, D), b, group["lr"], c) for r, b, c in asked]
                d, step_sizes = zip(*answers)
                yield p, (group, d, step_sizes, D)

    def _move(self, group: dict, params, states, t: int, device, dtype) -> list[Tensor]:
        """The step t of parameters of one device and dtype; the sums of what was observed."""
        η, λ, γ = group["lr"], group["lambdas"], group["decoupled_weight_decay"]
        rules, corrections = group["rules"], _corrections(group, t)
        how = rules, group["maximize"], group["merge"], group["controller"]
        grads, diagonals = [p.grad for p in params], [None] * len(params)
        if _needs_hessian(group):  # missing only in a step with lr = 0, which moves nothing
            diagonals = [s["hess_diag"] if "hess_diag" in s else zeros(p)
                         for p, s in zip(params, states)]  # fmt: skip
        if self.capturable:
            later = self._numbers_in_graphs(group, params, states, corrections)
            η, λ, corrections = later if _capturing() else (η, λ, corrections)
        foreach = group["foreach"]
        if foreach is None:
            foreach = device.type == "cuda" or group["controller"] is not None
        if not group["compile"] and not foreach:
            each_one = zip(params, grads, diagonals, states)
            return _summed([move(p, g, D, s["rules"], η, λ, corrections, γ, *how)
                            for p, g, D, s in each_one])  # fmt: skip
        buffers = [{name: [s["rules"][i][name] for s in states] for name in of_rule}
                   for i, of_rule in enumerate(states[0]["rules"])]  # fmt: skip
        if not group["compile"]:
            D = None if diagonals[0] is None else Tensors(diagonals)
            buffers = [{name: Tensors(b) for name, b in of_rule.items()} for of_rule in buffers]
            tensors = Tensors(params), Tensors(grads), D, buffers
            return move(*tensors, η, λ, corrections, γ, *how)
        number = functools.partial(_on, device, torch.promote_types(dtype, torch.float32))
        lists = [b for of_rule in buffers for b in of_rule.values()]
        held = list(itertools.chain(params, diagonals, *lists))  # so that no id is another's
        key = (*how, γ == 0, *map(id, held))  # all that the compiled step does not look at itself
        if key not in self._compiled:
            options = {"only": "grads", "size_asserts": False}
            self._compiled[key] = held, compiled(move_each, "the optimizer's step", **options)
        _, fused = self._compiled[key]
        numbers = number(η), [number(λi) for λi in λ], [tuple(map(number, c)) for c in corrections]
        decay = number(γ) if γ != 0 else 0
        return fused(params, grads, diagonals, buffers, *numbers, decay, *how)

    def _numbers_in_graphs(self, group: dict, params, states, corrections) -> tuple:
        """η, λ and corrections as tensors, which :meth:`advance` writes before a replay.

        Allocated by a step before the capture: memory of the graph's own may have been another
        tensor's, one that is dead by the time the optimizer runs.
        """
        λ, together = group["lambdas"], tuple(map(id, params))
        if together not in self._cells:
            if _capturing():
                raise RuntimeError("take a step with capturable set before you capture one")
            n, dtype = 1 + len(λ) + sum(map(len, corrections)), state_dtype(params[0])
            cells = torch.empty(n, dtype=dtype, device=params[0].device)
            self._cells[together] = group, states, cells
        if _capturing():
            self._replayed.add(together)
        cell = iter(self._cells[together][-1].unbind())
        η, λ = next(cell), [c if λi != 0 else 0.0 for λi, c in zip(λ, cell)]
        return η, λ, [tuple(itertools.islice(cell, len(c))) for c in corrections]

    def _states(self, group: dict, params: list[Tensor]) -> list[dict]:
        """With all buffers that rules and controller, which may have been changed since, want."""
        makers = _makers(group)
        wanted = [make(torch.empty(0)).keys() for make in makers]
        states = [self.state[p] for p in params]
        for p, state in zip(params, states):
            if "rules" not in state:
                state.update(step=0, rules=[{} for _ in makers])
            for make, names, buffers in zip(makers, wanted, state["rules"]):
                if not names <= buffers.keys():
                    buffers |= {k: b for k, b in make(p).items() if k not in buffers}
        return states

    def _keep(self, given: dict[Tensor, Tensor]) -> None:
        """Copy diagonals: "the last again" must not change with the caller's tensor."""
        kept = {p: self.state[p].get("hess_diag") for p in given}
        again = [p for p, D in kept.items() if D is not None]
        if again:
            torch._foreach_copy_([kept[p] for p in again], [given[p] for p in again])
        for p in given.keys() - set(again):
            self.state[p]["hess_diag"] = given[p].detach().to(state_dtype(p), copy=True)

    def _by_parameter(self, hess_diag: list[Tensor | None]) -> dict[Tensor, Tensor]:
        """The given tensors, where a rule needs them."""
        needs = {p: _needs_hessian(group) for group in self.param_groups for p in group["params"]}
        if len(hess_diag) != len(needs):
            counts = f"{len(hess_diag)} tensors for {len(needs)} parameters"
            raise ValueError(f"hess_diag: {counts}; pass one each, in the order of param_groups")
        for i, (p, D) in enumerate(zip(needs, hess_diag)):
            if D is None or (D.shape, D.device, D.is_floating_point()) == (p.shape, p.device, True):
                continue
            ours, theirs = (f"{tuple(x.shape)}, {x.dtype} on {x.device}" for x in (D, p))
            raise ValueError(f"hess_diag[{i}]: shape {ours}; its parameter: shape {theirs}")
        return {p: D for p, D in zip(needs, hess_diag) if D is not None and needs[p]}

    def _checked(self, group: dict, given: dict[Tensor, Tensor]) -> list[Tensor]:
        """The parameters of a group that move, once nothing speaks against it."""
        _check_rates(group)
        moving = [p for p in group["params"] if p.grad is not None]
        # A step with lr = 0 only makes buffers, as torch.distributed.checkpoint does.
        must_have_diagonal = _needs_hessian(group) and _if_here(group["lr"]) != 0
        for p in moving:
            state = self.state.get(p, {})
            if p.grad.layout is not torch.strided:
                raise RuntimeError(f"a gradient is {p.grad.layout}: make it dense (sparse=False)")
            if "rules" in state and len(state["rules"]) != len(_makers(group)):
                raise RuntimeError(
                    "rules were added or removed after the first step, or a controller was, so "
                    "buffers are missing: make a new optimizer, or weigh a rule with 0 for a while"
                )
            if must_have_diagonal and "hess_diag" not in state and p not in given:
                raise RuntimeError(
                    "AdaHessian needs the Hessian diagonal at its first step: "
                    "grads, diag = hessian_diagonal(loss, params), then step(hess_diag=diag)"
                )
        if _capturing() and group["controller"] is not None:
            raise RuntimeError("a controller looks at every step: leave it out of CUDA graphs")
        if _capturing() and not self.capturable:
            reason = "a CUDA graph would repeat this step's bias corrections for ever"
            ways = "capture the passes alone; or set capturable, and call advance() before replays"
            raise RuntimeError(f"{reason}: {ways}")
        return moving

    def state_dict(self) -> dict:
        """As in :class:`torch.optim.Optimizer`; rules become dicts of numbers and strings.

        The result holds tensors and primitives only, so that ``torch.load(...,
        weights_only=True)`` reads it back.
        """
        packed = super().state_dict()
        for group in packed["param_groups"]:
            group["rules"] = [_packed(r) for r in group["rules"]]
            group["controller"] = group["controller"] and _packed(group["controller"])
            group["lambdas"] = tuple(group["lambdas"])
            group.update(_plain(group))
        return packed

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore a ``state_dict()``, copied: later steps do not write into it.

        How to compute (``compile``, ``foreach``) stays this optimizer's own.

        Raises:
            ValueError: if it belongs to other rules or to other parameters.
        """
        saved: dict = {}

        def checked(_, state_dict: dict) -> dict:  # after the hooks that the user has registered
            saved.update(state_dict)
            return {**state_dict, "param_groups": self._restored_groups(state_dict)}

        def copy(_) -> None:  # torch rounds to the parameter's dtype; under bfloat16 ours are wider
            for key, p in self._keyed(saved):
                if key in saved["state"]:
                    self.state[p] = _copied(saved["state"][key], p)

        hooks = [self.register_load_state_dict_pre_hook(checked),
                 self.register_load_state_dict_post_hook(copy, prepend=True)]  # fmt: skip
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _keyed(self, state_dict: dict):
        """(key in the saved state, parameter), in order."""
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        return zip(keys, (p for group in self.param_groups for p in group["params"]))

    def _restored_groups(self, state_dict: dict) -> list[dict]:
        groups = list(state_dict["param_groups"])
        for i, (saved, group) in enumerate(zip(groups, self.param_groups)):
            saved = {"merge": "product", "controller": None, **saved}  # older states name neither
            theirs = [r["rule"] for r in [*saved.get("rules", []), saved["controller"]] if r]
            ours = [type(r).__name__ for r in [*group["rules"], group["controller"]] if r]
            if theirs != ours:
                whose = " + ".join(theirs) or "another optimizer"
                raise ValueError(f"the saved state is of {whose}, this is {' + '.join(ours)}")
            controller = group["controller"] and _unpacked(group["controller"], saved["controller"])
            groups[i] = {
                **saved,
                "rules": tuple(map(_unpacked, group["rules"], saved["rules"])),
                "controller": controller,
                "lambdas": tuple(saved["lambdas"]),
                "compile": group["compile"], "foreach": group["foreach"],
            }  # fmt: skip
        for key, p in self._keyed(state_dict):
            state = state_dict["state"].get(key, {})
            for buffers in [state, *state.get("rules", [])]:
                for name, value in buffers.items():
                    if isinstance(value, Tensor) and name != "step" and value.shape != p.shape:
                        shapes = f"{tuple(value.shape)}, the parameter {tuple(p.shape)}"
                        raise ValueError(f"the saved {name} of parameter {key} has shape {shapes}")
        return groups


def _summed(observed: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(numbers).sum() for numbers in zip(*observed)]


def _weighted_sum(weights: Sequence[Number], terms: Sequence):
    """A new tensor, or None if nothing has weight.

    What has none is left out, even where a direction that nobody wants is not finite.
    """
    weighed = [
        _times(λ, x) if isinstance(λ, Tensor) and isinstance(x, Tensor) else x.mul(λ)
        for λ, x in zip(weights, terms)
        if isinstance(λ, Tensor) or λ != 0
    ]
    return functools.reduce(lambda total, term: total.add_(term), weighed) if weighed else None


def _weighed(λ: Sequence[Number], η: Sequence[Number]) -> list[Number]:
    """λᵢ ηᵢ, but the number 0 where λᵢ is: a rule that has no weight is left out."""
    return [λi * ηi if isinstance(λi, Tensor) or λi != 0 else 0.0 for λi, ηi in zip(λ, η)]


def _times(λ: Tensor, x: Tensor) -> Tensor:
    return torch.where(λ != 0, x * λ, 0.0)


def _wide(x):
    first = x.tensors[0] if isinstance(x, Tensors) else x
    dtype = state_dtype(first)
    return x if first.dtype == dtype else each(lambda of_one: of_one.to(dtype), x)


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _corrections(group: dict, t: int) -> list[tuple[float, ...]]:
    return [rule.corrections(t) for rule in group["rules"]]


def _makers(group: dict) -> list[Callable]:
    """What makes a parameter's buffers: by rule, and last the controller's."""
    rules, controller = group["rules"], group["controller"]
    makers = [r.init for r in rules]
    return [*makers, functools.partial(controller.init, rules=rules)] if controller else makers


def _packed(part) -> dict:
    return {"rule": type(part).__name__, **asdict(part)}


def _unpacked(ours, saved: dict):
    return replace(ours, **{k: v for k, v in saved.items() if k != "rule"})


def _needs_hessian(group: dict) -> bool:
    return any(r.needs_hessian for r in group["rules"])


def _check_rates(group: dict) -> None:
    """lr and lambdas may be changed between steps: looked at again before each."""
    for name in ("lr", "decoupled_weight_decay"):
        if not _is_weight(group[name]):
            raise ValueError(f"{name}={group[name]!r}: must be a finite number, at least 0")
    lambdas = tuple(group["lambdas"])
    if len(group["rules"]) == 0 or len(lambdas) != len(group["rules"]):
        raise ValueError(f"lambdas={lambdas!r} for {len(group['rules'])} rules: one weight each")
    if not all(map(_is_weight, lambdas)):
        raise ValueError(f"lambdas={lambdas!r}: weights must be finite and at least 0")


def _is_weight(number) -> bool:
    number = _if_here(number)
    return isinstance(number, numbers.Real) and math.isfinite(number) and number >= 0


def _if_here(number: Number) -> float:
    """Of a tensor elsewhere, which would have to be waited for, only that there is one."""
    elsewhere = isinstance(number, Tensor) and number.device.type != "cpu"
    return 1.0 if elsewhere else _value(number)


def _weights(lambdas) -> tuple | Tensor:
    if not isinstance(lambdas, Iterable):
        raise ValueError(f"lambdas={lambdas!r}: must be a sequence of numbers, one per rule")
    return lambdas if isinstance(lambdas, Tensor) else tuple(lambdas)


def _value(number: Number) -> float:
    return number.item() if isinstance(number, Tensor) else number


def _on(device: torch.device, dtype: torch.dtype, number: Number) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(device, dtype)
    return torch.full((), number, device=device, dtype=dtype)  # filled there: no copy to wait for


def _copied(value, p: Tensor, name: str = ""):
    """A copy of one parameter's state, on its device and in the dtype its buffers have."""
    if isinstance(value, dict):
        return {k: _copied(v, p, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_copied(v, p) for v in value]
    if name == "step":
        return int(value)
    return value.detach().to(p.device, state_dtype(p), copy=True)


def _plain(value):
    """Tensors' and NumPy's numbers as Python's, which every loader accepts."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(v) for v in value)
    return value.item() if hasattr(value, "item") else value
