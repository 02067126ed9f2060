"""Train the matrix that the published results come from: one command, resumable, in slices.

    python data/results/train.py --dataset cifar10               # a GPU: full length; downloads
    python data/results/train.py --archive cifar10-jpeg.tar.xz   # images as train/CLASS/*, test/…
    python data/results/train.py --dataset cifar10 --scale cpu   # a tenth of it, small

Runs are trained in the order of :func:`matrix`, the most informative first, into
``OUT/PROTOCOL/RUN/``; what is complete is not trained again, what was interrupted goes on after its
last finished epoch, here or on another machine that is given the same folder. With ``--minutes 10``
the command stops in good time and exits with 75 while something is left: repeat it until it exits
with 0. Every slice leaves its histories behind. Started twice, the two share the work: a run that
one of them trains is left alone by the other. ``publish.py`` turns OUT into what is kept in git.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hybrid_lib import EXPERIMENTS, Experiment, History, run
from hybrid_lib.study.planning import PAPER_METHODS
from hybrid_lib.training import data

HERE = Path(__file__).resolve().parent
# At full length as in Table II; on a CPU a fifth of the images, and a tenth of the epochs or all.
SCALES = {
    "paper": {"shorter": 1},
    "cpu": {"shorter": 10, "width": 8, "train_limit": 10_000, "test_limit": 2_000},
    "cpu-long": {"shorter": 1, "width": 8, "train_limit": 10_000, "test_limit": 2_000},
}
# Second order and the rows with a jump first: they carry the claims.
ORDER = ("padam_sgd", "dyn_padam_sgd", "adahessian", "adasgd", "sgd", "dyn_atmo", "atmo", "adam")
MORE_TO_DO = 75  # exit status, as of sendmail's "try again later"


def matrix(
    scale: str, dataset: str, precision: str, seeds: int
) -> Iterator[tuple[str, Experiment]]:
    """(folder, experiment), the most informative first.

    Both protocols and the audit of the report's hidden settings with one seed, then both again,
    with the others.
    """
    changes = dict(SCALES[scale])
    shorter = changes.pop("shorter")

    def row(name: str, protocol: str, seed: int, variant: str = "", **audited) -> tuple:
        e = EXPERIMENTS[name]
        e = replace(e.scaled(e.epochs // shorter), dataset=dataset, precision=precision, seed=seed,
                    protocol=protocol, **changes)  # fmt: skip
        e = replace(e, name=f"{name}{variant}", **audited)
        folder = "audit" if variant else protocol
        return f"{folder}/{e.name}-seed{seed}", e

    assert sorted(ORDER) == sorted(PAPER_METHODS)
    protocols = ("released", "clean")
    rows = [(name, protocol, "", {}) for protocol in protocols for name in ORDER]
    audited = list(audits(shorter))
    for of_these, settings in itertools.product(([0], range(1, seeds)), (rows, audited)):
        for seed, (name, protocol, variant, changed) in itertools.product(of_these, settings):
            yield row(name, protocol, seed, variant, **changed)


def audits(shorter: int) -> Iterator[tuple]:
    """The hidden settings that a claim hangs on, one changed at a time."""
    adaptive_only = {"lambda_schedule": "constant", "lambda_start": (1, 0)}
    # Was Dyn. ATMO ever dynamic? Released it moves from (1, 0) the wrong way round, or not at all.
    yield "dyn_atmo", "released", "-frozen", adaptive_only
    yield "dyn_atmo", "released", "-as-written", {"lambda_direction": "report"}
    # The direction in which Dyn. PADAM-SGD fades.
    yield "dyn_padam_sgd", "released", "-as-written", {"lambda_direction": "report"}
    yield "dyn_padam_sgd", "clean", "-reversed", {"lambda_direction": "released"}
    # The fault behind AdaHessian's .8372: resumed at epoch 146 from the weights alone.
    restarted = {"restart_epoch": 146 // shorter + (shorter > 1)}
    for protocol in ("released", "clean"):
        yield "adahessian", protocol, f"-restarted-{protocol}", restarted
    # Test batches normalised by their own statistics, or by the running ones.
    for name in ("sgd", "padam_sgd", "adahessian"):
        yield name, "released", "-eval-mode", {"test_mode": "eval"}
    # The decay of the adaptive rule, which Algorithm 2 does not have.
    yield "atmo", "released", "-decay-in-sgd", {"weight_decay_in": "sgd"}


def unpacked(archive: Path, where: Path) -> Path:
    """The folder of images inside the archive; nothing leaves ``where``.

    Raises:
        FileNotFoundError: if there is no such archive and nothing unpacked either.
    """
    folder = where / "cifar10-jpeg"
    done = folder / ".complete"
    if not done.exists():
        if not archive.is_file():
            raise FileNotFoundError(f"{archive}: no such archive, and {folder} is not complete")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        done.touch()
    # Archives may have a folder of their own around train/ and test/.
    (train,) = sorted(folder.rglob("train"))[:1] or [folder / "train"]
    return train.parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--dataset", help="cifar10, downloaded if need be, or folder:PATH")
    images.add_argument("--archive", type=Path, help="a tar of train/CLASS/* and test/CLASS/*")
    parser.add_argument("--scale", choices=SCALES, default="paper")
    parser.add_argument("--precision", default="float32", help="tf32 or bfloat16: faster on GPUs")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="length of a slice")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="default: the runs that are long enough")  # fmt: skip
    parser.add_argument("--out", type=Path, help="default: runs/reproduction-SCALE")
    parser.add_argument("--list", action="store_true", help="show what is there and what is left")
    chosen = parser.parse_args(arguments)
    end = time.monotonic() + 60 * chosen.minutes
    out = chosen.out or data.PROJECT / "runs" / f"reproduction-{chosen.scale}"
    dataset = chosen.dataset
    if chosen.archive:  # named from the project: the same experiment wherever that lies
        unpacked_to = unpacked(chosen.archive, data.PROJECT / "data").relative_to(data.PROJECT)
        dataset = f"folder:{unpacked_to.as_posix()}"

    left = 0
    for folder, experiment in matrix(chosen.scale, dataset, chosen.precision, chosen.seeds):
        if chosen.list:
            there = (out / folder / "history.json").exists()
            status, done = "to do", 0
            if there:
                history = History.load(out / folder)
                status, done = history.status, len(history.rows)
            print(f"{status:10s} {folder}: {done} of {experiment.epochs} epochs")
            continue
        if time.monotonic() > end:
            left += 1
            continue
        try:
            history = run(
                experiment, out / folder, chosen.device, compile=chosen.compile,
                should_stop=lambda: time.monotonic() > end,
            )  # fmt: skip
            left += history.status == "stopped"
        except RuntimeError as error:  # of this run; the others can go on
            print(f"{folder}: {error}", file=sys.stderr)
            left += 1
    if left:
        print(f"{left} runs are left; the same command goes on")
    return MORE_TO_DO if left else 0


if __name__ == "__main__":
    sys.exit(main())
