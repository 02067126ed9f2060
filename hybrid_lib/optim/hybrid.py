"""One optimizer for all hybrids: rules propose, and :func:`move` merges their proposals.

The report's merge (Algorithms 2 and 4) is a product of sums, not a sum of the rules' own steps.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, is_dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from hybrid_lib.optim.compiled import CannotCompile, compiled
from hybrid_lib.optim.rules import Number, Seen, Tensors, each, state_dtype, zeros


def product(λ: Sequence[Number], η: Sequence[Number], d: Sequence):
    """(Σ λᵢ ηᵢ) (Σ λᵢ dᵢ): Algorithms 2 and 4."""
    d_merged = _weighted_sum(λ, d)
    η_merged = sum(λi * ηi for λi, ηi in zip(λ, η))
    return None if d_merged is None else d_merged.mul_(η_merged)


def sum_of_steps(λ: Sequence[Number], η: Sequence[Number], d: Sequence):
    """Σ λᵢ ηᵢ dᵢ: the weighted sum of separate optimizers' steps."""
    return _weighted_sum(_weighted_step_sizes(λ, η), d)


def graft(λ: Sequence[Number], η: Sequence[Number], d: Sequence):
    """(Σ λᵢ ‖ηᵢ dᵢ‖) d₁ / ‖d₁‖ for each tensor: the first rule's direction, scaled to the weighted
    sum of all step lengths (Agarwal et al. 2020 for λ = (0, 1))."""
    lengths = [each(torch.linalg.vector_norm, di) for di in d]
    length = _weighted_sum(_weighted_step_sizes(λ, η), lengths)
    # A norm below the root of the smallest number has lost its digits, as squares are summed.
    least = each(lambda n: n.clamp_min(torch.finfo(n.dtype).tiny ** 0.5), lengths[0])
    unit = d[0].div(least)
    return None if length is None else unit.mul_(length)


MOST_COMPILATIONS = 32  # per group
MERGES = {"product": product, "sum": sum_of_steps, "graft": graft}

# Torch's methods without the decorator whose first call imports the whole compiler: seconds.
_add_param_group, _state_dict, _load_state_dict = map(
    inspect.unwrap, (Optimizer.add_param_group, Optimizer.state_dict, Optimizer.load_state_dict)
)


def move(w, g, D, buffers, η, λ, corrections, γ, rules, maximize, merge, controller) -> list:
    """Take one step in place. Weights move nowhere else.

    Args:
        w, g, D: weights, gradient and Hessian diagonal (or None), each a tensor or ``Tensors``.
        buffers: one dict per rule, then the controller's, if there is one.
        η, λ, γ: learning rate, weights, decoupled weight decay.
        corrections: what each rule's ``corrections`` returned.
        rules, maximize, merge, controller: the parameter group's.

    Returns:
        What the controller observed.
    """
    x, g = _wide(w), _wide(g)  # bfloat16 is updated in float32; otherwise x is w
    seen = Seen(x, -g if maximize else g, D)  # D enters squared, so its sign is irrelevant
    originals = [dict(b) for b in buffers]
    proposals = [r.propose(seen, b, η, c) for r, b, c in zip(rules, buffers, corrections)]
    d, step_sizes = zip(*proposals)
    observed = controller.observe(seen, step_sizes, d, buffers[-1]) if controller else []
    if any(b[name] is not o[name] for b, o in zip(buffers, originals) for name in o):
        raise TypeError("a rule must update its buffers in place, as in buffers['m'].mul_(0.9)")

    step = MERGES[merge](λ, step_sizes, d)
    if not _is_zero(γ):
        x.mul_(1 - η * γ)
    if step is not None:
        x.sub_(step)
    if x is not w:
        w.copy_(x)
    return observed


def move_each(params, grads, diagonals, buffers, *settings) -> list:
    """Apply :func:`move` to each parameter and sum what the controller observed.

    Each buffer is a list of tensors here. A compiler can trace this function.
    """
    observed = []
    for i, (w, g) in enumerate(zip(params, grads)):
        buffers_i = [{name: b[i] for name, b in of_rule.items()} for of_rule in buffers]
        observed.append(move(w, g, diagonals[i], buffers_i, *settings))
    return _summed(observed)


class Hybrid(Optimizer):
    r"""Merge the proposals of several rules into one step.

    If rule i proposes direction :math:`d_i` and step size :math:`\eta_i`, a step is

    .. math:: w \leftarrow w (1 - \eta\gamma)
              - \Big(\sum_i \lambda_i \eta_i\Big) \Big(\sum_i \lambda_i d_i\Big)

    ``lr`` and ``lambdas`` live in ``param_groups``: change them there at any time, by hand or with
    a torch scheduler. Every rule updates its buffers on every step, whatever its weight, so a rule
    that is faded in later is already warmed up. Buffers have at least float32 precision.

    Args:
        params: parameters or parameter groups; a group may override every argument below.
        rules: the rules, adaptive ones first by convention.
        lr: learning rate :math:`\eta > 0`, passed to every rule.
        lambdas: one weight per rule, in their order: finite, at least 0. They need not sum to 1.
        decoupled_weight_decay: :math:`\gamma \ge 0`; weights shrink before they move (Algorithm 3).
        maximize: ascend instead of descend.
        compile: fuse the step with ``torch.compile``, so that it reads and writes each tensor once.
            Compilation takes seconds to a minute and pays off over thousands of steps. Results are
            equal up to rounding; changing ``lr`` or ``lambdas`` does not recompile.
        foreach: compute all parameters of a group at once, as in :mod:`torch.optim`: few kernels
            instead of many, at the cost of some memory. None: on NVIDIA GPUs or with a controller.
        merge: "product" (the report's), "sum" (:func:`sum_of_steps`) or "graft" (:func:`graft`).
        controller: sets ``lambdas`` after every step, based on what the rules proposed
            (:mod:`~hybrid_lib.optim.controllers`); keeps its memory in the group's ``memory``. It
            reads a few numbers back from the device per step, so it does not work in CUDA graphs.
            None: lambdas are left unchanged.

    To capture ``step`` in a CUDA graph, set the attribute ``capturable`` and call :meth:`advance`
    before every replay.

    Raises:
        ValueError: for a value out of range, at construction or, if changed since, in ``step``.
        TypeError: for complex parameters, and if ``rules`` contains anything but rules.
        CannotCompile: on a group's first step, if compilation fails; earlier groups have moved.

    Example:
        >>> from hybrid_lib.optim.rules import SGD, Adam
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = Hybrid([w], [Adam(), SGD()], lr=0.1, lambdas=(0.5, 0.5))
        >>> (w**2).sum().backward()
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([ 0.4225, -0.8725], requires_grad=True)

        Adam proposes 0.1 sign(g) and 0.1 / (1 - 0.9), SGD g and 0.1, so the first weight moves by
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
        self._clear_caches()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict) -> None:
        """Restore a copy or a loaded state: anything cached by buffer identity is now stale."""
        super().__setstate__(state)
        self._clear_caches()

    def _clear_caches(self) -> None:
        self._compiled: dict[tuple, tuple] = {}  # keyed by all that torch does not check
        # Keyed by parameters that move together: numbers that CUDA graphs read; captured steps.
        self._cells: dict[tuple, tuple] = {}
        self._captured: set[tuple] = set()

    @property
    def needs_hessian(self) -> bool:
        """Whether any rule of any group needs ``hess_diag``."""
        return any(map(_needs_hessian, self.param_groups))

    def add_param_group(self, param_group: dict) -> None:
        """Add a parameter group; settings that it does not give are taken from the defaults.

        Raises:
            ValueError, TypeError: as at construction; the optimizer is then left unchanged.
        """
        group = {**self.defaults, **param_group}
        group["rules"], group["lambdas"] = tuple(group["rules"]), _weights(group["lambdas"])
        needed = "needs_hessian", "init", "corrections", "propose"
        for r in group["rules"]:
            if isinstance(r, type) or not is_dataclass(r) or not all(hasattr(r, n) for n in needed):
                raise TypeError(f"rules: {r!r} is not a rule; pass instances, as in rules.SGD()")
        _check_rates(group)
        if not group["lr"] > 0:
            raise ValueError(f"lr={group['lr']!r}: must be a finite number above 0")
        group["memory"] = {} if group["controller"] is None else group["controller"].start(group)
        _add_param_group(self, group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                self.param_groups.pop()
                raise TypeError(f"a parameter is complex, {p.dtype}: pass torch.view_as_real of it")

    def advance(self) -> None:
        """Count the step that a CUDA graph is about to replay, and give the graph its numbers.

        Call this before every replay of a graph that captured ``step``. The replay uses the current
        learning rates, weights, decays and bias corrections, but weights and decays that were 0 at
        capture stay 0.

        Raises:
            RuntimeError: if no step has been captured since the state was made or loaded.
            ValueError: as in :meth:`step`; no step is counted then.
        """
        if not self._captured:
            raise RuntimeError("no step was captured with the current state: capture one first")
        for group in self.param_groups:
            _check_rates(group)
        for together in self._captured:
            group, states, cells = self._cells[together]
            t = states[0]["step"] + 1
            for state in states:
                state["step"] = t
            η, γ, λ = group["lr"], group["decoupled_weight_decay"], group["lambdas"]
            current = [η, γ, *λ, *itertools.chain(*_corrections(group, t))]
            cells.copy_(torch.tensor(current, dtype=cells.dtype), non_blocking=True)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        hess_diag: Iterable[Tensor | None] | None = None,
    ):
        """Take one step for all parameters that have a gradient.

        Args:
            closure: re-evaluates the model, sets the gradients and returns the loss.
            hess_diag: one tensor per parameter, in the order of ``param_groups``, with the
                parameter's shape, as returned by :func:`~hybrid_lib.hessian_diagonal`. None, for
                all or for one, reuses the last. Ignored where no rule needs it.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for sparse gradients, if a rule needs ``hess_diag`` and never got one, or
                during the capture of a CUDA graph unless ``capturable`` is set. Nothing has moved
                then.
            ValueError: if ``hess_diag`` does not match the parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        given = {} if hess_diag is None else self._by_parameter(list(hess_diag))
        moving = [self._checked(group, given) for group in self.param_groups]
        self._store_diagonals(given)
        for group, params in zip(self.param_groups, moving):
            states, observed = self._states(group, params), []
            # Parameters that skipped steps have an earlier step count and so other corrections.
            by_step: dict[tuple, list] = {}
            for p, state in zip(params, states):
                by_step.setdefault((state["step"] + 1, p.device, p.dtype), []).append((p, state))
            for (t, device, dtype), part in by_step.items():
                observed.append(self._move(group, *zip(*part), t, device, dtype))
                for _, state in part if not _capturing() else ():  # a capture moves nothing yet
                    state["step"] = t
            # A step with lr = 0 moves nothing, so it tells a controller nothing.
            if group["controller"] is not None and states and not _is_zero(_read(group["lr"])):
                numbers = [torch.stack(part).tolist() for part in observed]  # waits for the device
                known = (self.state.get(p, {}) for p in group["params"])
                started = [state for state in known if "rules" in state]
                sums = [sum(column) for column in zip(*numbers)]
                group["controller"].update(group, started, sums)
        return loss

    @torch.no_grad()
    def proposals(self, hess_diag: Iterable[Tensor | None] | None = None) -> Iterator[tuple]:
        """Yield what the rules would propose now, from copies of their buffers: nothing changes.

        Args:
            hess_diag: as for :meth:`step`.

        Yields:
            ``(parameter, (group, directions, step sizes, D or None))`` for each parameter that has
            a gradient, with one direction and one step size per rule.

        Raises:
            RuntimeError, ValueError: as in :meth:`step`.
        """
        given = {} if hess_diag is None else self._by_parameter(list(hess_diag))
        for group in self.param_groups:
            for p in self._checked(group, given):
                state = self.state.get(p, {})
                D = given.get(p, state.get("hess_diag"))
                D = zeros(p) if D is None and _needs_hessian(group) else D  # at lr = 0
                saved = state.get("rules") or [{}] * len(group["rules"])
                buffers = [r.init(p) | {name: b.clone() for name, b in of_rule.items()}
                           for r, of_rule in zip(group["rules"], saved)]  # fmt: skip
                g = -_wide(p.grad) if group["maximize"] else _wide(p.grad)
                inputs = zip(group["rules"], buffers, _corrections(group, state.get("step", 0) + 1))
                answers = [r.propose(Seen(_wide(p), g, D), b, group["lr"], c) for r, b, c in inputs]
                d, step_sizes = zip(*answers)
                yield p, (group, d, step_sizes, D)

    def _move(self, group: dict, params, states, t: int, device, dtype) -> list[Tensor]:
        """Take step t for parameters of one device and dtype; return the observed sums."""
        η, *λ, γ = map(_read, (group["lr"], *group["lambdas"], group["decoupled_weight_decay"]))
        rules, corrections = group["rules"], _corrections(group, t)
        settings = rules, group["maximize"], group["merge"], group["controller"]
        grads, diagonals = [p.grad for p in params], [None] * len(params)
        if _needs_hessian(group):  # missing only in a step with lr = 0, which moves nothing
            diagonals = [s["hess_diag"] if "hess_diag" in s else zeros(p)
                         for p, s in zip(params, states)]  # fmt: skip
        if self.capturable:
            graph_numbers = self._graph_numbers(group, λ, γ, params, states, corrections)
            η, λ, γ, corrections = graph_numbers if _capturing() else (η, λ, γ, corrections)
        foreach = group["foreach"]
        if foreach is None:
            plain = type(params[0]) in (Tensor, torch.nn.Parameter)  # a DTensor lacks operations
            foreach = (device.type == "cuda" and plain) or group["controller"] is not None
        if not group["compile"] and not foreach:
            each_parameter = zip(params, grads, diagonals, states)
            return _summed([move(p, g, D, s["rules"], η, λ, corrections, γ, *settings)
                            for p, g, D, s in each_parameter])  # fmt: skip
        buffers = [{name: [s["rules"][i][name] for s in states] for name in of_rule}
                   for i, of_rule in enumerate(states[0]["rules"])]  # fmt: skip
        if not group["compile"]:
            D = None if diagonals[0] is None else Tensors(diagonals)
            buffers = [{name: Tensors(b) for name, b in of_rule.items()} for of_rule in buffers]
            tensors = Tensors(params), Tensors(grads), D, buffers
            return move(*tensors, η, λ, corrections, γ, *settings)
        number = functools.partial(_on, device, torch.promote_types(dtype, torch.float32))
        lists = [b for of_rule in buffers for b in of_rule.values()]
        kept = list(itertools.chain(params, diagonals, *lists))  # so that their ids stay unique
        first = {}  # parameters may share one gradient
        shared = tuple(first.setdefault(id(g), i) for i, g in enumerate(grads))
        # Everything that the compiled step does not check:
        key = (*settings, _is_zero(γ), shared, *map(id, kept))
        if key not in self._compiled:
            if len(self._compiled) >= MOST_COMPILATIONS * len(self.param_groups):
                raise CannotCompile(
                    f"the optimizer's step was compiled {MOST_COMPILATIONS} times per group, as "
                    "other parameters have gradients each time, or rules change: use compile=False"
                )
            options = {"only": "grads", "size_asserts": False}
            self._compiled[key] = kept, compiled(move_each, "the optimizer's step", **options)
        _, fused = self._compiled[key]
        numbers = number(η), [number(λi) for λi in λ], [tuple(map(number, c)) for c in corrections]
        decay = 0 if _is_zero(γ) else number(γ)
        return fused(params, grads, diagonals, buffers, *numbers, decay, *settings)

    def _graph_numbers(self, group: dict, λ, γ, params, states, corrections) -> tuple:
        """Return η, λ, γ and corrections as tensors, which :meth:`advance` writes before a replay.

        A step before the capture allocates them: memory of the graph's own pool may have belonged
        to another tensor, dead by the time the optimizer runs.
        """
        together = tuple(map(id, params))
        if together not in self._cells:
            if _capturing():
                raise RuntimeError("take a step with capturable set before capturing one")
            n, dtype = 2 + len(λ) + sum(map(len, corrections)), state_dtype(params[0])
            cells = torch.empty(n, dtype=dtype, device=params[0].device)
            self._cells[together] = group, states, cells
        if _capturing():
            self._captured.add(together)
        cell = iter(self._cells[together][-1].unbind())
        η, decay = next(cell), next(cell)
        λ = [0.0 if _is_zero(λi) else c for λi, c in zip(λ, cell)]
        γ = 0.0 if _is_zero(γ) else decay
        return η, λ, γ, [tuple(itertools.islice(cell, len(c))) for c in corrections]

    def _states(self, group: dict, params: list[Tensor]) -> list[dict]:
        """Return the states, with any new buffers that a changed rule or controller needs."""
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

    def _store_diagonals(self, given: dict[Tensor, Tensor]) -> None:
        """Copy diagonals, as they may be reused after the caller changes its tensors."""
        kept = {p: self.state[p].get("hess_diag") for p in given}
        old = [p for p, D in kept.items() if D is not None]
        if old:
            torch._foreach_copy_([kept[p] for p in old], [given[p] for p in old])
        for p in given.keys() - set(old):
            self.state[p]["hess_diag"] = given[p].detach().to(state_dtype(p), copy=True)

    def _by_parameter(self, hess_diag: list[Tensor | None]) -> dict[Tensor, Tensor]:
        """Map parameters to the given tensors, where a rule needs them."""
        needs = {p: _needs_hessian(group) for group in self.param_groups for p in group["params"]}
        if len(hess_diag) != len(needs):
            counts = f"{len(hess_diag)} tensors for {len(needs)} parameters"
            raise ValueError(f"hess_diag: {counts}; pass one each, in the order of param_groups")
        for i, (p, D) in enumerate(zip(needs, hess_diag)):
            if D is None or (D.shape, D.device, D.is_floating_point()) == (p.shape, p.device, True):
                continue
            actual, expected = (f"{tuple(x.shape)}, {x.dtype} on {x.device}" for x in (D, p))
            raise ValueError(f"hess_diag[{i}] has shape {actual}; its parameter has {expected}")
        return {p: D for p, D in zip(needs, hess_diag) if D is not None and needs[p]}

    def _checked(self, group: dict, given: dict[Tensor, Tensor]) -> list[Tensor]:
        """Return a group's parameters that move, after checking that they can."""
        _check_rates(group)
        moving = [p for p in group["params"] if p.grad is not None]
        # torch.distributed.checkpoint takes a step with lr = 0, just to allocate buffers.
        must_have_diagonal = _needs_hessian(group) and not _is_zero(_read(group["lr"]))
        for p in moving:
            state = self.state.get(p, {})
            if p.grad.layout is not torch.strided:
                raise RuntimeError(f"a gradient is {p.grad.layout}: make it dense (sparse=False)")
            if "rules" in state and len(state["rules"]) != len(_makers(group)):
                raise RuntimeError(
                    "rules were added or removed, or a controller was, after the first step, so "
                    "buffers are missing: make a new optimizer, or set a rule's weight to 0 instead"
                )
            if must_have_diagonal and "hess_diag" not in state and p not in given:
                raise RuntimeError(
                    "AdaHessian needs the Hessian diagonal at its first step: "
                    "grads, diag = hessian_diagonal(loss, params), then step(hess_diag=diag)"
                )
        if _capturing() and group["controller"] is not None:
            raise RuntimeError("a controller reads values every step: keep it out of CUDA graphs")
        if _capturing() and not self.capturable:
            reason = "a CUDA graph would repeat this step's bias corrections for ever"
            ways = "capture only the passes, or set capturable and call advance() before replays"
            raise RuntimeError(f"{reason}: {ways}")
        return moving

    def state_dict(self) -> dict:
        """As in :class:`torch.optim.Optimizer`, with rules as dicts of numbers and strings.

        The result holds only tensors and primitives, so that ``torch.load(..., weights_only=True)``
        can read it.
        """
        packed = _state_dict(self)
        for group in packed["param_groups"]:
            group["rules"] = [_packed(r) for r in group["rules"]]
            group["controller"] = group["controller"] and _packed(group["controller"])
            group["lambdas"] = tuple(group["lambdas"])
            group.update(_plain(group))
        return packed

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore a copy of a ``state_dict()``: later steps do not write into the original.

        This optimizer keeps its own ``compile`` and ``foreach``.

        Raises:
            ValueError: if the state belongs to other rules or other parameters.
        """
        saved: dict = {}

        def checked(_, state_dict: dict) -> dict:  # runs after the user's own hooks
            saved.update(state_dict, state=self._with_empty_dicts(state_dict))
            return {**saved, "param_groups": self._restored_groups(saved)}

        def copy(_) -> None:  # torch rounds to the parameter's dtype; for bfloat16, ours is wider
            for key, p in self._keyed(saved):
                if key in saved["state"]:
                    self.state[p] = _copied(saved["state"][key], p)

        hooks = [self.register_load_state_dict_pre_hook(checked),
                 self.register_load_state_dict_post_hook(copy, prepend=True)]  # fmt: skip
        try:
            _load_state_dict(self, state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _with_empty_dicts(self, state_dict: dict) -> dict:
        """The saved state; torch.distributed drops the dicts of rules without buffers."""
        state = dict(state_dict["state"])
        for saved, group in zip(state_dict["param_groups"], self.param_groups):
            for key in saved["params"]:
                if "step" in state.get(key, {}):
                    rules = [buffers or {} for buffers in state[key].get("rules", [])]
                    rules += [{}] * (len(_makers(group)) - len(rules))
                    state[key] = {**state[key], "rules": rules}
        return state

    def _keyed(self, state_dict: dict):
        """Pair the keys of the saved state with the parameters, in order."""
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        return zip(keys, (p for group in self.param_groups for p in group["params"]))

    def _restored_groups(self, state_dict: dict) -> list[dict]:
        groups = list(state_dict["param_groups"])
        for i, (saved, group) in enumerate(zip(groups, self.param_groups)):
            saved = {"merge": "product", "controller": None, "memory": {}, **saved}  # if absent
            given = [r["rule"] for r in [*saved.get("rules", []), saved["controller"]] if r]
            needed = [type(r).__name__ for r in [*group["rules"], group["controller"]] if r]
            if given != needed:
                source = " + ".join(given) or "another optimizer"
                raise ValueError(f"the saved state is from {source}, this is {' + '.join(needed)}")
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
    """Return the weighted sum in a new tensor, or None if all weights are 0.

    Terms of weight 0 are left out, so that their directions need not be finite; except ``Tensors``
    under a weight on another device, whose value is unknown.
    """
    weighted = [
        _times(λ, x) if isinstance(λ, Tensor) and isinstance(x, Tensor) else x.mul(λ)
        for λ, x in zip(weights, terms)
        if not _is_zero(λ)
    ]
    return functools.reduce(lambda total, term: total.add_(term), weighted) if weighted else None


def _weighted_step_sizes(λ: Sequence[Number], η: Sequence[Number]) -> list[Number]:
    """λᵢ ηᵢ, but the number 0 where λᵢ is 0, so that a rule without weight is left out."""
    return [0.0 if _is_zero(λi) else λi * ηi for λi, ηi in zip(λ, η)]


def _times(λ: Tensor, x: Tensor) -> Tensor:
    return torch.where(λ != 0, x * λ, 0.0)


def _wide(x):
    first = x.tensors[0] if isinstance(x, Tensors) else x
    dtype = state_dtype(first)
    return x if first.dtype == dtype else each(lambda t: t.to(dtype), x)


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _corrections(group: dict, t: int) -> list[tuple[float, ...]]:
    return [rule.corrections(t) for rule in group["rules"]]


def _makers(group: dict) -> list[Callable]:
    """Functions that create a parameter's buffers: one per rule, then the controller's."""
    rules, controller = group["rules"], group["controller"]
    makers = [r.init for r in rules]
    return [*makers, functools.partial(controller.init, rules=rules)] if controller else makers


def _packed(part) -> dict:
    return {"rule": type(part).__name__, **asdict(part)}


def _unpacked(part, saved: dict):
    return replace(part, **{k: v for k, v in saved.items() if k != "rule"})


def _needs_hessian(group: dict) -> bool:
    return any(r.needs_hessian for r in group["rules"])


def _check_rates(group: dict) -> None:
    """Check lr, weight decay, lambdas and merge, which may be changed between steps."""
    for name in ("lr", "decoupled_weight_decay"):
        if not _is_weight(group[name]):
            allowed = "a finite number or a 0-dimensional tensor, at least 0"
            raise ValueError(f"{name}={group[name]!r}: must be {allowed}")
    lambdas = tuple(group["lambdas"])
    if len(group["rules"]) == 0 or len(lambdas) != len(group["rules"]):
        raise ValueError(f"lambdas={lambdas!r} for {len(group['rules'])} rules: pass one for each")
    if not all(map(_is_weight, lambdas)):
        raise ValueError(f"lambdas={lambdas!r}: weights must be finite and at least 0")
    if group["merge"] not in MERGES:
        raise ValueError(f"merge={group['merge']!r}: must be one of {', '.join(MERGES)}")


def _is_weight(number) -> bool:
    number = _read(number)
    if isinstance(number, Tensor):  # not read
        return number.dim() == 0 and number.device.type != "cpu"
    return isinstance(number, numbers.Real) and math.isfinite(number) and number >= 0


def _is_zero(number: Number) -> bool:
    """Whether a number is zero; a tensor might be anything."""
    return not isinstance(number, Tensor) and number == 0


def _read(number: Number) -> Number:
    """Return a CPU tensor's value, but other tensors as they are: reading them would block."""
    read = isinstance(number, Tensor) and number.device.type == "cpu" and number.dim() == 0
    return number.item() if read else number


def _weights(lambdas) -> tuple | Tensor:
    if not isinstance(lambdas, Iterable):
        raise ValueError(f"lambdas={lambdas!r}: must be a sequence of numbers, one per rule")
    return lambdas if isinstance(lambdas, Tensor) else tuple(lambdas)


def _on(device: torch.device, dtype: torch.dtype, number: Number) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(device, dtype)
    return torch.full((), number, device=device, dtype=dtype)  # filled there: no copy to wait for


def _copied(value, p: Tensor, name: str = ""):
    """Copy one parameter's state to its device and to the dtype of its buffers."""
    if isinstance(value, dict):
        return {k: _copied(v, p, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_copied(v, p) for v in value]
    if name == "step":
        return int(value)
    return value.detach().to(p.device, state_dtype(p), copy=True)


def _plain(value):
    """Convert numbers of torch and NumPy to Python's, which every loader accepts."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(v) for v in value)
    return value.tolist() if hasattr(value, "tolist") else value
