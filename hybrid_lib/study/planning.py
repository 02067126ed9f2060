"""The runs of a study, and the folders they are kept in."""

import dataclasses
import shlex
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from hybrid_lib.study.parameters import seed_list
from hybrid_lib.study.running import run_folder, run_many
from hybrid_lib.training import data
from hybrid_lib.training.experiments import (
    EXPERIMENTS,
    PAPER_METHODS,
    Experiment,
    did_you_mean,
    get_experiment,
)
from hybrid_lib.training.history import FILE, History

RESULTS = data.PROJECT / "data" / "results"  # published histories

# What a scale changes in Tables I and II; milestones and horizons keep their share of the epochs.
SCALES: dict[str, dict] = {
    # Seconds: does everything run? The numbers mean nothing.
    "toy": {"epochs": 2, "width": 4, "batch_size": 32, "train_limit": 160, "test_limit": 80},
    # Minutes on two CPU cores with the digits, an hour with 32x32 images: does every method learn?
    "demo": {"epochs": 12, "width": 8, "batch_size": 32},
    # Ten minutes a method on a T4 (estimated): all images, an eighth of the epochs.
    "colab": {"shorter": 8, "width": 16},
    "paper": {},  # GPU hours: as in the report
}
DEMO_TEXT = {"epochs": 6, "width": 32, "batch_size": 32, "train_limit": 2_000,
             "test_limit": 500}  # fmt: skip
DEMO_IMAGES = {"epochs": 10, "width": 16, "batch_size": 64, "train_limit": 10_000,
               "test_limit": 2_000}  # fmt: skip


def plan(
    scale: str = "demo", dataset: str = "digits", only: Iterable[str] = PAPER_METHODS,
    seeds: Iterable[int] = (0,), epochs: int | None = None, **changes,
) -> list[Experiment]:  # fmt: skip
    """The experiments of a study: rows of ``EXPERIMENTS`` at a scale, one per name and seed.

    ValueError for an unknown name or scale, or settings outside their range.

    Args:
        scale, only: keys of :data:`SCALES` and :data:`~hybrid_lib.EXPERIMENTS`.
        dataset: see :func:`hybrid_lib.training.data.load`.
        epochs: rescales the schedules; None: the scale's.
        changes: any other fields of Experiment; they override the scale's.

    >>> [e.epochs for e in plan("toy", only=["sgd"], seeds=[0, 1])]
    [2, 2]
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: must be one of {', '.join(SCALES)}")
    sizes = dict(SCALES[scale])
    if scale == "demo" and dataset != "digits":
        sizes = dict(DEMO_TEXT if dataset == "python-docs" else DEMO_IMAGES)
    limited = sizes.keys() & {"train_limit", "test_limit"}
    if limited and dataset.startswith("folder:"):  # the folder may hold fewer images
        for part, n in data.folder_sizes(dataset).items():
            if 0 < n < sizes.get(f"{part}_limit", 0):
                del sizes[f"{part}_limit"]
    default, shorter = sizes.pop("epochs", None), sizes.pop("shorter", 1)
    epochs = default if epochs is None else epochs
    changes = {**sizes, **changes, "dataset": dataset}
    planned, seeds = [], list(dict.fromkeys(seeds))
    for name in dict.fromkeys(only):
        experiment = get_experiment(name)
        n = experiment.epochs // shorter if epochs is None else epochs
        # replace() first: it refuses impossible numbers, which scaled() cannot handle.
        experiment = experiment.scaled(dataclasses.replace(experiment, epochs=n).epochs)
        planned += [dataclasses.replace(experiment, seed=s, **changes) for s in seeds]
    return planned


def default_out(scale: str, dataset: str, protocol: str = "clean") -> Path:
    """The default folder of a study: runs/SCALE, runs/SCALE-DATASET-PROTOCOL, …

    >>> default_out("demo", "folder:my/birds").name, default_out("demo", "digits", "released").name
    ('demo-birds', 'demo-released')
    """
    words = [scale]
    words += [Path(dataset.removeprefix("folder:")).name] if dataset != "digits" else []
    words += [protocol] if protocol != "clean" else []
    return data.PROJECT / "runs" / "-".join(words)


def experiments_from(params: SimpleNamespace) -> list[Experiment]:
    """The experiments of a notebook's parameters: scale, dataset, methods, seeds and epochs."""
    only = [name.strip() for name in params.methods.split(",")] if params.methods else PAPER_METHODS
    return plan(params.scale, params.dataset, only, seed_list(params.seeds), params.epochs)


def experiment_from(params: SimpleNamespace) -> Experiment:
    """The one experiment of a notebook's parameters: optimizer, scale, dataset and seed.

    Other parameters that name a field of Experiment set it, unless they are None; so do the words
    of ``settings``, if given: "nesterov=True hessian_every=10".
    """
    fields = {f.name for f in dataclasses.fields(Experiment)} - {"optimizer", "dataset", "seed"}
    changes = {k: v for k, v in vars(params).items() if k in fields and v is not None}
    for word in getattr(params, "settings", "").split():
        field, _, value = word.partition("=")
        if field not in fields:
            raise ValueError(f"settings: {field} is not a setting{did_you_mean(field, fields)}")
        changes[field] = value
    return plan(params.scale, params.dataset, [params.optimizer], [params.seed], **changes)[0]


def method(experiment: Experiment) -> str:
    """The name, for :func:`get_experiment`, of the row that ``experiment`` was made from."""
    return experiment.name if experiment.name in EXPERIMENTS else experiment.optimizer


def as_python(experiment: Experiment, folder: str | Path) -> str:
    """Python code that repeats a run exactly."""
    settings = "".join(
        f"    {f.name}={value!r},\n" for f in dataclasses.fields(Experiment)
        if (value := getattr(experiment, f.name)) != f.default
    )  # fmt: skip
    return (
        f"import hybrid_lib as hl\n\nexperiment = hl.Experiment(\n{settings})\n"
        f"history = hl.run(experiment, {str(folder)!r})\n"
    )


def as_papermill(experiment: Experiment, folder: str | Path) -> str:
    """A shell command that repeats a run exactly, through the notebook ``10_train_one``."""
    name, values = method(experiment), dataclasses.asdict(experiment)
    base = dataclasses.asdict(get_experiment(name).scaled(experiment.epochs))
    given = {"scale": "paper"} | {k: values[k] for k in ("dataset", "epochs", "seed")}
    others = [f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
              for k, v in values.items() if v != base[k] and k not in ("name", *given)]  # fmt: skip
    given |= {"optimizer": name, "settings": " ".join(others), "out": folder}
    words = ["papermill", "notebooks/10_train_one.ipynb", f"{experiment.name}.ipynb"]
    return shlex.join(words + [w for k, v in given.items() if v != "" for w in ("-p", k, str(v))])


def collect(params: SimpleNamespace) -> list[History]:
    """:func:`histories` for a notebook's ``out`` (empty: :func:`default_out`) and ``train``."""
    out = params.out or default_out(params.scale, params.dataset)
    return histories(params.plan, out, params.train)


def histories(
    experiments: Iterable[Experiment], out: str | Path, train: bool = True, **how
) -> list[History]:
    """The histories of ``experiments`` in a study's folder; ``train`` also trains missing runs.

    A folder with the runs directly inside, as in ``data/results``, is only read, by name and seed;
    a line is printed if settings differ. ``how`` are options of :func:`run_many`. FileNotFoundError
    if none of them is found and ``train`` is false, RuntimeError if every run failed.
    """
    experiments, out = list(experiments), Path(out)
    folders = [run_folder(out, e) for e in experiments]
    if any((out / folder.name / FILE).exists() for folder in folders):
        folders = [out / folder.name for folder in folders]
    elif train:
        found, failures = run_many(experiments, out, **how)
        print(*failures, sep="\n", end="\n" if failures else "")
        if not found:
            raise RuntimeError(f"{out}: every run failed")
        return found
    found = {e: History.load(f) for e, f in zip(experiments, folders) if (f / FILE).exists()}
    if not found:
        raise FileNotFoundError(f"{out}: found none of these runs; set train = True")
    if missing := [f.name for f in folders if not (f / FILE).exists()]:
        more = f" and {len(missing) - 10} more" * (len(missing) > 10)
        print(f"{out}: not found: {', '.join(missing[:10])}{more}")
    # Notebooks have no parameter for the protocol.
    if any(h.experiment != dataclasses.replace(e, protocol=h.experiment.protocol)
           for e, h in found.items()):  # fmt: skip
        print(f"{out}: shown as they were run; some settings differ from those given")
    if out.resolve().is_relative_to(RESULTS):
        for h in found.values():
            h.environment["published"] = True  # shown in every title
    return list(found.values())
