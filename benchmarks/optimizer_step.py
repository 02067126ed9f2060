"""Cost of an optimizer's own step, as a ratio to the time that moving its bytes takes.

    python -m benchmarks.optimizer_step [--width 64] [--rounds 21] [--eager] [--json]

Steps update ResNet18's 62 tensors (11.17 million parameters at width 64) in float32 with fixed
gradients. A method's floor is one compiled loop over flat arrays that reads and writes as many
bytes as the method must: weights, gradient and each buffer once. Rivals: torch's fused and foreach
optimizers; the report's ATMO, rewritten as the loop over parameters of its code; and, where
installed, the optimizers of ``pip install pytorch-optimizer timm heavyball``.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable

import torch

from benchmarks.timing import DEVICE, interleaved, show
from hybrid_lib import resnet18
from hybrid_lib.optim import methods
from hybrid_lib.optim.compiled import compiled

# How many arrays a step must read, and how many of these it must write back.
STREAMS = {"sgd": (3, 2), "adam": (4, 3), "atmo": (5, 4), "adahessian": (5, 3), "adasgd": (6, 4)}


def parameters(width: int) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    params = list(resnet18(width=width).to(DEVICE).parameters())
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def floor(n: int, reads: int, writes: int) -> Callable[[], object]:
    """One pass over ``reads`` arrays of n numbers that writes ``writes`` of them."""
    arrays = [torch.randn(n, device=DEVICE) for _ in range(reads)]

    def stream(arrays):
        total = sum(arrays)
        for array in arrays[:writes]:
            array.add_(total)  # each is read once and written once

    run = compiled(stream, "the floor")
    return lambda: run(arrays)


def released_atmo(params) -> Callable[[], object]:
    m, v, b = ([torch.zeros_like(p) for p in params] for _ in range(3))
    t = 0

    @torch.no_grad()
    def step():
        nonlocal t
        t += 1
        for p, mi, vi, bi in zip(params, m, v, b):
            g = p.grad.add(p, alpha=5e-4)
            bi.mul_(0.95).add_(g)
            d_sgd = bi * 1.0
            g = p.grad.add(p, alpha=5e-4)
            mi.mul_(0.9).add_(g, alpha=0.1)
            vi.mul_(0.999).addcmul_(g, g, value=0.001)
            d_adam = mi / ((vi.sqrt() / (1 - 0.999**t) ** 0.5) + 1e-8)
            merged = 0.5 * d_sgd + 0.5 * d_adam
            p.add_(merged, alpha=-(0.5 * 0.01 + 0.5 * 0.01 / (1 - 0.9**t)))

    return step


def rivals(width: int) -> dict[str, tuple[str, Callable]]:
    """Return (method whose floor applies, step) by name, without packages not installed."""

    def steps(optimizer, **arguments):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params]

        def step():
            for p, g in zip(params, grads):  # some packages clear the gradients
                p.grad = g
            optimizer.step(**arguments)

        return step

    sgd, adam = torch.optim.SGD, torch.optim.Adam
    found = {
        "released_atmo": ("atmo", released_atmo(parameters(width))),
        "torch_sgd_fused": ("sgd", steps(sgd(parameters(width), 0.01, 0.95, fused=True))),
        "torch_sgd_foreach": ("sgd", steps(sgd(parameters(width), 0.01, 0.95, foreach=True))),
        "torch_adam_fused": ("adam", steps(adam(parameters(width), fused=True))),
        "torch_adam_foreach": ("adam", steps(adam(parameters(width), foreach=True))),
    }
    for how in ("fused", "foreach"):
        both = [steps(adam(parameters(width), **{how: True})),
                steps(sgd(parameters(width), 0.01, 0.95, **{how: True}))]  # fmt: skip
        found[f"torch_adam_and_sgd_{how}"] = "atmo", lambda both=both: [step() for step in both]
    with contextlib.suppress(ImportError):
        import pytorch_optimizer

        params = parameters(width)
        adahessian = pytorch_optimizer.AdaHessian(params, update_period=10**9)
        D = [torch.randn_like(p) for p in params]
        found["pytorch_optimizer_adahessian"] = ("adahessian", steps(adahessian, hessian=D))
        padam = pytorch_optimizer.PAdam(parameters(width))
        found["pytorch_optimizer_padam"] = ("adam", steps(padam))
    with contextlib.suppress(ImportError):
        from timm.optim import Adahessian

        adahessian = Adahessian(parameters(width), update_each=10**9)
        for p in adahessian.param_groups[0]["params"]:  # D is given and not due again:
            p.hess = torch.randn_like(p)  # the update alone is timed
            adahessian.state[p]["hessian step"] = 1
        found["timm_adahessian"] = ("adahessian", steps(adahessian))
    with contextlib.suppress(ImportError):
        import heavyball

        found["heavyball_adamw"] = ("adam", steps(heavyball.AdamW(parameters(width))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--eager", action="store_true", help="skip compiled optimizers")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    chosen = parser.parse_args()
    n = sum(p.numel() for p in parameters(chosen.width))
    candidates = {f"floor_{name}": floor(n, *streams) for name, streams in STREAMS.items()}
    reference = {f"floor_{name}": f"floor_{name}" for name in STREAMS}
    for name in STREAMS:
        for suffix, compile in (("", True), ("_eager", False))[chosen.eager :]:
            params = parameters(chosen.width)
            optimizer = getattr(methods, name)(params, compile=compile)
            if optimizer.needs_hessian:
                optimizer.step(hess_diag=[torch.randn_like(p) for p in params])
            candidates[name + suffix] = optimizer.step
            reference[name + suffix] = f"floor_{name}"
    for name, (method, step) in rivals(chosen.width).items():
        candidates[name], reference[name] = step, f"floor_{method}"
    rows = interleaved(candidates, reference, chosen.rounds)
    show(rows, f"an optimizer's step on ResNet18, width {chosen.width}", "floor", chosen.json)


if __name__ == "__main__":
    main()
