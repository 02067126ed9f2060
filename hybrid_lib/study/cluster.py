"""Train many runs at once on a Dask cluster: a running one, or SLURM jobs.

Each run is one task, alone in its process. It writes to its own folder, on storage that all
machines share, and resumes from its checkpoint wherever Dask restarts it. Workers that see the same
GPU share it; set CUDA_VISIBLE_DEVICES to give each its own.

Security: anyone who can reach a Dask port can run code. A scheduler for SLURM jobs listens on TLS,
with temporary certificates. To start your own cluster on one machine::

    dask scheduler --host 127.0.0.1 --dashboard-address 127.0.0.1:8787
    dask worker tcp://127.0.0.1:8786 --nthreads 1 --host 127.0.0.1 --dashboard-address 127.0.0.1:0

(With ``--no-dashboard`` the worker listens on every interface.) Between machines, start both with
``--protocol tls --tls-ca-file CA --tls-cert CERT --tls-key KEY``, name the same files for this
process in DASK_DISTRIBUTED__COMM__TLS__CA_FILE, DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT and
DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY, and join ``tls://HOST:PORT``.
"""

import contextlib
import queue
import re
import shutil
import signal
import threading
import traceback
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import yaml

from hybrid_lib.study.progress import Event, Job, one_line
from hybrid_lib.training.history import History
from hybrid_lib.training.loop import run

ANSWER, SILENCE = 10, 60  # seconds to wait for a scheduler; and for news, before counting workers
AGAIN = "finished epochs are kept; repeat the same command to resume"
_ONE_AT_A_TIME = threading.Lock()


def train_all(
    jobs: Sequence[Job], order: Iterable[int], report: Callable[[int, Event], None],
    cluster: str, workers: int, settings: dict,
) -> None:  # fmt: skip
    """Train jobs, reporting epochs, histories and failures.

    A run that raises is not retried. A run whose worker dies is, until it has lost four workers.

    Args:
        jobs: experiments with their folders, as paths that every worker understands.
        order: indices of the jobs to train, in this order.
        cluster: a scheduler's address ("tcp://...", or "tls://..." with the certificates in Dask's
            configuration), or "slurm:PROFILE.yaml", a file with arguments of
            :class:`dask_jobqueue.SLURMCluster` and "timeout", seconds to wait for the first worker.
        workers: the number of SLURM jobs.
        settings: arguments of :func:`hybrid_lib.run`.

    Raises:
        ModuleNotFoundError: if Dask is missing.
        ValueError: if ``cluster`` is neither an address nor a valid profile.
        RuntimeError: if there is no scheduler or no worker, or if it goes away.
    """
    with _client(cluster, workers) as client:
        topic, arrived = f"hybrid-{uuid.uuid4()}", queue.SimpleQueue()
        client.subscribe_topic(topic, lambda event: arrived.put(event[1]))
        running = {
            client.submit(_train, jobs[i], settings, topic, i, pure=False, priority=-place): i
            for place, i in enumerate(order)
        }
        for future in running:
            future.add_done_callback(arrived.put)
        while running:
            try:
                event = arrived.get(timeout=SILENCE)
            except queue.Empty:
                if not client.scheduler_info(-1)["workers"]:
                    raise RuntimeError(f"no worker is left; {AGAIN}") from None
                continue
            if isinstance(event, tuple | list):
                report(*event)
            elif event.status == "finished":
                report(running.pop(event), event.result())
            elif event.status == "error":
                error = event.exception().with_traceback(event.traceback())
                traceback.print_exception(error)
                report(running.pop(event), one_line(error))
            else:
                raise RuntimeError(f"the scheduler {client.scheduler.address} is gone; {AGAIN}")


def _train(job: Job, settings: dict, topic: str, number: int) -> History:
    """Train one run on a worker: the task of the cluster."""
    from distributed import Reschedule, get_worker

    worker = get_worker()
    task = worker.state.tasks[worker.get_current_task()]
    with _ONE_AT_A_TIME:
        history = run(
            *job, **settings, progress=False,
            should_stop=lambda: worker.status.name.startswith("clos") or task.state == "cancelled",
            on_epoch=lambda history: worker.log_event(topic, (number, len(history.rows))),
        )  # fmt: skip
    if history.status == "stopped":  # the worker is closing, or the task was cancelled
        raise Reschedule
    return history


@contextlib.contextmanager
def _client(cluster: str, workers: int):
    try:
        import dask
        import distributed
    except ImportError:
        raise ModuleNotFoundError("a cluster needs Dask: pip install '.[cluster]'") from None
    timeout, address = 60, cluster
    with contextlib.ExitStack() as stack:
        if cluster.startswith("slurm:"):
            address, timeout = slurm(cluster.removeprefix("slurm:"))
            if shutil.which("sbatch") is None:
                raise RuntimeError("there is no sbatch here: run this where SLURM accepts jobs")
            stack.enter_context(address).scale(jobs=workers)
            print(f"waiting for the first of {workers} jobs (see squeue), at most {timeout} s")
        elif not re.fullmatch(r"(tcp|tls)://.+:\d+", cluster):
            raise ValueError(f"cluster={cluster!r}: give tcp://HOST:PORT, tls://…, slurm:FILE.yaml")
        elif cluster.startswith("tls") and not dask.config.get("distributed.comm.tls.ca-file"):
            raise ValueError(f"cluster={cluster!r}: Dask's configuration names no certificates")
        try:
            client = distributed.Client(address, timeout=ANSWER, set_as_default=False)
            stack.enter_context(client)
            print(f"dashboard: {client.dashboard_link}")
            client.wait_for_workers(1, timeout)
        except (OSError, ValueError) as error:  # a TimeoutError is an OSError
            raise RuntimeError(f"cluster={cluster!r}: no answer ({error})") from None
        yield client


def slurm(profile: str | Path):
    """A profile's cluster, and seconds to wait for a worker; ValueError for an invalid profile."""
    interrupt = signal.getsignal(signal.SIGINT)
    from dask_jobqueue import SLURMCluster

    signal.signal(signal.SIGINT, interrupt)  # the import made Ctrl-C exit silently
    try:
        settings = yaml.safe_load(Path(profile).read_text("utf-8"))
        timeout = settings.pop("timeout", 3600)
        settings = {"security": True, "shared_temp_directory": str(Path.cwd()), **settings}
        # With --no-dashboard a worker would still listen, and on every interface.
        loopback = ["--dashboard-address", "127.0.0.1:0"]
        settings["worker_extra_args"] = [*settings.get("worker_extra_args", []), *loopback]
        settings.setdefault("scheduler_options", {}).setdefault("dashboard_address", loopback[1])
        return SLURMCluster(**settings), timeout
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{profile}: not a valid SLURM profile ({error})") from error
