"""Data-parallel AdaSGD: each rank has a part of every batch, and all of them take the same step.

    torchrun --standalone --nproc-per-node 2 examples/data_parallel.py

Three rules keep it equal to one process (4e-14 in the weights after these 10 steps in float64;
breaking any of them: more than .001):

- the same probes on all ranks, from one seed: D = z ⊙ Hz is linear in H only for the same z;
- average gradients and D weighted by the size of the parts, D with its signs: |D| averaged is not
  the |D| of the whole batch;
- no DistributedDataParallel: it synchronises in ``backward()``, which ``hessian_diagonal`` does not
  call, and says nothing.

A network with BatchNorm normalises each part by itself, which moves D by about 1e-2; this one has
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
