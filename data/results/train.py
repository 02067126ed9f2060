"""Train the matrix of runs behind the published results: one command, resumable, in slices.

    python data/results/train.py --dataset cifar10               # on a GPU: full length; downloads
    python data/results/train.py --archive cifar10-jpeg.tar.xz   # images as train/CLASS/*, test/…
    python data/results/train.py --dataset cifar10 --scale auto --minutes 10   # as wide as fits
    python data/results/train.py --dataset cifar10 --scale cpu   # a tenth of the epochs, small

Runs are trained into ``OUT/PROTOCOL/RUN/`` in the order of :func:`matrix`, the most informative
first. Completed runs are skipped; interrupted runs resume after their last finished epoch, here or
on another machine that is given the same folder. With ``--minutes 10`` the command stops in time
and exits with 75 while runs are left: repeat it until it exits with 0, or with 1 if runs failed.
Every slice saves its histories. Two copies of the command, or ``--jobs 2``, share the work: neither
touches a run that the other is training. ``publish.py`` turns OUT into what is kept in git.
"""

from __future__ import annotations

import argparse
import itertools
import math
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import filelock
import torch

from hybrid_lib import EXPERIMENTS, Experiment, History, run
from hybrid_lib.training import data, loop
from hybrid_lib.training.experiments import PAPER_METHODS
from hybrid_lib.training.tasks import ImageClassification

# paper: full length as in Table II, also with narrower networks; cpu: a fifth of the images, and a
# tenth of the epochs or all.
SCALES = {
    "paper": {"shorter": 1},
    "paper-32": {"shorter": 1, "width": 32},
    "paper-16": {"shorter": 1, "width": 16},
    "cpu": {"shorter": 10, "width": 8, "train_limit": 10_000, "test_limit": 2_000},
    "cpu-long": {"shorter": 1, "width": 8, "train_limit": 10_000, "test_limit": 2_000},
}
# Second-order rows and rows with a jump first: the claims rest on them.
ORDER = ("padam_sgd", "dyn_padam_sgd", "adahessian", "adasgd", "sgd", "dyn_atmo", "atmo", "adam")
OVER = ("complete", "diverged")
FAILED, MORE_TO_DO = 1, 75  # exit status; 75 is sendmail's "try again later"


def matrix(
    scale: str, dataset: str, precision: str, seeds: int
) -> Iterator[tuple[str, Experiment]]:
    """Yield (folder, experiment), the most informative first.

    With the first seed both protocols and the audits of the report's hidden settings, then the
    same with the other seeds.
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
    for seed_group, settings in itertools.product(([0], range(1, seeds)), (rows, audited)):
        for seed, (name, protocol, variant, changed) in itertools.product(seed_group, settings):
            yield row(name, protocol, seed, variant, **changed)


def audits(shorter: int) -> Iterator[tuple]:
    """Yield (method, protocol, suffix, changes): one hidden setting that claims depend on."""
    adaptive_only = {"lambda_schedule": "constant", "lambda_start": (1, 0)}
    # Was Dyn. ATMO ever dynamic? As released, λ moves from (1, 0) the wrong way, or not at all.
    yield "dyn_atmo", "released", "-frozen", adaptive_only
    yield "dyn_atmo", "released", "-as-written", {"lambda_direction": "report"}
    # The direction of Dyn. PADAM-SGD's λ.
    yield "dyn_padam_sgd", "released", "-as-written", {"lambda_direction": "report"}
    yield "dyn_padam_sgd", "clean", "-reversed", {"lambda_direction": "released"}
    # The fault behind AdaHessian's .8372: resumed at epoch 146 from the weights alone.
    restarted = {"restart_epoch": 146 // shorter + (shorter > 1)}
    for protocol in ("released", "clean"):
        yield "adahessian", protocol, f"-restarted-{protocol}", restarted
    # Test batches normalised by their own statistics, or by the running ones.
    for name in ("sgd", "padam_sgd", "adahessian"):
        yield name, "released", "-eval-mode", {"test_mode": "eval"}
    # Weight decay in the adaptive rule, which Algorithm 2 does not have.
    yield "atmo", "released", "-decay-in-sgd", {"weight_decay_in": "sgd"}


def unpacked(archive: Path, where: Path) -> Path:
    """Unpack the archive inside ``where``, unless done before; return the folder of images.

    Raises:
        FileNotFoundError: if there is neither the archive nor an unpacked copy.
        FileExistsError: if the copy was unpacked from another archive.
    """
    folder = where / "cifar10-jpeg"
    done = folder / ".complete"
    size = f"{archive.stat().st_size} bytes" if archive.is_file() else ""
    if not done.exists():
        if not size:
            raise FileNotFoundError(f"{archive}: no such archive, and {folder} is not complete")
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock"):
            if not done.exists():  # another copy of the command may have made it meanwhile
                with tarfile.open(archive) as tar:
                    tar.extractall(folder, filter="data")
                done.write_text(size, encoding="utf-8")
    before = done.read_text("utf-8")
    if size and before not in ("", size):
        raise FileExistsError(f"{folder} is from an archive of {before}, {archive} has {size}: "
                              "remove the folder to use this one")  # fmt: skip
    # An archive may wrap train/ and test/ in a folder of its own.
    (train,) = sorted(folder.rglob("train"))[:1] or [folder / "train"]
    return train.parent


def seconds(experiment: Experiment, device: str | None) -> float:
    """Estimate a run's seconds on 50,000 training and 10,000 test images from a few steps on noise,
    not compiled (long runs are faster compiled)."""
    draw, size, n = torch.Generator().manual_seed(0), experiment.batch_size, 12
    images = torch.randint(0, 256, (n * size, 3, 32, 32), generator=draw, dtype=torch.uint8)
    labels = torch.randint(0, 10, (n * size,), generator=draw)
    part = images[: 3 * size], labels[: 3 * size]
    noise = data._data("noise", [*"0123456789"], (images, labels), part)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    task = ImageClassification(experiment, noise.to(device))
    few = replace(experiment.scaled(3), train_limit=None, test_limit=None)
    *_, rows = loop.epochs(few, task, capture=device.type == "cuda")
    steps = math.ceil(50_000 / size)
    epoch = rows[-1]["train_seconds"] / n * steps + rows[-1]["test_seconds"] / 3 * steps / 5
    return experiment.epochs * epoch


def widest(minutes: float, chosen: argparse.Namespace) -> str:
    """Return the scale of the widest network whose next run fits in the time, or the narrowest."""
    for scale in ("paper", "paper-32", "paper-16"):
        out = data.PROJECT / "runs" / f"reproduction-{scale}"
        for folder, experiment in matrix(scale, "cifar10", chosen.precision, chosen.seeds):
            status, done = state(out / folder)
            if status not in OVER and is_chosen(folder, chosen):
                share = 1 - done / experiment.epochs
                try:
                    needed = share * seconds(experiment, chosen.device) / 60
                except (loop.Diverged, torch.OutOfMemoryError) as error:
                    print(f"{scale}: {folder} cannot be timed ({type(error).__name__})")
                    break
                print(f"{scale}: {folder} takes about {needed:.1f} minutes")
                if needed <= minutes:
                    return scale
                break
    return scale


def is_chosen(folder: str, chosen: argparse.Namespace) -> bool:
    """Return whether ``--only`` selects the run."""
    return any(part in folder for part in chosen.only.split(","))


def state(folder: Path) -> tuple[str, int]:
    """Return a run's status and its number of finished epochs."""
    if not (folder / "history.json").exists():
        return "to do", 0
    history = History.load(folder)
    return history.status, len(history.rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--dataset", help="cifar10 (downloaded if needed) or folder:PATH")
    images.add_argument("--archive", type=Path, help="a tar of train/CLASS/* and test/CLASS/*")
    parser.add_argument("--scale", choices=(*SCALES, "auto"), default="paper",
                        help="auto: the widest of paper, paper-32 and paper-16 whose next run fits "
                        "into --minutes")  # fmt: skip
    parser.add_argument("--precision", default="float32", help="tf32, bfloat16: faster on GPUs")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="length of a slice")
    parser.add_argument("--only", default="", metavar="PART,…",
                        help="only runs whose folder contains one of these")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work")
    parser.add_argument(
        "--checkpoint-every", type=int, default=1, help="epochs between checkpoints"
    )
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="default: only runs that are long enough")  # fmt: skip
    parser.add_argument("--out", type=Path, help="default: runs/reproduction-SCALE")
    parser.add_argument("--list", action="store_true", help="show the status of every run")
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(arguments)
    end = time.monotonic() + 60 * chosen.minutes
    if chosen.scale == "auto":
        if chosen.out:
            parser.error("--scale auto: each width has a folder of its own; omit --out")
        chosen.scale = widest(chosen.minutes, chosen)
    out = chosen.out or data.PROJECT / "runs" / f"reproduction-{chosen.scale}"
    dataset = chosen.dataset
    if chosen.archive:  # relative to the project: the same experiment on every machine
        unpacked_to = unpacked(chosen.archive, data.PROJECT / "data").relative_to(data.PROJECT)
        dataset = f"folder:{unpacked_to.as_posix()}"

    if chosen.jobs > 1 and not chosen.list:
        data.load(dataset, 100, 100)  # downloads once, before the jobs start
    minutes = str(max(0.0, end - time.monotonic()) / 60)
    one_job = [sys.executable, __file__, *arguments, "--scale", chosen.scale, "--jobs", "1",
               "--minutes", minutes]  # fmt: skip
    others = [subprocess.Popen(one_job) for _ in range(1, 1 if chosen.list else chosen.jobs)]
    runs = [(folder, experiment) for folder, experiment
            in matrix(chosen.scale, dataset, chosen.precision, chosen.seeds)
            if is_chosen(folder, chosen)]  # fmt: skip
    failed = False
    for folder, experiment in runs:
        if chosen.list:
            status, done = state(out / folder)
            print(f"{status:10s} {folder}: {done} of {experiment.epochs} epochs")
            continue
        if time.monotonic() > end:
            break
        (out / folder).mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(out / folder / ".claim", timeout=0):
                run(
                    experiment, out / folder, chosen.device, compile=chosen.compile,
                    checkpoint_every=chosen.checkpoint_every,
                    should_stop=lambda: time.monotonic() > end,
                )  # fmt: skip
        except filelock.Timeout:
            continue  # another job has claimed it
        except RuntimeError as error:  # in this run; go on with the others
            print(f"{folder}: {error}", file=sys.stderr)
            failed = True
    statuses = [other.wait() for other in others]
    failed |= FAILED in statuses
    left = sum(state(out / folder)[0] not in OVER for folder, _ in runs)
    in_time = time.monotonic() <= end and MORE_TO_DO not in statuses
    if not left or chosen.list or (failed and in_time):  # what is left has failed
        return FAILED if failed else 0
    print(f"{left} runs are left; repeat the command to continue")
    return MORE_TO_DO


if __name__ == "__main__":
    sys.exit(main())
