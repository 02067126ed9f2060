"""The data-parallel example under torchrun: several ranks take the steps of one process."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "data_parallel.py"


def weights(ranks: int, out: Path, script: Path = EXAMPLE) -> dict:
    """The weights with which the example ends on that many gloo processes, equal on all ranks."""
    code = (
        f"import os, runpy, sys; sys.argv = [{str(script)!r}, {str(out)!r} + os.environ['RANK']]; "
    )
    runner = out.with_suffix(".py")
    runner.write_text(code + f"runpy.run_path({str(script)!r}, run_name='__main__')\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr"]
    command += ["127.0.0.1", "--nproc-per-node", str(ranks), runner]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    by_rank = [torch.load(f"{out}{rank}", weights_only=True) for rank in range(ranks)]
    assert all(
        torch.equal(a, b) for one in by_rank for a, b in zip(one.values(), by_rank[0].values())
    )
    return by_rank[0]


def distance(a: dict, b: dict) -> float:
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.fixture
def alone(monkeypatch) -> dict:
    """The weights from a single process: this one, as a process group of its own."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return runpy.run_path(str(EXAMPLE))["main"]()


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path, alone):
    assert next(iter(alone.values())).dtype == torch.float64
    assert distance(weights(2, tmp_path / "weights"), alone) < 1e-12


NEEDED = {
    "plain mean of uneven parts": ("mul_(len(mine) / batch)", "mul_(1 / dist.get_world_size())"),
    "absolute values before the mean": (
        "in grads + hess_diag:", "in grads + [D.abs_() for D in hess_diag]:"),
    "other probes per rank": ("manual_seed(step)", "manual_seed(step + 1000 * dist.get_rank())"),
}  # fmt: skip


@pytest.mark.parametrize(("right", "wrong"), NEEDED.values(), ids=NEEDED)
@pytest.mark.slow
def test_breaking_any_rule_of_the_example_changes_the_weights(right, wrong, tmp_path, alone):
    text = EXAMPLE.read_text("utf-8")
    assert right in text
    script = tmp_path / "wrong.py"
    script.write_text(text.replace(right, wrong), "utf-8")
    assert distance(weights(2, tmp_path / "weights", script), alone) > 1e-3
