"""Optimizers on random data: the same seed gives the same parameters, gradients and diagonals."""

import copy
import io

import torch

from hybrid_lib.optim import methods
from hybrid_lib.optim.hybrid import Hybrid

SHAPES = [(2, 3, 2, 2), (4, 3), (5,), ()]
OPTIMIZERS = {
    "sgd": lambda params, **kw: methods.sgd(params, nesterov=True, **kw),
    "adam": lambda params, **kw: methods.adam(params, amsgrad=True, **kw),
    "atmo": lambda params, **kw: methods.atmo(params, lambdas=(0.7, 0.4), **kw),
    "padam": methods.padam,
    "padam_sgd": lambda params, **kw: methods.padam_sgd(params, dampening=0.1, **kw),
    "adahessian": lambda params, **kw: methods.adahessian(params, spatial_average="auto", **kw),
    "adasgd": lambda params, **kw: methods.adasgd(params, spatial_average=4, **kw),
    "lion_sgd": methods.lion_sgd,
}


def parameters(seed=0, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    return [torch.nn.Parameter(w.to(dtype)) for w in drawn]


def observe(params, step):
    """Set the gradients of one step and return its D; both depend on the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)

    def normal(p):
        return torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype)

    for p in params:
        p.grad = normal(p)
    return [normal(p) for p in params]


def train(optimizer, steps):
    """Take steps; an optimizer of another package only gets the arguments that it knows."""
    for step in steps:
        diag = observe(parameters_of(optimizer), step)
        if isinstance(optimizer, Hybrid):
            optimizer.step(hess_diag=diag)
        elif type(optimizer).__name__ == "AdaHessian":
            optimizer.step(hessian=diag)
        else:
            optimizer.step()
    return optimizer


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def weights(optimizer):
    return [p.detach().clone() for p in parameters_of(optimizer)]


def snapshot(optimizer):
    return copy.deepcopy((weights(optimizer), optimizer.state_dict()))


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a, b):
    """Whether two nested structures of tensors and values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)  # nan is nan


def assert_close(a, b, rtol=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)
