"""Many runs at once, on Dask: processes of this machine, a running cluster, or jobs of SLURM.

One run is one task. It writes to its own folder, on storage that all machines share, and goes on
from its checkpoint wherever Dask starts it again: a killed worker costs the epoch it was in. What a
run computes does not depend on where it ran, but for the number of threads: float32 sums on a CPU
are rounded in another order. The processes of this machine share this process's threads.

A run has a process of its own: weights are drawn from torch's global generator, and TF32 is a
global switch. Runs that share a GPU are several workers that each declare a part of it.

Whoever reaches a Dask port can run code. Here everything listens on loopback alone; SLURM's jobs,
which cannot, speak TLS with certificates made for the day. A cluster of one's own, on one machine::

    dask scheduler --host 127.0.0.1 --dashboard-address 127.0.0.1:8787
    dask worker tcp://127.0.0.1:8786 --nthreads 1 --host 127.0.0.1 --dashboard-address 127.0.0.1:0

(``--no-dashboard`` closes nothing: the worker then listens on every interface.) Between machines,
give all of them ``--protocol tls --tls-ca-file CA --tls-cert CERT --tls-key KEY``, and this process
the same three files in Dask's configuration, as DASK_DISTRIBUTED__COMM__TLS__CA_FILE,
DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT and DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY in its
environment; then join ``tls://HOST:PORT``.
"""

from __future__ import annotations

import contextlib
import queue
import re
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
import yaml
from tqdm import tqdm

from hybrid_lib.study import figures
from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.history import History
from hybrid_lib.training.loop import run

LOOPBACK = "127.0.0.1:0"
ANSWER = 10  # seconds within which a scheduler answers
SILENCE = 60  # seconds without news, after which to see whether anybody is there
MISSING = "many runs at once need Dask: in the project's folder, pip install '.[cluster]'"
AGAIN = "what was finished is kept, the same command goes on from there"
_ONE_AT_A_TIME = threading.Lock()


def train_all(
    jobs: Sequence[tuple[Experiment, Path]],
    device: str | None = None,
    *,
    workers: int | None = None,
    cluster: str | None = None,
    gpu_share: float = 1.0,
) -> Iterator[tuple[Experiment, History | Exception]]:
    """Train each experiment in its folder; yields it with its history as they finish.

    A run that raises is yielded with its exception and not tried again; one whose worker dies is,
    from its checkpoint, until it has cost four workers.

    Args:
        jobs: experiments and their folders, as paths that every worker understands.
        device: as for :func:`hybrid_lib.run`. "cuda" claims ``gpu_share`` of a worker's resource
            "GPU", which workers declare: ``dask worker ... --resources GPU=0.25``.
        workers: processes on this machine, or jobs of SLURM; None: 1.
        cluster: None: this machine; the address of a scheduler ("tcp://...", "tls://..." with the
            certificates of Dask's configuration); or "slurm:PROFILE.yaml", the arguments of
            :class:`dask_jobqueue.SLURMCluster` and "timeout", seconds to wait for the first worker.
        gpu_share: 0.25 lets four runs share a GPU.

    Raises:
        ModuleNotFoundError: without the extra ``cluster``.
        ValueError: for a profile that is none, or more GPUs claimed than there are.
        RuntimeError: if there is no scheduler, no worker, or none with a GPU; or it went away.
    """
    with _client(workers or 1, cluster, device, gpu_share) as client:
        threads = None if cluster else max(1, torch.get_num_threads() // (workers or 1))
        claim = {"GPU": gpu_share} if _on_gpu(device, cluster) else None
        topic, arrived = f"hybrid-{uuid.uuid4()}", queue.SimpleQueue()
        client.subscribe_topic(topic, lambda event: arrived.put(event[1]))
        running = {
            client.submit(
                _train, *job, device, threads, topic, i, resources=claim, pure=False, priority=-i,
                key=f"{job[1].name}-{uuid.uuid4()}",
            ): job[0]
            for i, job in enumerate(jobs)
        }  # fmt: skip
        for future in running:
            future.add_done_callback(arrived.put)
        with _progress([experiment for experiment, _ in jobs]) as show:
            while running:
                try:
                    event = arrived.get(timeout=SILENCE)
                except queue.Empty:
                    if not client.scheduler_info(-1)["workers"]:
                        raise RuntimeError(f"no worker is left; {AGAIN}") from None
                    continue
                if isinstance(event, tuple | list):
                    show(*event)
                else:
                    yield running.pop(event), _result(event, client)


def _train(experiment, folder, device, threads, topic, number) -> History:
    """The task, on a worker."""
    from distributed import Reschedule, get_worker

    worker = get_worker()
    task = worker.state.tasks[worker.get_current_task()]
    if isinstance(worker.name, int) and torch.cuda.device_count() > 1 and device in (None, "cuda"):
        device = f"cuda:{worker.name % torch.cuda.device_count()}"
    with _ONE_AT_A_TIME:
        if threads:
            torch.set_num_threads(threads)
        history = run(
            experiment, folder, device, progress=False,
            should_stop=lambda: worker.status.name.startswith("clos") or task.state == "cancelled",
            on_epoch=lambda history: worker.log_event(topic, (number, len(history.rows))),
        )  # fmt: skip
    if history.status == "stopped":  # the end of the worker's lifetime; or nobody waits any more
        raise Reschedule
    return history


def _result(future, client) -> History | Exception:
    if future.status == "finished":
        return future.result()
    if future.status == "error":
        return future.exception().with_traceback(future.traceback())
    raise RuntimeError(f"the scheduler {client.scheduler.address} is gone; {AGAIN}")


@contextlib.contextmanager
def _client(workers: int, cluster: str | None, device, gpu_share: float):
    try:
        import dask
        import distributed
    except ImportError:
        raise ModuleNotFoundError(MISSING) from None
    timeout, address = 60, cluster
    with contextlib.ExitStack() as stack:
        if cluster is None:
            address = stack.enter_context(_this_machine(workers, device, gpu_share))
        elif cluster.startswith("slurm:"):
            address, timeout = slurm(cluster.removeprefix("slurm:"))
            if shutil.which("sbatch") is None:
                raise RuntimeError("there is no sbatch here: start this where SLURM takes jobs")
            stack.enter_context(address).scale(jobs=workers)
            print(f"waiting for the first of {workers} jobs (see squeue), at most {timeout} s")
        elif not re.fullmatch(r"(tcp|tls)://.+:\d+", cluster):
            raise ValueError(f"cluster={cluster!r}: give tcp://HOST:PORT, tls://…, slurm:FILE.yaml")
        elif cluster.startswith("tls") and not dask.config.get("distributed.comm.tls.ca-file"):
            raise ValueError(f"cluster={cluster!r}: Dask's configuration names no certificates")
        try:
            client = stack.enter_context(
                distributed.Client(address, timeout=ANSWER, set_as_default=False)
            )
        except (OSError, ValueError) as error:
            raise RuntimeError(f"cluster={cluster!r}: no scheduler answers ({error})") from None
        print(f"dashboard: {client.dashboard_link}")
        try:
            client.wait_for_workers(1, timeout)
        except TimeoutError:
            raise RuntimeError(f"cluster={cluster!r}: no worker came within {timeout} s") from None
        resources = [w["resources"] for w in client.scheduler_info(-1)["workers"].values()]
        if _on_gpu(device, cluster) and max(r.get("GPU", 0) for r in resources) < gpu_share:
            raise RuntimeError(f"{cluster}: start its workers with --resources GPU={gpu_share:g}")
        yield client


def _on_gpu(device: str | None, cluster: str | None) -> bool:
    """Whether runs claim a GPU; elsewhere a worker without the resource may still have one."""
    return device.startswith("cuda") if device else cluster is None and torch.cuda.is_available()


def _this_machine(workers: int, device, gpu_share: float):
    from distributed import LocalCluster

    resources = None
    if _on_gpu(device, None):
        gpus = torch.cuda.device_count()
        if workers * gpu_share > gpus:
            raise ValueError(f"{workers} workers with {gpu_share:g} GPU each: here are {gpus} GPUs")
        resources = {"GPU": gpu_share}
    return LocalCluster(
        n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=LOOPBACK,
        memory_limit=0, resources=resources,
    )  # fmt: skip


def slurm(profile: str | Path):
    """The cluster of a profile, and how long its first worker may take; no job is submitted yet.

    Raises:
        ValueError: if the file is not there or holds no profile.
    """
    from dask_jobqueue import SLURMCluster

    try:
        settings = yaml.safe_load(Path(profile).read_text("utf-8"))
        timeout = settings.pop("timeout", 3600)
        settings = {"security": True, "shared_temp_directory": str(Path.cwd()), **settings}
        # With --no-dashboard a worker still listens, and on every interface.
        closed = ["--dashboard-address", LOOPBACK]
        settings["worker_extra_args"] = [*settings.get("worker_extra_args", []), *closed]
        settings.setdefault("scheduler_options", {}).setdefault("dashboard_address", LOOPBACK)
        return SLURMCluster(**settings), timeout
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{profile}: no profile for SLURM ({error})") from error


@contextlib.contextmanager
def _progress(experiments: list[Experiment]):
    """Epochs of all runs: a bar in a terminal, a table in a notebook, nothing in a log."""
    names = [f"{e.label}, seed {e.seed}" for e in experiments]
    table = pd.DataFrame({"epoch": 0, "of": [e.epochs for e in experiments]}, index=names)
    handle = None
    if figures.is_interactive():
        from IPython.display import display

        handle = display(table, display_id=True)
    with tqdm(total=sum(table["of"]), unit="epoch", disable=not sys.stderr.isatty()) as bar:

        def show(number: int, epochs: int) -> None:
            bar.update(epochs - int(table.iat[number, 0]))
            table.iat[number, 0] = epochs
            if handle is not None:
                handle.update(table)

        yield show
