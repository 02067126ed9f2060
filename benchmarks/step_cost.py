"""Cost of a whole training step per method, as a ratio to the compiled SGD step.

    python -m benchmarks.step_cost [--width 16] [--batch 64] [--rounds 9] [--memory] [--json]

ResNet18 with the CIFAR stem on random 32x32 images, float32: forward, backward (with the Hessian
diagonal if a method needs it) and the optimizer's step, on a GPU if there is one. Names without a
suffix use this project's compiled engine; ``adahessian_lazy`` estimates the diagonal every 10 steps
on a quarter of the batch and is timed over 10 steps. ``_eager`` marks the eager engine. Rivals:
``torch_sgd`` and ``torch_adam``, PyTorch's own loop and optimizers, eager, as the report's code
trains; ``released_adahessian``, its way to the diagonal, rewritten:
``backward(create_graph=True)``, the derivative of ``p.grad``, and a loop over parameters.

The first call compiles: minutes on a small CPU, seconds when repeated. ``--memory`` prints the
peak memory that one step allocates instead of the time (CPU only).
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings

import torch
import torch.nn.functional as F

from benchmarks.timing import DEVICE, interleaved, show
from hybrid_lib import EXPERIMENTS, resnet18
from hybrid_lib.training.engines import compiled_pass, eager_pass, training_step
from hybrid_lib.training.loop import gpu_settings
from hybrid_lib.training.tasks import ImageClassification, image_model

LAZY = {"hessian_every": 10, "hessian_fraction": 0.25}
COMPILED = {
    "sgd": {}, "adam": {}, "atmo": {}, "padam_sgd": {}, "adahessian": {}, "adahessian_lazy": LAZY,
    "adasgd": {},
}  # fmt: skip


def ours(name: str, width: int, x: torch.Tensor, y: torch.Tensor, compile: bool):
    """Return a function that does one training step (lazy: ten) of a method on its own network."""
    experiment = dataclasses.replace(
        EXPERIMENTS[name.removesuffix("_lazy")], width=width, batch_size=len(y), **COMPILED[name]
    )
    layout = torch.channels_last if compile else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    model = image_model(experiment, 10, 3).to(x.device, memory_format=layout).train()
    optimizer = experiment.build_optimizer(model.parameters(), compile)
    one_pass = (compiled_pass if compile else eager_pass)(
        model, ImageClassification(experiment, None)
    )
    step = training_step(model, one_pass, optimizer)
    probes = torch.Generator(x.device).manual_seed(0)

    def steps():
        for i in range(experiment.hessian_every):
            step(x, y, probes if experiment.needs_hessian and i == 0 else None)

    return steps


def plain(make, width: int, x: torch.Tensor, y: torch.Tensor):
    """Return a step of PyTorch's usual loop with one of its optimizers."""
    torch.manual_seed(0)
    model = resnet18(width=width).to(x.device).train()
    optimizer = make(model.parameters())

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def released_adahessian(width: int, x: torch.Tensor, y: torch.Tensor):
    """Return a step with double backward over ``p.grad`` and an update parameter by parameter."""
    torch.manual_seed(0)
    model = resnet18(width=width).to(x.device).train()
    params = list(model.parameters())
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    steps_done = 0

    def step():
        nonlocal steps_done
        steps_done += 1
        for p in params:
            p.grad = None
        with warnings.catch_warnings():  # about the reference cycle of this graph
            warnings.simplefilter("ignore")
            F.cross_entropy(model(x), y).backward(create_graph=True)
        grads = [p.grad for p in params]
        zs = [torch.randint_like(p, high=2) * 2 - 1 for p in params]
        products = torch.autograd.grad(grads, params, zs)
        with torch.no_grad():
            for p, z, h, mi, vi in zip(params, zs, products, m, v):
                p.mul_(1 - 0.15 * 5e-4)
                mi.mul_(0.9).add_(p.grad, alpha=0.1)
                vi.mul_(0.999).addcmul_(h * z, h * z, value=0.001)
                root = (vi.sqrt() / (1 - 0.999**steps_done) ** 0.5).add_(1e-8)
                p.addcdiv_(mi, root, value=-0.15 / (1 - 0.9**steps_done))
                p.grad = None

    return step


def candidates(width: int, batch: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 32, 32, generator=generator).to(DEVICE)
    y = torch.randint(0, 10, (batch,), generator=generator).to(DEVICE)
    steps = {name: ours(name, width, x, y, compile=True) for name in COMPILED}
    for name in ("sgd", "adahessian"):
        steps[f"{name}_eager"] = ours(name, width, x, y, compile=False)
    steps["torch_sgd"] = plain(
        lambda p: torch.optim.SGD(p, 0.01, momentum=0.95, weight_decay=5e-4), width, x, y
    )
    steps["torch_adam"] = plain(lambda p: torch.optim.Adam(p, weight_decay=5e-4), width, x, y)
    steps["released_adahessian"] = released_adahessian(width, x, y)
    return steps


def peak_bytes(step) -> int:
    """Return the peak of the CPU memory that one call allocates itself."""
    step(), step()
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="peak allocation, not time")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    chosen = parser.parse_args()
    title = f"one training step of ResNet18, width {chosen.width}, batch {chosen.batch}"
    steps = candidates(chosen.width, chosen.batch)
    if chosen.memory:
        peaks = {name: peak_bytes(step) for name, step in steps.items()}
        print(f"peak memory of {title}")
        for name, peak in peaks.items():
            print(f"{name:28s} {peak / 2**20:8.1f} MiB  {peak / peaks['sgd']:.2f} x sgd")
        return
    with gpu_settings(EXPERIMENTS["sgd"]):  # as in a run: no TF32
        rows = interleaved(steps, "sgd", chosen.rounds)
    for row in rows:
        if row["name"] == "adahessian_lazy":  # ten steps were timed
            row.update({k: row[k] / LAZY["hessian_every"] for k in ("ratio", "low", "high", "ms")})
    show(rows, title, "sgd", chosen.json)


if __name__ == "__main__":
    main()
