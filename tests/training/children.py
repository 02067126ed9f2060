"""Real processes for tests, forked from a warm one: each has a pid of its own, none has to import.

The warm process (multiprocessing's fork server) never computes a gradient, which is what makes it
safe to fork. A child that is to be hit at a certain moment makes a file there and waits.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from hybrid_lib.study import __main__ as commands
from hybrid_lib.study import notebooks
from hybrid_lib.training import data, loop
from hybrid_lib.training.experiments import Experiment

TRAIN_ONE = data.PROJECT / "notebooks" / "10_train_one.ipynb"
WARM = ["hybrid_lib.study.__main__", "hybrid_lib.study.notebooks", "hybrid_lib.study.figures",
        "papermill.parameterize", "sklearn.datasets"]  # fmt: skip
FORKS = "forkserver" in multiprocessing.get_all_start_methods()  # Windows has none
context = multiprocessing.get_context("forkserver" if FORKS else None)
if FORKS:
    context.set_forkserver_preload(WARM)


class Child:
    """A process that calls ``work(*args)``; what it prints goes to the file ``said``."""

    def __init__(self, said: Path, work, *args):
        self.said = said
        said.touch()
        self.process = context.Process(target=_main, args=(said, work, args), daemon=True)
        self.process.start()

    def wait_for(self, ready: Path) -> None:
        """Until the child made that file."""
        until = time.monotonic() + 60
        while not ready.exists():
            assert self.process.is_alive(), self.said.read_text("utf-8")
            assert time.monotonic() < until, f"{ready} did not appear"
            time.sleep(0.005)

    def hit(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def ended(self) -> tuple[int, list[str]]:
        """Its exit code (negative: the signal that killed it) and the lines that it printed."""
        self.process.join(120)
        code = self.process.exitcode
        assert code is not None, "the process does not end"
        return code, self.said.read_text("utf-8").splitlines()


def _main(said: Path, work, args) -> None:
    stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.exit(work(*args))


# --- What a child does. ---


def training(e: Experiment, folder: Path, trouble=None, *args) -> None:
    """As a script of one's own would, after ``trouble(*args)`` has been arranged."""
    if trouble is not None:
        trouble(*args)
    history = loop.run(e, folder, "cpu")
    print(history.status, history.note)


def studying(arguments: list[str], trouble=None, *args) -> int:
    """The command hybrid-study; its notebooks are executed by other tests."""
    if trouble is not None:
        trouble(*args)
    notebooks.execute = lambda *_: ([], [])
    return commands.study(arguments)


def notebook_head(parameters: dict) -> None:
    """10_train_one up to its check, after papermill injected these parameters."""
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


def at_call(owner, name: str, count: int, happens) -> None:
    """``happens()`` before the ``count``-th call of a function."""
    called, left = getattr(owner, name), count

    def counted(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            happens()
        return called(*args, **kwargs)

    setattr(owner, name, counted)


# Functions, and the number of their call that is in the second epoch, with two steps in each.
MOMENTS = {
    "step": (torch.nn.functional, "cross_entropy", 5),  # twice and a test before
    "evaluation": (loop, "_test", 2),
    "checkpoint write": (os, "fsync", 4),  # the owner's name, checkpoint and history before
    "report": (notebooks, "report", 1),
}


def waits_in(moment: str, ready: Path) -> None:
    """The process waits there to be hit."""

    def wait():
        ready.touch()
        time.sleep(120)

    at_call(*MOMENTS[moment], wait)


def kills_itself(name: str, count: int) -> None:
    """Signal 9 at the ``count``-th call of a function of os."""
    at_call(os, name, count, lambda: os.kill(os.getpid(), signal.SIGKILL))


def as_nobody() -> None:
    """Root may write anywhere."""
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def vanishes(folder: Path) -> None:
    """Somebody removes, or moves, the folder before the second epoch is written."""
    at_call(loop, "save_checkpoint", 2, lambda: folder.rename(folder.with_name("elsewhere")))


def out_of_memory() -> None:
    """As the second epoch begins, as CUDA reports it."""

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 …")

    at_call(loop, "_train", 2, fail)


def clock_goes_back() -> None:
    """An hour at every look."""
    hours = itertools.count(time.time(), -3600)
    time.time = lambda: next(hours)


def offline(downloads: Path) -> None:
    """No name is resolved, and the downloads are in a folder of the test's."""

    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    socket.getaddrinfo = refuse
    os.environ["HYBRID_DATA"] = str(downloads)


def without(package: str) -> None:
    """As if a package were not installed."""
    sys.modules[package] = None


# --- What a run computed. ---


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
