"""The benchmarks run: their numbers are for a quiet machine, their code must not rot."""

import json
import sys

import pytest
import torch

from benchmarks import epoch, optimizer_step, step_cost


@pytest.mark.parametrize("name", ["atmo", "adasgd"])
def test_a_step_of_ours_moves_the_network(name, monkeypatch):
    made = []
    real = step_cost.image_model
    monkeypatch.setattr(step_cost, "image_model", lambda *a: made.append(real(*a)) or made[-1])
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    step = step_cost.ours(name, 2, x, y, compile=False)
    before = [p.detach().clone() for p in made[0].parameters()]
    step()
    assert not any(torch.equal(p, w) for p, w in zip(made[0].parameters(), before))


def test_an_epoch_is_timed(monkeypatch, capsys):
    words = ["--eager", "--json", "--only", "sgd"]
    words += ["--images", "512", "--epochs", "1", "--width", "2"]
    monkeypatch.setattr(sys, "argv", ["epoch", *words])
    monkeypatch.setattr(epoch.loop.data, "load", None)  # put back afterwards
    epoch.main()
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert "sgd" in row.values()


def test_the_rivals_of_an_optimizer_s_step_step():
    for _, step in optimizer_step.rivals(2).values():
        step()
