"""Whole studies: train many experiments, execute the notebooks on them, write one report.

Command line: ``hybrid-study --scale demo --dataset digits`` (or ``python -m hybrid_lib.study``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pydantic
from jupyter_client.manager import AsyncKernelManager

from hybrid_lib.study import figures
from hybrid_lib.study.cluster import train_all
from hybrid_lib.study.parameters import did_you_mean, one_of, seed_list
from hybrid_lib.study.report import write_report
from hybrid_lib.training import data
from hybrid_lib.training.experiments import EXPERIMENTS, Experiment, error_messages, get_experiment
from hybrid_lib.training.history import FILE, History, load_all
from hybrid_lib.training.loop import run
from hybrid_lib.training.tasks import load_task

NOTEBOOKS = data.PROJECT / "notebooks"
PAPER_METHODS = tuple(
    name for name in EXPERIMENTS if name != "padam"
)  # the eight rows of Table III

PARAMETERS = (  # of the notebook 10_train_one, among the fields of Experiment
    "epochs", "batch_size", "width", "train_limit", "test_limit", "lr", "lr_schedule",
    "lr_milestones", "momentum", "weight_decay", "partial", "hessian_power", "lambda_schedule",
    "lambda_start", "lambda_end", "lambda_epochs", "protocol", "precision",
)  # fmt: skip
RESULTS = data.PROJECT / "data" / "results"  # published histories
NOTHING_THERE = "none of these runs is there"

# What a scale changes in Tables I and II; milestones and horizons keep their share of the epochs.
SCALES: dict[str, dict] = {
    # Seconds: does everything run? The numbers mean nothing.
    "toy": {"epochs": 2, "width": 4, "batch_size": 32, "train_limit": 160, "test_limit": 80},
    # Minutes on two CPU cores with the digits, an hour with 32x32 images: does every method learn?
    "demo": {"epochs": 12, "width": 8, "batch_size": 32},
    # As in the report: GPU hours.
    "paper": {},
}
DEMO_IMAGES = {"epochs": 10, "width": 16, "batch_size": 64, "train_limit": 10_000,
               "test_limit": 2_000}  # fmt: skip


def plan(
    scale: str = "demo",
    dataset: str = "digits",
    only: Iterable[str] = PAPER_METHODS,
    seeds: Iterable[int] = (0,),
    epochs: int | None = None,
    **changes,
) -> list[Experiment]:
    """The experiments of a study: rows of ``EXPERIMENTS`` at a scale, one per name and seed.

    Args:
        scale: a key of :data:`SCALES`.
        dataset: see :func:`hybrid_lib.training.data.load`.
        only: names of :data:`~hybrid_lib.EXPERIMENTS`.
        seeds: one run per seed.
        epochs: rescales the schedules; None: as the scale says.
        changes: any other field of Experiment, over what the scale says.

    Raises:
        ValueError: for an unknown name or scale, or settings outside their range.

    >>> [e.epochs for e in plan("toy", only=["sgd"], seeds=[0, 1])]
    [2, 2]
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: must be {one_of(SCALES)}")
    small_images = scale != "demo" or dataset == "digits"
    sizes = dict(SCALES[scale] if small_images else DEMO_IMAGES)
    if dataset.startswith("folder:"):  # a scale asks for that many images at most
        for part, n in data.folder_sizes(dataset).items():
            if 0 < n < sizes.get(f"{part}_limit", 0):
                del sizes[f"{part}_limit"]
    changes = {**sizes, **changes}
    usual = changes.pop("epochs", None)
    epochs = usual if epochs is None else epochs
    planned = []
    for name in dict.fromkeys(only):
        experiment = get_experiment(name)
        if epochs is not None:
            # replace() first: it refuses an impossible number that scaled() cannot work with.
            experiment = experiment.scaled(dataclasses.replace(experiment, epochs=epochs).epochs)
        for seed in dict.fromkeys(seeds):
            planned.append(dataclasses.replace(experiment, dataset=dataset, seed=seed, **changes))
    return planned


def run_folder(out: str | Path, experiment: Experiment) -> Path:
    """Where a study keeps a run: ``OUT/runs/NAME-seedN``."""
    return Path(out) / "runs" / f"{experiment.name}-seed{experiment.seed}"


def histories(
    experiments: Iterable[Experiment], out: str | Path, train: bool = True
) -> list[History]:
    """The histories of ``experiments`` in a study's folder; what is missing is trained if wished.

    A folder with the runs directly inside, as in ``data/results``, is read and never trained in.
    What is only read is found by name and seed; a line says where its other settings are not those
    of ``experiments``.

    Raises:
        FileNotFoundError: if there is none and nothing was to be trained.
    """
    folders = {run_folder(out, e): e for e in experiments}
    if any((Path(out) / folder.name / FILE).exists() for folder in folders):
        folders, train = {Path(out) / folder.name: e for folder, e in folders.items()}, False
    found, other = [], set()
    for folder, experiment in folders.items():
        if train:
            found.append(run(experiment, folder))
        elif (folder / FILE).exists():
            history = History.load(folder)
            other |= set(_identity(history.experiment)) - set(_identity(experiment))
            found.append(_marked(history, folder))
    if other:
        settings = ", ".join(sorted({name for name, _ in other}))
        print(f"{out}: shown as they were run, with settings of their own ({settings})")
    if not found:
        raise FileNotFoundError(f"{out}: {NOTHING_THERE}; set train = True to train them")
    return found


def published(experiments: Iterable[Experiment], folder: Path = RESULTS) -> list[History]:
    """The published histories of just these experiments, in their order; titles say "published"."""
    known = {_identity(h.experiment): _marked(h, folder) for h in load_all(folder)}
    return [known[key] for key in map(_identity, experiments) if key in known]


def _identity(experiment: Experiment) -> tuple:
    """An experiment, wherever its images are kept."""
    settings = dataclasses.asdict(experiment) | {"dataset": data.title(experiment.dataset)}
    return tuple(settings.items())


def _marked(history: History, folder: Path) -> History:
    """The history; if it is a published one, its data set is named so in every title."""
    if RESULTS not in (folder.resolve(), *folder.resolve().parents):
        return history
    environment = {**history.environment, "dataset": f"{history.dataset}, published runs"}
    return dataclasses.replace(history, environment=environment)


def run_many(
    experiments: Iterable[Experiment],
    out: Path,
    device: str | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    gpu_share: float = 1.0,
    progress: bool = True,
    compile: bool | None = None,
) -> tuple[list[History], list[str]]:
    """Train what is missing of a study, one run after the other or several at once.

    Args:
        device: see :func:`hybrid_lib.run`.
        workers, cluster, gpu_share: see :func:`hybrid_lib.study.cluster.train_all`; with neither
            workers nor cluster the runs happen in this process.
        progress: show each run's epochs there; otherwise, a line when it is over.
        compile: see :func:`hybrid_lib.run`; runs of workers choose for themselves.

    Returns:
        The histories in the order of ``experiments``, and a line for each run that failed or
        diverged: one that does leaves the others untouched.
    """
    jobs = [(e, run_folder(out, e)) for e in experiments]
    if workers or cluster:
        finished = train_all(jobs, device, workers=workers, cluster=cluster, gpu_share=gpu_share)
    else:
        finished = ((e, _tried(e, folder, device, progress, compile)) for e, folder in jobs)
    found, failures = {}, []
    for e, outcome in finished:
        if isinstance(outcome, Exception):
            traceback.print_exception(outcome)
            failures.append(f"{e.name}, seed {e.seed}: {_one_line(outcome)}")
            continue
        found[e] = outcome
        if outcome.status == "diverged":
            failures.append(f"{outcome.label}, seed {e.seed}: diverged, {outcome.note}")
        if workers or cluster or not progress:  # else the run has said so itself
            accuracy = (
                f", test accuracy {outcome.final['test_accuracy']:.4f}" if outcome.rows else ""
            )
            print(f"{outcome.label}, seed {e.seed}: {outcome.status}{accuracy}")
    return [found[e] for e in experiments if e in found], failures


def _tried(experiment: Experiment, folder: Path, device, progress, compile):
    try:
        return run(experiment, folder, device, progress=progress, compile=compile)
    except Exception as error:
        return error


def default_out(scale: str, dataset: str, protocol: str = "clean") -> Path:
    """Where a study is kept if nothing else is said: runs/SCALE, runs/SCALE-DATASET-PROTOCOL, …

    >>> default_out("demo", "folder:my/birds").name, default_out("demo", "digits", "released").name
    ('demo-birds', 'demo-released')
    """
    words = [scale]
    words += [Path(dataset.removeprefix("folder:")).name] if dataset != "digits" else []
    words += [protocol] if protocol != "clean" else []
    return data.PROJECT / "runs" / "-".join(words)


def experiments_from(
    chosen: SimpleNamespace, only: Iterable[str] = PAPER_METHODS
) -> list[Experiment]:
    """The experiments that a notebook's parameters ask for.

    ``chosen`` has scale, dataset and seeds (as text: "0,3" or "0-4"), and epochs (None: the
    scale's).
    """
    return plan(chosen.scale, chosen.dataset, only, seed_list(chosen.seeds), chosen.epochs)


def experiment_from(chosen: SimpleNamespace) -> Experiment:
    """The one experiment that a notebook's parameters ask for.

    ``chosen`` has optimizer (a name of ``EXPERIMENTS``), scale, dataset and seed; of its other
    values those that are not None and name a field of Experiment change that field. ``settings``
    has further fields as text, if it is there: "nesterov=True hessian_every=10".
    """
    fields = {f.name for f in dataclasses.fields(Experiment)} - {"optimizer", "dataset", "seed"}
    changes = {k: v for k, v in vars(chosen).items() if k in fields and v is not None}
    for word in getattr(chosen, "settings", "").split():
        field, _, value = word.partition("=")
        if field not in fields:
            raise ValueError(f"settings: {field} is no setting{did_you_mean(field, fields)}")
        changes[field] = value
    return plan(chosen.scale, chosen.dataset, [chosen.optimizer], [chosen.seed], **changes)[0]


def as_python(experiment: Experiment, folder: str | Path) -> str:
    """Python code that repeats a run exactly."""
    defaults = {f.name: f.default for f in dataclasses.fields(Experiment)}
    given = {k: v for k, v in dataclasses.asdict(experiment).items() if v != defaults[k]}
    settings = "".join(f"    {k}={v!r},\n" for k, v in given.items())
    return (
        f"import hybrid_lib as hl\n\nexperiment = hl.Experiment(\n{settings})\n"
        f"history = hl.run(experiment, {str(folder)!r})\n"
    )


def as_papermill(experiment: Experiment, folder: str | Path) -> str:
    """A shell command that repeats a run exactly, through the notebook ``10_train_one``."""
    name = experiment.name if experiment.name in EXPERIMENTS else experiment.optimizer
    start = dataclasses.asdict(get_experiment(name).scaled(experiment.epochs))
    words = ["papermill", "notebooks/10_train_one.ipynb", f"{experiment.name}.ipynb"]
    words += ["-p", "scale", "paper", "-p", "optimizer", name, "-p", "dataset", experiment.dataset]
    words += ["-p", "epochs", str(experiment.epochs), "-p", "seed", str(experiment.seed)]
    others = []
    for field, value in dataclasses.asdict(experiment).items():
        if value != start[field] and field not in ("name", "optimizer", "dataset", "seed"):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            if field in PARAMETERS:
                words += ["-p", field, text]
            else:
                others.append(f"{field}={text}")
    if others:
        words += ["-p", "settings", " ".join(others)]
    return shlex.join([*words, "-p", "out", str(folder)])


def collect(chosen: SimpleNamespace, only: Iterable[str] = PAPER_METHODS) -> list[History]:
    """The histories of :func:`experiments_from`, from ``chosen.out`` (empty: :func:`default_out`).

    ``chosen.train`` says whether to train what is missing there. If the default folder has none of
    them, published histories of the same experiments are taken, if there are any.
    """
    wanted = experiments_from(chosen, only)
    out = chosen.out or default_out(chosen.scale, chosen.dataset)
    own = chosen.out or any((run_folder(out, e) / FILE).exists() for e in wanted)
    if not own and (found := published(wanted)):
        print(f"{len(found)} of {len(wanted)} runs, published ones; set out to train your own")
        return found
    return histories(wanted, out, chosen.train)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 0 if every run and every notebook succeeded, else 1."""
    parser = argparse.ArgumentParser("hybrid-study", description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="demo", help="default: %(default)s")
    parser.add_argument(
        "--dataset", default="digits", help=f"{', '.join(data.NAMES)} or folder:PATH"
    )
    parser.add_argument(
        "--only", default=",".join(PAPER_METHODS), help="methods, separated by commas"
    )
    parser.add_argument("--seeds", default="0", help="as in 0,3 or 0-4; default: %(default)s")
    parser.add_argument("--protocol", default="clean", help="clean or released")
    parser.add_argument("--epochs", type=int, help="other than the scale's; schedules keep shape")
    parser.add_argument(
        "--out", type=Path, help="default: runs/SCALE-DATASET-PROTOCOL, without digits and clean"
    )
    chosen = parse(parser, arguments)

    try:
        experiments = plan(
            chosen.scale, chosen.dataset, chosen.only.split(","), seed_list(chosen.seeds),
            chosen.epochs, protocol=chosen.protocol,
        )  # fmt: skip
        for experiment in {e.batch_size: e for e in experiments}.values():
            load_task(experiment, chosen.device)  # what is wrong with the data is said at once
    except pydantic.ValidationError as error:
        return _refused("; ".join(error_messages(error)))
    except (ValueError, OSError, ImportError) as error:
        return _refused(error)

    try:
        return _carried_out(experiments, chosen)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _carried_out(experiments: list[Experiment], chosen: argparse.Namespace) -> int:
    out = (chosen.out or default_out(chosen.scale, chosen.dataset, chosen.protocol)).resolve()
    try:
        found, failures = run_many(experiments, out, **scale_out(chosen))
    except (ImportError, ValueError, RuntimeError) as error:
        return _refused(error)
    if not any(h.rows for h in found):  # otherwise those that diverged at once count in ranks
        return _refused("; ".join(failures))
    located = chosen.dataset
    if located.startswith("folder:"):  # the notebooks run elsewhere
        located = f"folder:{Path(located.removeprefix('folder:')).resolve()}"
    pages, faults_ = execute_notebooks(out, chosen.scale, located, chosen.seeds)
    failures += faults_
    report = write_report(out, found, pages, failures)

    ranking = figures.accuracy_table(found).sort_values("final", ascending=False)
    print(f"\n{ranking.round(4).to_string(na_rep='-')}\n")
    for failure in failures:
        print(f"failed: {failure}")
    print(f"report: {report}")
    return 1 if failures else 0


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse a command line that trains, with the options of where to; prepare for being one."""
    parser.add_argument("--device", help="cpu, cuda, …; default: a GPU if there is one")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction,
        help="fuse the training step with torch.compile; default: where a run is long enough",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, help="that many runs at once (needs Dask)")
    parser.add_argument("--cluster", help="tcp://HOST:PORT of a Dask scheduler, or slurm:FILE.yaml")
    parser.add_argument(
        "--gpu-share", type=float, default=1, help="part of a GPU that a run claims"
    )
    chosen = parser.parse_args(arguments)
    if chosen.workers is not None and chosen.workers < 1:
        parser.error(f"--workers {chosen.workers}: at least 1, or leave it out")
    if not 0 < chosen.gpu_share <= 1:
        parser.error(f"--gpu-share {chosen.gpu_share}: above 0, at most 1")
    if chosen.compile is not None and (chosen.workers or chosen.cluster):
        parser.error("--compile goes with runs in this process; those of workers choose themselves")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # "±" under an ASCII locale
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: in an orderly way
    return chosen


def scale_out(chosen: argparse.Namespace) -> dict:
    """The options of :func:`parse`, as :func:`trained` takes them."""
    return {k: getattr(chosen, k) for k in ("device", "compile", "workers", "cluster", "gpu_share")}


def execute_notebooks(
    out: Path, scale: str, dataset: str, seeds: str
) -> tuple[list[Path], list[str]]:
    """Execute the notebooks that read a study into ``out/notebooks``, as notebooks and as pages.

    Returns:
        The pages, and a line for each notebook that failed.
    """
    import nbconvert  # imported where used: a second that training alone does not need
    import papermill

    folder = out / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "out": str(out), "scale": scale, "dataset": dataset, "seeds": seeds, "train": False
    }  # fmt: skip
    pages, failures = [], []
    for source in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        accepted = papermill.inspect_notebook(source)
        if "train" not in accepted:
            continue  # a notebook that trains for itself is no reader of a study
        executed = folder / source.name
        print(f"notebook {source.stem}")
        try:
            papermill.execute_notebook(
                source, executed, {k: v for k, v in given.items() if k in accepted},
                progress_bar=False, cwd=NOTEBOOKS, kernel_manager_class=_PrivateKernelManager,
            )  # fmt: skip
        except Exception as error:
            if NOTHING_THERE in str(error):
                print(f"notebook {source.stem}: none of its methods is in this study")
            else:
                failures.append(f"notebook {source.stem}: {_one_line(error)}")
            executed.unlink(missing_ok=True)  # half a result is none
            continue
        content = json.loads(executed.read_text("utf-8"))  # indented: a quarter is blanks
        executed.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
        page, _ = nbconvert.HTMLExporter(exclude_input=False).from_filename(str(executed))
        executed.with_suffix(".html").write_text(page, encoding="utf-8")
        pages.append(executed.with_suffix(".html"))
    return pages, failures


class _PrivateKernelManager(AsyncKernelManager):
    """Talks to the kernel through files of this user instead of open ports."""

    transport = "tcp" if os.name == "nt" else "ipc"

    def __init__(self, **settings):
        super().__init__(**settings)
        if self.transport == "ipc":  # in a folder of its own, gone with the manager
            folder = tempfile.mkdtemp(prefix="hybrid-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self.ip = f"{folder}/kernel"


def _refused(reason) -> int:
    print(f"hybrid-study: {reason}", file=sys.stderr)
    return 2


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


if __name__ == "__main__":
    sys.exit(main())
