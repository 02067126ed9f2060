"""The benchmarks still run. Their numbers need a quiet machine and are not checked here."""

import json
import sys

import pytest
import torch

from benchmarks import curves, data_feed, epoch, optimizer_step, step_cost


@pytest.mark.parametrize("name", ["atmo", "adasgd"])
def test_a_benchmarked_step_moves_every_parameter(name, monkeypatch):
    models = []
    real = step_cost.image_model
    monkeypatch.setattr(step_cost, "image_model", lambda *a: models.append(real(*a)) or models[-1])
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    step = step_cost.ours(name, 2, x, y, compile=False)
    before = [p.detach().clone() for p in models[0].parameters()]
    step()
    assert not any(torch.equal(p, w) for p, w in zip(models[0].parameters(), before))


def test_the_epoch_benchmark_prints_a_row(monkeypatch, capsys):
    arguments = ["--eager", "--json", "--only", "sgd"]
    arguments += ["--images", "512", "--epochs", "1", "--width", "2"]
    monkeypatch.setattr(sys, "argv", ["epoch", *arguments])
    monkeypatch.setattr(epoch.loop.data, "load", None)  # put back afterwards
    epoch.main()
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert "sgd" in row.values()


def test_the_benchmark_of_curves_counts_seeds_that_diverge(monkeypatch, capsys):
    diverging = {"lr": 1e30}
    monkeypatch.setattr(curves, "VARIANTS", {"eager": ({}, False), "too fast": (diverging, False)})
    monkeypatch.setattr(
        sys, "argv", ["curves", "--seeds", "1", "--epochs", "1", "--method", "sgd", "--json"]
    )
    curves.main()
    one, other = map(json.loads, capsys.readouterr().out.splitlines())
    assert (one["diverged"], one["difference"]) == (0, 0.0)
    assert (other["diverged"], other["accuracy"]) == (1, None)
    monkeypatch.setattr(sys, "argv", ["curves", "--seeds", "1", "--epochs", "1", "--method", "sgd"])
    curves.main()
    assert "diverged: 1" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:This DataLoader")  # on a machine with one core
def test_the_benchmark_of_images_names_every_way(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["data_feed", "--images", "64", "--batch", "32", "--rounds", "2", "--json"]
    )
    data_feed.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["torchvision", "torchvision_2_workers", "hybrid_lib"]
    assert all(row["images_per_second"] > 0 for row in rows)


def test_every_rival_of_the_optimizer_step_runs():
    for _, step in optimizer_step.rivals(2).values():
        step()


def test_steps_are_timed_without_tf32_as_runs_are(monkeypatch, capsys):
    seen = []
    candidate = {"sgd": lambda: seen.append(torch.backends.cudnn.allow_tf32)}
    monkeypatch.setattr(step_cost, "candidates", lambda *_: candidate)
    monkeypatch.setattr(sys, "argv", ["step_cost", "--rounds", "2", "--json"])
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    step_cost.main()
    assert set(seen) == {False}
    assert torch.backends.cudnn.allow_tf32
