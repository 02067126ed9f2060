"""Where the time of a training step goes."""

from __future__ import annotations

import itertools
import statistics

import torch

from hybrid_lib.training import data
from hybrid_lib.training.engines import compiled_pass, eager_pass
from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.loop import fast_layout, now, tf32
from hybrid_lib.training.tasks import load_task


def step_seconds(
    experiment: Experiment, device=None, repeats: int = 5, compile: bool = False
) -> dict[str, float]:
    """Where the time of a training step goes: medians in seconds.

    Returns:
        "gradient" (forward and backward), "Hessian" (what its diagonal costs beyond the gradient;
        0 for first-order methods), "step" (the optimizer's own) and "evaluation" (a forward pass
        on one batch, without gradient).
    """
    task = load_task(experiment, device)
    device, layout = task.device, fast_layout(task.device, compile)
    model = task.build_model().to(device, memory_format=layout)
    one_pass = (compiled_pass if compile else eager_pass)(model, task)
    optimizer = experiment.build_optimizer(model.parameters(), compile)
    probes = data.generator("probes", experiment.seed, 0, device)
    x, y = next(task.training_batches(0, layout))
    parts: dict[str, list[float]] = {"gradient": [], "Hessian": [], "step": [], "evaluation": []}
    for _ in range(repeats + 2):
        with tf32(experiment):
            clock = [now(device)]
            _, _, grads, hess_diag = one_pass(x, y, None)
            clock.append(now(device))
            if optimizer.needs_hessian:
                _, _, grads, hess_diag = one_pass(x, y, probes)
            clock.append(now(device))
            for p, g in zip(model.parameters(), grads):
                p.grad = g
            optimizer.step(hess_diag=hess_diag)
            clock.append(now(device))
            model.train(experiment.tests_in_training_mode)
            with torch.no_grad():
                model(x)
            clock.append(now(device))
            model.train()
        gradient, hessian, step, evaluation = (b - a for a, b in itertools.pairwise(clock))
        # The second pass has a gradient in it, too.
        hessian = hessian - gradient if optimizer.needs_hessian else 0.0
        for of_part, seconds in zip(parts.values(), (gradient, hessian, step, evaluation)):
            of_part.append(seconds)
    return {name: statistics.median(s[2:]) for name, s in parts.items()}  # the first two warm up
