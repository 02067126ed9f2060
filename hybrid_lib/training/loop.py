"""The training loop: one experiment in, one row per epoch out.

:func:`run` is the whole story for most users. :func:`epochs` is the loop itself, a generator of
rows, for those who want to watch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from hybrid_lib.training import checkpoint, data
from hybrid_lib.training.data import Data
from hybrid_lib.training.engines import (
    Pass,
    compiled_pass,
    eager_pass,
    why_not_compile,
    worth_compiling,
)
from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.history import FILE, History

TEST_BATCH = 1000  # in evaluation mode the batch size does not matter, but for memory


class Diverged(RuntimeError):
    """The loss is not finite any more."""


class Stopped(RuntimeError):
    """``should_stop`` said so."""


def run(
    experiment: Experiment,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    *,
    progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    on_epoch: Callable[[History], None] = lambda history: None,
    compile: bool | None = None,
) -> History:
    """Train an experiment, go on with it, or return what is already complete.

    Args:
        experiment: what to run.
        out: the run's folder. After every epoch ``history.json`` (experiment, environment, rows)
            and ``last.pt`` (everything needed to go on) are in it; a later call with the same
            experiment continues from there, to the same numbers. None: nothing is written.
        device: where to train; None: an NVIDIA GPU if there is one, else the CPU.
        progress: show a bar in a terminal, elsewhere print a line per epoch.
        should_stop: asked before every step; True ends the call with status "stopped".
        on_epoch: called with the history so far, once it is on disk: at the start of the call
            (with the rows of a checkpoint, if any) and after every epoch.
        compile: whether ``torch.compile`` fuses the training step: the same numbers up to
            rounding, sooner or (short runs) later. None: as the run began, or for a new run if
            it is long enough and the machine has a compiler. ``environment["engine"]`` of the
            history says what it was.

    Returns:
        The history. Its status is "complete", "stopped", or "diverged" if a loss was not finite:
        that is a result, kept up to the last good epoch and not tried again.

    Raises:
        ValueError: for settings that do not fit the data or the device.
        FileNotFoundError: for data that is not there.
        CannotCompile: a RuntimeError, if ``compile=True`` and there is no compiler.
        RuntimeError: if the folder holds another experiment or another process writes to it.
    """
    folder = None if out is None else Path(out)
    if folder is not None and (folder / FILE).exists():
        history = History.load(folder)
        _check_same(experiment, history, folder)
        if history.status in ("complete", "diverged"):
            return history

    dataset = loaded(experiment, device)
    device = dataset.train_images.device
    begun_with = None
    if folder is not None and (folder / FILE).exists():
        begun_with = history.environment.get("engine")
        before = history.environment.get("dataset_checksum")
        if before != dataset.checksum:
            raise RuntimeError(
                f"{folder} was trained on other images of {dataset.title} (checksum {before}, here "
                f"{dataset.checksum}); restore them, or choose another folder"
            )
    engine = _engine(experiment, dataset, compile, begun_with)
    with contextlib.nullcontext() if folder is None else checkpoint.only_writer(folder):
        return _run(experiment, dataset, device, folder, progress, should_stop, on_epoch, engine)


def epochs(
    experiment: Experiment,
    dataset: Data,
    device: torch.device,
    folder: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    compile: bool = False,
) -> Iterator[list[dict]]:
    """The loop. Yields all rows so far, first those of the checkpoint, then after every epoch.

    When rows are yielded, the checkpoint that belongs to them is on disk.

    Raises:
        Diverged, Stopped: in the middle of an epoch; rows and checkpoint are those before it.
    """
    layout = _layout(device, compile)
    model = experiment.build_model(len(dataset.classes), dataset.train_images.shape[1])
    model.to(device, memory_format=layout)
    one_pass = (compiled_pass if compile else eager_pass)(model, experiment)
    optimizer = experiment.build_optimizer(model.parameters(), compile)
    learning_rates, lambdas = experiment.learning_rates(), experiment.lambdas()

    rows = checkpoint.restore(folder, experiment, model, optimizer)
    yield rows
    for epoch in range(len(rows), experiment.epochs):
        if epoch + 1 == experiment.restart_epoch:
            optimizer = experiment.build_optimizer(model.parameters(), compile)
        for group in optimizer.param_groups:
            group["lr"], group["lambdas"] = learning_rates[epoch], lambdas(epoch)

        with _tf32(experiment, device):
            start = _now(device)
            train_loss, train_accuracy = _train(
                model, one_pass, optimizer, dataset, experiment, epoch, should_stop, layout
            )
            trained = _now(device)
            test_loss, test_accuracy = _test(model, dataset, experiment, epoch, layout)
            tested = _now(device)

        rows.append(
            {
                "epoch": epoch + 1,
                "lr": learning_rates[epoch],
                "lambdas": lambdas(epoch),
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "train_seconds": trained - start,
                "test_seconds": tested - trained,
            }
        )
        checkpoint.keep(folder, experiment, model, optimizer, rows)
        yield rows


def _train(
    model, one_pass: Pass, optimizer, dataset, experiment, epoch, should_stop, layout
) -> tuple[float, float]:
    """One epoch; returns mean loss and accuracy while training. On a GPU nothing here waits."""
    model.train()
    params = list(model.parameters())
    images, labels = dataset.train_images, dataset.train_labels
    device, n, seed = images.device, len(images), experiment.seed
    crops = data.generator("augmentation", seed, epoch, device)
    probes = data.generator("probes", seed, epoch, device)
    n_steps = math.ceil(n / experiment.batch_size)
    losses = torch.zeros(n_steps, device=device)
    sizes = torch.zeros(n_steps, device=device)
    correct = torch.zeros((), dtype=torch.long, device=device)

    order = data.order(n, seed, epoch)
    for step, (x, y) in enumerate(data.batches(images, labels, order, experiment.batch_size)):
        if should_stop():
            raise Stopped(f"in epoch {epoch + 1}, step {step + 1}")
        if experiment.augment:
            x = data.augmented(x, crops)
        due = (epoch * n_steps + step) % experiment.hessian_every == 0 or not optimizer.state
        loss, right, grads, hess_diag = one_pass(
            _inputs(x, dataset, experiment, layout),
            y,
            probes if optimizer.needs_hessian and due else None,
        )
        losses[step], sizes[step] = loss, len(y)
        correct += right
        if device.type == "cpu":  # elsewhere a look would wait: once per epoch, below
            _check_finite(losses, optimizer, epoch)
        for p, g in zip(params, grads):
            p.grad = g
        optimizer.step(hess_diag=hess_diag)

    _check_finite(losses, optimizer, epoch)
    return ((losses * sizes).sum() / n).item(), correct.item() / n


@torch.no_grad()
def _test(
    model: nn.Module, dataset: Data, experiment: Experiment, epoch: int, layout
) -> tuple[float, float]:
    """Mean loss and accuracy over the test images."""
    images, labels = dataset.test_images, dataset.test_labels
    order, size = torch.arange(len(images)), TEST_BATCH
    model.train(experiment.tests_in_training_mode)
    if experiment.tests_in_training_mode:  # uses, and moves, batch statistics: a folder's images
        # lie class by class, and a batch of one class has statistics like no training batch's.
        order, size = data.order(len(images), seed=0, epoch=0), experiment.batch_size
    loss_sum = torch.zeros((), device=images.device)
    correct = torch.zeros((), dtype=torch.long, device=images.device)
    for x, y in data.batches(images, labels, order, size):
        logits = model(_inputs(x, dataset, experiment, layout))
        loss_sum += F.cross_entropy(logits, y, reduction="sum")
        correct += (logits.argmax(dim=1) == y).sum()
    loss = loss_sum.item() / len(images)
    if not math.isfinite(loss):
        raise Diverged(f"test loss {loss} in epoch {epoch + 1}")
    return loss, correct.item() / len(images)


def step_seconds(
    experiment: Experiment, device=None, repeats: int = 5, compile: bool = False
) -> dict[str, float]:
    """Where the time of a training step goes: medians in seconds.

    Returns:
        "gradient" (forward and backward), "Hessian" (what its diagonal costs beyond the gradient;
        0 for first-order methods), "step" (the optimizer's own) and "evaluation" (a forward pass
        on one batch, without gradient).
    """
    dataset = loaded(experiment, device)
    device = dataset.train_images.device
    layout = _layout(device, compile)
    model = experiment.build_model(len(dataset.classes), dataset.train_images.shape[1])
    model.to(device, memory_format=layout)
    one_pass = (compiled_pass if compile else eager_pass)(model, experiment)
    optimizer = experiment.build_optimizer(model.parameters(), compile)
    probes = data.generator("probes", experiment.seed, 0, device)
    x = _inputs(dataset.train_images[: experiment.batch_size], dataset, experiment, layout)
    y = dataset.train_labels[: experiment.batch_size]
    parts: dict[str, list[float]] = {"gradient": [], "Hessian": [], "step": [], "evaluation": []}
    for _ in range(repeats + 2):
        with _tf32(experiment, device):
            t0 = _now(device)
            _, _, grads, hess_diag = one_pass(x, y, None)
            t1 = _now(device)
            if optimizer.needs_hessian:
                _, _, grads, hess_diag = one_pass(x, y, probes)
            t2 = _now(device)
            for p, g in zip(model.parameters(), grads):
                p.grad = g
            optimizer.step(hess_diag=hess_diag)
            t3 = _now(device)
            model.train(experiment.tests_in_training_mode)
            t4 = _now(device)
            with torch.no_grad():
                model(x)
            t5 = _now(device)
            model.train()
        # The second pass has a gradient in it, too.
        hessian = (t2 - t1) - (t1 - t0) if optimizer.needs_hessian else 0.0
        for name, seconds in zip(parts, (t1 - t0, hessian, t3 - t2, t5 - t4)):
            parts[name].append(seconds)
    return {name: statistics.median(s[2:]) for name, s in parts.items()}  # the first two warm up


def _inputs(images: Tensor, dataset: Data, experiment: Experiment, layout) -> Tensor:
    images = images.contiguous(memory_format=layout)
    raw = experiment.protocol == "released"  # 0-255, as the report's code fed them
    return images.float() if raw else data.normalised(images, dataset)


def _layout(device: torch.device, compile: bool) -> torch.memory_format:
    """Channels last where convolutions are faster so: on GPUs, and compiled on CPUs."""
    fast = compile or device.type == "cuda"
    return torch.channels_last if fast else torch.contiguous_format


def _engine(experiment, dataset: Data, compile: bool | None, begun_with: str | None) -> str:
    """What the history will say: "compiled", "eager", or "eager: why it could not be compiled"."""
    if compile is None:
        compile = worth_compiling(experiment, len(dataset.train_images))
        if begun_with is not None:
            compile = begun_with == "compiled"  # rounds otherwise: resumed as begun
        why_not = why_not_compile(dataset.train_images.device.type) if compile else ""
        if why_not:
            print(f"{experiment.label}: training eagerly, since {why_not}")
            return f"eager: {why_not}"
        if not compile and begun_with is not None:
            return begun_with  # with the reason, if there was one
    return "compiled" if compile else "eager"


@contextlib.contextmanager
def _tf32(experiment: Experiment, device: torch.device) -> Iterator[None]:
    """Whether NVIDIA GPUs may round to TF32 (torch lets convolutions); afterwards as before."""
    if device.type != "cuda":
        yield
        return
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = experiment.precision == "tf32"
        yield
    finally:
        for backend, value in zip(backends, before):
            backend.allow_tf32 = value


def _check_finite(losses: Tensor, optimizer, epoch: int) -> None:
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        group, step = optimizer.param_groups[0], int(bad[0])
        raise Diverged(
            f"loss {losses[step].item()} in epoch {epoch + 1}, step {step + 1} "
            f"(lr {group['lr']:.4g}, lambdas {group['lambdas']})"
        )


def loaded(experiment: Experiment, device: str | torch.device | None = None) -> Data:
    """The experiment's data on the device, once the three are known to go together.

    Raises:
        ValueError, FileNotFoundError: as :func:`run` does.
    """
    try:
        if device is None or device == "":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"device={str(device)!r}: no NVIDIA GPU here; use 'cpu' or leave it out"
            )
        torch.zeros(1, device=device).item()  # there, and able to hold numbers
    except (RuntimeError, AssertionError, ImportError) as error:  # each backend has its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device={str(device)!r}: use cpu, cuda or cuda:N ({reason})") from None
    if experiment.precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision='tf32' needs an NVIDIA GPU, not {device.type!r}; use float32")
    dataset = data.load(experiment.dataset, experiment.train_limit, experiment.test_limit)
    n, size = len(dataset.train_images), experiment.batch_size
    if size > n:
        raise ValueError(
            f"batch_size={size} is larger than the {n} training images of {dataset.title}"
        )
    # Eight times halved (cifar stem) or 32 times (imagenet), a small image is a single pixel.
    shrink = 8 if experiment.stem == "cifar" else 32
    parts = [n] + [len(dataset.test_images)] * experiment.tests_in_training_mode
    if max(dataset.train_images.shape[2:]) <= shrink and any(
        size == 1 or m % size == 1 for m in parts
    ):
        raise ValueError(
            f"batch_size={size} leaves a last batch of one image (of {parts}), whose one-pixel "
            "feature maps have no batch statistics; change batch_size or a limit by one"
        )
    return dataset.to(device)


def _run(experiment, dataset, device, folder, progress, should_stop, on_epoch, engine) -> History:
    history = History(experiment, environment=_environment(dataset, device, engine))
    show = _Progress(experiment, progress)
    try:
        compile = engine == "compiled"
        for rows in epochs(experiment, dataset, device, folder, should_stop, compile):
            history.rows = list(rows)
            if rows and folder is not None:
                history.save(folder)
            show(rows)
            on_epoch(history)
        history.status = "complete"
    except Diverged as reason:
        history.status, history.note = "diverged", str(reason)
    except Stopped as reason:
        history.status, history.note = "stopped", str(reason)
    except KeyboardInterrupt:
        history.status, history.note = "stopped", "interrupted"
        raise
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"{device} is out of memory: lower batch_size or width (another experiment), or free "
            "the device; what was finished is kept, run again to go on"
        ) from error
    finally:
        show.close(history)
        if folder is not None and (history.rows or history.status == "diverged"):
            with contextlib.suppress(OSError):  # a full disk has been reported already
                history.save(folder)
    return history


class _Progress:
    """A bar where someone watches a terminal, a line per epoch in notebooks and logs."""

    def __init__(self, experiment: Experiment, enabled: bool):
        self.experiment, self.enabled, self.shown = experiment, enabled, None
        self.bar = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(total=experiment.epochs, desc=experiment.label, unit="epoch")

    def __call__(self, rows: list[dict]) -> None:
        if self.enabled and rows and self.bar is None and self.shown is not None:
            epochs = self.experiment.epochs
            print(f"{self.experiment.label} {rows[-1]['epoch']}/{epochs} {_line(rows[-1])}")
        if self.bar is not None:
            self.bar.update(len(rows) - self.bar.n)
            self.bar.set_postfix_str(_line(rows[-1]) if rows else "")
        self.shown = len(rows)

    def close(self, history: History) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.enabled and history.status in ("stopped", "diverged"):
            again = "; run again to continue" if history.status == "stopped" else ""
            print(f"{history.label}: {history.status}, {history.note}; "
                  f"epochs kept: {len(history.rows)}{again}")  # fmt: skip


def _line(row: dict) -> str:
    weights = ", ".join(f"{w:.3g}" for w in row["lambdas"])
    return (
        f"train loss {row['train_loss']:.4f} acc {row['train_accuracy']:.4f}, "
        f"test loss {row['test_loss']:.4f} acc {row['test_accuracy']:.4f}, "
        f"lr {row['lr']:.4g}, lambdas ({weights}), {row['train_seconds']:.2f} s"
    )


def _now(device: torch.device) -> float:
    """Seconds on a clock that never goes back, once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _environment(dataset: Data, device: torch.device, engine: str) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "dataset": dataset.title,
        "dataset_checksum": dataset.checksum,
        "train_images": len(dataset.train_images),
        "test_images": len(dataset.test_images),
        "device": str(device),
        "device_name": name,
        "engine": engine,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "hybrid_lib": _own_version(),
        "platform": platform.system(),
    }


def _own_version() -> str:
    try:
        return version("hybrid-lib")
    except PackageNotFoundError:  # imported from a folder, not installed
        return "unknown"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # elsewhere platform knows; on Linux it says x86_64
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _check_same(experiment: Experiment, history: History, folder: Path) -> None:
    ours, theirs = dataclasses.asdict(experiment), dataclasses.asdict(history.experiment)
    differing = [
        f"{k}: {theirs[k]!r} there, {ours[k]!r} here" for k in ours if ours[k] != theirs[k]
    ]
    if differing:
        raise RuntimeError(
            f"{folder} holds another experiment ({'; '.join(differing)}); choose another folder"
        )
