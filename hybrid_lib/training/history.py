"""A run's files: its history, JSON with a row per epoch, and checkpoints to resume from.

Files are replaced atomically, and only one process at a time writes to a run's folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import torch
from pydantic import ValidationError

from hybrid_lib.optim.compiled import first_line
from hybrid_lib.training.experiments import Experiment, error_messages

FILE = "history.json"
COLUMNS = (
    "epoch", "lr", "lambdas", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
    "train_seconds", "test_seconds",
)  # fmt: skip
FORMAT = 1  # increased when an older version could misread newer files


@dataclass
class History:
    """The results of a run so far.

    Every finished epoch has a row of COLUMNS. ``epoch`` starts at 1; ``train_loss`` and
    ``train_accuracy`` are means over the epoch's batches, while training. A validation set adds
    ``validation_loss`` and ``validation_accuracy``. With a controller, ``lambdas`` are those at the
    epoch's end; SWATS adds ``switched_at``, a step per parameter group (0: not yet).
    """

    experiment: Experiment
    rows: list[dict] = field(default_factory=list)
    environment: dict = field(default_factory=dict)  # data and their checksum, device, versions
    status: str = "running"  # complete, stopped (run again to continue) or diverged
    note: str = ""  # why it stopped or diverged

    @property
    def label(self) -> str:
        """The name of the method, as in the report."""
        return self.experiment.label

    @property
    def dataset(self) -> str:
        """The title of the data set."""
        return self.environment.get("dataset", self.experiment.dataset)

    @property
    def environments(self) -> list[dict]:
        """How the last call ran, then earlier calls that ran differently."""
        return [self.environment, *self.environment.get("earlier", [])]

    @property
    def final(self) -> dict:
        """The row of the last epoch."""
        return self.rows[-1]

    @property
    def best(self) -> dict:
        """The row with the highest validation accuracy, or the first such row.

        Without a validation set, the row with the highest test accuracy. As it is then chosen on
        the test set, report it beside :attr:`final`, not instead of it.
        """
        return max(self.rows, key=lambda row: row.get("validation_accuracy", row["test_accuracy"]))

    def frame(self):
        """The rows as a pandas table, indexed by epoch; needs the extra ``study``."""
        import pandas as pd  # imported here: training does not need it

        return pd.DataFrame(self.rows, columns=None if self.rows else COLUMNS).set_index("epoch")

    def save(self, path: str | Path) -> None:
        """Write ``path`` (or ``path/history.json`` for a folder) completely or not at all."""
        parts = {
            "format": FORMAT,
            "status": self.status,
            "note": self.note,
            "experiment": dataclasses.asdict(self.experiment),
            "environment": self.environment,
        }
        head = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in parts.items()]
        rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in self.rows)
        text = ",\n ".join([*head, f'"rows": [\n  {rows}\n ]'])  # a line per epoch
        write_atomically(_file(path), f"{{\n {text}\n}}\n".encode())

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read a file that :meth:`save` wrote, or the folder that holds it.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a history, is damaged, or comes from a newer version.
        """
        file = _file(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no history there; a run writes one after an epoch")
        try:
            content = json.loads(file.read_text("utf-8"))
            if content["format"] > FORMAT:
                newer = f"format {content['format']} is newer than this version can read ({FORMAT})"
                raise ValueError(f"{newer}; update hybrid_lib")
            rows = [{**row, "lambdas": tuple(row["lambdas"])} for row in content["rows"]]
            experiment, note = Experiment(**content["experiment"]), content.get("note", "")
            return cls(experiment, rows, content["environment"], content["status"], note)
        except ValidationError as error:
            raise ValueError(f"{file}: {'; '.join(error_messages(error))}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: not a readable history ({error})") from error


def load_all(folder: str | Path) -> list[History]:
    """All histories at or below ``folder``, in the order of their paths."""
    return [History.load(file) for file in sorted(Path(folder).rglob(FILE))]


def write_atomically(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Replace the file ``path`` with ``content``; the old file becomes ``keep``, if given.

    Raises:
        OSError: if the folder cannot be written or the disk is full; the old file stays intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if keep is not None and path.exists():
            _replace(path, keep)
        _replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _replace(source: Path, target: Path) -> None:
    for wait in (0.01, 0.1, 1):  # on Windows a file that somebody reads cannot be replaced
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(wait)
    return os.replace(source, target)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Lock the folder and explain disk errors; a killed process releases the lock.

    Raises:
        RuntimeError: if another process holds the lock, or the folder cannot be written to.
    """
    owner = folder / ".owner"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=0).acquire()
    except filelock.Timeout:
        who = owner.read_text("utf-8") if owner.exists() else "another process"
        raise RuntimeError(f"{folder}: {who} is training there; wait for it, or stop it") from None
    except OSError as error:
        raise RuntimeError(f"{folder}: cannot write there ({error.strerror})") from error
    with lock:
        try:
            write_atomically(owner, f"process {os.getpid()} on {platform.node()}".encode())
            yield
        except OSError as error:
            file = f" ({Path(error.filename).name})" if error.filename else ""
            raise RuntimeError(
                f"{folder}: {error.strerror or error}{file}; fix the problem and run again to "
                "continue from the last checkpoint"
            ) from error


def save_checkpoint(
    folder: Path, experiment: Experiment, model: dict, optimizer: dict, rows: list[dict]
) -> None:
    """Write two ``state_dict()`` to ``last.pt``; the previous checkpoint becomes ``prev.pt``."""
    content = io.BytesIO()
    state = {
        "format": FORMAT,
        "experiment": dataclasses.asdict(experiment),
        "rows": rows,
        "model": model,
        "optimizer": optimizer,
    }
    torch.save({**state, "checksum": _checksum(state)}, content)
    write_atomically(folder / "last.pt", content.getvalue(), keep=folder / "prev.pt")


def restore_checkpoint(folder: Path, experiment: Experiment, model, optimizer) -> list[dict]:
    """Load the newest intact checkpoint into model and optimizer; return its rows, or none.

    Raises:
        RuntimeError: if it belongs to another experiment, or comes from a newer version.
    """
    for name in ("last.pt", FILE, ".owner"):
        for leftover in folder.glob(f".{name}.*"):  # from an interrupted write
            leftover.unlink(missing_ok=True)
    for file in (folder / "last.pt", folder / "prev.pt"):
        if not file.exists():
            continue
        content = file.read_bytes()  # a file that cannot be read now may be intact
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            # torch checks none; version 0.1 wrote a different one, outside the state.
            if state.pop("checksum", None) not in (None, _checksum(state)):
                raise ValueError("its checksum does not match")
        except Exception as error:  # torch raises anything for a damaged file
            if isinstance(error, MemoryError) or "allocate memory" in str(error):
                raise
            print(f"{file} is damaged ({first_line(error)}); trying the previous one")
            os.replace(file, file.with_suffix(".damaged"))  # it must not become prev.pt
            continue
        if state["format"] > FORMAT:
            raise RuntimeError(f"{file} was written by a newer version; update hybrid_lib")
        if not _matches(experiment, state["experiment"]):
            raise RuntimeError(f"{file} belongs to another experiment; choose another folder")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["rows"]
    if (folder / FILE).exists():  # published histories come without checkpoints
        kept = folder / f"history-before-{time.strftime('%Y%m%d-%H%M%S')}.json"
        os.replace(folder / FILE, kept)
        print(
            f"{folder}: no checkpoint, starting again; the earlier history is kept as {kept.name}"
        )
    return []


def _checksum(state) -> str:
    """SHA-256 of a state's tensors, numbers and names; a zip's checksums miss flipped flags."""
    digest, waiting = hashlib.sha256(), [state]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [part for item in value.items() for part in item]
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{value!r};".encode())
    return digest.hexdigest()


def _matches(experiment: Experiment, settings: dict) -> bool:
    """Whether these are the experiment's settings; an older file lacks newer ones."""
    try:
        return Experiment(**settings) == experiment
    except ValueError:
        return False


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" and not path.is_dir() else path / FILE
