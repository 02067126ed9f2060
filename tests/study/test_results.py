"""The matrix of the published results: complete, one change at a time, and resumable in slices."""

import importlib.util
import itertools
import shutil
import tarfile
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from hybrid_lib import History
from hybrid_lib.study.planning import PAPER_METHODS
from hybrid_lib.training import data
from hybrid_lib.training.experiments import EXPERIMENTS


def script(name):
    source = data.PROJECT / "data" / "results" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"results_{name}", source)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # a script imports its neighbours
        patch.syspath_prepend(source.parent)
        spec.loader.exec_module(module)
    return module


train, publish = script("train"), script("publish")


@pytest.mark.parametrize("scale", train.SCALES)
def test_the_matrix_has_every_row_and_audits_that_change_one_setting_of_a_row(scale):
    listed = list(train.matrix(scale, "cifar10", "float32", seeds=2))
    planned = dict(listed)
    assert len(planned) == len(listed)
    for where in itertools.product(("clean", "released"), PAPER_METHODS, (0, 1)):
        e = planned["{}/{}-seed{}".format(*where)]
        assert (e.protocol, e.name, e.seed) == where
    audits = {f: e for f, e in planned.items() if f.startswith("audit/")}
    assert len(audits) == 20
    for audit in audits.values():
        row = planned[f"{audit.protocol}/{audit.name.partition('-')[0]}-seed{audit.seed}"]
        changed = {k for k, v in asdict(audit).items() if v != asdict(row)[k]} - {"name"}
        one = {"lambda_direction"}, {"restart_epoch"}, {"test_mode"}, {"weight_decay_in"}
        assert changed in (*one, {"lambda_schedule"}, {"lambda_schedule", "lambda_epochs"})
    restarted = planned["audit/adahessian-restarted-clean-seed0"].restart_epoch
    assert restarted == (15 if scale == "cpu" else 146)


def test_every_contestant_has_the_same_budget_and_shares_its_draws():
    """No contestant has luckier rates: all have the same shares of equally wide ranges."""
    fair, seen = script("fair"), {}
    for folder, experiments in fair.studies():
        contestant, study, _ = experiments[0].name.split("-")
        assert len({e.name for e in experiments}) == len(experiments) == 5
        kept = {(e.dataset, e.lr_schedule, e.epochs, e.batch_size, e.train_limit,
                 e.validation_limit, e.seed, e.lr_milestones) for e in experiments}  # fmt: skip
        assert len(kept) == 1
        low, high = fair.CONTESTANTS[contestant][1]
        assert high / low == pytest.approx(1000)
        shares = tuple(round(np.log10(e.lr / low) / 3, 6) for e in experiments)
        seen.setdefault((folder, study), []).append((contestant, kept, shares))
    assert {key[0] for key in seen} == {
        f"{task}/{schedule}"
        for task in ("digits", "python-docs")
        for schedule in ("cosine", "constant")
    }
    assert len(seen) == 4 * 3
    for trials in seen.values():
        assert [contestant for contestant, *_ in trials] == list(fair.CONTESTANTS)
        assert all(others[1:] == trials[0][1:] for others in trials)
    assert len({trials[0][2] for trials in seen.values()}) == 3, "each study draws anew"
    planned = [len(list(fair.studies(scale))) for scale in fair.SCALES]
    assert planned == [4 * 3 * 14, 2 * 6, 2 * 3 * 14]
    dynamic = fair.trials("digits", "cosine", "dyn_adasgd", 0)
    assert {e.lambdas()(0) for e in dynamic} == {(1.0, 0.0)}
    assert len({e.lambdas()(0) for e in fair.trials("digits", "cosine", "adasgd", 0)}) == 5
    for name, setting in (("hedge_atmo", "lambda_rate"), ("swats", "lambda_tolerance")):
        drawn = fair.trials("digits", "cosine", name, 0)
        assert len({getattr(e, setting) for e in drawn}) == 5
        assert all(e.chooses_lambdas for e in drawn)


def test_trials_are_trained_listed_chosen_from_and_published(tmp_path, monkeypatch, capsys):
    fair = script("fair")
    small = {"epochs": 1, "width": 1, "batch_size": 32, "train_limit": 140, "validation_limit": 40}
    monkeypatch.setattr(fair, "TASKS", {"digits": {**small, "test_limit": 50}})
    monkeypatch.setattr(fair, "SCALES", {"cpu": (("digits",), ("cosine",), 1, ("sgd", "atmo"))})
    monkeypatch.setattr(fair, "TRIALS", 2)
    monkeypatch.setattr(fair, "FINAL_SEEDS", (1, 2))
    monkeypatch.setattr(fair, "PUBLISHED", tmp_path / "fair")
    command = ["--out", str(tmp_path), "--workers", "1"]
    assert fair.main([*command, "--list"]) == 0
    assert capsys.readouterr().out.count("to do") == 4, "the runs with new seeds are not chosen yet"
    assert fair.main(command) == 0
    capsys.readouterr()
    assert fair.main([*command, "--list"]) == 0
    assert capsys.readouterr().out.count("complete") == 4 + 4
    assert fair.main([*command, "--publish"]) == 0
    runs = pd.read_csv(tmp_path / "fair" / "runs.csv")
    for name, of_name in runs.groupby("contestant"):
        trials, finals = (of_name[of_name["part"] == part] for part in ("cosine", "final"))
        best = trials.loc[trials["validation"].idxmax()]
        assert set(finals["lr"]) == {best["lr"]}, name
        assert set(finals["seed"]) == {1, 2}
    last = runs.groupby("contestant")["lambda_sgd_at_the_end"]
    assert last.count().to_dict() == {"atmo": 4, "sgd": 0}, "a rule alone has no weight"
    kept = History.load(tmp_path / "digits/final/runs/sgd-final-seed1")
    (shown,) = runs[runs["run"] == "digits/final/sgd-final-seed1"]["test"]
    assert shown == pytest.approx(kept.final["test_accuracy"], rel=1e-4)
    with pytest.raises(FileNotFoundError, match="not finished"):
        fair.chosen_of([kept, replace(kept, status="running")])


@pytest.mark.parametrize(("statuses", "code"), [(["complete", "diverged"], 0), (["complete"], 1)])
def test_a_run_that_diverged_is_a_result_and_one_without_a_history_has_failed(
    statuses, code, monkeypatch, capsys
):
    fair, e = script("fair"), EXPERIMENTS["sgd"]
    ended = [History(e, status=status) for status in statuses], ["a line about the other"]
    monkeypatch.setitem(fair.command.__globals__, "run_many", lambda *_, **how: ended)
    stages = [[("digits", [e, replace(e, seed=1)])]]
    assert fair.command(fair.__doc__, lambda chosen: stages, dict, []) == code
    assert capsys.readouterr().out == "a line about the other\n"


def test_merges_and_layers_differ_in_nothing_else():
    merges = script("merges")
    for task in merges.SCHEDULE:
        tried = {es[0].name[:-2]: es for es in merges.tuning(task)}
        assert len(tried) == 3 * 7 + 1
        for method in merges.ADAPTIVE:
            own = {"name", "lr", "merge", "lambda_start", "lambda_on", "weight_decay"}
            one = asdict(tried[f"{method}-product"][0])
            of_method = [name for name in tried if name.startswith(f"{method}-")]
            for name in of_method:
                other = asdict(tried[name][0])
                assert {k for k in one if one[k] != other[k]} <= own
            for names, same in (
                (("product", "sum", "graft"), ("lr", "lambda_start")),
                (("all", "norms_and_head", "matrices"), ("lr", "lambda_start", "merge")),
            ):
                for setting in same:
                    values = [[getattr(e, setting) for e in tried[f"{method}-{n}"]] for n in names]
                    assert values[1:] == values[:-1]


def test_padam_sgd_turns_into_sgd_one_setting_at_a_time():
    depth = script("depth")
    one = {e.name: e for e in depth.variants() if e.seed == 0}
    assert len(depth.variants()) == 5 * len(one)
    report = EXPERIMENTS["sgd"]
    assert one["sgd"].lambdas()(0) == (0, 1)
    for name in ("momentum", "weight_decay", "lr", "lr_schedule"):
        assert getattr(one["sgd"], name) == getattr(report, name)
    assert (one["sgd"].batch_size, one["padam_sgd"].batch_size) == (64, 32)

    def changed(a, b):
        return {k for k, v in asdict(one[a]).items() if v != asdict(one[b])[k]} - {"name"}

    for setting, changes in depth.SETTINGS.items():
        assert changed("padam_sgd", f"padam_sgd-{setting}") == {*changes}
        assert changed("sgd", f"sgd-{setting}") == {*changes}
    assert changed("padam_sgd", "sgd") == {
        k for changes in depth.SETTINGS.values() for k in changes
    }
    for setting, changes in depth.OWN.items():
        assert changed("padam_sgd", f"padam_sgd-{setting}") <= {*changes}


def test_a_slice_takes_the_widest_network_whose_next_run_fits(monkeypatch, tmp_path, capsys):
    takes = {64: 600, 32: 300, 16: 100}
    monkeypatch.setattr(train, "seconds", lambda e, device: takes[e.width])
    monkeypatch.setattr(data, "PROJECT", tmp_path)
    command = ["--dataset", "cifar10", "--scale", "auto", "--list", "--seeds", "1", "--minutes"]
    for minutes, scale in ((11, "paper"), (10, "paper"), (9, "paper-32"), (1, "paper-16")):
        assert train.main([*command, str(minutes)]) == 0
        printed = capsys.readouterr().out
        estimates = [line for line in printed.splitlines() if "takes about" in line]
        assert estimates[-1].startswith(f"{scale}: released/padam_sgd-seed0 takes about")
        assert printed.count("to do") == 26
    monkeypatch.setattr(train, "state", lambda folder: ("stopped", 150))  # three quarters are done
    train.main([*command, "2.5", "--only", "clean/padam_sgd"])
    assert capsys.readouterr().out.startswith("paper: clean/padam_sgd-seed0 takes about 2.5")
    monkeypatch.setattr(train, "state", lambda folder: ("complete", 200))
    train.main([*command, "9"])
    assert "takes about" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.main([*command, "9", "--out", str(tmp_path)])
    assert "omit --out" in capsys.readouterr().err


def test_a_slice_skips_a_width_that_does_not_fit_into_memory(monkeypatch, tmp_path, capsys):
    def seconds(e, device):
        if e.width == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1

    monkeypatch.setattr(train, "seconds", seconds)
    monkeypatch.setattr(data, "PROJECT", tmp_path)
    train.main(["--dataset", "cifar10", "--scale", "auto", "--list", "--minutes", "9"])
    printed = capsys.readouterr().out
    assert "paper: released/padam_sgd-seed0 cannot be timed (OutOfMemoryError)" in printed
    assert "paper-32: released/padam_sgd-seed0 takes about" in printed


def test_the_estimated_time_of_a_run_is_that_of_its_steps(monkeypatch):
    """The last of three epochs of twelve steps, and three test batches, is scaled up."""
    e = replace(EXPERIMENTS["sgd"], width=1, batch_size=8, epochs=100)
    assert train.seconds(e, "cpu") > 0
    rows = [{"train_seconds": 1.2, "test_seconds": 0.3}]
    monkeypatch.setattr(train.loop, "epochs", lambda *_, **how: iter([rows]))
    assert train.seconds(e, "cpu") == pytest.approx(100 * (6250 * 0.1 + 1250 * 0.1))


@pytest.fixture
def archive(tmp_path):
    """Twenty pictures of two classes, packed as CIFAR-10's copy is."""
    draw = np.random.default_rng(0)
    with tarfile.open(tmp_path / "pictures.tar.xz", "w:xz") as tar:
        for part, n in (("train", 8), ("test", 2)):
            for label in ("cat", "dog"):
                for i in range(n):
                    file = tmp_path / "picture.png"
                    Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
                    tar.add(file, f"{part}/{label}/{i}.png")
    return tmp_path / "pictures.tar.xz"


def test_slices_complete_the_matrix_on_several_machines(monkeypatch, tmp_path, archive, capsys):
    small = {"shorter": 100, "width": 2, "batch_size": 8}
    monkeypatch.setattr(train, "SCALES", {"paper": small})
    monkeypatch.setattr(train, "ORDER", ("sgd", "adasgd"))
    monkeypatch.setattr(train, "PAPER_METHODS", ("sgd", "adasgd"))
    audit = ("adasgd", "clean", "-decay-in-both", {"weight_decay_in": "both"})
    monkeypatch.setattr(train, "audits", lambda shorter: iter([audit]))
    monkeypatch.setattr(data, "PROJECT", tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ["--archive", str(archive), "--seeds", "1", "--device", "cpu"]
    assert train.main([*command, "--minutes", "0"]) == train.MORE_TO_DO
    assert "5 runs are left" in capsys.readouterr().out
    assert train.main([*command, "--only", "clean/sgd,audit"]) == 0
    assert len(list((tmp_path / "runs").rglob("history.json"))) == 2
    assert train.main(command) == 0
    written = {
        str(f.parent.relative_to(tmp_path / "runs/reproduction-paper")): History.load(f)
        for f in (tmp_path / "runs").rglob("history.json")
    }
    assert {f: (h.status, len(h.rows)) for f, h in written.items()} == {
        f"{protocol}/{name}-seed0": ("complete", epochs)
        for protocol in ("released", "clean")
        for name, epochs in (("sgd", 3), ("adasgd", 2))
    } | {"audit/adasgd-decay-in-both-seed0": ("complete", 2)}
    assert {h.dataset for h in written.values()} == {"CIFAR-10 (JPEG copy)"}
    check_published(tmp_path, monkeypatch)
    assert train.main([*command, "--precision", "bfloat16"]) == train.FAILED, "other experiments"
    other = shutil.copy(archive, tmp_path / "other.tar.xz")
    assert train.main(["--archive", str(other), "--list"]) == 0, "whatever its name"
    with open(other, "ab") as longer:
        longer.write(b"more")
    with pytest.raises(FileExistsError, match=r"other.* bytes: remove the folder"):
        train.main(["--archive", str(other), "--list"])
    archive.unlink()  # unpacked once is enough
    capsys.readouterr()
    assert train.main([*command, "--list"]) == 0
    assert capsys.readouterr().out.count("complete ") == 5
    check_resumed_elsewhere(tmp_path, monkeypatch, command)


def check_resumed_elsewhere(tmp_path, monkeypatch, command):
    """On another machine, complete runs in the folder stay and the unfinished one is completed."""
    there = tmp_path / "another machine"
    there.mkdir()
    for name in ("data", "runs"):
        (tmp_path / name).rename(there / name)
    monkeypatch.setattr(data, "PROJECT", there)
    monkeypatch.chdir(there)
    runs = there / "runs" / "reproduction-paper"
    whole = {f: History.load(f) for f in runs.rglob("history.json")}
    for checkpoint in runs.rglob("*.pt"):  # complete runs do not need them
        checkpoint.unlink()
    cut = runs / "clean" / "sgd-seed0"
    for file in cut.iterdir():
        file.unlink()
    unfinished = whole[cut / "history.json"].experiment
    stops = iter([False, False, True])  # after the first of three epochs, two steps each
    assert train.run(unfinished, cut, "cpu", should_stop=lambda: next(stops)).status == "stopped"
    before = {f: f.stat().st_mtime_ns for f in whole}
    assert train.main(command) == 0
    assert {f for f in whole if f.stat().st_mtime_ns != before[f]} == {cut / "history.json"}
    for row, again in zip(whole[cut / "history.json"].rows, History.load(cut).rows, strict=True):
        assert row["test_loss"] == again["test_loss"]


def check_published(tmp_path, monkeypatch):
    """Published histories are compact and readable, and the page has every section."""
    monkeypatch.setattr(publish.figures.go.Figure, "write_image", lambda figure, f, **_: f.touch())
    target = tmp_path / "published"
    assert publish.main([str(tmp_path / "runs/reproduction-paper"), str(target)]) == 0
    again = History.load(target / "clean/sgd-seed0")
    trained = History.load(tmp_path / "runs/reproduction-paper/clean/sgd-seed0")
    assert again.experiment == trained.experiment
    for a, b in zip(again.rows, trained.rows, strict=True):
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-4)
        assert len(str(a["test_loss"])) < 9
    page = (target / "TABLES.md").read_text("utf-8")
    assert page.startswith("# CIFAR-10 (JPEG copy)\n\nResNet18, width 2, 16 training and 4 test")
    for title in ("protocol released", "protocol clean", "The report's claims", "Audit"):
        assert title in page
    assert "weight_decay_in: None → both" in page
    file = next((target / "audit").rglob("history.json"))
    audit = History.load(file)
    audit.environment["device_name"] = "an abacus"
    audit.save(file)
    publish.render(target)
    assert "an abacus" in (target / "TABLES.md").read_text("utf-8")
    assert {f.name for f in target.glob("*.png")} == {
        f"{protocol}-figure{n}.png" for protocol in ("clean", "released") for n in range(1, 6)
    }


def test_an_audit_is_compared_with_its_row_seed_by_seed_after_the_last_epoch():
    def trained(seed, last, **changes):
        rows = [{"epoch": i, "test_accuracy": a} for i, a in ((1, last + 0.1 * seed), (2, last))]
        e = replace(EXPERIMENTS["sgd"], seed=seed, **changes)
        return History(e, rows, status="complete")

    rows = [trained(seed, 0.5 + 0.1 * seed) for seed in range(4)]
    changes = {"name": "sgd-nesterov", "nesterov": True}
    audited = [trained(i, last, **changes) for i, last in ((2, 0.73), (0, 0.52), (1, 0.62))]
    unfinished = replace(trained(3, 0.1, **changes), status="stopped")
    (row,) = publish.audit_table([*audited, unfinished], rows[::-1]).to_dict("records")
    assert (row["method"], row["changed"], row["seeds"]) == ("SGD", "nesterov: None → True", 3)
    found = [row[k] for k in ("row", "audit", "difference", "±", "row's best", "report")]
    margin = 4.303 * 0.0057735 / 3**0.5  # of .02, .02 and .03
    assert found == pytest.approx([0.6, 0.62333, 0.02333, margin, 0.7, 0.8539], rel=1e-3)


def test_a_missing_archive_is_refused_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "PROJECT", tmp_path)
    with pytest.raises(SystemExit):
        train.main(["--list", "--seeds", "1", "--out", "nowhere"])
    assert "--dataset --archive is required" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no such archive"):
        train.main(["--archive", str(tmp_path / "none.tar.xz")])
    assert not (tmp_path / "data").exists()
