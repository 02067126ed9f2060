"""A run computes what a plain loop in torch does: every epoch's order, rate, weights and probes.

Of the library, the loop below uses only the network, the loss's Hessian diagonal and the step of
the optimizer; in particular, the inputs of every epoch are worked out here. Comparing a run with
itself, interrupted or not, would not notice weights that never change.
"""

import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from toys import toy, trained

from hybrid_lib import hessian_diagonal
from hybrid_lib.training import data
from hybrid_lib.training.tasks import image_model

SIZE, N, TESTED = 16, 40, 30  # images per batch, for training and for tests


def small(name, **changes):
    return toy(name, epochs=4, seed=3, **changes)


def stream(purpose, epoch, seed=3):
    digest = hashlib.sha256(f"{purpose}/{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def weights_of(e, epoch):
    """(adaptive, SGD) in the 0-based epoch: a line from start to end."""
    if e.lambda_schedule == "constant":
        return e.lambda_start
    done = min(epoch / (e.lambda_epochs or e.epochs), 1)
    return tuple((1 - done) * a + done * b for a, b in zip(e.lambda_start, e.lambda_end))


def rate_of(e, epoch):
    if e.restart_epoch and epoch + 1 >= e.restart_epoch:  # the rate restarts as well
        epoch -= e.restart_epoch - 1
    if e.lr_schedule == "cosine":
        return e.lr * (1 + math.cos(math.pi * epoch / e.epochs)) / 2
    return e.lr * e.lr_gamma ** sum(epoch >= milestone for milestone in e.lr_milestones)


def by_hand(e):
    d, rows = data.load("digits", N, TESTED, e.validation_limit), []
    n = len(d.train_labels)
    model = image_model(e, 10, 1)
    params = list(model.parameters())
    optimizer = e.build_optimizer(params)
    released = e.protocol == "released"

    def inputs(images):
        # Rounded as the library rounds, since AdaHessian's steps magnify small differences.
        return images.float() if released else data.normalised(images, d)

    for epoch in range(e.epochs):
        if epoch + 1 == e.restart_epoch:
            optimizer = e.build_optimizer(params)
        (group,) = optimizer.param_groups
        group["lr"] = rate_of(e, epoch)
        if e.is_hybrid:
            group["lambdas"] = weights_of(e, epoch)
        loss_sum = right = 0
        probes, crops = stream("probes", epoch), stream("augmentation", epoch)
        model.train()
        for index in torch.randperm(n, generator=stream("order", epoch)).split(SIZE):
            x, y = d.train_images[index], d.train_labels[index]
            logits = model(inputs(data.augmented(x, crops) if e.augment else x))
            loss, diag = F.cross_entropy(logits, y), None
            if e.needs_hessian:
                grads, diag = hessian_diagonal(loss, params, e.hessian_samples, probes)
            else:
                grads = torch.autograd.grad(loss, params)
            for p, g in zip(params, grads):
                p.grad = g
            optimizer.step(hess_diag=diag)
            loss_sum += loss.item() * len(y)
            right += (logits.argmax(1) == y).sum().item()
        row = {"train_loss": loss_sum / n, "train_accuracy": right / n}
        model.train(released)
        order = torch.arange(TESTED)
        if released:
            order = torch.randperm(TESTED, generator=stream("order", 0, seed=0))
        loss_sum = right = 0
        with torch.no_grad():
            for index in order.split(SIZE if released else TESTED):
                y = d.test_labels[index]
                logits = model(inputs(d.test_images[index]))
                loss_sum += F.cross_entropy(logits, y).item() * len(y)
                right += (logits.argmax(1) == y).sum().item()
        row |= {"test_loss": loss_sum / TESTED, "test_accuracy": right / TESTED}
        if e.validation_limit:
            with torch.no_grad():
                logits, y = model(inputs(d.validation_images)), d.validation_labels
            row["validation_loss"] = F.cross_entropy(logits, y).item()
            row["validation_accuracy"] = (logits.argmax(1) == y).double().mean().item()
        rows.append(row)
    return rows


CASES = {
    "sgd": small("sgd"),
    "cosine, dynamic": small("dyn_atmo"),
    "milestones, dynamic, augmented": small("dyn_padam_sgd", augment=True, lr_gamma=0.5),
    "second order, two probes": small("adasgd", hessian_samples=2),
    "as released": small("padam_sgd", protocol="released"),
    "restarted": small("adahessian", restart_epoch=3),
    "validated": small("adam", validation_limit=20),
}


@pytest.mark.parametrize("e", CASES.values(), ids=CASES)
def test_a_run_matches_the_plain_loop(e):
    rows = trained(e).rows
    for ours, theirs in zip(rows, by_hand(e), strict=True):
        assert {k: ours[k] for k in theirs} == pytest.approx(theirs, rel=2e-3, abs=1e-6)


def test_training_seconds_exclude_the_test_pass(monkeypatch):
    """Only a batch moves the clock: by 1 in training, by 100 in the test pass."""
    from hybrid_lib.training import loop, tasks

    clock = [0.0]

    def ticking(batches, seconds):
        def tick(self, *args):
            for batch in batches(self, *args):
                clock[0] += seconds
                yield batch

        return tick

    task = tasks.ImageClassification
    monkeypatch.setattr(task, "training_batches", ticking(task.training_batches, 1))
    monkeypatch.setattr(task, "test_batches", ticking(task.test_batches, 100))
    monkeypatch.setattr(loop, "now", lambda device: clock[0])
    (row, *_) = trained(small("sgd")).rows
    assert (row["train_seconds"], row["test_seconds"]) == (math.ceil(N / SIZE), 100)
