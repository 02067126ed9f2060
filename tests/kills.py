"""Kills a training process with signal 9 and compares what the resumed run computes; a script.

    python kills.py FOLDER EXPERIMENT ROUNDS [SEED]

prints one JSON object: how many kills, at which moments, and the runs that came out different.
Training happens in forked children, so that a kill costs milliseconds; this process itself never
computes a gradient, which is what makes it safe to fork.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from hybrid_lib import data
from hybrid_lib.experiments import EXPERIMENTS
from hybrid_lib.train import run

EPOCHS = 3
# Checkpoint and history are written in every epoch, the owner's name before the first, each flushed
# and renamed; from the second epoch on, the last checkpoint is renamed as well. These are all the
# moments of the first two epochs.
MOMENTS = [("fsync", n) for n in range(1, 6)] + [("replace", n) for n in range(1, 7)]


def child(work) -> int:
    """A process that does ``work`` and exits with 0."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def finished(pid: int) -> bool:
    """Wait for a child; was it done before it was killed?"""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status != 0:
        raise SystemExit(f"the run failed by itself, status {status}")
    return True


def killing_itself(work, name: str, count: int):
    """``work``, killed at the ``count``-th call of os.fsync or os.replace."""
    called, left = getattr(os, name), count

    def counted(*args):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return called(*args)

    def armed():
        setattr(os, name, counted)
        work()

    return armed


def outcome(folder: Path):
    """Everything that a run computed, but for the times."""
    history = json.loads((folder / "history.json").read_text("utf-8"))
    rows = [{k: v for k, v in r.items() if "seconds" not in k} for r in history["rows"]]
    kept = torch.load(folder / "last.pt", weights_only=True)
    return history["status"], rows, plain(kept["model"]), plain(kept["optimizer"])


def plain(state):
    """The same with bytes for tensors, so that == means: to the bit."""
    if isinstance(state, torch.Tensor):
        return state.numpy().tobytes()
    if isinstance(state, dict):
        return {k: plain(v) for k, v in state.items()}
    return [plain(v) for v in state] if isinstance(state, list | tuple) else state


def main(out: Path, name: str, rounds: int, seed: int = 0) -> dict:
    random.seed(seed)
    e = replace(
        EXPERIMENTS[name].scaled(EPOCHS), dataset="digits", width=2, batch_size=16, train_limit=32,
        test_limit=20, augment=True,
    )  # fmt: skip
    data.load(e.dataset, e.train_limit, e.test_limit)  # children find it in memory

    def training(folder):
        return lambda: run(e, folder, "cpu", progress=False)

    start = time.perf_counter()
    assert finished(child(training(out / "straight")))
    seconds = time.perf_counter() - start
    expected = outcome(out / "straight")
    moments, different = Counter(), []

    for call, count in MOMENTS:
        folder = out / f"{call}-{count}"
        assert not finished(child(killing_itself(training(folder), call, count)))
        moments[f"{call} {count}"] += 1
        assert finished(child(training(folder)))
        if outcome(folder) != expected:
            different.append(folder.name)

    for i in range(rounds):
        folder, done = out / f"random-{i}", False
        while not done:
            pid = child(training(folder))
            time.sleep(random.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            done = finished(pid)
            if not done:
                rows = folder / "history.json"
                epochs = len(json.loads(rows.read_text())["rows"]) if rows.exists() else 0
                torn = any(folder.glob(".last.pt.*")) or any(folder.glob(".history.json.*"))
                moments[f"random, {epochs} epochs on disk{', in a write' * torn}"] += 1
        if outcome(folder) != expected:
            different.append(folder.name)
        if any(folder.glob(".*.json.*")) or any(folder.glob(".last.pt.*")):
            different.append(f"{folder.name} holds leftovers")
    return {"kills": sum(moments.values()), "moments": moments, "different": different}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))))
