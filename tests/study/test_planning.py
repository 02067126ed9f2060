"""Plans have one run per method and seed; notebooks collect them; text repeats a run."""

import shlex
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from PIL import Image
from test_parameters import namespace

import hybrid_lib as hl
from hybrid_lib.study import planning, tables
from hybrid_lib.study.parameters import checked, seed_list
from hybrid_lib.study.planning import default_out, plan, run_folder
from hybrid_lib.training import data
from hybrid_lib.training.experiments import EXPERIMENTS, Experiment
from hybrid_lib.training.history import History
from hybrid_lib.training.tasks import load_task


def test_a_plan_is_one_run_per_method_and_seed():
    planned = plan("toy", only=["sgd", "adasgd", "sgd"], seeds=[0, 7, 0])
    folders = [run_folder("out", e).name for e in planned]
    assert folders == ["sgd-seed0", "sgd-seed7", "adasgd-seed0", "adasgd-seed7"]
    assert all((e.dataset, e.epochs, e.width) == ("digits", 2, 4) for e in planned)


def test_the_paper_scale_changes_only_data_and_seed():
    planned = plan("paper", "cifar10")
    assert planned == [e for name, e in EXPERIMENTS.items() if name != "padam"]


@pytest.mark.parametrize("scale", planning.SCALES)
@pytest.mark.parametrize("dataset", ["digits", "cifar10", "folder:somewhere"])
def test_every_scale_keeps_the_shape_of_the_schedules(scale, dataset):
    for e in plan(scale, dataset):
        table = EXPERIMENTS[e.name]
        assert (e.lr, e.lr_schedule, e.lambda_schedule) == (
            table.lr, table.lr_schedule, table.lambda_schedule)  # fmt: skip
        if e.epochs >= 10:
            for ours, theirs in zip(e.lr_milestones, table.lr_milestones, strict=True):
                assert ours / e.epochs == pytest.approx(theirs / table.epochs, abs=0.06)


def test_changes_override_the_scale_and_epochs_rescale_schedules():
    (e,) = plan("demo", only=["dyn_padam_sgd"], epochs=40, width=3, protocol="released")
    assert (e.epochs, e.lr_milestones, e.lambda_epochs) == (40, (20, 30), 20)
    assert (e.width, e.protocol, e.batch_size) == (3, "released", 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": "huge"}, r"scale='huge'.*toy, demo, colab, paper"),
        ({"only": ["adma"]}, r"'adma'.*did you mean adam\?"),
        ({"dataset": "cifar"}, r"dataset='cifar'"),
        ({"epochs": 0}, r"epochs"),
        ({"seeds": [-1]}, r"seed"),
        ({"lr": -1}, r"lr"),
    ],
)
def test_an_impossible_plan_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"scale": "toy", **arguments})


@pytest.mark.parametrize("text", ["", ",", "a", "1,", "3-1", "3-1,7", "1-2-9", "-1", "1.5", "0-"])
def test_seeds_are_numbers_and_ranges(text):
    assert seed_list("7, 1-2") == [7, 1, 2]
    with pytest.raises(ValueError, match=rf"seeds='{text}': .*0,3 or 0-4"):
        seed_list(text)


def test_a_study_is_kept_below_runs_by_default():
    runs = data.PROJECT / "runs"
    assert default_out("demo", "digits") == runs / "demo"
    assert default_out("toy", "cifar10", "released") == runs / "toy-cifar10-released"
    inside = [default_out("demo", f"folder:{p}") for p in ("..", "/", "a/..", "../../etc", "~")]
    assert all(p.resolve().is_relative_to(runs) for p in inside)


def folder_of_images(root, n_train=100, n_test=40):
    rng = np.random.default_rng(0)
    for (part, n), name in product({"train": n_train, "test": n_test}.items(), ("a", "b")):
        (root / part / name).mkdir(parents=True)
        for i in range(n // 2):
            image = Image.fromarray(rng.integers(0, 256, (9, 9, 3), "u1"))
            image.save(root / part / name / f"{i}.png")
    return root


@pytest.mark.parametrize("scale", ["toy", "demo"])
def test_a_folder_smaller_than_the_scale_s_limits_is_used_whole(tmp_path, scale):
    root = folder_of_images(tmp_path)
    (e,) = plan(scale, f"folder:{root}", ["sgd"])
    assert load_task(e, "cpu").n_train == 100


# --- What a notebook reads. ---

DEMO = data.PROJECT / "data" / "results" / "cifar10-jpeg-demo"
GIVEN = dict(scale="demo", dataset="digits", methods="", seeds="0", epochs=None, train=True)


def collected(**given) -> list[History]:
    """What a notebook with these parameters collects."""
    params = SimpleNamespace(**GIVEN | given)
    params.plan = planning.experiments_from(params)
    return planning.collect(params)


@pytest.fixture
def no_training(monkeypatch):
    """Training anything is an error."""
    monkeypatch.setattr(planning, "run_many", lambda *args: pytest.fail("this would train"))


@pytest.mark.parametrize("train", [True, False])
def test_published_runs_are_read_whatever_the_scale(no_training, train, capsys):
    found = collected(scale="toy", dataset="digits", out=str(DEMO), train=train,
                      methods="sgd,padam,adasgd")  # fmt: skip
    assert [len(h.rows) for h in found] == [10, 10]
    assert tables.subject(found) == "CIFAR-10 (JPEG copy), published runs"
    missing, line = capsys.readouterr().out.splitlines()
    assert missing == f"{DEMO}: not found: padam-seed0"
    assert line == f"{DEMO}: shown as they were run; some settings differ from those given"


def test_runs_under_another_protocol_are_those_asked_for(no_training, tmp_path, capsys):
    """Notebooks do not name a protocol, but reports of either are made by them."""
    (e,) = plan("toy", only=["sgd"])
    (tmp_path / "sgd-seed0").mkdir()
    for protocol in ("released", "clean"):
        History(replace(e, protocol=protocol)).save(tmp_path / "sgd-seed0")
        assert planning.histories([e], tmp_path)[0].experiment.protocol == protocol
    assert capsys.readouterr().out == ""
    History(replace(e, lr=0.5)).save(tmp_path / "sgd-seed0")
    planning.histories([e], tmp_path)
    assert "some settings differ" in capsys.readouterr().out


def test_missing_runs_are_trained_once(tmp_path, capsys):
    given = {"scale": "toy", "dataset": "digits", "methods": "sgd", "out": str(tmp_path)}
    with pytest.raises(FileNotFoundError):
        collected(**given, train=False)
    (found,) = collected(**given)
    assert collected(**given, train=False) == collected(**given) == [found]
    with pytest.raises(RuntimeError, match="every run failed"):
        planning.histories(
            [replace(found.experiment, name="x", train_limit=None, batch_size=2000)], tmp_path
        )
    assert "x, seed 0: ValueError: batch_size=2000" in capsys.readouterr().out


# --- Runs as text, to repeat them. ---

REPEATED = [
    *(replace(e, dataset="digits", seed=3) for e in EXPERIMENTS.values()),
    EXPERIMENTS["dyn_padam_sgd"].scaled(20),
    replace(EXPERIMENTS["adasgd"].scaled(10), lambda_start=(0.75, 0.25), train_limit=500),
    replace(EXPERIMENTS["padam"], partial=0.25, lr=0.05, dataset="folder:my 'own' images"),
    replace(EXPERIMENTS["sgd"], augment=True, nesterov=True),
    replace(EXPERIMENTS["adahessian"], hessian_every=10, spatial_average="kernel"),
    Experiment(name="adam-sgd", optimizer="adam+sgd", lr=0.01, epochs=200, momentum=0.9),
]  # fmt: skip
repeated = pytest.mark.parametrize(
    "e", REPEATED, ids=[f"{i}-{e.name}" for i, e in enumerate(REPEATED)]
)


@repeated
def test_the_python_code_of_a_run_repeats_it(e, monkeypatch):
    seen = []
    monkeypatch.setattr(hl, "run", lambda *args: seen.append(args))
    exec(planning.as_python(e, "a 'folder'"), {})
    assert seen == [(e, "a 'folder'")]


@pytest.mark.filterwarnings("default")
@repeated
def test_the_papermill_command_of_a_run_repeats_it(e):
    from papermill.cli import _resolve_type

    words = shlex.split(planning.as_papermill(e, "a 'folder'"))
    source = nbformat.read(data.PROJECT / words[1], 4)
    given = [(words[i + 1], _resolve_type(words[i + 2])) for i in range(3, len(words), 3)]
    (declared,) = [c.source for c in source.cells if "parameters" in c.metadata.get("tags", [])]
    params = checked(namespace(declared=declared, **dict(given)), planning.experiment_from)
    assert params.out == "a 'folder'"
    assert replace(params.plan, name=e.name) == e
