"""The history of a run: its experiment, its environment and one row per epoch, as one JSON file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from pydantic import ValidationError

from hybrid_lib.training.experiments import Experiment, error_messages

FILE = "history.json"
COLUMNS = (
    "epoch", "lr", "lambdas", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
    "train_seconds", "test_seconds",
)  # fmt: skip
FORMAT = 1  # raised when a reader of today could misread the file of tomorrow


@dataclass
class History:
    """What a run has computed so far.

    Attributes:
        experiment: what was run.
        rows: one dict per finished epoch, with COLUMNS: ``epoch`` from 1; ``train_loss`` and
            ``train_accuracy`` are means over the epoch's batches, while training.
        environment: data set and its checksum, device, versions.
        status: "running", "complete", "stopped" (run again to continue) or "diverged".
        note: why it stopped or diverged.
    """

    experiment: Experiment
    rows: list[dict] = field(default_factory=list)
    environment: dict = field(default_factory=dict)
    status: str = "running"
    note: str = ""

    @property
    def label(self) -> str:
        """The name of the method, as in the report."""
        return self.experiment.label

    @property
    def dataset(self) -> str:
        """The title of the data set."""
        return self.environment.get("dataset", self.experiment.dataset)

    @property
    def final(self) -> dict:
        """The row of the last epoch."""
        return self.rows[-1]

    @property
    def best(self) -> dict:
        """The row of the highest test accuracy, the first if there are several.

        The test set chose it: report it beside :attr:`final`, not instead.
        """
        return max(self.rows, key=lambda row: row["test_accuracy"])

    def frame(self) -> pd.DataFrame:
        """The rows as a table, indexed by epoch."""
        columns = None if self.rows else COLUMNS
        return pd.DataFrame(self.rows, columns=columns).set_index("epoch")

    def save(self, path: str | Path) -> None:
        """Write ``path`` (or ``path/history.json`` for a folder) as a whole or not at all."""
        head = {
            "format": FORMAT,
            "status": self.status,
            "note": self.note,
            "experiment": dataclasses.asdict(self.experiment),
            "environment": self.environment,
            "rows": [],
        }
        text = json.dumps(head, indent=1, ensure_ascii=False)
        rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in self.rows)
        text = text.removesuffix("[]\n}") + f"[\n  {rows}\n ]\n}}\n"  # a line per epoch
        write_atomically(_file(path), text.encode("utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read a file that :meth:`save` wrote, or the folder that holds it.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is no history, is damaged, or comes from a newer version.
        """
        file = _file(path)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no history there; a run writes it after its 1st epoch"
            )
        try:
            content = json.loads(file.read_text("utf-8"))
            if content["format"] > FORMAT:
                raise ValueError(
                    f"format {content['format']} is newer than this version reads ({FORMAT}); "
                    "update hybrid_lib"
                )
            rows = [{**row, "lambdas": tuple(row["lambdas"])} for row in content["rows"]]
            experiment = Experiment(**content["experiment"])
            environment, status = content["environment"], content["status"]
        except ValidationError as error:
            raise ValueError(f"{file}: {'; '.join(error_messages(error))}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: not a readable history ({error})") from error
        return cls(experiment, rows, environment, status, content.get("note", ""))


def load_all(folder: str | Path) -> list[History]:
    """All histories at or below ``folder``, in the order of their paths."""
    return [History.load(file) for file in sorted(Path(folder).rglob(FILE))]


def write_atomically(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Replace ``path`` by ``content``: whoever reads it sees the old or the new file, never a part.

    The old file becomes ``keep``, if given, once the new one is safely on disk.

    Raises:
        OSError: if the folder cannot be written or the disk is full; the old file is then intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / FILE
