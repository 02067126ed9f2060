"""The training loop: one experiment in, one row per epoch out.

Most users need only :func:`run`. :func:`epochs` is the loop itself, a generator of rows, for those
who want to follow it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
import operator
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from hybrid_lib.training import data
from hybrid_lib.training.engines import (
    captured,
    compiled_pass,
    eager_pass,
    should_compile,
    training_step,
)
from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.history import (
    FILE,
    History,
    only_writer,
    restore_checkpoint,
    save_checkpoint,
)
from hybrid_lib.training.tasks import load_task


class Diverged(RuntimeError):
    """The loss is no longer finite."""


class Stopped(RuntimeError):
    """``should_stop`` returned True."""


def run(
    experiment: Experiment,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    *,
    progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    on_epoch: Callable[[History], None] = lambda history: None,
    compile: bool | None = None,
    capture: bool | None = None,
    threads: int | None = None,
    checkpoint_every: int = 1,
    watch: Callable[..., Callable[[], dict]] | None = None,
) -> History:
    """Train an experiment, resume it, or return its history if it is already complete.

    Args:
        experiment: what to run.
        out: the run's folder. After every epoch it contains ``history.json`` and ``last.pt`` (the
            state). A later call resumes from them, to the same numbers (on a GPU up to rounding).
            None: nothing is saved.
        device: where to train; None: an NVIDIA GPU if there is one, else the CPU.
        progress: print a line per epoch.
        should_stop: polled before every step; True stops the run with status "stopped".
        on_epoch: called with the history so far, once it is on disk: at the start of the call
            (with the rows of a checkpoint, if any) and after every epoch.
        compile: whether to fuse the training step with ``torch.compile``: the same numbers up to
            rounding. None: as in the previous call; if new, where it saves time
            (:func:`should_compile`).
        capture: whether to replay the step as a CUDA graph, one launch instead of hundreds. None:
            as in the previous call; if new, on NVIDIA GPUs.
        threads: CPU threads. Another number rounds sums in another order and changes a seed's
            result. None: as in the previous call; if new, one on a CPU: the same numbers on every
            machine.
        checkpoint_every: epochs between checkpoints. More than one saves time if an epoch takes no
            longer than writing the state. The state is also written when the call ends, so that
            only a killed process has to repeat the epochs since the last checkpoint.
        watch: called with model and optimizer before training, as :func:`look_inside` is. It
            returns a function that is called after every epoch and returns what to add to the row,
            a dict that JSON can hold. It may hook into the optimizer's steps, so it rules out CUDA
            graphs.

    Returns:
        The history, with status "complete", "stopped", or "diverged" if a loss was not finite. A
        diverged run is a result: it is kept up to the last good epoch and not tried again.
        ``environment`` records how the last call ran; ``environment["earlier"]`` lists earlier
        calls that ran differently.

    Raises:
        ValueError: for settings that do not fit the data or the device, and for a column that
            ``watch`` returns and JSON cannot hold.
        FileNotFoundError: if the data are missing.
        CannotCompile: a RuntimeError, if ``compile=True`` and there is no compiler.
        RuntimeError: if the folder holds another experiment or another process writes to it.
    """
    folder, earlier = None if out is None else Path(out), {}
    for name, n in {"threads": threads, "checkpoint_every": checkpoint_every}.items():
        if n is not None and n < 1:
            raise ValueError(f"{name}={n!r}: must be at least 1")
    if folder is not None and (folder / FILE).exists():
        history = History.load(folder)
        _check_same(experiment, history, folder)
        if history.status in ("complete", "diverged"):
            return history
        earlier = history.environment

    task = load_task(experiment, device)
    if earlier and earlier.get("dataset_checksum") != task.environment["dataset_checksum"]:
        there, here = earlier.get("dataset_checksum"), task.environment["dataset_checksum"]
        raise RuntimeError(
            f"{folder} was trained on other data of {task.environment['dataset']} (checksum "
            f"{there}, here {here}); restore that data, or choose another folder"
        )
    if compile is None:
        compile = should_compile(experiment, task, earlier.get("engine"))
    on_gpu = task.device.type == "cuda"
    if capture and not on_gpu:
        raise ValueError(f"capture=True needs an NVIDIA GPU, not {task.device.type!r}")
    if capture and watch:
        raise ValueError("capture=True: a CUDA graph replays steps unseen by watch; drop one")
    if capture is None:
        hooked = experiment.chooses_lambdas or watch is not None
        capture = on_gpu and not hooked and earlier.get("cuda_graphs", True)
    how = {"compile": compile, "capture": capture, "checkpoint_every": checkpoint_every,
           "should_stop": should_stop, "watch": watch}  # fmt: skip
    default = 1 if task.device.type == "cpu" else torch.get_num_threads()
    threads = threads or earlier.get("cpu_threads", default)
    with contextlib.nullcontext() if folder is None else only_writer(folder), _cpu_threads(threads):
        environment = _environment(task, compile, capture)
        others = [*earlier.pop("earlier", []), *([earlier] if earlier else [])]
        if others := [other for other in others if other != environment]:
            environment["earlier"] = others
        history = History(experiment, environment=environment)
        _train_until_done(history, task, folder, progress, on_epoch, how)
    return history


def epochs(
    experiment: Experiment,
    task,
    folder: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    compile: bool = False,
    capture: bool = False,
    checkpoint_every: int = 1,
    watch: Callable[..., Callable[[], dict]] | None = None,
) -> Iterator[list[dict]]:
    """The loop: yield all rows so far, first those of the checkpoint, then after every epoch.

    When rows are yielded, their checkpoint is on disk, or will be when the generator ends.

    Raises:
        Diverged, Stopped: in the middle of an epoch; rows and checkpoint are those before it.
    """
    layout = fast_layout(task.device, compile)
    model = task.build_model().to(task.device, memory_format=layout)
    one_pass = (compiled_pass if compile else eager_pass)(model, task)
    pool = torch.cuda.graph_pool_handle() if capture else None
    repeated = functools.partial(captured, pool=pool) if capture else lambda function, *_: function

    def new_optimizer() -> tuple:
        optimizer = experiment.build_optimizer(model.named_parameters(), compile)
        step = repeated(training_step(model, one_pass, optimizer), optimizer)
        return optimizer, step, watch(model, optimizer) if watch else dict

    def evaluate(x, y, probes=None) -> tuple:
        outputs = model(x)
        return task.loss(outputs, y, reduction="sum"), task.right(outputs, y)

    optimizer, step, watch_columns = new_optimizer()
    evaluate = repeated(evaluate)
    probes = torch.Generator(task.device)
    learning_rates, lambdas = experiment.learning_rates(), experiment.lambdas()

    rows = [] if folder is None else restore_checkpoint(folder, experiment, model, optimizer)
    yield rows
    unsaved = None  # the state after the last epoch, until it is saved
    try:
        for epoch in range(len(rows), experiment.epochs):
            if epoch + 1 == experiment.restart_epoch:
                optimizer, step, watch_columns = new_optimizer()
            for group in optimizer.param_groups:
                group["lr"] = learning_rates[epoch]
                if group["controller"] is None and len(group["rules"]) == len(lambdas(epoch)):
                    group["lambdas"] = lambdas(epoch)

            row = {"epoch": epoch + 1, "lr": learning_rates[epoch], "lambdas": lambdas(epoch)}
            with gpu_settings(experiment):
                start = now(task.device)
                model.train()
                probes.manual_seed(data.seed_of("probes", experiment.seed, epoch))
                row["train_loss"], row["train_accuracy"] = _train(
                    step, optimizer, probes, task, epoch, should_stop, layout
                )
                trained = now(task.device)
                model.train(experiment.tests_in_training_mode)
                row["test_loss"], row["test_accuracy"] = _test(evaluate, task, epoch, layout)
                tested = now(task.device)
                if experiment.validation_limit is not None:
                    measured = _test(evaluate, task, epoch, layout, "validation")
                    row["validation_loss"], row["validation_accuracy"] = measured
            row |= _controller_columns(optimizer) | _as_json(watch_columns())
            rows.append({**row, "train_seconds": trained - start, "test_seconds": tested - trained})
            state = model.state_dict(), optimizer.state_dict(), rows
            due = (epoch + 1) % checkpoint_every == 0 or epoch + 1 == experiment.epochs
            unsaved = state if due else copy.deepcopy(state)
            if due and folder is not None:
                save_checkpoint(folder, experiment, *state)
                unsaved = None
            yield rows
    finally:
        if unsaved is not None and folder is not None:
            save_checkpoint(folder, experiment, *unsaved)


def _train(step, optimizer, probes, task, epoch: int, should_stop, layout) -> tuple[float, float]:
    """Train one epoch; return its mean loss and accuracy. On a GPU no step waits for the device."""
    e, device = task.experiment, task.device
    n_steps = math.ceil(task.n_train / e.batch_size)
    losses, sizes = torch.zeros(n_steps, device=device), []
    correct = torch.zeros((), dtype=torch.long, device=device)

    for i, (x, y) in enumerate(task.training_batches(epoch, layout)):
        if should_stop():
            raise Stopped(f"in epoch {epoch + 1}, step {i + 1}")
        due = (epoch * n_steps + i) % e.hessian_every == 0 or not optimizer.state
        wanted = probes if optimizer.needs_hessian and due else None
        loss, right = step(x, y, wanted)
        losses[i] = loss
        sizes.append(y.numel())
        correct += right
        if device.type == "cpu":  # other devices would stall: once per epoch, below
            _check_finite(losses, optimizer, epoch)

    _check_finite(losses, optimizer, epoch)
    n = sum(sizes)
    weights = torch.tensor(sizes, dtype=losses.dtype, device=device)
    return ((losses * weights).sum() / n).item(), correct.item() / n


def _controller_columns(optimizer) -> dict:
    """The current weights set by a controller, averaged over tensors if each has its own, and the
    steps at which they switched, if they do."""
    controlled = [group for group in optimizer.param_groups if group["controller"] is not None]
    if not controlled:
        return {}
    mean = tuple(sum(λ) / len(controlled) for λ in zip(*(g["lambdas"] for g in controlled)))
    switched = [g["memory"]["switched_at"] for g in controlled if "switched_at" in g["memory"]]
    return {"lambdas": mean} | ({"switched_at": switched} if switched else {})


def _as_json(columns: dict) -> dict:
    """The columns as they will be read back from the file."""
    try:
        return json.loads(json.dumps(columns, allow_nan=False))
    except (TypeError, ValueError) as error:
        allowed = "only text, finite numbers, booleans, None, lists and dicts of these can be saved"
        raise ValueError(f"watch returned {columns!r} ({error}): {allowed}") from error


@torch.no_grad()
def _test(evaluate, task, epoch: int, layout, part: str = "test") -> tuple[float, float]:
    """Mean loss and accuracy over the test or the validation set."""
    loss_sum = torch.zeros((), device=task.device)
    correct, n = torch.zeros((), dtype=torch.long, device=task.device), 0
    for x, y in getattr(task, f"{part}_batches")(layout):
        loss, right = evaluate(x, y)
        loss_sum += loss
        correct += right
        n += y.numel()
    loss = loss_sum.item() / n
    if not math.isfinite(loss):
        raise Diverged(f"{part} loss {loss} in epoch {epoch + 1}")
    return loss, correct.item() / n


def _check_finite(losses: Tensor, optimizer, epoch: int) -> None:
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        group, step = optimizer.param_groups[0], int(bad[0])
        raise Diverged(
            f"loss {losses[step].item()} in epoch {epoch + 1}, step {step + 1} "
            f"(lr {group['lr']:.4g}, lambdas {group['lambdas']})"
        )


def _train_until_done(history: History, task, folder, progress, on_epoch, how: dict) -> None:
    """Fill the history, save it after every epoch, and report how the run ended."""
    experiment, say = history.experiment, print if progress else lambda text: None
    try:
        for i, rows in enumerate(epochs(experiment, task, folder, **how)):
            history.rows = list(rows)
            if not rows:  # nothing was resumed
                history.environment.pop("earlier", None)
            if rows and folder is not None:
                history.save(folder)
            if i:  # the first rows are a checkpoint's
                say(f"{history.label} {len(rows)}/{experiment.epochs} {_line(rows[-1])}")
            on_epoch(history)
        history.status = "complete"
    except (Diverged, Stopped) as reason:
        history.status, history.note = type(reason).__name__.lower(), str(reason)
    except KeyboardInterrupt:
        history.status, history.note = "stopped", "interrupted"
        raise
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"{task.device} is out of memory: lower batch_size or width (another experiment), or "
            "free memory on the device; run again to continue from the last checkpoint, if any"
        ) from error
    finally:
        if folder is not None and (history.rows or history.status == "diverged"):
            with contextlib.suppress(OSError):  # a full disk has been reported already
                history.save(folder)
        if history.status in ("stopped", "diverged"):
            again = "; run again to continue" if history.status == "stopped" and folder else ""
            say(f"{history.label}: {history.status}, {history.note}; "
                f"epochs kept: {len(history.rows)}{again}")  # fmt: skip


def _line(row: dict) -> str:
    weights = ", ".join(f"{w:.3g}" for w in row["lambdas"])
    return (
        f"train loss {row['train_loss']:.4f} acc {row['train_accuracy']:.4f}, "
        f"test loss {row['test_loss']:.4f} acc {row['test_accuracy']:.4f}, "
        f"lr {row['lr']:.4g}, lambdas ({weights}), {row['train_seconds']:.2f} s"
    )


def fast_layout(device: torch.device, compile: bool) -> torch.memory_format:
    """Channels last where it makes convolutions faster: on GPUs, and on CPUs when compiled."""
    fast = compile or device.type == "cuda"
    return torch.channels_last if fast else torch.contiguous_format


# Names of the same switches: all versions of torch have the first, 2.9 and newer have both.
_TF32 = ("cuda.matmul.allow_tf32", "cudnn.allow_tf32")
_FP32_PRECISION = tuple(
    f"{place}.fp32_precision"
    for place in ("cuda.matmul", "mkldnn.matmul", "cudnn.conv", "cudnn.rnn")
)


@contextlib.contextmanager
def gpu_settings(experiment: Experiment) -> Iterator[None]:
    """On NVIDIA GPUs, allow or forbid TF32 (torch allows it in convolutions) and let cuDNN try
    algorithms to find the fastest convolutions, so two runs may differ by rounding. Undone on exit.
    """

    def write(values: dict) -> None:
        for name, value in values.items():
            where, _, last = name.rpartition(".")
            setattr(operator.attrgetter(where)(torch.backends), last, value)

    before, overall = {}, None
    for name in (*_TF32, *_FP32_PRECISION, "cudnn.benchmark"):
        # Torch without a name, or set by a newer name such that the older one has no value.
        with contextlib.suppress(AttributeError, RuntimeError):
            before[name] = operator.attrgetter(name)(torch.backends)
    with contextlib.suppress(RuntimeError):
        overall = torch.get_float32_matmul_precision()
    allowed = experiment.precision == "tf32"
    newer = {name: "tf32" if allowed else "ieee" for name in _FP32_PRECISION if name in before}
    try:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        write({"cudnn.allow_tf32": allowed, "cudnn.benchmark": True, **newer})
        yield
    finally:
        write({name: before.pop(name) for name in _TF32 if name in before})
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        write(before)


@contextlib.contextmanager
def _cpu_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def now(device: torch.device) -> float:
    """Seconds on a monotonic clock, read after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _environment(task, compile: bool, capture: bool) -> dict:
    on_gpu = task.device.type == "cuda"
    try:
        own_version = version("hybrid-lib")
    except PackageNotFoundError:  # imported from a folder, not installed
        own_version = "unknown"
    return {
        **task.environment,
        "device": str(task.device),
        "device_name": torch.cuda.get_device_name(task.device) if on_gpu else cpu_name(),
        "engine": "compiled" if compile else "eager",
        "cuda_graphs": capture,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "hybrid_lib": own_version,
        "platform": platform.system(),
    }


def cpu_name() -> str:
    """The processor's name, as far as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux only, where platform just says x86_64
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _check_same(experiment: Experiment, history: History, folder: Path) -> None:
    here, there = dataclasses.asdict(experiment), dataclasses.asdict(history.experiment)
    differing = [f"{k}: {there[k]!r} there, {v!r} here" for k, v in here.items() if v != there[k]]
    if differing:
        raise RuntimeError(
            f"{folder} holds another experiment ({'; '.join(differing)}); choose another folder"
        )
