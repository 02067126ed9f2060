"""The update rules SGD, Adam, Padam, AdaHessian and Lion, reduced to what a hybrid needs.

Used alone, a rule would move the weights by ``-step_size * direction``. Proposals are merged, and
weights moved, only in :mod:`hybrid_lib.optim.hybrid`. A rule is a frozen dataclass of
hyper-parameters, which raises ValueError for one outside its range, with

- ``needs_hessian``: whether it needs the diagonal of the Hessian,
- ``init(w)``: returns its buffers for one parameter, a dict of tensors of its shape,
- ``corrections(t)``: returns, as Python floats, what depends only on the step count t = 1, 2, …,
- ``propose(seen, buffers, lr, corrections)``: updates the buffers in place and returns
  (direction, step size).

In ``propose``, call tensor methods (``x.add(y)``), not torch functions, and do not read values: the
same code serves one tensor, all tensors of a parameter group (:class:`Tensors`) and a compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Number = float | Tensor  # in a compiled step, numbers are 0-dimensional tensors


class Tensors:
    """Tensors that act as one: every method calls ``torch._foreach_<method>`` on all of them.

    >>> x = Tensors([torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
    >>> x.add(x, alpha=2).tensors
    [tensor([3., 6.]), tensor([9.])]
    """

    def __init__(self, tensors):
        self.tensors = list(tensors)

    def __getattr__(self, name: str) -> Callable[..., Tensors]:
        operation = getattr(torch, f"_foreach_{name}")

        def apply_to_all(*others, **options):
            others = [x.tensors if isinstance(x, Tensors) else x for x in others]
            result = operation(self.tensors, *others, **options)
            return self if name.endswith("_") else Tensors(result)

        return apply_to_all

    def __neg__(self) -> Tensors:
        return self.neg()


def each(function: Callable[[Tensor], Tensor], x: Tensor | Tensors) -> Tensor | Tensors:
    """Apply ``function`` to a tensor, or to each of several."""
    return Tensors(map(function, x.tensors)) if isinstance(x, Tensors) else function(x)


def flat(x: Tensor | Tensors) -> Tensor:
    """Return all entries as one vector."""
    return torch.cat([t.flatten() for t in x.tensors]) if isinstance(x, Tensors) else x.flatten()


def state_dtype(p: Tensor) -> torch.dtype:
    """The dtype of a rule's inputs and buffers: the parameter's own, but at least float32."""
    wide = p.dtype in (torch.float32, torch.float64)  # called often: avoids promote_types
    return p.dtype if wide else torch.promote_types(p.dtype, torch.float32)


def zeros(w: Tensor) -> Tensor:
    """A zero buffer for ``w``, with its shape and strides, in at least float32."""
    return torch.zeros_like(w, dtype=state_dtype(w), requires_grad=False)


class Seen(NamedTuple):
    """What a rule may read in one step; all three have the same shape."""

    w: Tensor | Tensors  # the weights before this step
    g: Tensor | Tensors  # the gradient at w, negated if the loss is maximised
    hess_diag: Tensor | Tensors | None = None  # None if no rule needs it


@dataclass(frozen=True)
class SGD:
    r"""Stochastic gradient descent with momentum, the :math:`\Delta_{SGD}` of Algorithms 2 and 4.

    .. math:: g' = g + \gamma w, \quad b_1 = g'_1, \quad b_t = \mu b_{t-1} + (1 - d)\, g'_t,
              \quad \text{direction } b_t \;(\text{Nesterov: } g'_t + \mu b_t), \quad \eta_t = \eta

    As in :class:`torch.optim.SGD`, the first buffer is not dampened. With momentum .95 the
    direction grows to about 20 gradients, so half the weight is not half the movement.

    Args:
        momentum: :math:`\mu \ge 0`.
        dampening: d, in [0, 1].
        nesterov: look one momentum step ahead; needs momentum > 0 and no dampening.
        weight_decay: :math:`\gamma \ge 0`, an L2 term added to the gradient.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    needs_hessian = False

    def __post_init__(self):
        check_at_least_zero(momentum=self.momentum, weight_decay=self.weight_decay)
        if not 0 <= self.dampening <= 1:
            raise ValueError(f"dampening={self.dampening!r}: must lie in [0, 1]")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            given = f"momentum={self.momentum!r}, dampening={self.dampening!r}"
            raise ValueError(f"nesterov=True with {given}: needs momentum > 0 and dampening = 0")

    def init(self, w: Tensor) -> dict[str, Tensor]:
        """The momentum buffer, if there is momentum."""
        return {"momentum_buffer": zeros(w)} if self.momentum else {}

    def corrections(self, t: int) -> tuple[float, ...]:
        """1 - d, but 1 for the first gradient."""
        return (1.0 if t == 1 else 1 - self.dampening,)

    def propose(self, seen: Seen, buffers: dict, lr: Number, corrections) -> tuple:
        """Update the momentum buffer and return (direction, step size)."""
        (share,) = corrections
        g = _with_l2(seen, self.weight_decay)
        if self.momentum == 0:
            return g, lr
        b = buffers["momentum_buffer"].mul_(self.momentum)
        b.add_(g if self.dampening == 0 else g.mul(share))
        return (g.add(b, alpha=self.momentum) if self.nesterov else b), lr


@dataclass(frozen=True)
class Adam:
    r"""Adam, the :math:`\Delta_{Adam}` of Algorithm 2.

    .. math:: m_t = \beta_1 m_{t-1} + (1 - \beta_1) g'_t, \quad
              v_t = \beta_2 v_{t-1} + (1 - \beta_2) {g'_t}^2, \quad
              \text{direction } \frac{m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \varepsilon}, \quad
              \eta_t = \frac{\eta}{1 - \beta_1^t}

    The bias correction of m is part of the step size, not of the direction. For Adam alone this
    changes nothing (it is :class:`torch.optim.Adam`); in a merge it scales SGD's direction too.

    Args:
        betas: decay rates of m and v, each in [0, 1).
        eps: :math:`\varepsilon \ge 0`, added to the root.
        weight_decay: L2 term added to the gradient. Algorithm 2 has none here; the released code
            and the defaults of :func:`hybrid_lib.atmo` have it.
        amsgrad: divide by the running maximum of v.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False

    needs_hessian = False

    def __post_init__(self):
        object.__setattr__(self, "betas", _checked_betas(self.betas))
        check_at_least_zero(eps=self.eps, weight_decay=self.weight_decay)

    def init(self, w: Tensor) -> dict[str, Tensor]:
        """The averages m and v and, with AMSGrad, the maximum of v."""
        return _averages(w, self.amsgrad)

    def corrections(self, t: int) -> tuple[float, ...]:
        """1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t)."""
        return _unbiased(self.betas[0], t, -1), _unbiased(self.betas[1], t, -0.5)

    def propose(self, seen: Seen, buffers: dict, lr: Number, corrections) -> tuple:
        """Update m and v and return (direction, step size)."""
        m, root = self._average_and_root(seen, buffers, corrections[1])
        return m.div(root), lr * corrections[0]

    def _average_and_root(self, seen: Seen, buffers: dict, root_correction: Number) -> tuple:
        """Return m and the corrected root of v, or of its maximum, plus eps."""
        g = _with_l2(seen, self.weight_decay)
        m, v = _updated_averages(buffers, g, g, self.betas)
        if self.amsgrad:
            largest = buffers["max_exp_avg_sq"]
            v = largest.copy_(largest.maximum(v))
        return m, v.sqrt().mul_(root_correction).add_(self.eps)


@dataclass(frozen=True)
class Padam(Adam):
    r"""Partially adaptive Adam (Algorithm 1; Chen et al. 2018).

    .. math:: \text{direction } \frac{m_t}{(\sqrt{\hat v_t} + \varepsilon)^{2p}}, \quad
              \hat v_t = \max(\hat v_{t-1}, v_t)

    p = 1/2 divides by the root, as Adam does; as p → 0 it approaches SGD with momentum. Published
    versions disagree on the bias correction:

    - "released": the step size is :math:`\eta\sqrt{1-\beta_2^t}/(1-\beta_1^t)` whatever p is, as in
      the code of the authors of Padam and of the report.
    - "none": the step size is :math:`\eta`, as in Algorithm 1 to the letter.
    - "consistent": the step size is :math:`\eta / (1-\beta_1^t)`, and the root is that of
      :math:`\hat v_t/(1-\beta_2^t)`: corrected before the power, equal to Adam at p = 1/2.

    Args:
        betas, eps, weight_decay: as for :class:`Adam`.
        amsgrad: divide by the running maximum of v (Algorithm 1). The released PADAM-SGD does not.
        partial: p in (0, 1/2]; the exponent on the root of v is 2p.
        bias_correction: one of the versions above.
    """

    amsgrad: bool = True
    partial: float = 1 / 8
    bias_correction: str = "released"

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.partial <= 0.5:
            raise ValueError(f"partial={self.partial!r}: must lie in (0, 1/2]; 1/2 is Adam's root")
        readings = ("released", "none", "consistent")
        if self.bias_correction not in readings:
            raise ValueError(f"bias_correction={self.bias_correction!r}: must be one of {readings}")

    def corrections(self, t: int) -> tuple[float, ...]:
        """Factors of the step size and of the root of v, according to ``bias_correction``."""
        if self.bias_correction == "released":
            return _unbiased(self.betas[1], t, 0.5) * _unbiased(self.betas[0], t, -1), 1.0
        return super().corrections(t) if self.bias_correction == "consistent" else (1.0, 1.0)

    def propose(self, seen: Seen, buffers: dict, lr: Number, corrections) -> tuple:
        """Update m and v and return (direction, step size)."""
        m, root = self._average_and_root(seen, buffers, corrections[1])
        return m.div(root.pow_(2 * self.partial)), lr * corrections[0]


@dataclass(frozen=True)
class AdaHessian:
    r"""AdaHessian (Algorithm 3; Yao et al. 2020): Adam with the Hessian diagonal D inside v.

    .. math:: v_t = \beta_2 v_{t-1} + (1 - \beta_2) {D^{(s)}_t}^2, \quad
              \text{direction } \frac{m_t}{(v_t / (1 - \beta_2^t))^{k/2} + \varepsilon}, \quad
              \eta_t = \frac{\eta}{1 - \beta_1^t}

    m averages the plain gradient; :class:`~hybrid_lib.Hybrid` applies decoupled weight decay. v is
    updated on every step, even when the last D is reused.

    Args:
        betas: decay rates of m and v, each in [0, 1).
        eps: :math:`\varepsilon \ge 0`, added after the power is taken.
        hessian_power: k in (0, 1]; 1 is a Newton-like scaling, k → 0 plain momentum.
        spatial_average: how :math:`D^{(s)}` is made from D. None: :math:`D^{(s)} = D`. "kernel":
            mean of \|D\| over the last two dimensions of 4-D tensors. "auto": also over the last
            dimension of 2-D and 3-D tensors. An integer b: over blocks of b entries in
            row-major order (Algorithm 3's block size; the last block may be shorter).
        signed_average: average D itself, as printed in Algorithm 3; entries of opposite sign then
            cancel. Both public implementations average \|D\|.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    hessian_power: float = 1.0
    spatial_average: str | int | None = None
    signed_average: bool = False

    needs_hessian = True

    def __post_init__(self):
        object.__setattr__(self, "betas", _checked_betas(self.betas))
        check_at_least_zero(eps=self.eps)
        if not 0 < self.hessian_power <= 1:
            raise ValueError(f"hessian_power={self.hessian_power!r}: must lie in (0, 1]")
        block = self.spatial_average
        if not (block in (None, "kernel", "auto") or (type(block) is int and block >= 1)):
            allowed = 'None, "kernel", "auto" or a block size of at least 1'
            raise ValueError(f"spatial_average={block!r}: must be {allowed}")

    def init(self, w: Tensor) -> dict[str, Tensor]:
        """The averages m and v."""
        return _averages(w)

    def corrections(self, t: int) -> tuple[float, ...]:
        """1 / (1 - beta1^t) and 1 / (1 - beta2^t)."""
        return _unbiased(self.betas[0], t, -1), _unbiased(self.betas[1], t, -1)

    def propose(self, seen: Seen, buffers: dict, lr: Number, corrections) -> tuple:
        """Update m and v and return (direction, step size)."""
        m_correction, v_correction = corrections
        D = seen.hess_diag
        if self.spatial_average is not None:
            D = D if self.signed_average else D.abs()
            D = each(lambda t: spatial_average(t, self.spatial_average), D)
        m, v = _updated_averages(buffers, seen.g, D, self.betas)
        scale = v.mul(v_correction).pow_(self.hessian_power / 2)
        return m.div(scale.add_(self.eps)), lr * m_correction


@dataclass(frozen=True)
class Lion:
    r"""Lion, sign steps from two averages (Chen et al. 2023); not in the report.

    .. math:: \text{direction } \mathrm{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t), \quad
              m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t, \quad \eta_t = \eta

    :class:`~hybrid_lib.Hybrid` applies decoupled weight decay, if any.

    Args:
        betas: weights of the past in the direction and in the average m, each in [0, 1).
    """

    betas: tuple[float, float] = (0.9, 0.99)

    needs_hessian = False

    def __post_init__(self):
        object.__setattr__(self, "betas", _checked_betas(self.betas))

    def init(self, w: Tensor) -> dict[str, Tensor]:
        """The average m."""
        return {"exp_avg": zeros(w)}

    def corrections(self, t: int) -> tuple[float, ...]:
        """Return none: m starts at zero and is not corrected."""
        return ()

    def propose(self, seen: Seen, buffers: dict, lr: Number, corrections) -> tuple:
        """Update m and return (direction, step size)."""
        beta1, beta2 = self.betas
        m = buffers["exp_avg"]
        direction = m.mul(beta1).add_(seen.g, alpha=1 - beta1).sign_()
        m.lerp_(seen.g, 1 - beta2)
        return direction, lr


def spatial_average(values: Tensor, block: str | int | None) -> Tensor:
    """Replace every entry by the mean of its block; :class:`AdaHessian` defines the blocks.

    >>> spatial_average(torch.tensor([1.0, 3.0, 5.0, 7.0, 10.0]), 2)
    tensor([ 2.,  2.,  6.,  6., 10.])
    """
    if block is None or values.numel() == 0:
        return values
    if isinstance(block, int):
        size = min(block, values.numel())
        means = F.avg_pool1d(values.reshape(1, 1, -1), size, ceil_mode=True).flatten()
        return means.repeat_interleave(size)[: values.numel()].view_as(values)
    averaged_dims = {4: (2, 3)} if block == "kernel" else {2: (1,), 3: (2,), 4: (2, 3)}
    if values.dim() not in averaged_dims:
        return values
    return values.mean(dim=averaged_dims[values.dim()], keepdim=True).expand_as(values)


def _with_l2(seen: Seen, weight_decay: float):
    return seen.g if weight_decay == 0 else seen.g.add(seen.w, alpha=weight_decay)


def _averages(w: Tensor, amsgrad: bool = False) -> dict[str, Tensor]:
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
    return {name: zeros(w) for name in names}


def _updated_averages(buffers: dict, first, second, betas: tuple[float, float]) -> tuple:
    """Update and return moving averages, m of ``first`` and v of ``second`` squared."""
    beta1, beta2 = betas
    m = buffers["exp_avg"].lerp_(first, 1 - beta1)
    v = buffers["exp_avg_sq"].mul_(beta2).addcmul_(second, second, value=1 - beta2)
    return m, v


def _unbiased(beta: float, t: int, power: float) -> float:
    """Return (1 - beta^t)^power; a moving average started at zero is biased by 1 - beta^t."""
    return (1 - beta**t) ** power


def check_at_least_zero(**values: float) -> None:
    """Raise ValueError for a number that is negative or not finite."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value!r}: must be a finite number, at least 0")


def _checked_betas(betas) -> tuple[float, float]:
    betas = tuple(betas)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas!r}: must be two numbers in [0, 1)")
    return betas
