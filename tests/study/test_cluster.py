"""Runs on Dask repeat a serial study to the bit, whichever process dies; no port is public."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import yaml
from test_running import check_resumed, is_free, killing, rows, toy_runs, waited_for, with_failures

from hybrid_lib.study import cluster
from hybrid_lib.study.__main__ import study
from hybrid_lib.study.running import run_many
from hybrid_lib.training.history import FILE, History

ROOT = Path(__file__).parents[2]
LOOPBACK = {"127.0.0.1", "::1"}


def listening(*pids: int) -> set[str]:
    """Addresses on which processes or their children listen."""
    roots = [psutil.Process(pid) for pid in pids]
    family = [*roots, *(child for root in roots for child in root.children(recursive=True))]
    return {c.laddr.ip for p in family for c in p.net_connections() if c.status == "LISTEN"}


CPU = {"device": "cpu"}


# --- Clusters that cannot be used. ---


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", r"give tcp://HOST:PORT, tls://…, slurm:FILE\.yaml"),
        ("http://127.0.0.1:1", r"give tcp://"),
        ("tls://127.0.0.1:1", r"Dask's configuration names no certificates"),
        ("tcp://127.0.0.1:1", r"cluster='tcp://127.0.0.1:1': no answer"),
        ("without Dask", r"pip install '.\[cluster\]'"),
    ],
)
def test_without_a_usable_cluster_one_line_says_why(
    address, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cluster, "ANSWER", 0.3)
    if address == "without Dask":
        monkeypatch.setitem(sys.modules, "distributed", None)
    command = ["--scale", "toy", "--only", "sgd", "--out", str(tmp_path / "x")]
    assert study([*command, "--cluster", address]) == 2
    shown, errors = capsys.readouterr()
    assert (shown, len(errors.splitlines())) == ("", 1)
    assert re.search(message, errors)


# --- A scheduler and workers that are running already. ---


class Joined:
    """A scheduler and two workers in their own processes, started as a user would."""

    def __init__(self, folder: Path):
        self.folder, self.processes, self.file = folder, [], folder / "scheduler.json"
        self.start("scheduler", "--port", "0", "--scheduler-file", self.file)
        self.address = waited_for(lambda: self.file.exists() and self.contents())["address"]
        for _ in range(2):
            limits = ("--nthreads", "1", "--memory-limit", "0")
            self.start("worker", self.address, *limits, "--local-directory", folder)

    def start(self, part: str, *arguments) -> None:
        command = [sys.executable, "-m", f"distributed.cli.dask_{part}", *map(str, arguments)]
        closed = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
        with open(self.folder / f"{part}.log", "ab") as log:
            self.processes.append(
                subprocess.Popen([*command, *closed], stdout=log, stderr=log, cwd=self.folder)
            )

    def contents(self):
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


@pytest.mark.slow
def test_a_joined_cluster_repeats_a_serial_study_even_if_a_process_is_killed(tmp_path, joined):
    experiments, out, killed = with_failures(8), tmp_path / "out", {}
    experiments[0] = experiments[0].scaled(40)
    expected, failed_there = run_many(experiments, tmp_path / "serial", "cpu", workers=1)
    killer = killing(out / "runs", killed)
    found, failed = run_many(experiments, out, "cpu", cluster=joined.address)
    killer.join()
    addresses = listening(*(p.pid for p in joined.processes))

    assert [rows(h) for h in found] == [rows(h) for h in expected]
    assert [h.status for h in found] == [h.status for h in expected]
    assert failed == failed_there
    assert len(failed) == 2
    check_resumed(out, killed["before"])
    assert addresses
    assert addresses <= LOOPBACK


def long_and_short(tmp_path: Path) -> list:
    (long,), (short,) = toy_runs(1, epochs=5000), toy_runs(1, epochs=1)
    return [(long, tmp_path / "long"), (short, tmp_path / "short")]


@pytest.mark.slow
def test_an_interrupt_of_the_waiting_process_stops_the_runs(tmp_path, joined):
    def report(number, event):
        if number == 0 and event == 3:
            assert not is_free(tmp_path / "long")
            short = tmp_path / "short"  # its worker may have joined later
            waited_for(lambda: (short / FILE).exists() and History.load(short).status == "complete")
            raise KeyboardInterrupt

    jobs = long_and_short(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cluster.train_all(jobs, (1, 0), report, joined.address, 1, CPU)
    waited_for(lambda: is_free(tmp_path / "long"), 20)
    assert History.load(tmp_path / "long").status == "stopped"
    assert History.load(tmp_path / "short").status == "complete"


@pytest.mark.slow
def test_the_end_of_the_scheduler_is_reported_and_loses_nothing(tmp_path, joined):
    """It kills the scheduler, so it must be the last test with it."""

    def kill():
        waited_for((tmp_path / "long" / FILE).exists)
        os.kill(joined.processes[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RuntimeError, match=r"is gone; .* repeat the same command to resume"):
        cluster.train_all(long_and_short(tmp_path), [0], lambda *_: None, joined.address, 1, CPU)
    killer.join()
    waited_for(lambda: is_free(tmp_path / "long"), 20)
    assert History.load(tmp_path / "long").rows


# --- SLURM: there is none here, but the job script for it can be read. ---


INTERFACE = next(name for name, places in psutil.net_if_addrs().items()
                if "127.0.0.1" in (place.address for place in places))  # fmt: skip


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """The example, on the loopback network, which every machine has under some name.

    dask_jobqueue leaves the files of its certificates open, about which the garbage collector warns
    in whichever test it runs, so it runs here.
    """
    monkeypatch.chdir(tmp_path)  # certificates are written here
    settings = yaml.safe_load((ROOT / "examples" / "slurm.yaml").read_text("utf-8"))
    file = tmp_path / "profile.yaml"
    file.write_text(yaml.safe_dump({**settings, "interface": INTERFACE}), "utf-8")
    yield file
    gc.collect()


leaves_files_open = pytest.mark.filterwarnings("ignore")


@leaves_files_open
def test_the_example_profile_gives_the_expected_job_script(profile):
    there, timeout = cluster.slurm(profile)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
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
        "--nthreads 1", "--nworkers 4", "--lifetime 470m", "--nanny",
        "--protocol tls://", f"--interface {INTERFACE}", "--dashboard-address 127.0.0.1:0", address,
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
def test_a_second_slurm_job_resumes_the_runs_of_the_first(profile, tmp_path, monkeypatch):
    """SLURM itself has not been run; a stand-in for sbatch runs its job scripts here."""
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
    expected, _ = run_many(experiments, tmp_path / "serial", "cpu", workers=1)
    with pytest.raises(RuntimeError, match=r"no worker is left; .* repeat the same command"):
        run_many(experiments, tmp_path / "out", "cpu", cluster=f"slurm:{profile}")
    settings["worker_extra_args"] = []
    profile.write_text(yaml.safe_dump(settings), "utf-8")
    found, failed = run_many(experiments, tmp_path / "out", "cpu", cluster=f"slurm:{profile}")
    assert failed == []
    assert [rows(h) for h in found] == [rows(h) for h in expected]


@leaves_files_open
def test_without_sbatch_nothing_waits_for_it(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no sbatch here"):
        run_many(toy_runs(1), tmp_path / "out", cluster=f"slurm:{profile}")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", ""), ("- a\n- b", ""), ("a: {", ""), ("queue: gpu", "cores"),
     ("cores: 4\nmemory: 1GB\nqueu: gpu", "queu")],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # dask_jobqueue's, about half-built objects
def test_an_invalid_profile_is_refused(text, message, tmp_path):
    file = tmp_path / "profile.yaml"
    file.write_text(text)
    for where, why in ((file, message), (tmp_path / "nowhere.yaml", "No such file")):
        with pytest.raises(ValueError, match=rf"not a valid SLURM profile \(.*{why}"):
            cluster.slurm(where)
