"""What a run goes on from: whole checkpoints in its folder, written by one process at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import torch

from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.history import FILE, FORMAT, write_atomically


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which a killed process gives back, and explain what the disk says."""
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
            who = f"process {os.getpid()} on {platform.node()}"
            write_atomically(owner, who.encode("utf-8"))
            yield
        except OSError as error:
            raise RuntimeError(
                f"{folder}: {error.strerror or error}; the epochs that {FILE} lists are safe, "
                "mend it and run again to go on"
            ) from error


def keep(folder: Path | None, experiment, model, optimizer, rows) -> None:
    """Write ``last.pt``; what was there becomes ``prev.pt``."""
    if folder is None:
        return
    content = io.BytesIO()
    state = {
        "format": FORMAT,
        "experiment": dataclasses.asdict(experiment),
        "rows": rows,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, content)
    write_atomically(folder / "last.pt", _sealed(content.getvalue()), keep=folder / "prev.pt")


def restore(folder: Path | None, experiment: Experiment, model, optimizer) -> list[dict]:
    """Load the newest intact checkpoint into model and optimizer and return its rows."""
    if folder is None:
        return []
    for name in ("last.pt", FILE, ".owner"):
        for leftover in folder.glob(f".{name}.*"):  # of a write that was cut short
            leftover.unlink(missing_ok=True)
    for file in (folder / "last.pt", folder / "prev.pt"):
        if not file.exists():
            continue
        try:
            content = _checked(file.read_bytes())
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # torch's errors of what it cannot read are of every kind
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"{file} is damaged ({reason}); looking for the one before")
            os.replace(file, file.with_suffix(".damaged"))  # it must not become the one before
            continue
        if state["format"] > FORMAT:
            raise RuntimeError(f"{file} was written by a newer version; update hybrid_lib")
        if not _is(experiment, state["experiment"]):
            raise RuntimeError(f"{file} belongs to another experiment; choose another folder")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["rows"]
    if (folder / FILE).exists():  # published histories travel without their checkpoints
        kept = folder / f"history-before-{time.strftime('%Y%m%d-%H%M%S')}.json"
        os.replace(folder / FILE, kept)
        print(
            f"{folder}: no checkpoint, starting again; the earlier history is kept as {kept.name}"
        )
    return []


def _is(experiment: Experiment, settings: dict) -> bool:
    """Whether these are its settings; an older file lacks newer ones."""
    try:
        return Experiment(**settings) == experiment
    except ValueError:
        return False


def _sealed(archive: bytes) -> bytes:
    """A zip archive, as torch.save writes it, with its SHA-256 as the archive's comment.

    torch.load reads it as any other; the two last bytes before a comment are its length.
    """
    digest = hashlib.sha256(archive).hexdigest().encode("ascii")
    return archive[:-2] + len(digest).to_bytes(2, "little") + digest


def _checked(sealed: bytes) -> bytes:
    digest = hashlib.sha256(sealed[:-66] + b"\0\0").hexdigest().encode("ascii")
    if sealed[-64:] != digest:
        raise ValueError("its checksum does not fit")
    return sealed
