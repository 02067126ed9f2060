"""Parallel runs compute what each computes alone, whichever process is killed; nothing is lost."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import torch

from hybrid_lib.study import progress, running
from hybrid_lib.study.planning import plan
from hybrid_lib.study.running import run_folder, run_many
from hybrid_lib.training.history import FILE, History


def toy_runs(n: int, epochs: int = 4) -> list:
    """``n`` runs of four methods, with as many seeds as needed."""
    names = ("sgd", "adam", "padam_sgd", "adasgd")
    planned = plan("toy", only=names, seeds=range(-(-n // 4)), epochs=epochs, width=1,
                   batch_size=16, train_limit=32, test_limit=20)  # fmt: skip
    return sorted(planned, key=lambda e: e.seed)[:n]


def rows(history: History) -> list[dict]:
    """What a run computed, without the times."""
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in history.rows]


def test_runs_are_spread_over_all_gpus(monkeypatch, tmp_path):
    devices = []

    class Process:
        exitcode = 0

        def __init__(self, target, args):
            self.pipe = args[0]
            devices.append(args[1]["device"])

        def start(self):
            self.pipe.send("done")

        def join(self):
            pass

    fake = types.SimpleNamespace(Pipe=running.multiprocessing.Pipe, Process=Process)
    monkeypatch.setattr(running.multiprocessing, "get_context", lambda kind: fake)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    run_many(toy_runs(4), tmp_path, "cuda", workers=4)
    assert devices == ["cuda:0", "cuda:1"] * 2


def waited_for(condition, seconds: float = 60):
    """Wait for a true value of ``condition`` and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise TimeoutError(f"{condition} for {seconds} s")


def owner(folder: Path) -> int:
    """The process that trains, or trained, there."""
    return int(re.search(r"\d+", (folder / ".owner").read_text()).group())


def in_the_middle(runs: Path) -> Path | None:
    """The folder of an unfinished run that has a checkpoint."""
    for file in runs.glob(f"*/{FILE}"):
        found = History.load(file)
        if found.status == "running" and len(found.rows) < found.experiment.epochs - 1:
            return file.parent
    return None


def is_free(folder: Path) -> bool:
    """Whether no process trains there any more."""
    with contextlib.suppress(filelock.Timeout), filelock.FileLock(folder / ".lock", timeout=0):
        return True
    return False


def with_failures(n: int) -> list:
    """``n`` runs, two of which fail: one diverges, one cannot even begin."""
    good = toy_runs(n - 2)
    diverging = replace(good[0], name="diverging", lr=1e30)
    impossible = replace(good[0], name="too-large", train_limit=None, batch_size=2000)
    return [*good[:2], diverging, impossible, *good[2:]]


def killing(runs: Path, killed: dict) -> threading.Thread:
    """Start a thread that kills the process of one unfinished run below ``runs``."""

    def kill_one():
        folder = waited_for(lambda: in_the_middle(runs))
        os.kill(owner(folder), signal.SIGKILL)
        killed["before"] = History.load(folder)

    thread = threading.Thread(target=kill_one)
    thread.start()
    return thread


def check_resumed(out: Path, before: History) -> None:
    after = History.load(run_folder(out, before.experiment))
    assert before.status == "running"
    assert after.rows[: len(before.rows)] == before.rows, "it started again instead of going on"


@pytest.mark.slow
def test_parallel_runs_match_serial_ones_even_if_one_is_killed_and_two_fail(tmp_path):
    experiments, killed = with_failures(4), {}
    experiments[0] = experiments[0].scaled(40)
    expected, failed_there = run_many(experiments, tmp_path / "alone", "cpu", workers=1)
    killer = killing(tmp_path / "out" / "runs", killed)
    found, failed = run_many(experiments, tmp_path / "out", "cpu", workers=2)
    killer.join()
    assert [rows(h) for h in found] == [rows(h) for h in expected]
    assert [h.status for h in found] == [h.status for h in expected]
    assert [h.experiment for h in found] == [e for e in experiments if e.name != "too-large"]
    assert failed == failed_there
    assert len(failed) == 2
    check_resumed(tmp_path / "out", killed["before"])
    assert {h.environment["cpu_threads"] for h in found} == {1}


@pytest.mark.slow
def test_a_run_whose_process_is_repeatedly_killed_is_given_up(tmp_path, monkeypatch):
    experiments, killed = toy_runs(2, epochs=2000), set()
    folders = [run_folder(tmp_path, e) for e in experiments]
    monkeypatch.setattr(running, "ATTEMPTS", 2)

    def kill_all():
        while len(killed) < 4:
            for folder in folders:
                if (folder / FILE).exists() and (pid := owner(folder)) not in killed:
                    killed.add(pid)
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    killer = threading.Thread(target=kill_all)
    killer.start()
    found, failures = run_many(experiments, tmp_path, "cpu", workers=2)
    killer.join()
    assert (found, [line.partition(", ")[2] for line in failures]) == (
        [], ["seed 0: killed (exit code -9)"] * 2)  # fmt: skip


SCRIPT = """
import sys
from test_running import toy_runs
from hybrid_lib.study.running import run_many
if __name__ == "__main__":
    run_many(toy_runs(2, epochs=9999), sys.argv[1], "cpu", workers=2)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize(
    ("number", "whom"), [(signal.SIGINT, "all"), (signal.SIGKILL, "first")], ids=["Ctrl-C", "kill"]
)
def test_runs_stop_cleanly_when_their_parent_is_interrupted_or_killed(number, whom, tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    first = subprocess.Popen([sys.executable, script, out], env=where, start_new_session=True,
                             stderr=subprocess.DEVNULL)  # fmt: skip
    folders = [run_folder(out, e) for e in toy_runs(2)]
    try:
        waited_for(lambda: all((folder / FILE).exists() for folder in folders))
        (os.killpg if whom == "all" else os.kill)(first.pid, number)
        assert first.wait(60) != 0
        waited_for(lambda: all(map(is_free, folders)), 20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
    assert [History.load(folder).status for folder in folders] == ["stopped", "stopped"]


# --- How many at once, in which order, and progress. ---


def test_the_number_of_parallel_runs_is_cores_divided_by_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    assert [running.cores("cpu", threads) for threads in (None, 1, 2, 4, 9)] == [6, 6, 3, 1, 1]
    assert running.cores("cuda:1") == running.cores("mps") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (running.cores(None), running.cores("cpu")) == (1, 6)


def test_the_longest_run_begins_first_and_complete_runs_are_only_read(tmp_path, monkeypatch):
    experiments = toy_runs(4, epochs=1)
    run_many(experiments[:1], tmp_path, "cpu")
    begun, real = [], running.run
    monkeypatch.setattr(running, "run", lambda e, *a, **h: begun.append(e.name) or real(e, *a, **h))
    found, _ = run_many(experiments, tmp_path, "cpu", workers=1)
    assert begun == ["sgd", "adasgd", "adam", "padam_sgd"]  # sgd is complete and only read
    assert [h.experiment for h in found] == experiments
    again, failed = run_many(experiments, tmp_path, cluster="tcp://not-needed:1")
    assert (again, failed) == (found, [])


def test_parallel_runs_load_what_may_be_a_download_once_before_they_start(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(running, "load_task", lambda e, device: done.append(e.dataset) or 1 / 0)
    monkeypatch.setattr(running, "_in_processes", lambda *_: done.append("started"))
    sets = ("cifar10", "digits", "folder:nowhere")
    runs = [replace(e, dataset=d, name=f"{e.name}-{i}")
            for i, d in enumerate(sets) for e in toy_runs(2)]  # fmt: skip
    run_many(runs, tmp_path, "cpu", workers=2)
    assert sorted(done[:2]) == ["cifar10", "digits"]
    assert done[2:] == ["started"]


def test_progress_names_the_run_its_seed_its_epoch_and_the_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    experiments = plan("toy", only=["sgd", "adasgd"], seeds=[0, 7], epochs=10)
    shown = progress.Progress(experiments)
    lines = []

    def after(seconds, number, event):
        now[0] += seconds
        shown(number, event)
        lines.append(capsys.readouterr().out.strip())

    after(1, 0, 4)  # resumes from a checkpoint
    after(11, 0, 5)
    after(8, 0, 10)
    after(0, 0, History(experiments[0], [{"test_accuracy": 0.5}], {}, "complete"))
    after(10, 3, 0)
    after(10, 3, 5)
    after(0, 2, "RuntimeError: no luck")
    assert lines[0] == ""
    # 12 s for one of ten epochs of SGD; 5 + 10 are left, and 2 x 10 that cost four times as much
    assert lines[1] == "SGD, seed 0 (run 1 of 4): epoch 5 of 10; 0 of 4 done, about 19 min left"
    assert lines[2] == "", "a log has a line every ten seconds"
    assert lines[3] == "SGD, seed 0: complete, test accuracy 0.5000; 1 of 4 done, about 5 min left"
    assert lines[5].startswith("AdaSGD, seed 7 (run 4 of 4): epoch 5 of 10; 1 of 4 done")
    assert lines[6].startswith("AdaSGD, seed 0: RuntimeError: no luck; 2 of 4 done")
