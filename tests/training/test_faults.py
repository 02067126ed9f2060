"""The fault table: what goes wrong, the exit code, the message, and what is left on disk.

Every row runs in its own process, with a real signal, folder or file. What a test cannot have (a
GPU's memory, the system's clock) is imitated inside that process.
"""

import functools
import io
import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import children
import pytest
import torch
from children import Child, outcome
from toys import image_folder, toy

from hybrid_lib.study.__main__ import study
from hybrid_lib.study.planning import plan, run_folder
from hybrid_lib.training.experiments import EXPERIMENTS
from hybrid_lib.training.history import History

pytestmark = pytest.mark.skipif(not children.FORKS, reason="needs fork and signals")

E = toy("dyn_atmo", train_limit=32, test_limit=20, augment=True)
(STUDIED,) = plan("toy", only=["sgd"])
TOY = ["--scale", "toy", "--only", "sgd"]


class Place:
    """Where a fault happens: a run, its folder, and the ways to start it."""

    def __init__(self, tmp: Path, straight: Callable, stopped: Path):
        self.tmp, self.straight, self.stopped = tmp, straight, stopped
        self.e, self.folder, self.study_out = E, tmp / "run", tmp / "study"
        self.log, self.ready, self.sentinel = tmp / "log", tmp / "ready", tmp / "sentinel"
        self.start = self.script

    def script(self, *trouble) -> Child:
        """Start a user's script, which calls ``run``."""
        return Child(self.log, children.training, self.e, self.folder, *trouble)

    def study(self, *trouble) -> Child:
        """Start ``hybrid-study`` with one method."""
        self.e, self.folder = STUDIED, run_folder(self.study_out, STUDIED)
        self.start = self.study
        return self.command(TOY, *trouble)

    def command(self, arguments, *trouble) -> Child:
        """Start ``hybrid-study`` with these arguments."""
        given = [*arguments, "--out", str(self.study_out)]
        return Child(self.log, children.studying, given, *trouble)

    def copy_stopped_run(self) -> None:
        """Fill the folder with two of three epochs and both checkpoints."""
        shutil.copytree(self.stopped, self.folder)

    def files(self) -> dict[str, bytes]:
        return {f.name: f.read_bytes() for f in self.folder.glob("[!.]*")}


class Row(NamedTuple):
    fault: str
    cause: Callable[[Place], Child]
    code: int  # the exit code; negative: killed by that signal
    says: str  # a pattern that some printed line matches
    left: Callable[[Place], None]  # checks what is left on disk


# --- Faults. ---


def hit(number: int, moment: str, start=Place.script):
    """Send a process a signal in its second epoch."""

    def cause(place):
        child = start(place, children.waits_in, moment, place.ready)
        child.wait_for(place.ready)
        child.hit(number)
        return child

    return cause


def spoilt(how):
    """Spoil the files of a stopped run and start it again."""

    def cause(place):
        place.copy_stopped_run()
        how(place)
        place.before = place.files()
        return place.script()

    return cause


def command(arguments: str, *what):
    """Call hybrid-study with these arguments."""
    return lambda place: place.command(arguments.split(), *what)


def given(**parameters):
    """Let papermill inject these parameters into 10_train_one."""
    return lambda place: Child(place.log, children.notebook_head, parameters)


def ascii_locale(place):
    """Start a new interpreter, since it chooses encodings as it starts."""
    place.study_out = place.tmp / "größer"
    code = "import sys, children; sys.exit(children.studying(sys.argv[1:]))"
    out = ["--out", str(place.study_out)]
    where = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words, here = [sys.executable, "-c", code, *TOY, *out], Path(__file__).parent
    done = subprocess.run(words, cwd=here, env=os.environ | where, capture_output=True, timeout=300)
    text = (done.stdout + done.stderr).decode("utf-8", "surrogateescape")
    return SimpleNamespace(ended=lambda: (done.returncode, text.splitlines()))


def read_only_folder(place):
    place.temporary = Path(tempfile.mkdtemp(" 'Größen' \"$HOME\" 日本", dir="/tmp"))
    place.temporary.chmod(0o755)
    place.folder = place.temporary / "run"
    place.copy_stopped_run()
    place.folder.chmod(0o555)
    return place.script(children.as_nobody)


def two_at_once(place):
    place.first = place.script(children.waits_in, "step", place.ready)
    place.first.wait_for(place.ready)
    return Child(place.tmp / "second log", children.training, place.e, place.folder)


def other_images(place):
    folder = place.tmp / "images"
    image_folder(folder, n=16)
    place.e = replace(E, dataset=f"folder:{folder}")
    place.script(children.kills_itself, "fsync", 6).ended()
    (folder / "train/cat/0.png").write_bytes((folder / "train/dog/1.png").read_bytes())
    place.before = place.files()
    return place.script()


# --- Spoilt files. ---


def cut_short(place):
    last = place.folder / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])


class Attack:
    """Its pickle creates a folder when it is loaded."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


def load_checkpoint(place) -> dict:
    return torch.load(place.folder / "last.pt", weights_only=True)


def write_checkpoint(place, state) -> None:
    archive = io.BytesIO()
    torch.save({k: v for k, v in state.items() if k != "checksum"}, archive)
    (place.folder / "last.pt").write_bytes(archive.getvalue())


def checkpoint_of_adam(place):
    """Leave the checkpoint of another optimizer, without the history that would reveal it."""
    adam = replace(E, optimizer="adam", momentum=None, lambda_schedule="constant",
                   lambda_start=(0.5, 0.5), lambda_end=(0, 1), lambda_epochs=None)  # fmt: skip
    write_checkpoint(place, {**load_checkpoint(place), "experiment": dict(vars(adam))})
    (place.folder / "history.json").unlink()


def history_with(change: Callable[[str], str]):
    def spoil(place):
        file = place.folder / "history.json"
        file.write_text(change(file.read_text("utf-8")), "utf-8")

    return spoil


# --- What is left. ---


def resumes(epochs: int):
    """That many epochs are on disk, and the next call resumes to what a straight run computes."""

    def left(place):
        if epochs:
            assert len(History.load(place.folder).rows) == epochs
        code, lines = place.start().ended()
        assert code == 0, lines
        assert outcome(place.folder) == place.straight(place.e)
        assert leftovers(place.folder) == []

    return left


def leftovers(folder: Path) -> list[str]:
    """Files left by interrupted writes."""
    return [f.name for f in folder.glob(".*") if f.name not in (".lock", ".owner")]


def writable_again(place):
    place.folder.chmod(0o755)
    resumes(2)(place)


def found_again(place):
    place.folder.with_name("elsewhere").rename(place.folder)
    resumes(1)(place)


def first_is_undisturbed(place):
    """The first process goes on undisturbed; kill -9 frees the folder."""
    assert str(place.first.process.pid) in (place.tmp / "second log").read_text("utf-8")
    place.first.hit(signal.SIGKILL)
    place.first.ended()
    resumes(1)(place)


def like_a_straight_run(place):
    """An undisturbed run computes the same, and nothing else was created."""
    assert not place.sentinel.exists()
    assert outcome(place.folder) == place.straight(place.e)
    assert all(row["train_seconds"] > 0 for row in History.load(place.folder).rows)


def history_is_kept(place):
    like_a_straight_run(place)
    (kept,) = place.folder.glob("history-before-*.json")
    assert kept.read_bytes() == place.before["history.json"]


def untouched(place):
    assert place.files() == place.before
    assert not place.sentinel.exists()


def nothing_written(place):
    """Nothing but the log is written."""
    assert {f.name for f in place.tmp.iterdir()} == {"log"}


KILLED, TERMINATED, INTERRUPTED = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
AGAIN = "stopped; repeat the same command to resume"

FAULTS = [
    # Killed and interrupted.
    Row("kill -9 in a step", hit(KILLED, "step"), -9, "", resumes(1)),
    Row("SIGTERM to a script", hit(TERMINATED, "step"), -15, "", resumes(1)),
    Row("Ctrl-C in a script", hit(INTERRUPTED, "step"), 1,
        "stopped, interrupted; epochs kept: 1; run again to continue", resumes(1)),
    Row("SIGTERM to hybrid-study", hit(TERMINATED, "checkpoint write", Place.study), 130, AGAIN,
        resumes(1)),
    Row("SIGTERM after the training", hit(TERMINATED, "report", Place.study), 130, AGAIN,
        resumes(2)),
    Row("Ctrl-C in hybrid-study", hit(INTERRUPTED, "step", Place.study), 130, AGAIN, resumes(0)),
    # The machine.
    Row("a folder without write permission", read_only_folder, 1,
        r"run: cannot write there \(Permission denied\)", writable_again),
    Row("the folder vanishes", lambda place: place.script(children.vanishes, place.folder), 1,
        r"run: No such file or directory \(.*last\.pt.*\); ", found_again),
    Row("CUDA is out of memory", lambda place: place.script(children.out_of_memory), 1,
        "out of memory: lower batch_size or width .*run again to continue", resumes(1)),
    Row("the clock is set back", lambda place: place.script(children.clock_goes_back), 0,
        "complete", like_a_straight_run),
    Row("a locale without UTF-8", ascii_locale, 0, "report: .*report.html",
        lambda place: (place.study_out / "report.html").read_text("utf-8").index("Runs: 1, on")),
    Row("two processes at once", two_at_once, 1,
        r"run: process \d+ on .* is training there; wait for it, or stop it", first_is_undisturbed),
    # Spoilt files.
    Row("a checkpoint is cut short", spoilt(cut_short), 0,
        r"last.pt is damaged \(.*\); trying the previous one", like_a_straight_run),
    Row("both checkpoints are empty", spoilt(
        lambda place: [(place.folder / f).write_bytes(b"") for f in ("last.pt", "prev.pt")]), 0,
        "no checkpoint, starting again; the earlier history is kept as history-before-",
        history_is_kept),
    Row("a checkpoint that runs code, with a valid checksum", spoilt(
        lambda place: write_checkpoint(place, {"model": Attack(place.sentinel)})), 0,
        "last.pt is damaged", like_a_straight_run),
    Row("a checkpoint of another optimizer", spoilt(checkpoint_of_adam), 1,
        "last.pt belongs to another experiment; choose another folder", untouched),
    Row("a checkpoint of a newer version", spoilt(
        lambda place: write_checkpoint(place, {**load_checkpoint(place), "format": 99})), 1,
        "last.pt was written by a newer version; update hybrid_lib", untouched),
    Row("a history is cut short", spoilt(history_with(lambda text: text[:300])), 1,
        "history.json: not a readable history", untouched),
    Row("a history with a name that leaves its folder", spoilt(history_with(
        lambda text: text.replace('"dyn_atmo"', '"../../x"'))), 1,
        r"history.json: name='../../x': String should match", untouched),
    Row("the folder of another experiment", spoilt(
        lambda place: setattr(place, "e", replace(E, lr=0.5, seed=3))), 1,
        r"holds another experiment \(lr: 0.001 there, 0.5 here; seed: 0 there, 3 here\)",
        untouched),
    Row("other images than before", other_images, 1,
        r"run was trained on other data of folder images \(checksum \w+, here \w+\)", untouched),
    # Data and packages.
    Row("torchvision is missing but needed", command(
        "--scale toy --only sgd --dataset cifar10", children.without, "torchvision"), 2,
        "dataset=cifar10 needs torchvision: pip install torchvision", nothing_written),
    Row("torchvision is missing and not needed",
        lambda place: place.script(children.without, "torchvision"), 0, "complete",
        like_a_straight_run),
    # Parameters of notebooks.
    Row("a value that is code", given(lr="__import__('os').mkdir('sentinel')"), 1,
        r"lr=\"__import__\('os'\)", nothing_written),
    Row("a name that is code", given(**{"lr = 1\nprint('code')\nepochs": 3}), 1,
        "papermill's cell contains code, not only values", nothing_written),
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcome of an undisturbed experiment, computed once."""

    @functools.cache
    def computed(e):
        folder = tmp_path_factory.mktemp("straight")
        Child(folder / "log", children.training, e, folder).ended()
        return outcome(folder)

    return computed


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was killed in its third epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    killed = children.training, E, folder, children.kills_itself, "fsync", 6
    assert Child(folder.with_name("log"), *killed).ended()[0] == -signal.SIGKILL
    assert len(History.load(folder).rows) == 2
    return folder


@pytest.fixture
def place(tmp_path, undisturbed, stopped):
    made = Place(tmp_path, undisturbed, stopped)
    yield made
    if hasattr(made, "temporary"):
        shutil.rmtree(made.temporary)


@pytest.mark.parametrize("row", FAULTS, ids=[row.fault for row in FAULTS])
def test_fault(row, place):
    code, lines = row.cause(place).ended()
    assert code == row.code, "\n".join(lines)
    assert any(re.search(row.says, line) for line in lines or [""]), "\n".join(lines)
    row.left(place)


# --- Bad input. ---

REFUSED = [  # arguments of hybrid-study, and the line that refuses them
    ("--only adma", r"'adma'.*did you mean adam\?"), ("--only ../sgd", r"'\.\./sgd'"),
    ("--dataset cifar", r"dataset='cifar'.*cifar10"), ("--dataset folder:", r"folder"),
    ("--dataset folder:nowhere", r"folder:nowhere: no such folder"),
    ("--dataset folder:{empty}", r"expected images in .*train: none"),
    ("--dataset folder:{small}", r"(batch_size|train_limit)=.* 20 "),
    ("--dataset mnist", r"MNIST is not complete.*network"),
    ("--epochs 0", r"epochs=0"), ("--epochs many", r"--epochs.*many"),
    ("--seeds one", r"seeds='one'"), ("--protocol dirty", r"protocol='dirty'"),
    ("--scale huge", r"--scale.*huge"), ("--device quantum", r"device='quantum'"),
    ("--device cuda:99", r"use cpu"), ("--lambda 1", r"--lambda"),
]  # fmt: skip


def no_such_host(*args, **kwargs):
    raise OSError("Name or service not known")


@pytest.mark.parametrize(("bad", "message"), REFUSED, ids=[bad for bad, _ in REFUSED])
def test_bad_input_is_refused_in_one_line_with_exit_code_2_and_writes_nothing(
    bad, message, tmp_path, monkeypatch, capsys
):
    empty, small, downloads = (tmp_path / name for name in ("empty", "small", "downloads"))
    empty.mkdir()
    image_folder(small, n=10)
    monkeypatch.setenv("HYBRID_DATA", str(downloads))
    monkeypatch.setattr(socket, "getaddrinfo", no_such_host)
    words = ["--scale", "toy", *bad.format(empty=empty, small=small).split()]
    try:
        code = study([*words, "--out", str(tmp_path / "study")])
    except SystemExit as refused:  # by argparse, which prints its usage before the message
        code = refused.code
    assert code == 2
    printed = capsys.readouterr()
    lines = (printed.out + printed.err).splitlines()
    (line,) = [line for line in lines if not re.match(r"usage:| {3}", line)]
    assert re.search(message, line)
    assert not (tmp_path / "study").exists()
    assert not [f for f in downloads.rglob("*") if f.is_file()]


# --- Signal 9 at every write, and at random moments. ---


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_killed_at_every_write_a_run_resumes_to_the_bit(name, tmp_path, undisturbed):
    for count in itertools.count(1):
        folder, log = tmp_path / str(count), tmp_path / f"log {count}"
        killed = Child(log, children.training, E, folder, children.kills_itself, name, count)
        code, lines = killed.ended()
        assert code in (0, -signal.SIGKILL), lines
        again, lines = Child(log, children.training, E, folder).ended()
        assert again == 0, lines
        assert outcome(folder) == undisturbed(E)
        assert leftovers(folder) == []
        if code == 0:  # it has fewer writes than that
            break
    assert count > 6, "every epoch writes a checkpoint and a history"


def killed_at_random(e, tmp: Path, kills: int, expected) -> None:
    """Kill a run at random moments until it completes, and compare what it computes."""
    latest, killed, log = 0.3, 0, tmp / "log"  # seconds
    while killed < kills:
        folder, code = Path(tempfile.mkdtemp(dir=tmp)) / "run", None
        while code != 0:
            child = Child(log, children.training, e, folder)
            time.sleep(random.uniform(0, latest))
            child.hit(signal.SIGKILL)
            code, lines = child.ended()
            assert code in (0, -signal.SIGKILL), "\n".join(lines)
            killed += code != 0
            latest *= 1.1 if code else 1 / 1.2  # however busy the machine is, about half are killed
        assert outcome(folder) == expected
        assert leftovers(folder) == []


def test_killed_at_random_moments_a_run_resumes_to_the_bit(tmp_path, undisturbed):
    killed_at_random(E, tmp_path, 4, undisturbed(E))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_killed_at_many_random_moments_a_run_resumes_to_the_bit(name, tmp_path, undisturbed):
    e = toy(name, train_limit=32, test_limit=20, augment=True)
    killed_at_random(e, tmp_path, 25, undisturbed(e))
