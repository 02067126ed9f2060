"""A study trains what is missing, reports what failed, and refuses what it can't do in one line."""

import contextlib
import dataclasses
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from PIL import Image
from test_parameters import namespace

import hybrid_lib as hl
from hybrid_lib.study import figures, planning
from hybrid_lib.study.parameters import checked, seed_list
from hybrid_lib.study.planning import default_out, main, plan, run_folder
from hybrid_lib.training import data, loop
from hybrid_lib.training.experiments import EXPERIMENTS, Experiment
from hybrid_lib.training.history import History
from hybrid_lib.training.tasks import load_task

# --- What a study consists of. ---


def test_a_plan_is_one_run_per_method_and_seed():
    planned = plan("toy", only=["sgd", "adasgd"], seeds=[0, 7])
    folders = [run_folder("out", e).name for e in planned]
    assert folders == ["sgd-seed0", "sgd-seed7", "adasgd-seed0", "adasgd-seed7"]
    assert all((e.dataset, e.epochs, e.width) == ("digits", 2, 4) for e in planned)


def test_the_eight_rows_of_table_three_are_the_default():
    assert [e.name for e in plan()] == [name for name in EXPERIMENTS if name != "padam"]


def test_at_paper_scale_nothing_but_data_and_seed_is_changed():
    for e in plan("paper", "cifar10"):
        assert e == EXPERIMENTS[e.name]


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


def test_changes_go_over_the_scale_and_epochs_rescale():
    (e,) = plan("demo", only=["dyn_padam_sgd"], epochs=40, width=3, protocol="released")
    assert (e.epochs, e.lr_milestones, e.lambda_epochs) == (40, (20, 30), 20)
    assert (e.width, e.protocol, e.batch_size) == (3, "released", 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": "huge"}, r"scale='huge'.*toy, demo, paper"),
        ({"only": ["adma"]}, r"'adma'.*did you mean adam\?"),
        ({"only": ["dyn_padam"]}, r"'dyn_padam'.*sgd, adam"),
        ({"dataset": "cifar"}, r"dataset='cifar'"),
        ({"epochs": 0}, r"epochs"),
        ({"epochs": "many"}, r"epochs"),
        ({"seeds": [-1]}, r"seed"),
        ({"lr": -1}, r"lr"),
    ],
)
def test_an_impossible_plan_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"scale": "toy", **arguments})


def test_no_two_runs_of_a_plan_share_a_folder():
    with contextlib.suppress(ValueError):  # to refuse repeated names is as good
        planned = plan("toy", only=["sgd", "adam", "sgd"], seeds=[0, 1, 0])
        assert len({run_folder("x", e) for e in planned}) == len(planned)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0", [0]), ("0,3", [0, 3]), ("0-4", [0, 1, 2, 3, 4]), ("7, 1-2", [7, 1, 2]), ("5-5", [5])],
)
def test_seeds_from_text(text, seeds):
    assert seed_list(text) == seeds


@pytest.mark.parametrize("text", ["", ",", "a", "1,", "3-1", "-1", "1.5", "0-"])
def test_what_is_no_list_of_seeds_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"0,3 or 0-4") as caught:
        seed_list(text)
    assert repr(text) in str(caught.value)


def test_where_a_study_is_kept():
    runs = data.PROJECT / "runs"
    assert default_out("demo", "digits") == runs / "demo"
    assert default_out("toy", "cifar10") == runs / "toy-cifar10"
    assert default_out("toy", "cifar10", "released") == runs / "toy-cifar10-released"
    assert default_out("demo", "folder:data/cifar10-jpeg") == runs / "demo-cifar10-jpeg"
    inside = [default_out("demo", f"folder:{p}") for p in ("..", "/", "a/..", "../../etc", "~")]
    assert all(p.resolve().is_relative_to(runs) for p in inside)


# --- Published histories. ---

DEMO = data.PROJECT / "data" / "results" / "cifar10-jpeg-demo"
ASKED = dict(
    scale="demo", dataset="folder:data/cifar10-jpeg", seeds="0", epochs=None, out="", train=True
)


@pytest.fixture
def no_training(monkeypatch, tmp_path):
    """Whatever would be trained is an error, and there are no runs of one's own."""
    monkeypatch.setattr(planning, "run", lambda *args: pytest.fail("this would train"))
    monkeypatch.setattr(planning, "default_out", lambda *args: tmp_path / "runs")


@pytest.mark.parametrize("dataset", ["folder:data/cifar10-jpeg", "folder:/else/where/cifar10-jpeg"])
def test_published_runs_of_the_same_experiments_are_read_and_named_so(no_training, capsys, dataset):
    found = planning.collect(SimpleNamespace(**ASKED | {"dataset": dataset}))
    assert [h.experiment.name for h in found] == list(planning.PAPER_METHODS)
    assert figures.subject(found) == "CIFAR-10 (JPEG copy), published runs"
    assert "8 of 8 runs, published ones" in capsys.readouterr().out
    (sgd,) = planning.collect(SimpleNamespace(**ASKED), ["sgd", "padam"])
    assert sgd.rows == History.load(DEMO / "sgd-seed0").rows


@pytest.mark.parametrize("other", [{"dataset": "digits"}, {"epochs": 11}, {"seeds": "1"}])
def test_published_runs_of_other_experiments_are_not(no_training, other):
    with pytest.raises(FileNotFoundError, match="none of these runs is there"):
        planning.collect(SimpleNamespace(**ASKED | {"train": False} | other))


def test_one_s_own_runs_come_before_published_ones(no_training, tmp_path):
    own = History.load(DEMO / "sgd-seed0")
    folder = run_folder(tmp_path / "runs", own.experiment)
    folder.mkdir(parents=True)
    own.save(folder)
    (found,) = planning.collect(SimpleNamespace(**ASKED | {"train": False}))
    assert found.dataset == "CIFAR-10 (JPEG copy)"


@pytest.mark.parametrize("train", [True, False])
def test_a_folder_of_published_runs_is_read_whatever_the_scale(no_training, train, capsys):
    asked = ASKED | {"scale": "toy", "dataset": "digits", "out": str(DEMO), "train": train}
    found = planning.collect(SimpleNamespace(**asked), ["sgd", "padam", "adasgd"])
    assert [len(h.rows) for h in found] == [10, 10]
    assert figures.subject(found) == "CIFAR-10 (JPEG copy), published runs"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{DEMO}: shown as they were run, with settings of their own (batch_")
    assert ", epochs, " in line


# --- The command line. ---


@pytest.fixture
def no_notebooks(monkeypatch):
    """The study without its notebooks, which test_notebooks.py executes."""
    monkeypatch.setattr(planning, "execute_notebooks", lambda *args: ([], []))


@pytest.fixture
def told(capsys):
    """Call main; returns exit code, stdout and stderr."""

    def told(*arguments):
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return told


class Loaded(HTMLParser):
    """Everything that a browser would fetch for a page."""

    FETCHED = ("src", "srcset", "poster", "data", "background")

    def __init__(self, page: str):
        super().__init__()
        self.fetched, self.links, self.scripts = [], [], 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        for name, value in attributes:
            if name in self.FETCHED or (name == "href" and tag != "a"):
                self.fetched.append(value)
            elif name == "href":
                self.links.append(value)
            elif name == "style":
                self.fetched += re.findall(r"url\(([^)]*)\)", value)


def test_a_toy_study_from_nothing_to_the_report(tmp_path, no_notebooks, told):
    out = tmp_path / "a study, größer"
    command = ("--scale", "toy", "--only", "sgd,adasgd", "--seeds", "0-1", "--out", out)
    code, shown, errors = told(*command)
    assert (code, errors) == (0, "")
    folders = sorted(f.name for f in (out / "runs").iterdir())
    assert folders == ["adasgd-seed0", "adasgd-seed1", "sgd-seed0", "sgd-seed1"]
    for folder in folders:
        h = History.load(out / "runs" / folder)
        assert (h.status, len(h.rows)) == ("complete", 2)

    assert "SGD 2/2 train loss" in shown
    assert shown.rstrip().endswith(f"report: {out / 'report.html'}")
    table = shown[shown.index("report (CIFAR-10)") :]
    assert "handwritten digits" in table
    assert re.search(r"^AdaSGD +0\.8771 +0\.\d+", table, re.M)
    assert re.search(r"^SGD +0\.8539 +0\.\d+", table, re.M)

    page = (out / "report.html").read_text("utf-8")
    assert "<title>Hybrid optimizers on handwritten digits</title>" in page
    assert page.count("Plotly.newPlot(") == 4
    assert "AdaSGD" in page
    assert "claims on handwritten digits, clean protocol" in page
    assert page.count("cannot be told") >= 10, "two epochs decide little"
    loaded = Loaded(page)
    assert [f for f in loaded.fetched if not f.startswith("data:")] == []
    assert loaded.links == []
    assert loaded.scripts > 3
    assert "What failed" not in page


def test_run_again_it_trains_only_what_is_missing(tmp_path, no_notebooks, told, monkeypatch):
    command = ("--scale", "toy", "--only", "sgd,adam", "--out", tmp_path)
    assert told(*command)[0] == 0
    trained, real = [], loop.epochs
    monkeypatch.setattr(loop, "epochs", lambda e, *args: trained.append(e.name) or real(e, *args))
    before = {f: f.read_bytes() for f in (tmp_path / "runs").rglob("*.json")}
    assert told(*command)[0] == 0
    assert trained == []
    assert {f: f.read_bytes() for f in (tmp_path / "runs").rglob("*.json")} == before
    assert told("--scale", "toy", "--only", "sgd,adam,atmo", "--out", tmp_path)[0] == 0
    assert trained == ["atmo"]


def test_a_run_that_fails_is_named_and_leaves_the_others(tmp_path, no_notebooks, told, monkeypatch):
    real = planning.run

    def failing(e, *args, **how):
        if e.name == "adam":
            raise RuntimeError("the <disk> is\nfull & slow")
        return real(e, *args, **how)

    monkeypatch.setattr(planning, "run", failing)
    command = ("--scale", "toy", "--only", "sgd,adam,atmo", "--out", tmp_path)
    code, shown, _ = told(*command)
    assert code == 1
    assert "failed: adam, seed 0: RuntimeError: full & slow" in shown
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "What failed" in page
    assert "adam, seed 0: RuntimeError: full &amp; slow" in page
    assert {f.name for f in (tmp_path / "runs").iterdir()} == {"sgd-seed0", "atmo-seed0"}

    monkeypatch.setattr(planning, "run", real)
    assert told(*command)[0] == 0
    assert "What failed" not in (tmp_path / "report.html").read_text("utf-8")


def test_a_run_that_diverged_at_once_counts_in_the_report(
    tmp_path, no_notebooks, told, monkeypatch
):
    real = planning.run

    def diverging(e, *args, **how):
        history = real(e, *args, **how)
        diverged = e.name == "adam" and e.seed == 1
        return dataclasses.replace(history, rows=[], status="diverged") if diverged else history

    monkeypatch.setattr(planning, "run", diverging)
    told("--scale", "toy", "--only", "sgd,adam", "--seeds", "0-1", "--out", tmp_path)
    assert "1 complete, 1 diverged" in (tmp_path / "report.html").read_text("utf-8")
    code, _, errors = told("--scale", "toy", "--only", "adam", "--seeds", "1", "--out", tmp_path)
    assert (code, "Adam, seed 1: diverged" in errors) == (2, True)


def test_where_everything_fails_the_exit_code_says_so(tmp_path, told, monkeypatch):
    def failing(*args, **how):
        raise RuntimeError("no luck")

    monkeypatch.setattr(planning, "run", failing)
    code, _, errors = told("--scale", "toy", "--only", "sgd,adam", "--out", tmp_path)
    assert code != 0
    assert errors.splitlines()[-1].count("no luck") == 2


def notebook(*cells: str):
    made = [nbformat.v4.new_code_cell(source) for source in cells]
    made[0].metadata["tags"] = ["parameters"]
    meta = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=made, metadata=meta)


@pytest.mark.filterwarnings("default")  # of papermill, nbconvert and jupyter_client
def test_a_notebook_that_fails_is_named_and_leaves_the_others(tmp_path, told, monkeypatch):
    sources, out = tmp_path / "sources", tmp_path / "out"
    sources.mkdir()
    head = "train: bool = True  # x\nseeds: str = ''  # x"
    for name, made in {
        "01_good.ipynb": notebook(head, "print('seeds', seeds, 'train', train)"),
        "02_bad.ipynb": notebook(head, "raise RuntimeError('a <bad> cell')"),
        "03_trains_itself.ipynb": notebook("epochs: int = 1  # x", "raise AssertionError"),
    }.items():
        nbformat.write(made, sources / name)
    monkeypatch.setattr(planning, "NOTEBOOKS", sources)
    code, shown, _ = told("--scale", "toy", "--only", "sgd", "--seeds", "0", "--out", out)
    assert code == 1
    assert re.search(r"failed: notebook 02_bad: .*RuntimeError: a <bad> cell", shown)
    assert not (out / "notebooks" / "03_trains_itself.ipynb").exists()
    executed = nbformat.read(out / "notebooks" / "01_good.ipynb", 4)
    assert executed.cells[-1].outputs[0].text == "seeds 0 train False\n"
    assert "seeds 0 train False" in (out / "notebooks" / "01_good.html").read_text("utf-8")
    page = (out / "report.html").read_text("utf-8")
    assert "a &lt;bad&gt; cell" in page
    assert Loaded(page).links == ["notebooks/01_good.html"]


def folder_of_images(root, n_train=100, n_test=40):
    rng = np.random.default_rng(0)
    for (part, n), name in product({"train": n_train, "test": n_test}.items(), ("a", "b")):
        (root / part / name).mkdir(parents=True)
        for i in range(n // 2):
            image = Image.fromarray(rng.integers(0, 256, (9, 9, 3), "u1"))
            image.save(root / part / name / f"{i}.png")
    return root


@pytest.mark.parametrize("scale", ["toy", "demo"])
def test_a_folder_smaller_than_the_scale_s_limits_is_used_as_it_is(tmp_path, scale):
    root = folder_of_images(tmp_path)
    (e,) = plan(scale, f"folder:{root}", ["sgd"])
    assert load_task(e, "cpu").n_train == 100


def test_a_relative_folder_is_found_wherever_the_study_is_started(tmp_path, told, monkeypatch):
    """Also by the notebooks, which run elsewhere."""
    folder_of_images(tmp_path / "pictures", 200, 100)
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(
        planning, "execute_notebooks", lambda *args: seen.append(args[2]) or ([], [])
    )
    command = ("--scale", "toy", "--only", "sgd", "--dataset", "folder:pictures", "--out", "out")
    assert told(*command)[0] == 0
    assert (tmp_path / "out" / "report.html").exists()
    monkeypatch.chdir(planning.NOTEBOOKS)
    data._load.cache_clear()
    assert data.load(seen[0]).title == "folder pictures"


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


@pytest.mark.parametrize("e", REPEATED, ids=[f"{i}-{e.name}" for i, e in enumerate(REPEATED)])
def test_the_python_code_of_a_run_is_the_run(e, monkeypatch):
    seen = []
    monkeypatch.setattr(hl, "run", lambda *args: seen.append(args))
    exec(planning.as_python(e, "a 'folder'"), {})
    assert seen == [(e, "a 'folder'")]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("e", REPEATED, ids=[f"{i}-{e.name}" for i, e in enumerate(REPEATED)])
def test_the_papermill_command_of_a_run_is_the_run(e):
    from papermill.cli import _resolve_type

    words = shlex.split(planning.as_papermill(e, "a 'folder'"))
    source = nbformat.read(data.PROJECT / words[1], 4)
    given = [(words[i + 1], _resolve_type(words[i + 2])) for i in range(3, len(words), 3)]
    (declared,) = [c.source for c in source.cells if "parameters" in c.metadata.get("tags", [])]
    chosen = checked(namespace(declared=declared, **dict(given)), planning.experiment_from)
    assert chosen.out == "a 'folder'"
    assert replace(planning.experiment_from(chosen), name=e.name) == e


@pytest.mark.parametrize(
    ("words", "compile"), [([], None), (["--no-compile"], False), (["--compile"], True)]
)
def test_the_engine_of_a_study_is_the_one_asked_for(monkeypatch, tmp_path, words, compile):
    asked = []
    monkeypatch.setattr(planning, "execute_notebooks", lambda *args: ([], []))
    real = planning.run

    def watched(e, folder, device, **how):
        asked.append(how.pop("compile"))
        return real(e, folder, device, **how)

    monkeypatch.setattr(planning, "run", watched)
    assert main(["--scale", "toy", "--only", "sgd", "--out", str(tmp_path), *words]) == 0
    assert asked == [compile]


def test_workers_choose_their_engine_themselves(capsys):
    with pytest.raises(SystemExit):
        main(["--scale", "toy", "--compile", "--workers", "2"])
    assert "those of workers choose themselves" in capsys.readouterr().err
