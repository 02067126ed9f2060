"""Data-parallel AdaSGD: each rank gets a part of every batch, and all take the same step.

    torchrun --standalone --nproc-per-node 2 examples/data_parallel.py

Three rules keep it equal to one process (to 4e-14 in the weights after these 10 steps in float64;
if any of them is broken, the difference exceeds .001):

- use the same probes on all ranks, from one seed: D = z ⊙ Hz is linear in H only for the same z;
- average gradients and D, weighted by the size of each part, and D with its signs: the average of
  |D| is not the |D| of the whole batch;
- do not use DistributedDataParallel: it synchronises in ``backward()``, which ``hessian_diagonal``
  does not call, and it gives no warning.

BatchNorm would normalise each part by itself and move D by about 1e-2, so this network uses
LayerNorm.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

from hybrid_lib import adasgd, hessian_diagonal
from hybrid_lib.training import data


def main(steps: int = 10, batch: int = 33) -> dict:
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same initial weights everywhere
    digits = data.load("digits")
    images, labels = data.normalised(digits.train_images, digits).double(), digits.train_labels
    layers = nn.Linear(64, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 10)
    model = nn.Sequential(nn.Flatten(), *layers).double()
    params = list(model.parameters())
    optimizer = adasgd(params, lr=0.01, lambdas=(0.5, 0.5))
    for step in range(steps):
        indices = torch.arange(step * batch, (step + 1) * batch) % len(images)
        mine = indices[dist.get_rank() :: dist.get_world_size()]
        loss = nn.functional.cross_entropy(model(images[mine]), labels[mine])
        probes = torch.Generator().manual_seed(step)
        grads, hess_diag = hessian_diagonal(loss, params, generator=probes)
        for t in grads + hess_diag:
            dist.all_reduce(t.mul_(len(mine) / batch))
        for p, g in zip(params, grads):
            p.grad = g
        optimizer.step(hess_diag=hess_diag)
    dist.destroy_process_group()
    return model.state_dict()


if __name__ == "__main__":
    weights = main()
    if len(sys.argv) > 1:
        torch.save(weights, sys.argv[1])
