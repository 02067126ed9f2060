"""What a whole training step costs, per method, as a ratio to SGD's step in the same run.

    python -m benchmarks.step_cost [--width 16] [--batch 64] [--rounds 7] [--json]

ResNet18 with the CIFAR stem on random 32x32 images: forward, backward (with the Hessian diagonal
where a method needs it) and the optimizer's step, all eager, float32, on the CPU or on a GPU
where there is one. Methods take turns in every round, so that a machine that slows down slows all
of them; the ratio is the median over rounds of (method / SGD of the same round), its spread the
quartiles.

Two rivals run beside ours: ``torch_sgd`` is torch.optim.SGD, and ``released_adahessian`` is the
way of the report's code, which keeps the gradient's graph with ``backward(create_graph=True)``
and differentiates ``p.grad``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings

import torch
import torch.nn.functional as F

from hybrid_lib import EXPERIMENTS, hessian_diagonal, resnet18
from hybrid_lib.curvature import rademacher

OURS = ("sgd", "adam", "atmo", "padam_sgd", "adahessian", "adasgd")
RIVALS = ("torch_sgd", "released_adahessian")


def make_step(name: str, width: int, x: torch.Tensor, y: torch.Tensor):
    """A function that does one training step of a method on a network of its own."""
    torch.manual_seed(0)
    model = resnet18(width=width).to(x.device).train()
    params = list(model.parameters())
    row = name if name in OURS else {"torch_sgd": "sgd"}.get(name, "adahessian")
    optimizer = EXPERIMENTS[row].build_optimizer(params)
    if name == "torch_sgd":
        optimizer = torch.optim.SGD(params, 0.01, momentum=0.95, weight_decay=5e-4)

    def first_order():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def second_order():
        grads, diagonal = hessian_diagonal(F.cross_entropy(model(x), y), params)
        for p, g in zip(params, grads):
            p.grad = g
        optimizer.step(hess_diag=diagonal)

    def released():
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch warns of this graph's cycle; zero_grad breaks it
            F.cross_entropy(model(x), y).backward(create_graph=True)
        zs = [rademacher(p) for p in params]
        Hz = torch.autograd.grad([p.grad for p in params], params, zs)
        for p in params:
            p.grad = p.grad.detach()
        optimizer.step(hess_diag=[z * h for z, h in zip(zs, Hz)])

    if name == "released_adahessian":
        return released
    return second_order if getattr(optimizer, "needs_hessian", False) else first_order


def measure(width: int, batch: int, rounds: int) -> list[dict]:
    """One row per method: name, milliseconds, ratio to SGD with quartiles."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 32, 32, generator=generator).to(device)
    y = torch.randint(0, 10, (batch,), generator=generator).to(device)
    steps = {name: make_step(name, width, x, y) for name in OURS + RIVALS}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_ > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["sgd"])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append({"name": name, "ratio": middle, "low": low, "high": high,
                     "ms": 1000 * statistics.median(taken)})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    chosen = parser.parse_args()
    rows = measure(chosen.width, chosen.batch, chosen.rounds)
    if chosen.json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"
    )
    print(f"ResNet18, width {chosen.width}, batch {chosen.batch}, {chosen.rounds} rounds, eager")
    for row in rows:
        print(
            f"{row['name']:20s} {row['ms']:8.1f} ms  {row['ratio']:.2f} x SGD "
            f"({row['low']:.2f} to {row['high']:.2f})"
        )


if __name__ == "__main__":
    main()
