"""Hutchinson's estimate of the Hessian diagonal, from Hessian-vector products."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hybrid_lib.optim.compiled import first_line

DEVICE_ERRORS = "allocate memory|CUDA error|cuDNN error"
ATTENTION = "compute attention within torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"


def hessian_diagonal(
    loss: Tensor | Callable[[list[Tensor]], tuple[Tensor, object]],
    params: Iterable[Tensor],
    n_samples: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[list[Tensor | None], list[Tensor]] | tuple[list[Tensor], list[Tensor], object]:
    r"""Compute the gradient of ``loss`` and Hutchinson's estimate of its Hessian diagonal.

    .. math:: D = \frac{1}{n} \sum_{s=1}^{n} z_s \odot (H z_s), \qquad
              z_s \in \{-1, 1\}^N \text{ uniformly}

    Unbiased, because the entries of z are independent with :math:`z_i^2 = 1`:
    :math:`E[z_i \sum_j H_{ij} z_j] = H_{ii}`. The variance of entry i is
    :math:`\frac{1}{n} \sum_{j \ne i} H_{ij}^2`; on a diagonal Hessian every probe is exact.

    A pure function: it writes no ``.grad`` and leaves no graph behind, except the one that ``loss``
    itself holds, so keep only ``loss.detach()``. With a GradScaler, call
    ``scaler.scale(loss).backward(retain_graph=True)`` first and take D alone from here, of the
    unscaled loss: ``unscale_`` divides every ``.grad``, and D never.

    Args:
        loss: a scalar, computed from ``params`` by twice differentiable operations; or a function
            of the parameters that returns (scalar, other) and has no side effects:
            :func:`forward_over_reverse` calls it once per probe (each with new dropout masks).
        params: the tensors to differentiate with respect to.
        n_samples: number of probes to average, at least 1; each costs about two gradients.
        generator: source of the probes, on the parameters' device; None: the global generator.

    Returns:
        ``(grads, diag)``, each with one tensor per parameter, in order. If the loss does not depend
        on a parameter, its gradient is None; if it is linear in a parameter, D is 0. For a
        function, ``(grads, diag, other)``, with a gradient of 0 instead of None.

    Raises:
        ValueError: if ``n_samples`` is below 1 or ``params`` is empty; for a loss that is a tensor,
            also if it is not a scalar or depends on none of ``params``, or if some are frozen.
        TypeError: if ``params`` is a single tensor.
        RuntimeError, NotImplementedError: if torch cannot differentiate the loss twice (fused
            attention, compiled models) or a function in forward mode (LSTM), with a remedy.

    Reference: Hutchinson 1990; Bekas, Kokiopoulou and Saad 2007.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> grads, diag = hessian_diagonal((w**3).sum(), [w])
        >>> grads[0], diag[0]
        (tensor([ 3., 12.]), tensor([ 6., 12.]))
        >>> hessian_diagonal(lambda p: ((p[0]**3).sum(), p[0].mean()), [w])
        ([tensor([ 3., 12.])], [tensor([ 6., 12.])], tensor(1.5000))
    """
    if isinstance(params, Tensor):
        raise TypeError("params is a tensor: pass a list of tensors, as in [w]")
    params = list(params)
    if not params:
        raise ValueError("params is empty: pass at least one tensor")
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples!r}: must be at least 1")
    if callable(loss):
        probes = [rademacher(params, generator) for _ in range(n_samples)]
        try:
            with torch.no_grad():  # for other tensors that the function uses
                return forward_over_reverse(loss, [p.detach() for p in params], probes)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"this loss cannot be differentiated in forward mode ({first_line(error)}): pass "
                f"the loss itself instead of a function, or {ATTENTION}"
            ) from error
    if loss.numel() != 1:
        raise ValueError(f"loss has shape {tuple(loss.shape)}: it must be a scalar")
    if not loss.requires_grad:
        raise ValueError("loss has no graph: compute it with gradients on and do not detach it")
    frozen = [i for i, p in enumerate(params) if not p.requires_grad]
    if frozen:
        raise ValueError(f"params at {frozen} require no gradient: omit frozen parameters")
    try:
        return _reverse_over_reverse(loss, params, n_samples, generator)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or re.search(DEVICE_ERRORS, str(error)):
            raise
        raise RuntimeError(
            f"this loss cannot be differentiated twice ({first_line(error)}): {ATTENTION}, "
            "use the model before torch.compile, or compute the loss anew if backward() freed it"
        ) from error


def _reverse_over_reverse(loss: Tensor, params: list[Tensor], n_samples: int, generator) -> tuple:
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    if all(g is None for g in grads):
        raise ValueError(
            "the loss depends on none of params: pass the parameters of its model, and checkpoint "
            "activations, if at all, with checkpoint(..., use_reentrant=False)"
        )
    # Sum in at least float32: bfloat16 would lose many small terms.
    diag = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
    curved = [g for g in grads if g is not None and g.requires_grad]  # H z = 0 for the rest
    if not curved and _has_custom_backward(loss):
        raise ValueError(
            "no gradient of this loss can be differentiated again, so D would be 0: rewrite the "
            "backward() of its custom autograd.Function, which is not differentiable"
        )
    for sample in range(n_samples if curved else 0):
        zs = rademacher(params, generator)
        z_curved = [z for z, g in zip(zs, grads) if g is not None and g.requires_grad]
        last = sample == n_samples - 1
        Hz = torch.autograd.grad(curved, params, z_curved, retain_graph=not last, allow_unused=True)
        for D, z, h in zip(diag, zs, Hz):
            if h is not None:
                D.add_(z * h, alpha=1 / n_samples)
    return (
        [None if g is None else g.detach() for g in grads],
        [D.to(p.dtype) for D, p in zip(diag, params)],
    )


def _has_custom_backward(loss: Tensor) -> bool:
    """Whether the graph contains an autograd.Function written in Python.

    Torch's own operations are twice differentiable or raise an error.
    """
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        pending += [child for child, _ in node.next_functions]
    return False


def forward_over_reverse(
    function: Callable[[list[Tensor]], tuple[Tensor, object]],
    params: list[Tensor],
    probes: Sequence[Sequence[Tensor]],
) -> tuple[list[Tensor], list[Tensor], object]:
    r"""Compute :func:`hessian_diagonal` in forward-over-reverse mode, for compiled loops.

    H z is the derivative of the gradient along z, computed in forward mode (``torch.func.jvp``)
    together with the gradient: one pass, no graph. Eager, it is slower than two backward passes;
    under ``torch.compile``, twice as fast: a convolution's derivative is again a convolution.

    Args:
        function: takes the parameters and has no side effects; returns the scalar loss and any
            other tensors to keep from the pass, in tuples, lists or dicts.
        params: the tensors at which ``function`` is differentiated.
        probes: one z per sample, with one tensor per parameter, of the same shape and strides.

    Returns:
        ``(grads, diag, other)``: gradient, D, and what ``function`` returns besides the loss.

    Example:
        >>> w = torch.tensor([1.0, 2.0])
        >>> z = torch.tensor([1.0, -1.0])
        >>> forward_over_reverse(lambda p: ((p[0] ** 3).sum(), ()), [w], [[z]])
        ([tensor([ 3., 12.])], [tensor([ 6., 12.])], ())
    """
    gradient = torch.func.grad(function, has_aux=True)
    sums = None
    for z in probes:  # a compiler recognises that the gradient is the same each time
        grads, Hz, other = torch.func.jvp(gradient, (params,), (list(z),), has_aux=True)
        # Sum in at least float32: bfloat16 would lose many small terms.
        terms = [(zi * h).to(torch.promote_types(h.dtype, torch.float32)) for zi, h in zip(z, Hz)]
        sums = terms if sums is None else [s + term for s, term in zip(sums, terms)]
    return grads, [(s / len(probes)).to(h.dtype) for s, h in zip(sums, Hz)], other


def rademacher(params: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
    """Draw independent signs, -1 or 1 with equal probability, in tensors like ``params``.

    >>> (z,) = rademacher([torch.empty(1000)], torch.Generator().manual_seed(0))
    >>> sorted(set(z.tolist()))
    [-1.0, 1.0]
    """
    params = list(params)
    return signs(random_bits(params, generator), params)


def random_bits(params: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
    """Draw at least one random bit per entry of ``params``, packed into bytes."""
    n = sum(p.numel() for p in params)
    words = torch.empty(-(-n // 64), dtype=torch.int64, device=params[0].device)
    return words.random_(-(2**63), None, generator=generator).view(torch.uint8)  # None: all 64 bits


def signs(bits: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Map bit 0 to -1 and bit 1 to 1, in tensors like ``params``."""
    sizes = [p.numel() for p in params]
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    unpacked = bits.unsqueeze(1).bitwise_right_shift(shifts).bitwise_and(1).flatten()
    zs = [torch.empty_like(p, requires_grad=False) for p in params]
    for z, part in zip(zs, unpacked[: sum(sizes)].split(sizes)):
        z.copy_(part.view(z.shape)).mul_(2).sub_(1)
    return zs
