"""A history loads as it was saved, is never half written, and foreign files are refused."""

import errno
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lib.training import history
from hybrid_lib.training.experiments import EXPERIMENTS
from hybrid_lib.training.history import History, load_all, write_atomically

quick = settings(max_examples=50, deadline=None)
finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]))


def row(epoch: int = 1, **values) -> dict:
    numbers = dict.fromkeys(
        ["lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "train_seconds",
         "test_seconds"], 0.5)  # fmt: skip
    return {"epoch": epoch, "lambdas": (0.5, 0.5), **numbers, **values}


@st.composite
def histories(draw):
    keys = [key for key in row() if key not in ("epoch", "lambdas")]
    one = st.fixed_dictionaries(
        {**dict.fromkeys(keys, finite), "lambdas": st.lists(finite, min_size=1).map(tuple)}
    )
    rows = [{"epoch": i + 1, **r} for i, r in enumerate(draw(st.lists(one, max_size=4)))]
    e = replace(draw(st.sampled_from(list(EXPERIMENTS.values()))), seed=draw(st.integers(0, 99)))
    status = draw(st.sampled_from(["running", "complete", "stopped", "diverged"]))
    return History(e, rows, draw(st.dictionaries(text, text | st.integers())), status, draw(text))


@pytest.fixture
def saved(tmp_path):
    """A file with two epochs."""
    rows = [row(1, test_accuracy=0.9), row(2, test_accuracy=0.8)]
    History(EXPERIMENTS["atmo"], rows, {"dataset": "digits"}, "complete").save(tmp_path)
    return tmp_path / "history.json"


# --- Round trips. ---


@quick
@given(histories())
def test_a_saved_history_loads_unchanged(h):
    with tempfile.TemporaryDirectory() as folder:
        h.save(folder)
        assert History.load(folder) == h
        assert History.load(Path(folder) / "history.json") == h
        h.save(Path(folder) / "again.json")
        assert History.load(Path(folder) / "again.json") == h


def test_the_file_is_json_with_a_line_per_epoch(saved):
    content = json.loads(saved.read_text("utf-8"))
    assert content["format"] == 1
    assert content["experiment"]["optimizer"] == "atmo"
    lines = saved.read_text("utf-8").splitlines()
    assert [sum(f'"epoch": {n}' in line for line in lines) for n in (1, 2)] == [1, 1]
    assert sum('"epoch"' in line for line in lines) == 2


def test_final_best_and_frame():
    rows = [row(i + 1, test_accuracy=a) for i, a in enumerate([0.5, 0.9, 0.7, 0.9, 0.8])]
    h = History(EXPERIMENTS["sgd"], rows)
    assert h.final["epoch"] == 5
    assert h.best["epoch"] == 2, "the first of several"
    h.rows = [row | {"validation_accuracy": i / 9} for i, row in enumerate(h.rows)]
    assert h.best is h.rows[-1], "the validation set chooses where there is one"
    assert h.frame()["test_accuracy"].to_dict() == {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.9, 5: 0.8}
    empty = History(EXPERIMENTS["sgd"], [], status="diverged").frame()
    assert (len(empty), empty.index.name) == (0, "epoch")


def test_label_and_data_set_for_figures():
    e = EXPERIMENTS["dyn_atmo"]
    assert History(e).label == "Dyn. ATMO"
    assert History(e).dataset == "cifar10"
    assert History(e, environment={"dataset": "CIFAR-10"}).dataset == "CIFAR-10"


def test_load_all_reads_every_history_below_a_folder(tmp_path):
    for name in ("b/c", "a", "b"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        History(EXPERIMENTS["sgd"], note=name).save(tmp_path / name)
    (tmp_path / "b" / "other.json").write_text("{}")
    assert sorted(h.note for h in load_all(tmp_path)) == ["a", "b", "b/c"]
    assert load_all(tmp_path / "nothing") == []


# --- Damaged and foreign files. ---


FOREIGN = [
    b"[]", b"{}", b"null", b"3", b'"text"', b"\xff\xfe binary \x00", b"epoch,loss\n1,2\n",
    b'{"format": 1}', b'{"format": 1, "rows": [], "experiment": []}',
    b'{"format": 1, "rows": [[1, 2]], "experiment": {}}',
    b'{"format": "new", "rows": [], "experiment": {}}', 0, 0.01, 0.5, 0.9, 0.999,
]  # fmt: skip


@pytest.mark.parametrize("content", FOREIGN, ids=lambda c: str(c)[:30])
def test_a_foreign_or_truncated_file_is_refused_by_name(saved, content):
    whole = saved.read_bytes()
    saved.write_bytes(content if isinstance(content, bytes) else whole[: int(len(whole) * content)])
    with pytest.raises(ValueError, match=r"history\.json: ") as caught:
        History.load(saved)
    assert str(caught.value).startswith(str(saved))
    with pytest.raises(FileNotFoundError, match=r"history\.json: no history there"):
        History.load(saved.parent / "nothing")


def changed(file: Path, change) -> None:
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")


MISFITS = [
    (lambda c: c.update(format=2), r"format 2 is newer.*update hybrid_lib"),
    *[(lambda c, change=change: c["experiment"].update(change), message) for change, message in [
        ({"lr": -1}, r"lr=-1: "), ({"optimizer": "tiger"}, r"optimizer='tiger'"),
        ({"colour": "red"}, r"colour='red'")]],
    *[(lambda c, name=name: c.pop(name), name) for name in ("environment", "rows")],
    (lambda c: c["rows"][0].pop("lambdas"), r"lambdas"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MISFITS)
def test_invalid_content_is_refused_by_name(saved, change, message):
    changed(saved, lambda c: c.pop("note"))
    assert History.load(saved).note == ""  # as in older files
    changed(saved, change)
    with pytest.raises(ValueError, match=message) as caught:
        History.load(saved)
    assert str(caught.value).startswith(str(saved))


def test_nan_is_refused_and_the_old_file_kept(saved):
    before = saved.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        History(EXPERIMENTS["sgd"], [row(1, test_loss=float("nan"))]).save(saved)
    assert saved.read_bytes() == before


# --- Atomic writing. ---


def test_writing_leaves_one_file(tmp_path):
    file = tmp_path / "a file"
    for content in (b"first", b"", b"the second, longer one"):
        write_atomically(file, content)
        assert file.read_bytes() == content
    assert os.listdir(tmp_path) == ["a file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file_and_nothing_else(saved, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(history.os, call, full)
    with pytest.raises(OSError, match="No space left"):
        History(EXPERIMENTS["sgd"]).save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_the_umask_decides_who_may_read_the_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("times", [2, 9])
def test_a_file_that_somebody_reads_is_replaced_a_moment_later(times, tmp_path, monkeypatch):
    """On Windows a file cannot be replaced while it is open."""
    replace_, refused = os.replace, iter(range(times))

    def replace_later(source, target):
        if next(refused, None) is not None:
            raise PermissionError("in use")
        replace_(source, target)

    monkeypatch.setattr(os, "replace", replace_later)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / "file").write_text("old")
    if times > 3:
        with pytest.raises(PermissionError):
            write_atomically(tmp_path / "file", b"new")
    else:
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == ("old" if times > 3 else "new")
    assert len(list(tmp_path.iterdir())) == 1
