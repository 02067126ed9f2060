"""A run follows its experiment, survives every interruption to the bit, and refuses the impossible.

The comparison is always the same: the rows except their seconds, and the weights, buffers and
optimizer state of the last checkpoint, against those of an undisturbed run.
"""

import contextlib
import errno
import functools
import io
import json
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from children import outcome
from filelock import FileLock
from toys import after, image_folder, numbers, toy, trained

from hybrid_lib.training import data, engines, history, loop, tasks
from hybrid_lib.training.experiments import EXPERIMENTS, Experiment
from hybrid_lib.training.history import History
from hybrid_lib.training.loop import epochs, run


def interrupt_after(steps: int):
    stop = after(steps)

    def should_stop():
        if stop():
            raise KeyboardInterrupt
        return False

    return should_stop


# --- What a run computes. ---


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_and_writes_a_row_per_epoch(name, tmp_path):
    e = toy(name)
    h = trained(e, tmp_path)
    assert (h.status, h.note, h.experiment) == ("complete", "", e)
    assert [row["epoch"] for row in h.rows] == [1, 2, 3]
    assert [row["lr"] for row in h.rows] == e.learning_rates()
    assert [row["lambdas"] for row in h.rows] == [e.lambdas()(i) for i in range(3)]
    assert all(row["train_seconds"] > 0 and row["test_seconds"] > 0 for row in h.rows)
    assert h.rows[-1]["train_loss"] < h.rows[0]["train_loss"]
    assert History.load(tmp_path) == h
    assert h.environment["dataset"] == "handwritten digits"
    assert h.environment["dataset_checksum"] == data.load("digits", 40, 30).checksum
    assert h.environment["torch"] == str(torch.__version__)


def test_without_an_installed_package_the_version_is_unknown(monkeypatch):
    monkeypatch.setattr(loop, "version", lambda _: version("not-installed"))
    assert trained(toy(epochs=1)).environment["hybrid_lib"] == "unknown"


CHANGES = [
    {"seed": 1}, {"augment": True}, {"width": 3}, {"lr": 0.02}, {"batch_size": 20},
    {"protocol": "released"}, {"precision": "bfloat16"}, {"precision": "float16"},
    {"stem": "imagenet", "batch_size": 20},
]  # fmt: skip


def test_the_same_experiment_repeats_the_same_numbers_and_any_change_alters_them():
    first = numbers(trained(toy(epochs=1)).rows)
    assert numbers(trained(toy(epochs=1)).rows) == first
    for change in CHANGES:
        (other,) = numbers(trained(toy(epochs=1, **change)).rows)
        assert other["train_loss"] != first[0]["train_loss"], change


@pytest.mark.parametrize(
    ("name", "every", "expected"),
    [("adasgd", 1, 9), ("adasgd", 2, 5), ("adahessian", 4, 3), ("adasgd", 100, 1), ("atmo", 1, 0)],
)
def test_the_hessian_is_estimated_as_often_as_asked_for(monkeypatch, name, every, expected):
    seen, estimate = [], engines.hessian_diagonal

    def counted(loss, params, n_samples, generator):
        seen.append(n_samples)
        return estimate(loss, params, n_samples, generator)

    monkeypatch.setattr(engines, "hessian_diagonal", counted)
    trained(toy(name, **({"hessian_every": every, "hessian_samples": 2} if expected else {})))
    assert seen == [2] * expected


def test_the_caller_s_random_states_are_left_alone(tmp_path):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    before = states()
    trained(toy("adasgd", augment=True), tmp_path)
    assert states() == before


def test_a_run_has_one_thread_unless_told_otherwise_and_keeps_its_number(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert trained(toy(epochs=1)).environment["cpu_threads"] == 1
        trained(toy(), tmp_path, threads=2, should_stop=after(4))
        seen = []
        h = trained(toy(), tmp_path, on_epoch=lambda _: seen.append(torch.get_num_threads()))
        assert (h.environment["cpu_threads"], {*seen}) == (2, {2})
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


BACKENDS = torch.backends
SETTINGS = {
    "torch's own": lambda: None,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "TF32 everywhere": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "TF32 nowhere": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    # torch 2.9 and newer; the older names have no value then
    "TF32, newer name": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "no TF32 in convolutions": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
    "TF32 unless told otherwise": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
}


def readable_settings() -> list:
    found = []
    for read in (
        lambda: BACKENDS.cudnn.allow_tf32, lambda: BACKENDS.cudnn.conv.fp32_precision,
        lambda: BACKENDS.cuda.matmul.allow_tf32, lambda: BACKENDS.cuda.matmul.fp32_precision,
        lambda: BACKENDS.mkldnn.matmul.fp32_precision, torch.get_float32_matmul_precision,
        lambda: BACKENDS.cudnn.benchmark,
    ):  # fmt: skip
        with contextlib.suppress(AttributeError, RuntimeError):
            found.append((read, read()))
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_user_s_settings_of_torch_are_left_alone(setting):
    newer = hasattr(BACKENDS.cuda.matmul, "fp32_precision")
    if not newer and list(SETTINGS).index(setting) > 3:
        pytest.skip("this torch has only the older names")
    try:
        SETTINGS[setting]()
        before = readable_settings()
        for precision in ("float32", "tf32"):
            with loop.gpu_settings(SimpleNamespace(precision=precision)):
                allowed = precision == "tf32"
                assert BACKENDS.cudnn.allow_tf32 == BACKENDS.cuda.matmul.allow_tf32 == allowed
                if newer:
                    assert (BACKENDS.cudnn.conv.fp32_precision == "tf32") == allowed
            assert [(read, read()) for read, _ in before] == before
    finally:
        if newer:
            BACKENDS.fp32_precision = "none"
        BACKENDS.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")


def test_with_rarer_checkpoints_a_run_resumes_from_the_last_one(tmp_path):
    e = toy(epochs=5)
    whole = trained(e, tmp_path / "whole", checkpoint_every=2)
    trained(e, tmp_path / "cut", checkpoint_every=2, should_stop=after(3 * 3 + 1))
    begun, saved = [], []

    def look(h):
        begun.append(len(h.rows))
        saved.append(len(torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["rows"]))

    cut = trained(e, tmp_path / "cut", checkpoint_every=2, on_epoch=look)
    assert begun == [3, 4, 5], "the state was written when the call ended"
    assert saved == [3, 4, 5]
    assert numbers(cut.rows) == numbers(whole.rows)
    saved.clear()
    trained(e, tmp_path / "anew" / ".." / "cut2", checkpoint_every=3,
            on_epoch=lambda h: saved.append((tmp_path / "cut2" / "last.pt").exists()))  # fmt: skip
    assert saved == [False, False, False, True, True, True]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_a_fault_in_a_rarer_checkpoint_costs_no_epoch(tmp_path, straight, monkeypatch, fault):
    e, write, left = toy(epochs=5), loop.save_checkpoint, iter([None])

    def failing(folder, experiment, model, optimizer, rows):
        write(folder, experiment, model, optimizer, rows)
        if len(rows) == 4 and next(left, 0) is None:  # once: the new file is lost
            os.replace(folder / "prev.pt", folder / "last.pt")
            raise fault

    monkeypatch.setattr(loop, "save_checkpoint", failing)
    with pytest.raises((fault, RuntimeError)):
        trained(e, tmp_path, checkpoint_every=2)
    begun = []
    trained(e, tmp_path, checkpoint_every=2, on_epoch=lambda h: begun.append(len(h.rows)))
    assert begun == [4, 5]
    assert outcome(tmp_path) == straight(e)


def test_columns_of_watch_are_read_back_as_they_were_written(tmp_path):
    def watch(value):
        return lambda model, optimizer: lambda: {"seen": value}

    cut = trained(toy(), tmp_path, watch=watch((np.float64(0.5), 1)), should_stop=after(4))
    assert cut.rows[0]["seen"] == [0.5, 1]
    for value in (float("nan"), torch.zeros(2), np.float32(1)):
        with pytest.raises(ValueError, match=r"watch returned \{'seen': .*finite numbers"):
            trained(toy(), tmp_path, watch=watch(value))
    resumed = trained(toy(), tmp_path, watch=watch(1))
    assert [row["seen"] for row in resumed.rows] == [[0.5, 1], 1, 1]
    assert History.load(tmp_path) == resumed


def test_a_history_names_every_machine_that_trained_it(tmp_path, monkeypatch):
    trained(toy(), tmp_path, should_stop=after(1))
    assert not (tmp_path / "history.json").exists(), "no epoch, no machine"
    for steps, machine in ((4, "one"), (8, "two"), (5, "two")):
        monkeypatch.setattr(loop, "cpu_name", lambda machine=machine: machine)
        h = trained(toy(epochs=9), tmp_path / "run", should_stop=after(steps))
        assert h.status == "stopped"
    assert h.environment["device_name"] == "two"
    assert [other["device_name"] for other in h.environment["earlier"]] == ["one"]


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(stopped, monkeypatch):
    e, folder, straight = stopped
    before = sorted(f.name for f in folder.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda file: open(file / "nowhere"))  # noqa: SIM115
        with pytest.raises((OSError, RuntimeError)):
            trained(e, folder)
    assert sorted(f.name for f in folder.iterdir()) == before
    trained(e, folder)
    assert outcome(folder) == straight


def test_a_folder_may_have_any_name(tmp_path):
    assert trained(toy(), tmp_path / "a.json").status == "complete"
    assert len(History.load(tmp_path / "a.json" / "history.json").rows) == 3


# --- The two protocols. ---


@pytest.fixture
def passes(monkeypatch):
    """The network's inputs: training mode, least and largest value, number, running mean."""
    seen, build = [], tasks.image_model

    def look(model, args):
        (x, *_) = args
        mean = model.stem[1].running_mean.clone()
        seen.append((model.training, x.min().item(), x.max().item(), len(x), mean))

    def recorded(*args):
        model = build(*args)
        model.register_forward_pre_hook(look)
        return model

    monkeypatch.setattr(tasks, "image_model", recorded)
    return seen


@pytest.mark.parametrize("protocol", ["clean", "released"])
@pytest.mark.parametrize("test_mode", ["protocol", "eval", "train"])
def test_the_protocol_decides_what_the_network_sees_and_its_mode(passes, protocol, test_mode):
    trained(toy(epochs=2, protocol=protocol, test_mode=test_mode))
    raw = protocol == "released"
    training = test_mode == "train" or (test_mode == "protocol" and raw)
    sizes = [16, 16, 8, 16, 14] if training else [16, 16, 8, 30]
    assert [n for *_, n, _ in passes] == sizes * 2
    assert [mode for mode, *_ in passes] == ([True] * 3 + [training] * (len(sizes) - 3)) * 2
    assert all((low, high) == (0, 255) or not raw for _, low, high, *_ in passes)
    assert all(-3 < low < 0 < high < 3 or raw for _, low, high, *_ in passes)
    moved = not passes[3][-1].equal(passes[4][-1])
    assert moved == training, "in training mode a test pass moves the running statistics"


def test_batches_of_a_test_pass_in_training_mode_mix_the_classes(passes, tmp_path):
    image_folder(tmp_path, lambda part, label, i: np.full((8, 8, 3), 255 * label, "u1"), n=16)
    dataset = f"folder:{tmp_path}"  # whose files are sorted by class
    whole = {"train_limit": None, "test_limit": None}
    trained(toy(epochs=1, protocol="released", dataset=dataset, **whole))
    assert [(low, high) for _, low, high, *_ in passes] == [(0, 255)] * 4


# --- Interrupted and resumed. ---

RESUMED = [
    ("sgd", {}), ("dyn_atmo", {"augment": True}), ("dyn_padam_sgd", {"protocol": "released"}),
    ("adasgd", {"augment": True, "hessian_every": 2, "hessian_samples": 2}),
    ("adahessian", {"restart_epoch": 3, "hessian_every": 4}),
]  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The outcome of an undisturbed experiment."""

    @functools.cache
    def computed(e):
        folder = tmp_path_factory.mktemp("straight")
        trained(e, folder)
        return outcome(folder)

    return computed


STOPS = [
    *((*method, *stop) for method in RESUMED
      for stop in ((after, 3), (interrupt_after, 4), (interrupt_after, 8))),
    *(("adasgd", {"augment": True}, after, steps) for steps in (0, 2)),  # nothing is kept
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "stop", "steps"), STOPS)
def test_a_run_stopped_anywhere_resumes_to_the_same_bits(
    name, changes, stop, steps, tmp_path, straight
):
    e = toy(name, **changes)
    try:
        assert trained(e, tmp_path, should_stop=stop(steps)).status == "stopped"
    except KeyboardInterrupt:
        assert stop is interrupt_after
    if steps >= 3:
        kept = History.load(tmp_path)
        assert (kept.status, len(kept.rows)) == ("stopped", steps // 3)
        assert re.search(rf"epoch {steps // 3 + 1}|interrupted", kept.note)
    while trained(e, tmp_path, should_stop=after(4)).status != "complete":  # again and again
        pass
    assert outcome(tmp_path) == straight(e)


def test_a_checkpoint_from_before_a_setting_existed_resumes(tmp_path, straight):
    trained(toy(), tmp_path, should_stop=after(4))
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["experiment"]["restart_epoch"]
    archive = io.BytesIO()
    torch.save(state, archive)
    (tmp_path / "last.pt").write_bytes(archive.getvalue())
    trained(toy(), tmp_path)
    assert outcome(tmp_path) == straight(toy())


def test_leaving_the_loop_over_epochs_loses_nothing(tmp_path, straight):
    e = toy("atmo")
    for rows in epochs(e, tasks.load_task(e, "cpu"), tmp_path):
        assert not rows or torch.load(tmp_path / "last.pt", weights_only=True)["rows"] == rows
        if len(rows) == 2:
            break
    trained(e, tmp_path)
    assert outcome(tmp_path) == straight(e)


def test_the_history_is_readable_while_the_run_goes_on(tmp_path):
    seen = []

    def look():
        if (tmp_path / "history.json").exists():
            h = History.load(tmp_path)
            seen.append((h.status, len(h.rows)))
        return False

    trained(toy(), tmp_path, should_stop=look)
    assert seen == [("running", 1)] * 3 + [("running", 2)] * 3


def test_a_complete_run_is_returned_without_data_training_or_checkpoint(tmp_path, monkeypatch):
    first = trained(toy(), tmp_path)
    for function in ("load_task", "epochs"):
        monkeypatch.setattr(loop, function, None)
    (tmp_path / "prev.pt").unlink()
    before = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    with FileLock(tmp_path / ".lock"):  # nor is the folder written to
        assert trained(toy(), tmp_path) == first
    assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == before
    (tmp_path / "last.pt").unlink()
    assert trained(toy(), tmp_path) == first


# --- One writer. ---


def test_two_threads_cannot_train_in_one_folder(tmp_path):
    refused = []

    def should_stop():
        if not refused:
            with ThreadPoolExecutor(1) as thread, pytest.raises(RuntimeError) as caught:
                thread.submit(trained, toy(), tmp_path).result()
            refused.append(str(caught.value))
        return False

    assert trained(toy(), tmp_path, should_stop=should_stop).status == "complete"
    assert "training there" in refused[0]


# --- Damaged checkpoints. ---


@pytest.fixture
def stopped(tmp_path, straight):
    """A run stopped in its third epoch (last.pt and prev.pt are there); its straight outcome."""
    e = toy("atmo", width=1)
    trained(e, tmp_path / "run", should_stop=after(7))
    return e, tmp_path / "run", straight(e)


def damages(content: bytes) -> dict[str, bytes]:
    """Cut short at several places; bits flipped anywhere and in an entry of the zip directory.

    Bit 4 of byte 38 is special: it turns the entry into a folder, whose content is not read.
    """
    rng = random.Random(0)
    entry = content.rfind(b"PK\x01\x02", 0, content.rfind(b"data/1PK"))
    flips = [
        *((rng.randrange(len(content)), rng.randrange(8)) for _ in range(30)),
        *((entry + i, 4 if i == 38 else i % 8) for i in range(50)),
    ]
    made = {f"{n} bytes": content[:n] for n in (0, 100, len(content) // 2, len(content) - 1)}
    for byte, bit in flips:
        flipped = bytearray(content)
        flipped[byte] ^= 1 << bit
        made[f"bit {bit} of byte {byte}"] = bytes(flipped)
    return made


def test_from_damaged_checkpoints_the_last_or_the_previous_state_is_restored(tmp_path, capsys):
    e = toy("atmo")

    def fresh():
        model = torch.nn.Linear(3, 2)
        return model, e.build_optimizer(model.parameters())

    def restored():
        model, optimizer = fresh()
        rows = history.restore_checkpoint(tmp_path, e, model, optimizer)
        state = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict(), rows], state)
        return len(rows), state.getvalue()

    model, optimizer = fresh()
    for n in (1, 2):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        states = model.state_dict(), optimizer.state_dict()
        history.save_checkpoint(tmp_path, e, *states, [{}] * n)
    last = tmp_path / "last.pt"
    content, states = last.read_bytes(), {restored()}
    last.unlink()
    states.add(restored())
    assert {n for n, _ in states} == {1, 2}
    wrong = {}
    for damage, damaged in damages(content).items():
        last.write_bytes(damaged)
        try:
            if restored() not in states:
                wrong[damage] = "another state"
        except Exception as error:
            wrong[damage] = repr(error)[:80]
    assert not wrong


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_without_memory_to_read_a_checkpoint_it_is_not_called_damaged(stopped, monkeypatch, error):
    e, folder, straight = stopped
    before = sorted(f.name for f in folder.iterdir())

    def load(*_, **how):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", load)
        with pytest.raises((MemoryError, RuntimeError)):
            trained(e, folder)
    assert sorted(f.name for f in folder.iterdir()) == before
    trained(e, folder)
    assert outcome(folder) == straight


def test_a_damaged_checkpoint_never_replaces_a_good_one(stopped, monkeypatch):
    e, folder, straight = stopped
    (folder / "last.pt").write_bytes(b"damaged")
    replace_file = os.replace

    def failing(source, target):
        if Path(target).name == "last.pt":
            raise OSError(errno.EIO, "Input/output error")
        replace_file(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing)
        with pytest.raises((OSError, RuntimeError), match="Input/output error"):
            trained(e, folder)
    assert torch.load(folder / "prev.pt", weights_only=True)["rows"], "the only good one"
    trained(e, folder)
    assert outcome(folder) == straight


# --- When the machine fails. ---


@pytest.mark.parametrize("name", ["last.pt", "history.json"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_full_disk_loses_no_saved_epoch(tmp_path, straight, monkeypatch, name, epoch):
    replace_file, left = os.replace, iter(range(epoch - 1))

    def full(source, target):
        if Path(target).name == name and next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises((OSError, RuntimeError), match="No space left") as caught:
            trained(toy(), tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    if epoch == 2:
        assert len(History.load(tmp_path).rows) == 1
    assert not [f for f in tmp_path.iterdir() if f.name.startswith((".last", ".hist"))]
    trained(toy(), tmp_path)
    assert outcome(tmp_path) == straight(toy())


# --- Divergence is a result. ---


@pytest.mark.parametrize("name", ["sgd", "adasgd"])
def test_a_run_that_diverges_is_kept_and_not_repeated(tmp_path, monkeypatch, name):
    h = trained(toy(name, lr=1e30), tmp_path)
    assert h.status == "diverged"
    assert re.search(r"loss (nan|inf) in epoch 1, step \d \(lr 1e\+30, lambdas \(", h.note)
    assert json.loads((tmp_path / "history.json").read_text("utf-8"))["rows"] == []
    monkeypatch.setattr(loop, "epochs", None)
    assert trained(toy(name, lr=1e30), tmp_path) == h


def test_epochs_before_a_divergence_are_kept(tmp_path, monkeypatch):
    rates = Experiment.learning_rates
    monkeypatch.setattr(
        Experiment, "learning_rates", lambda self: [*rates(self)[:2], 1e30, *rates(self)[3:]]
    )
    h = trained(toy(epochs=5), tmp_path)
    assert (h.status, len(h.rows)) == ("diverged", 2)
    assert "epoch 3" in h.note
    assert len(torch.load(tmp_path / "last.pt", weights_only=True)["rows"]) == 2
    assert History.load(tmp_path) == h


def test_a_test_loss_that_is_not_finite_is_a_divergence_too():
    # A single step per epoch: only the test pass can notice.
    h = trained(toy(epochs=2, batch_size=40, lr=1e30))
    assert (h.status, h.rows) == ("diverged", [])
    assert re.search(r"test loss (nan|inf).* epoch 1\b", h.note)


# --- Refused, and then nothing is written. ---

REFUSED = [
    *[(toy(**changes), {}, r"last batch of one image") for changes in (
        {"batch_size": 39}, {"batch_size": 13}, {"batch_size": 1},
        {"batch_size": 29, "protocol": "released"}, {"batch_size": 39, "stem": "imagenet"})],
    (toy(train_limit=None, batch_size=1201), {}, r"batch_size=1201.*1200.*digits"),
    (toy(train_limit=1300), {}, r"train_limit=1300.*1200"),
    (toy(test_limit=598), {}, r"test_limit=598.*597"),
    (toy(precision="tf32"), {}, r"tf32.*NVIDIA GPU.*cpu"),
    *[(toy(), {"device": bad}, rf"device='{bad}'.*cpu, cuda")
      for bad in ("quantum", "meta", "mps")],
    *[(toy(), {"device": bad}, rf"{bad}.*use cpu") for bad in ("cuda", "cuda:99")],
    (toy(), {"threads": 0}, r"threads=0: must be at least 1"),
    (toy(), {"checkpoint_every": 0}, r"checkpoint_every=0: must be at least 1"),
    (toy(), {"capture": True}, r"capture=True needs an NVIDIA GPU, not 'cpu'"),
    (toy(dataset="folder:/nowhere/at/all"), {}, r"no such folder"),
]  # fmt: skip


@pytest.mark.parametrize(("e", "how", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_an_impossible_run_is_refused_in_one_line_and_writes_nothing(e, how, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run(e, tmp_path / "new" / "run", **{"device": "cpu", "progress": False, **how})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises((OSError, RuntimeError), match="file"):
        trained(toy(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# --- Printed lines. ---


def test_a_run_prints_a_line_per_epoch_or_nothing(capsys, tmp_path):
    run(toy("atmo"), tmp_path, "cpu", should_stop=after(7))
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3
    assert re.match(
        r"ATMO 1/3 train loss \d\.\d+ acc 0\.\d+, test loss \d\.\d+ acc 0\.\d+, lr 0\.01, "
        r"lambdas \(0\.5, 0\.5\), \d+\.\d\d s$", shown[0])  # fmt: skip
    assert re.match(r"ATMO: stopped, in epoch 3, step 2; epochs kept: 2; run again", shown[2])
    run(toy("atmo"), tmp_path, "cpu")
    assert capsys.readouterr().out.startswith("ATMO 3/3 ")  # earlier epochs are not printed again
    run(toy("atmo"), None, "cpu", progress=False)
    assert capsys.readouterr() == ("", "")
    run(toy("atmo"), None, "cpu", should_stop=after(1))
    assert "again" not in capsys.readouterr().out, "nothing was saved"
