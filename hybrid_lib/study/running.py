"""Train many runs, several at once: in processes on this machine, or on a cluster.

On a CPU a run has one thread, so that its numbers do not depend on the number of cores. Each run
has its own folder and resumes from its checkpoint: after an interruption, repeat the same call.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from multiprocessing import connection
from pathlib import Path

import torch

from hybrid_lib.study.progress import Event, Job, Progress, epoch_cost, one_line, outcome
from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.history import History
from hybrid_lib.training.loop import run
from hybrid_lib.training.tasks import load_task

ATTEMPTS = 3  # for a run whose process is killed


def run_folder(out: str | Path, experiment: Experiment) -> Path:
    """The folder of a run in a study: ``OUT/runs/NAME-seedN``."""
    return Path(out) / "runs" / f"{experiment.name}-seed{experiment.seed}"


def run_many(
    experiments: Iterable[Experiment], out: str | Path, device: str | None = None, *,
    workers: int | None = None, threads: int | None = None, compile: bool | None = None,
    cluster: str | None = None,
) -> tuple[list[History], list[str]]:  # fmt: skip
    """Train the missing runs of a study, several at once and the longest first.

    A script that calls this needs ``if __name__ == "__main__":``, as multiprocessing requires.

    Args:
        device, threads, compile: see :func:`hybrid_lib.run`.
        workers: how many runs at once; None: as many as there are cores, or one on a GPU. With 1,
            they train in this process. On SLURM: the number of jobs.
        cluster: see :func:`hybrid_lib.study.cluster.train_all`.

    Returns:
        The histories in the order of ``experiments``, and a line for each run that failed or
        diverged, which does not affect the others.
    """
    for name, n in {"workers": workers, "threads": threads}.items():
        if n is not None and n < 1:
            raise ValueError(f"{name}={n}: at least 1, or leave it out")
    jobs = [(e, run_folder(out, e)) for e in experiments]
    settings = {"device": device, "threads": threads, "compile": compile}
    over = [i for i, (_, folder) in enumerate(jobs) if _is_over(folder)]
    costs = [-e.epochs * epoch_cost(e) for e, _ in jobs]
    order = sorted(set(range(len(jobs))) - {*over}, key=costs.__getitem__)
    at_once = min(workers or cores(device, threads), len(order))
    progress = Progress([e for e, _ in jobs])
    try:
        for i in over if cluster or at_once > 1 else (*over, *order):  # over: only read
            progress(i, train(jobs[i], functools.partial(progress, i), settings))
        if cluster and order:
            from hybrid_lib.study.cluster import train_all

            train_all(jobs, order, progress, cluster, workers or 1, settings)
        elif at_once > 1:
            for e in {jobs[i][0].dataset: jobs[i][0] for i in order}.values():
                if not e.dataset.startswith("folder:"):  # download once, not in every process
                    with contextlib.suppress(Exception):  # the runs will report it
                        load_task(e, "cpu")
            _in_processes(jobs, order, progress, settings, at_once)
    finally:
        progress.line.close()
    ended = sorted(progress.ended.items())
    failures = [f"{progress.names[i]}: {outcome(event)}" for i, event in ended
                if isinstance(event, str) or event.status == "diverged"]  # fmt: skip
    return [event for _, event in ended if isinstance(event, History)], failures


def _is_over(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return History.load(folder).status in ("complete", "diverged")
    return False


def cores(device: str | None = "cpu", threads: int | None = None) -> int:
    """How many runs fit on this machine at once, with ``threads`` threads each."""
    if not device.startswith("cpu") if device else torch.cuda.is_available():
        return 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (usable or 1) // (threads or 1))


def train(job: Job, report, settings: dict, **how) -> History | str:
    """Train one run, reporting its epochs; an exception is printed and returned as a line."""
    how |= {"progress": False, "on_epoch": lambda history: report(len(history.rows))}
    try:
        return run(*job, **settings, **how)
    except Exception as error:
        traceback.print_exc()
        return one_line(error)


def _in_processes(jobs: Sequence[Job], order: list[int], report, settings, at_once: int) -> None:
    context, gpus = multiprocessing.get_context("spawn"), torch.cuda.device_count()
    waiting, killed, started = list(order), Counter(), []
    busy: dict[connection.Connection, tuple] = {}  # pipes to processes that have a run

    def give(slot: int, pipe=None, process=None) -> None:
        """Send the next run to a process, or to a new one if none is given."""
        if pipe is None:
            spread = gpus > 1 and settings["device"] in (None, "cuda")
            placed = {**settings, "device": f"cuda:{slot % gpus}"} if spread else settings
            pipe, child_end = context.Pipe()
            process = context.Process(target=_serve, args=(child_end, placed))
            process.start()
            child_end.close()
            started.append((pipe, process))
        busy[pipe] = process, slot, waiting.pop(0)
        with contextlib.suppress(OSError):  # killed already: handled below
            pipe.send(jobs[busy[pipe][-1]])

    try:
        for slot in range(at_once):
            give(slot)
        while busy:
            for pipe in connection.wait([*busy]):
                process, slot, number = busy[pipe]
                try:
                    event = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    event = f"killed (exit code {process.exitcode})"
                    killed[number] += 1
                    if killed[number] < ATTEMPTS:
                        waiting.insert(0, number)
                        event = None
                if event is not None:
                    report(number, event)
                if not isinstance(event, int):
                    del busy[pipe]
                    if waiting:
                        give(slot, *(() if process.exitcode else (pipe, process)))
    finally:  # once its pipe is closed, a process stops after its current step
        for pipe, _ in started:
            pipe.close()
        for _, process in started:
            process.join()


def _serve(pipe: connection.Connection, settings: dict) -> None:
    """The work of a process: train jobs from the pipe until it closes or its owner dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the parent decides

    def report(event: Event) -> None:
        with contextlib.suppress(OSError):  # the parent has gone
            pipe.send(event)

    def parent_closed_it() -> bool:
        try:
            return pipe.poll()
        except OSError:  # on Windows
            return True

    with contextlib.suppress(EOFError, OSError):
        while True:
            report(train(pipe.recv(), report, settings, should_stop=parent_closed_it))
