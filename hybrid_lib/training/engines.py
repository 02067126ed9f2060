"""One pass over a training batch: loss, gradient and, where due, the Hessian diagonal.

Two engines give the same numbers up to rounding. The eager one is plain PyTorch. The compiled one
(``torch.compile``, forward over reverse) is faster per step, by a third for first-order methods and
by half for second-order ones, but has to compile once per shape.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hybrid_lib.optim.compiled import CannotCompile, compiled, first_line
from hybrid_lib.optim.curvature import forward_over_reverse, hessian_diagonal, random_bits, signs
from hybrid_lib.optim.hybrid import Hybrid
from hybrid_lib.training.experiments import Experiment

# (x, y, generator of the probes, or None if no Hessian diagonal is due) ->
# (loss, number of correct predictions, gradients, Hessian diagonal or None)
Pass = Callable[
    [Tensor, Tensor, torch.Generator | None],
    tuple[Tensor, Tensor, list[Tensor], list[Tensor] | None],
]


def should_compile(experiment: Experiment, task, begun_with: str | None = None) -> bool:
    """Whether to compile a run for which the user has not decided.

    A resumed run keeps its engine. A new run is compiled if it has enough steps to save more time
    than compiling takes (20,000 for a first-order method, 2,000 for a second-order one). Either way
    the machine needs a compiler.
    """
    steps = experiment.epochs * math.ceil(task.n_train / experiment.batch_size)
    wanted = steps >= (2_000 if experiment.needs_hessian else 20_000)
    if begun_with is not None:
        wanted = begun_with == "compiled"
    why_not = why_not_compile(str(task.device)) if wanted else ""
    if why_not:
        print(f"{experiment.label}: training eagerly, since {why_not}")
    return wanted and not why_not


@functools.lru_cache
def why_not_compile(device: str) -> str:
    """Why this device cannot compile; empty if it can. The first call takes seconds."""
    try:
        compiled(lambda x: x.sin() + 1, "a test function")(torch.zeros(8, device=device))
    except CannotCompile as error:
        return str(error)
    return ""


def eager_pass(model: nn.Module, task) -> Pass:
    """Autograd's backward passes; second derivatives come from differentiating the gradients."""
    params, e = list(model.parameters()), task.experiment

    def one_pass(x, y, probes):
        outputs = model(x)
        loss = task.loss(outputs, y)
        part = _hessian_items(e, len(y))
        if probes is not None and part == len(y):
            grads, diag = hessian_diagonal(loss, params, e.hessian_samples, probes)
        else:
            grads, diag = torch.autograd.grad(loss * e.loss_scale, params), None
            grads = _unscaled(grads, e.loss_scale)
        if probes is not None and part < len(y):
            discarded: list[Tensor] = []  # the running statistics already include these items
            loss_of_part = task.loss(model(x[:part], discarded), y[:part])
            diag = hessian_diagonal(loss_of_part, params, e.hessian_samples, probes)[1]
        return loss.detach(), task.right(outputs, y), grads, diag

    return one_pass


def compiled_pass(model: nn.Module, task) -> Pass:
    """Forward over reverse, fused by ``torch.compile``; a smaller last batch runs eagerly.

    Expects model and inputs in ``torch.channels_last``.

    Raises:
        CannotCompile: on the first call of the pass.
    """
    names = [name for name, _ in model.named_parameters()]
    params, e = list(model.parameters()), task.experiment
    part = _hessian_items(e, e.batch_size)
    other_sizes = eager_pass(model, task)

    def loss_of(params, x, y):
        statistics: list[Tensor] = []
        outputs = torch.func.functional_call(model, dict(zip(names, params)), (x, statistics))
        loss = task.loss(outputs, y)
        return loss * e.loss_scale, (loss, task.right(outputs, y), statistics)

    def fused(params, x, y, bits):
        diag, zs = None, [signs(b, params) for b in bits]
        if not zs or part < e.batch_size:
            grads, seen = torch.func.grad(loss_of, has_aux=True)(params, x, y)
            grads = _unscaled(grads, e.loss_scale)
        if zs and part == e.batch_size:
            grads, diag, seen = forward_over_reverse(lambda p: loss_of(p, x, y), params, zs)
        elif zs:
            _, diag, _ = forward_over_reverse(lambda p: loss_of(p, x[:part], y[:part]), params, zs)
        return grads, diag, *seen

    # The tangent of a convolution is a sum of two terms. Store the sum, not both terms to be added
    # again at every read: this takes less time and a fifth less memory.
    fast = compiled(fused, "the training pass", realize_reads_threshold=1)

    def one_pass(x, y, probes):
        if len(y) != e.batch_size:
            return other_sizes(x, y, probes)
        n_samples = e.hessian_samples if probes is not None else 0
        bits = [random_bits(params, probes) for _ in range(n_samples)]
        with torch.no_grad():
            grads, diag, loss, right, statistics = fast([p.detach() for p in params], x, y, bits)
            model.absorb(statistics)
        return loss, right, grads, diag

    return one_pass


def training_step(model: nn.Module, one_pass: Pass, optimizer: Hybrid) -> Callable:
    """A pass and the optimizer's step: (x, y, probes) -> (loss, number of correct predictions)."""
    params = list(model.parameters())
    place = {p: i for i, p in enumerate(params)}
    order = [place[p] for group in optimizer.param_groups for p in group["params"]]

    def step(x, y, probes):
        loss, right, grads, hess_diag = one_pass(x, y, probes)
        for p, g in zip(params, grads):
            p.grad = g
        optimizer.step(hess_diag=hess_diag and [hess_diag[i] for i in order])
        return loss, right

    return step


def captured(function: Callable, optimizer: Hybrid | None = None, pool=None) -> Callable:
    """Replay ``function(x, y, probes)`` as a CUDA graph: one launch instead of hundreds.

    Every kind of call (shapes, with or without probes, which λ are 0) has its own graph, captured
    after the second such call. Those two run normally, to compile, choose algorithms and allocate
    buffers. A function that cannot be captured keeps running normally, and a line says why. Read
    the results before the next call of any function that shares ``pool``.

    Args:
        function: computes on tensors only. It may write into other tensors that stay in place, and
            draws only from the generator ``probes``, which is the same one in every call.
        optimizer: the one whose step is part of ``function``, if any.
        pool: memory (``torch.cuda.graph_pool_handle()``) to share between graphs that never run at
            the same time.

    Raises:
        RuntimeError: if a failed capture leaves torch unable to continue.
    """
    graphs: dict[tuple, tuple] = {}  # by kind: input buffers, and (graph, results) or None
    calls, streams = Counter(), {}

    def capture(inputs, probes):
        graph, device = torch.cuda.CUDAGraph(), inputs[0].device
        if probes is not None:
            graph.register_generator_state(probes)
        stream = streams.setdefault(device, torch.cuda.Stream(device))
        how = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        failed = None
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            try:
                with torch.cuda.graph(graph, **how):
                    try:
                        return graph, function(*inputs, probes)
                    except RuntimeError as error:  # here, so that torch can end the capture
                        failed = error
            except RuntimeError as error:
                reason = "capturing a CUDA graph failed; run again with capture=False"
                raise RuntimeError(f"{reason} ({first_line(failed or error)})") from error
        reason = f"this step cannot be captured ({first_line(failed)})"
        print(f"continuing without a CUDA graph: {reason}")
        return None

    def call(x, y, probes=None):
        groups = () if optimizer is None else optimizer.param_groups
        used = (λ != 0 for group in groups for λ in group["lambdas"])
        kind = (x.shape, y.shape, probes is None, *used)
        if kind not in graphs:
            graphs[kind] = (x.clone(), y.clone()), None
        inputs, graph = graphs[kind]
        for tensor, new in zip(inputs, (x, y)):
            tensor.copy_(new)
        if graph is None:
            results = function(*inputs, probes)
            calls[kind] += 1
            if calls[kind] == 2:
                graphs[kind] = inputs, capture(inputs, probes)
            return results
        if optimizer is not None:
            optimizer.advance()
        graph[0].replay()
        return graph[1]

    if optimizer is not None:
        optimizer.capturable = True
    return call


def _unscaled(grads, scale: float) -> list[Tensor]:
    """Gradients divided by the loss scale; all zero if one of them left float16's range."""
    if scale == 1:
        return grads
    finite = torch.stack([g.isfinite().all() for g in grads]).all()
    return [torch.where(finite, g / scale, 0.0) for g in grads]


def _hessian_items(experiment: Experiment, n: int) -> int:
    """How many of a batch's n items the Hessian diagonal uses; batch norm needs two."""
    return min(n, max(2, math.ceil(experiment.hessian_fraction * n)))
