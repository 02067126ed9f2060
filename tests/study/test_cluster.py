"""Runs on Dask are those of a serial study, to the bit, whoever dies; nobody else can listen."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import filelock
import psutil
import pytest
import yaml

from hybrid_lib.study import cluster, planning
from hybrid_lib.study.planning import plan, run_folder, run_many
from hybrid_lib.training.history import FILE, History

ROOT = Path(__file__).parents[2]
LOOPBACK = {"127.0.0.1", "::1"}


def toy_runs(n: int, epochs: int = 4) -> list:
    """Runs of four methods, with as many seeds as it takes."""
    names = ("sgd", "adam", "padam_sgd", "adasgd")
    planned = plan("toy", only=names, seeds=range(-(-n // 4)), epochs=epochs)
    return sorted(planned, key=lambda e: e.seed)[:n]


def rows(history: History) -> list[dict]:
    """What a run computed, without what the clock said."""
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in history.rows]


def listening(*pids: int) -> set[str]:
    """Addresses on which processes or their children listen."""
    roots = [psutil.Process(pid) for pid in pids]
    family = [*roots, *(child for root in roots for child in root.children(recursive=True))]
    return {c.laddr.ip for p in family for c in p.net_connections() if c.status == "LISTEN"}


def waited_for(condition, seconds: float = 60):
    """The first true value of ``condition``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise TimeoutError(f"{condition} for {seconds} s")


# --- On this machine. ---


def test_processes_of_this_machine_listen_on_loopback_and_compute_the_same(tmp_path, capsys):
    experiments = toy_runs(3)
    impossible = replace(experiments[0], name="too-large", train_limit=None, batch_size=2000)
    jobs = [(e, run_folder(tmp_path / "dask", e)) for e in [impossible, *experiments]]
    found, addresses = {}, set()
    for e, outcome in cluster.train_all(jobs, "cpu", workers=2):
        found[e] = outcome
        addresses |= listening(os.getpid())
    assert addresses
    assert addresses <= LOOPBACK
    assert "dashboard: http://127.0.0.1:" in capsys.readouterr().out
    error = found.pop(impossible)
    assert isinstance(error, ValueError)
    assert "batch_size=2000" in str(error)
    expected, _ = run_many(experiments, tmp_path / "serial", "cpu")
    assert [rows(found[e]) for e in experiments] == [rows(h) for h in expected]


def test_without_the_extra_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    command = ["--scale", "toy", "--only", "sgd", "--out", str(tmp_path / "x"), "--workers", "2"]
    assert planning.main(command) != 0
    shown, errors = capsys.readouterr()
    assert shown == ""
    assert len(errors.splitlines()) == 1
    assert "pip install '.[cluster]'" in errors


def test_more_gpus_than_there_are_cannot_be_claimed():
    with pytest.raises(ValueError, match=r"100 workers with 0\.5 GPU each: here are \d+ GPUs"):
        next(cluster.train_all([], "cuda", workers=100, gpu_share=0.5))


def test_where_no_scheduler_answers_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "ANSWER", 0.3)
    command = ["--scale", "toy", "--only", "sgd", "--out", str(tmp_path), "--cluster"]
    assert planning.main([*command, "tcp://127.0.0.1:1"]) != 0
    assert "cluster='tcp://127.0.0.1:1': no scheduler answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", r"give tcp://HOST:PORT, tls://…, slurm:FILE\.yaml"),
        ("http://127.0.0.1:1", r"give tcp://"),
        ("tls://127.0.0.1:1", r"Dask's configuration names no certificates"),
    ],
)
def test_what_cannot_be_an_address_is_refused(address, message):
    with pytest.raises(ValueError, match=message):
        next(cluster.train_all([], cluster=address))


# --- A scheduler and workers that others have started. ---


class Joined:
    """A scheduler and two workers as processes of their own, as somebody would start them."""

    def __init__(self, folder: Path):
        self.folder, self.processes, self.file = folder, [], folder / "scheduler.json"
        self.start("scheduler", "--port", "0", "--scheduler-file", self.file)
        self.address = waited_for(lambda: self.file.exists() and self.said())["address"]
        for _ in range(2):
            limits = ("--nthreads", "1", "--memory-limit", "0", "--resources", "GPU=0.5")
            self.start("worker", self.address, *limits, "--local-directory", folder)

    def start(self, part: str, *arguments) -> None:
        command = [sys.executable, "-m", f"distributed.cli.dask_{part}", *map(str, arguments)]
        closed = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
        with open(self.folder / f"{part}.log", "ab") as log:
            self.processes.append(
                subprocess.Popen([*command, *closed], stdout=log, stderr=log, cwd=self.folder)
            )

    def said(self):
        try:
            return json.loads(self.file.read_text())
        except ValueError:
            return None  # it is being written

    def stop(self) -> None:
        for process in self.processes:
            process.kill()  # a worker's own process ends with its nanny
            process.wait()


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    there = Joined(tmp_path_factory.mktemp("joined"))
    yield there
    there.stop()


def in_the_middle(runs: Path) -> tuple[int, Path] | None:
    """The process of an unfinished run that has a checkpoint, and its folder."""
    for owner in runs.glob("*/.owner"):
        file = owner.with_name(FILE)
        if file.exists():
            found = History.load(file)
            if found.status == "running" and len(found.rows) < found.experiment.epochs - 1:
                return int(re.search(r"\d+", owner.read_text()).group()), owner.parent
    return None


@pytest.mark.parametrize("n", [8, pytest.param(24, marks=pytest.mark.slow)])
def test_a_joined_cluster_finishes_what_a_serial_study_does_whoever_dies(n, tmp_path, joined):
    good = toy_runs(n - 2)
    diverging = replace(good[0], name="diverging", lr=1e30)
    impossible = replace(good[0], name="too-large", train_limit=None, batch_size=2000)
    experiments = [*good[:2], diverging, impossible, *good[2:]]
    expected, failed_there = run_many(experiments, tmp_path / "serial", "cpu")

    out, killed = tmp_path / "out", {}

    def kill_one():
        pid, folder = waited_for(lambda: in_the_middle(out / "runs"))
        os.kill(pid, signal.SIGKILL)
        killed["pid"], killed["before"] = pid, History.load(folder)

    killer = threading.Thread(target=kill_one)
    killer.start()
    found, failed = run_many(experiments, out, "cpu", cluster=joined.address)
    killer.join()
    addresses = listening(*(p.pid for p in joined.processes))

    assert [rows(h) for h in found] == [rows(h) for h in expected]
    assert [h.status for h in found] == [h.status for h in expected]
    assert sorted(failed) == sorted(failed_there)
    assert len(failed) == 2
    before = killed["before"]
    after = History.load(run_folder(out, before.experiment))
    assert before.status == "running"
    assert after.rows[: len(before.rows)] == before.rows, "it started again instead of going on"
    assert addresses
    assert addresses <= LOOPBACK


def test_gpus_are_claimed_where_workers_declare_them(tmp_path, joined):
    """These declare half a GPU that they do not have: the run is placed, and says so."""
    ((_, error),) = cluster.train_all(
        [(toy_runs(1)[0], tmp_path)], "cuda", cluster=joined.address, gpu_share=0.5
    )
    assert "no NVIDIA GPU" in str(error)
    with pytest.raises(RuntimeError, match="start its workers with --resources GPU=1"):
        next(cluster.train_all([], "cuda", cluster=joined.address))


def is_free(folder: Path) -> bool:
    """Whether nobody trains there any more."""
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            return True
    except filelock.Timeout:
        return False


def has_begun(folder: Path) -> bool:
    return (folder / FILE).exists() and len(History.load(folder).rows) > 0


def long_and_short(tmp_path: Path) -> list:
    (long,), (short,) = toy_runs(1, epochs=2000), toy_runs(1, epochs=1)
    return [(long, tmp_path / "long"), (short, tmp_path / "short")]


def test_who_stops_waiting_stops_the_runs(tmp_path, joined):
    outcomes = cluster.train_all(long_and_short(tmp_path), "cpu", cluster=joined.address)
    _, short = next(outcomes)
    assert short.status == "complete"
    waited_for(lambda: has_begun(tmp_path / "long"))
    assert not is_free(tmp_path / "long")
    outcomes.close()
    waited_for(lambda: is_free(tmp_path / "long"), 20)
    assert History.load(tmp_path / "long").status == "stopped"


def test_a_scheduler_s_end_is_told_and_loses_nothing(tmp_path, joined):
    """The last test with this scheduler."""
    outcomes = cluster.train_all(long_and_short(tmp_path), "cpu", cluster=joined.address)
    next(outcomes)
    waited_for(lambda: has_begun(tmp_path / "long"))
    os.kill(joined.processes[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"is gone; .* the same command goes on from there"):
        next(outcomes)
    waited_for(lambda: is_free(tmp_path / "long"), 20)
    assert History.load(tmp_path / "long").rows


# --- SLURM: there is none here, but the script that it would be given can be read. ---


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """The example, on the network of every machine.

    dask_jobqueue leaves its certificates' files open, which the collector then says of whichever
    test it runs in: it runs here.
    """
    monkeypatch.chdir(tmp_path)  # where certificates go
    settings = yaml.safe_load((ROOT / "examples" / "slurm.yaml").read_text("utf-8"))
    file = tmp_path / "profile.yaml"
    file.write_text(yaml.safe_dump({**settings, "interface": "lo"}), "utf-8")
    yield file
    gc.collect()


leaves_files_open = pytest.mark.filterwarnings("ignore")


@leaves_files_open
def test_the_job_script_of_the_example(profile):
    there, timeout = cluster.slurm(profile)
    with there:
        script, address = there.job_script(), there.scheduler_address
        link, addresses = there.dashboard_link, listening(os.getpid())
    assert timeout == 86400
    directives = set(re.findall(r"^#SBATCH (.*)$", script, re.M))
    assert {"-p gpu", "-A my-account", "-t 08:00:00", "--gres=gpu:1", "-n 1"} <= directives
    assert "--cpus-per-task=4" in directives
    assert "--mem=30G" in directives  # 32 GB in units of 1024
    assert "source .venv/bin/activate" in script.splitlines()
    (command,) = [line for line in script.splitlines() if "dask_worker" in line]
    for words in (
        "--nthreads 1", "--nworkers 4", "--resources GPU=0.25", "--lifetime 470m", "--nanny",
        "--protocol tls://", "--interface lo", "--dashboard-address 127.0.0.1:0", address,
    ):  # fmt: skip
        assert words in command
    for name in ("tls-cert", "tls-key", "tls-ca-file"):
        (file,) = re.findall(rf"--{name} (\S+)", command)
        assert Path(file).parent == profile.parent, "where every job can read it"
    assert address.startswith("tls://")
    assert link.startswith("http://127.0.0.1:")
    assert addresses <= LOOPBACK


SBATCH = """#!/bin/sh
cp "$1" job.sh
nohup bash job.sh >> job.log 2>&1 &
echo Submitted batch job $!
"""


@pytest.mark.slow
@leaves_files_open
def test_with_an_sbatch_that_runs_its_script_here_a_second_job_goes_on_from_the_first(
    profile, tmp_path, monkeypatch
):
    """SLURM itself has not been run; this is what happens between its jobs and this process."""
    settings = yaml.safe_load(profile.read_text("utf-8"))
    short = ["--lifetime", "12s"]
    settings |= {"processes": 2, "cores": 2, "job_script_prologue": [], "worker_extra_args": short}
    profile.write_text(yaml.safe_dump(settings), "utf-8")
    (tmp_path / "bin").mkdir()
    for name, script in {"sbatch": SBATCH, "scancel": "#!/bin/sh\nkill $1 || true\n"}.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr(cluster, "SILENCE", 2)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    experiments = toy_runs(2, epochs=200)
    expected, _ = run_many(experiments, tmp_path / "serial", "cpu")
    with pytest.raises(RuntimeError, match=r"no worker is left; .* the same command goes on"):
        run_many(experiments, tmp_path / "out", "cpu", cluster=f"slurm:{profile}")
    settings["worker_extra_args"] = []
    profile.write_text(yaml.safe_dump(settings), "utf-8")
    found, failed = run_many(experiments, tmp_path / "out", "cpu", cluster=f"slurm:{profile}")
    assert failed == []
    assert [rows(h) for h in found] == [rows(h) for h in expected]


@leaves_files_open
def test_where_there_is_no_sbatch_nothing_waits_for_it(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no sbatch here"):
        run_many(toy_runs(1), tmp_path / "out", cluster=f"slurm:{profile}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no profile for SLURM \(.*No such file"),
        ("", r"no profile for SLURM"),
        ("- a\n- b", r"no profile for SLURM"),
        ("cores: 4\nmemory: 1GB\nqueu: gpu", r"no profile for SLURM \(.*queu"),
        ("queue: gpu", r"no profile for SLURM \(.*cores"),
        ("a: {", r"no profile for SLURM"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # dask_jobqueue's, of what it leaves half-built
def test_what_is_no_profile_is_refused(text, message, tmp_path):
    file = tmp_path / "profile.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        cluster.slurm(file)
