"""Real processes for tests, forked from one that has imported everything; each has its own pid.

That process (multiprocessing's fork server) never computes a gradient, which makes it safe to fork.
A child that is to receive a signal at a certain moment creates a file there and waits.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch

from hybrid_lib.study import __main__ as commands
from hybrid_lib.study import notebooks
from hybrid_lib.training import data, loop
from hybrid_lib.training.experiments import Experiment

TRAIN_ONE = data.PROJECT / "notebooks" / "10_train_one.ipynb"
PRELOADED = ["hybrid_lib.study.__main__", "hybrid_lib.study.notebooks", "hybrid_lib.study.figures",
             "papermill.parameterize", "sklearn.datasets"]  # fmt: skip
FORKS = "forkserver" in multiprocessing.get_all_start_methods()  # Windows has none
context = multiprocessing.get_context("forkserver" if FORKS else None)
if FORKS:
    context.set_forkserver_preload(PRELOADED)


class Child:
    """A process that calls ``work(*args)``; its output goes to the file ``log``."""

    def __init__(self, log: Path, work, *args):
        self.log = log
        log.touch()
        self.process = context.Process(target=_main, args=(log, work, args), daemon=True)
        self.process.start()

    def wait_for(self, ready: Path) -> None:
        """Wait until the child has created that file."""
        until = time.monotonic() + 60
        while not ready.exists():
            assert self.process.is_alive(), self.log.read_text("utf-8")
            assert time.monotonic() < until, f"{ready} did not appear"
            time.sleep(0.005)

    def hit(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def ended(self) -> tuple[int, list[str]]:
        """Wait; return its exit code (negative: the signal that killed it) and printed lines."""
        self.process.join(120)
        code = self.process.exitcode
        assert code is not None, "the process did not end"
        return code, self.log.read_text("utf-8").splitlines()


def _main(log: Path, work, args) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the process that it was forked from may see GPUs
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.exit(work(*args))


# --- What a child runs. ---


def training(e: Experiment, folder: Path, trouble=None, *args) -> None:
    """Train as a user's script would, after ``trouble(*args)`` has set up a fault."""
    if trouble is not None:
        trouble(*args)
    history = loop.run(e, folder, "cpu")
    print(history.status, history.note)


def studying(arguments: list[str], trouble=None, *args) -> int:
    """Run the command hybrid-study, without its notebooks, which other tests execute."""
    if trouble is not None:
        trouble(*args)
    notebooks.execute = lambda *_: ([], [])
    return commands.study(arguments)


def notebook_head(parameters: dict) -> None:
    """Run 10_train_one up to its check, with these parameters injected by papermill."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    notebook = load_notebook_node(str(TRAIN_ONE))
    cells = [c.source for c in parameterize_notebook(notebook, parameters).cells
             if c.cell_type == "code"]  # fmt: skip
    known: dict = {"In": [""]}
    for cell in cells[: 1 + next(i for i, c in enumerate(cells) if "parameters.checked(" in c)]:
        known["In"].append(cell)
        exec(cell, known)


# --- What goes wrong. ---


def at_call(owner, name: str, count: int, action) -> None:
    """Call ``action()`` before the ``count``-th call of a function."""
    called, left = getattr(owner, name), count

    def counted(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            action()
        return called(*args, **kwargs)

    setattr(owner, name, counted)


# Functions, and which of their calls is in the second epoch; an epoch has two steps and a test.
MOMENTS = {
    "step": (torch.nn.functional, "cross_entropy", 5),  # an epoch calls it three times
    "checkpoint write": (os, "fsync", 4),  # after the owner's name, checkpoint and history
    "report": (notebooks, "report", 1),
}


def waits_in(moment: str, ready: Path) -> None:
    """At that moment, wait for a signal."""

    def wait():
        ready.touch()
        time.sleep(120)

    at_call(*MOMENTS[moment], wait)


def kills_itself(name: str, count: int) -> None:
    """Send this process signal 9 at the ``count``-th call of a function of os."""
    at_call(os, name, count, lambda: os.kill(os.getpid(), signal.SIGKILL))


def as_nobody() -> None:
    """Give up root's rights: root may write anywhere."""
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def vanishes(folder: Path) -> None:
    """Move the folder away before the second epoch is written."""
    at_call(loop, "save_checkpoint", 2, lambda: folder.rename(folder.with_name("elsewhere")))


def out_of_memory() -> None:
    """Fail as the second epoch begins, with CUDA's own message."""

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 …")

    at_call(loop, "_train", 2, fail)


def clock_goes_back() -> None:
    """Set the clock back by an hour at every reading."""
    hours = itertools.count(time.time(), -3600)
    time.time = lambda: next(hours)


def without(package: str) -> None:
    """Act as if a package were not installed."""
    sys.modules[package] = None


# --- What a run computed. ---


def outcome(folder: Path):
    """Everything that a run computed, except the times."""
    history = json.loads((folder / "history.json").read_text("utf-8"))
    rows = [{k: v for k, v in r.items() if "seconds" not in k} for r in history["rows"]]
    kept = torch.load(folder / "last.pt", weights_only=True)
    return history["status"], rows, plain(kept["model"]), plain(kept["optimizer"])


def plain(state):
    """Replace tensors by their bytes, so that == compares to the bit."""
    if isinstance(state, torch.Tensor):
        return state.numpy().tobytes()
    if isinstance(state, dict):
        return {k: plain(v) for k, v in state.items()}
    return [plain(v) for v in state] if isinstance(state, list | tuple) else state
