"""The command line of fair.py, depth.py and merges.py: train, list or publish runs."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from hybrid_lib import Experiment
from hybrid_lib.study.running import run_folder, run_many
from hybrid_lib.training import data
from hybrid_lib.training.history import FILE, History, write_atomically

PUBLISHED = Path(__file__).with_name("fair")
Batches = Iterable[tuple[str, list[Experiment]]]  # (folder below --out, experiments)


def command(
    doc: str,
    stages: Callable[[argparse.Namespace], Iterable[Batches]],
    tables: Callable[[argparse.Namespace], dict[Path, pd.DataFrame]],
    arguments: list[str] | None = None,
    **options: dict,
) -> int:
    """Train stage by stage, planning each after the ones before it; return the exit status.

    Args:
        doc: the script's docstring.
        stages, tables: functions of the parsed arguments: what to train, and a table per file.
        options: further options by name, with their arguments for ``add_argument``.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    name = doc.split("data/results/")[1].split(".py")[0]
    parser.add_argument("--out", type=Path, default=data.PROJECT / "runs" / name)
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="compile on CPU: a minute per run")
    parser.add_argument("--workers", type=int, help="runs at once; default: one per core")
    parser.add_argument("--list", action="store_true", help="show the status of every run")
    parser.add_argument("--publish", action="store_true", help="write the tables beside this file")
    for option, how in options.items():
        parser.add_argument(f"--{option}", **how)
    chosen = parser.parse_args(arguments)
    if chosen.publish:
        for file, table in tables(chosen).items():
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, table.to_csv(index=False, float_format="%.5g").encode())
        return 0
    messages, failed = [], False
    compile = chosen.compile if chosen.device == "cpu" else None
    for folder, experiments in batches(stages(chosen)):
        out = chosen.out / folder
        if chosen.list:
            for e in experiments:
                file = run_folder(out, e) / FILE
                status = History.load(file).status if file.exists() else "to do"
                print(f"{status:10s} {folder} {file.parent.name}")
        else:
            how = {"workers": chosen.workers, "compile": compile}
            found, lines = run_many(experiments, out, chosen.device, **how)
            messages += lines
            failed |= len(found) < len(experiments)  # one that diverged is a result
    print(*messages, sep="\n", end="\n" if messages else "")
    return int(failed)


def batches(stages: Iterable[Batches]) -> Batches:
    """Yield all batches up to the first stage that chooses among runs which are not there yet."""
    with contextlib.suppress(FileNotFoundError):
        for stage in stages:
            yield from stage
