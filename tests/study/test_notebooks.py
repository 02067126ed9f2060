"""Notebooks are committed clean, run from top to bottom, and refuse unknown parameters.

Each runs at toy size in this process, two by papermill, all by papermill with -m slow. The cells
that read a study also run for every kind of study: one method, none of the report's methods, a
failed run.
"""

import ast
import json
import math
import os
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import filelock
import nbformat
import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import hybrid_lib as hl
from hybrid_lib.study import figures, notebooks
from hybrid_lib.study.__main__ import study
from hybrid_lib.study.planning import plan, run_folder
from hybrid_lib.training.experiments import EXPERIMENTS, Experiment
from hybrid_lib.training.history import History
from hybrid_lib.training.loop import run

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9]*.ipynb"))
# Injected for speed where a notebook declares it; each notebook has its own folder for runs.
SMALL = {"scale": "toy", "train": True, "steps": 5, "probes": 16, "train_limit": 160, "epochs": 2,
         "workers": 1}  # fmt: skip
every_notebook = pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda source: source.stem)


def code_cells(source: Path) -> list[str]:
    return [c.source for c in nbformat.read(source, 4).cells if c.cell_type == "code"]


def declared(source: Path) -> dict[str, ast.AnnAssign]:
    """The declared parameters by name."""
    return {node.target.id: node for node in ast.parse(code_cells(source)[0]).body}


# --- As committed. ---


@every_notebook
def test_a_notebook_has_text_short_cells_and_no_outputs(source):
    notebook = nbformat.reads(source.read_text("utf-8"), nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.cells[0].source.startswith("# ")
    assert sum(len(c.source) for c in notebook.cells if c.cell_type == "markdown") > 600
    for cell in notebook.cells:
        assert (cell.get("outputs", []), cell.get("execution_count")) == ([], None)
        assert set(cell.metadata) <= {"tags"}
        assert cell.cell_type == "markdown" or len(cell.source.splitlines()) <= 25


@every_notebook
def test_the_first_code_cell_declares_parameters_with_type_and_comment(source):
    cells = [c for c in nbformat.read(source, 4).cells if c.cell_type == "code"]
    assert [c.metadata.get("tags") for c in cells] == [["parameters"]] + [None] * (len(cells) - 1)
    lines = cells[0].source.splitlines()
    for node, line in zip(ast.parse(cells[0].source).body, lines, strict=True):
        assert isinstance(node, ast.AnnAssign), line
        value = ast.literal_eval(node.value)
        assert value is None or type(value).__name__ == ast.unparse(node.annotation), line
        assert len(line.split("  # ", 1)[1].strip()) > 3, line


# --- Cells executed in this process, without a kernel and without drawing. ---


def execute(source: Path, given: dict, to_the_check: bool = False) -> dict:
    """Run the code cells with ``given`` injected as by papermill; return the globals."""
    parameters, *rest = code_cells(source)
    injected = "# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in given.items())
    known: dict = {"In": [""], "__name__": "__main__"}
    if to_the_check:
        rest = rest[: 1 + next(i for i, cell in enumerate(rest) if "parameters.checked(" in cell)]
    for cell in [parameters, injected, *rest]:
        known["In"].append(cell)
        exec(compile(cell, str(source), "exec"), known)
    return known


@pytest.fixture
def shown_figures(monkeypatch):
    """Make studies execute all their notebooks in this process; returns the figures they show."""
    real_for_study, shown = notebooks.for_study, []

    def for_study(found, scale, **given):  # at toy scale it lists 08_results alone
        jobs = real_for_study(found, "demo", **given)
        return {source: {**values, "scale": scale} for source, values in jobs.items()}

    def executed(jobs, out):
        for source, given in jobs.items():
            execute(source, given)
        return [], []

    monkeypatch.setattr(notebooks, "for_study", for_study)
    monkeypatch.setattr(notebooks, "execute", executed)
    monkeypatch.setattr(figures, "show", shown.append)
    return shown


@every_notebook
def test_defaults_pass_a_notebook_s_own_check_and_a_mistyped_name_does_not(source):
    execute(source, {}, to_the_check=True)
    name = next(iter(declared(source)))
    with pytest.raises(ValueError, match=rf"{name}x is not a .*did you mean {name}\?"):
        execute(source, {f"{name}x": 1}, to_the_check=True)


@pytest.mark.parametrize("only", ["sgd", "sgd,adasgd", "padam_sgd", "adam+adahessian"])
def test_the_notebooks_of_a_study_run_for_any_methods(only, tmp_path, shown_figures, capsys):
    code = study(["--scale", "toy", "--only", only, "--out", str(tmp_path), "--workers", "1"])
    assert "failed" not in capsys.readouterr().out
    assert code == 0
    assert len(shown_figures) >= 4
    assert all(isinstance(figure, go.Figure) for figure in shown_figures)


def test_the_notebooks_of_a_study_run_with_several_seeds_and_a_run_that_diverged_at_once(
    tmp_path, shown_figures, capsys, monkeypatch
):
    rates = Experiment.learning_rates
    monkeypatch.setattr(
        Experiment, "learning_rates",
        lambda self: [1e30, 1e30] if (self.name, self.seed) == ("padam_sgd", 1) else rates(self),
    )  # fmt: skip
    arguments = ["--scale", "toy", "--only", "sgd,padam_sgd", "--seeds", "0-1", "--workers", "1"]
    assert study([*arguments, "--out", str(tmp_path)]) == 1
    assert "failed: PADAM-SGD, seed 1: diverged" in capsys.readouterr().out


# --- What 11_sweep shows. ---


KINDS = """{optimizer: atmo, scale: toy, seeds: 0-1, fixed: {width: 2}, grid: {lr: [0.001, 1.0e+30],
    lambda_start: ["1, 0", [1, 1]], momentum: [null, 0.5], nesterov: [false, true]}}"""


def test_every_varied_setting_has_an_axis_and_incomplete_cells_are_empty(tmp_path, shown_figures):
    source = NOTEBOOKS[0].with_name("11_sweep.ipynb")
    runs = execute(source, {"space": KINDS, "out": str(tmp_path), "workers": 1})["runs"]
    parallel, cells = shown_figures[0].data[0], shown_figures[1].data[0]
    done = runs.dropna(subset="test_accuracy")
    names = [dimension.label for dimension in parallel.dimensions]
    assert names == ["learning rate η", "lambda_start", "momentum", "nesterov", "test accuracy"]
    assert {len(dimension["values"]) for dimension in parallel.dimensions} == {len(done)}
    assert (list(cells.x), len(cells.y)) == (["0.001", "1e+30"], 2)
    for x, column in zip(cells.x, cells.z.T):
        at_rate = runs.loc[runs["lr"] == float(x), "test_accuracy"]
        if at_rate.notna().all():
            assert column.mean() == pytest.approx(at_rate.mean())
        else:
            assert np.isnan(column).any()


# --- What 08_results says of several seeds. ---


def made_up(name, seed, *accuracies, status="complete", seconds=1.0):
    rows = [{"epoch": i, "test_accuracy": a, "train_seconds": seconds}
            for i, a in enumerate(accuracies, start=1)]  # fmt: skip
    return History(replace(EXPERIMENTS[name], seed=seed), rows, {"dataset": "dots"}, status)


@pytest.fixture(scope="module")
def results():
    """The functions of 08_results."""
    known: dict = {}
    imports, *others = code_cells(NOTEBOOKS[0].with_name("08_results.ipynb"))[2:]
    for cell in [imports.partition("params =")[0], *(c for c in others if c.startswith("def "))]:
        exec(cell.partition("\n\n\nif ")[0], known)
    return known


def test_every_seed_is_a_point_beside_the_mean_and_a_failed_one_is_named(results):
    runs = [made_up("adam", i, 1.0, a) for i, a in enumerate((0.5, 0.7, 0.9))]
    runs += [made_up("sgd", i, 0.0, 0.3 + i / 100) for i in range(2)]
    runs += [made_up("sgd", 2, 0.1, status="diverged")]
    figure = results["final_accuracies"](runs)
    seeds, means = figure.data
    points = sorted(zip(seeds.y, seeds.x))
    assert points == [("adam", 0.5), ("adam", 0.7), ("adam", 0.9), ("sgd", 0.3), ("sgd", 0.31)]
    assert list(means.x) == pytest.approx([0.7, 0.305])
    assert means.error_x.array[0] == pytest.approx(4.303 * 0.2 / 3**0.5, rel=1e-3)
    assert figure.layout.yaxis.ticktext == ("Adam", "SGD")
    texts = [a.text for a in figure.layout.annotations]
    assert texts == ["rank 1 to 2", "rank 1 to 2<br>1 diverged"]
    assert "dots" in figure.layout.title.text


def test_the_time_to_an_accuracy_by_hand(results):
    found = [
        made_up("sgd", 0, 0.2, 0.5, 0.4, seconds=2),  # it counts although it drops again
        made_up("sgd", 1, 0.5, 0.5, 0.7, seconds=4),
        made_up("sgd", 2, 0.1, 0.1, 0.1, seconds=2),
        made_up("adam", 0, 0.9, 0.9),
        made_up("adam", 1, 0.1, 0.1),
        made_up("adam", 2, status="diverged"),
        made_up("adam", 3, 0.9, status="stopped"),
    ]
    table = results["time_to"](found, 0.5)
    sgd, adam = table.loc["SGD"], table.loc["Adam"]
    # Seconds are those of training: 4 in two epochs, 4 in one.
    assert (sgd["reached"], sgd["seeds"], sgd["epochs"], sgd["seconds"]) == (2, 3, 2, 4)
    assert (adam["reached"], adam["seeds"]) == (1, 3)
    assert adam[["epochs", "seconds"]].isna().all()
    assert (sgd["final"], adam["final"]) == pytest.approx((0.4, 0.5))
    for finals, level in ((dict(sgd=0.51, adam=0.9, atmo=0.63), "0.60"), (dict(sgd=0.65), "0.65")):
        found = [made_up(name, 0, last) for name, last in finals.items()]
        assert results["time_to"](found).index.name == f"to {level}", "half of the methods reach it"


# --- What 02_optimizers says of the merge. ---


@pytest.fixture(scope="module")
def optimizers():
    """The values of 02_optimizers, after three steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "show", lambda figure: None)
        return execute(NOTEBOOKS[0].with_name("02_optimizers.ipynb"), {"steps": 3})


def test_bias_correction_scales_the_whole_step(optimizers):
    step_sizes = optimizers["step_sizes"]
    assert step_sizes["atmo"][[1, 10, 44]].tolist() == pytest.approx([5.5, 1.27, 1.005], rel=5e-3)
    padam_sgd = step_sizes["padam_sgd"][[1, 100, 391, 3000]].tolist()
    assert padam_sgd == pytest.approx([0.66, 0.65, 0.78, 0.99], abs=6e-3)


@pytest.mark.parametrize("name", ["atmo", "padam_sgd", "adasgd"])
def test_measuring_a_step_does_not_change_it(optimizers, name):
    measured, trained = optimizers["perceptron"](), optimizers["perceptron"]()
    optimizers["train_and_measure"](measured, getattr(hl, name)(measured.parameters()), 3)
    weights, generator = list(trained.parameters()), torch.Generator().manual_seed(0)
    optimizer = getattr(hl, name)(weights)
    for step in range(3):
        loss = optimizers["loss_on_digits"](trained, step)
        grads, diagonal = hl.hessian_diagonal(loss, weights, 1, generator)
        for p, g in zip(weights, grads):
            p.grad = g
        optimizer.step(hess_diag=diagonal)
    for p, q in zip(measured.parameters(), trained.parameters()):
        torch.testing.assert_close(p, q)


def test_one_probe_is_nearly_noise_and_the_second_moment_of_adahessian_tracks_rows(optimizers):
    cosines, table = optimizers["cosines"]["650 weights"], optimizers["curvatures"]
    assert cosines[1] < 0.1 < 0.5 < cosines[32]
    assert (table["tracked"] / table["row"]).median() == pytest.approx(1, abs=0.05)
    assert (table["tracked"] / table["diagonal"]).median() > 3


@pytest.mark.parametrize(
    ("stem", "given", "faults"),
    [("02_optimizers", {"steps": 0, "probes": 7, "lr": 0.0}, ["steps=0", "probes=7", "lr=0"]),
     ("03_schedules", {"optimizer": "sgd"}, ["lambda"])],
)  # fmt: skip
def test_impossible_values_are_refused_all_at_once(stem, given, faults):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        execute(NOTEBOOKS[0].with_name(f"{stem}.ipynb"), given, to_the_check=True)
    assert all(fault in str(refused.value) for fault in faults)


# --- Executed by papermill. ---


@pytest.fixture(scope="session")
def toy_study(tmp_path_factory):
    """All runs of a toy study, trained once by whichever worker comes first."""
    out = tmp_path_factory.getbasetemp().parent / "toy-study"
    with filelock.FileLock(f"{out}.lock"):
        for e in plan("toy"):
            run(e, run_folder(out, e), progress=False)
    return out


def toy_parameters(source: Path, folder: Path, toy_study: Path) -> dict:
    """The parameters to inject, with runs in ``folder``."""
    given, known = {**SMALL, "out": str(folder / "run"), "runs": str(folder)}, declared(source)
    if "seeds" in known:  # it reads a study
        given |= {"out": str(toy_study), "epochs": None}
    return {k: v for k, v in given.items() if k in known}


def executed_by_papermill(source: Path, target: Path, toy_study: Path):
    import papermill

    given = toy_parameters(source, target.parent, toy_study)
    papermill.execute_notebook(
        source, target, given, progress_bar=False, cwd=source.parent, execution_timeout=90
    )
    return checked_notebook(target)


def checked_notebook(file: Path):
    notebook = nbformat.read(file, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count
            for output in cell.outputs:
                assert output.output_type != "error"
                assert "Warning" not in output.get("text", ""), output
    return notebook


# A kernel of its own costs each notebook some ten seconds of imports.
IN_A_KERNEL = ("09_explorer", "10_train_one")
BY_COMMANDS = ("08_results", "11_sweep")  # in test_study.py


@pytest.mark.parametrize(
    "source", [n for n in NOTEBOOKS if n.stem not in IN_A_KERNEL + BY_COMMANDS],
    ids=lambda n: n.stem,
)  # fmt: skip
def test_a_notebook_runs_from_top_to_bottom(source, tmp_path, toy_study, monkeypatch):
    monkeypatch.chdir(source.parent)
    shown = []
    monkeypatch.setattr(figures, "show", shown.append)
    execute(source, toy_parameters(source, tmp_path, toy_study))
    assert shown or source.stem == "01_playground"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
@pytest.mark.parametrize("stem", ["02_optimizers", "10_train_one", "14_inside_a_hybrid"])
def test_a_notebook_that_trains_runs_on_a_gpu(stem, tmp_path, monkeypatch):
    source = NOTEBOOKS[0].with_name(f"{stem}.ipynb")
    monkeypatch.chdir(source.parent)
    monkeypatch.setattr(figures, "show", lambda figure: None)
    execute(source, toy_parameters(source, tmp_path, tmp_path))


@pytest.mark.filterwarnings("default")  # of papermill and jupyter_client
@pytest.mark.parametrize(
    "source",
    [pytest.param(n, id=n.stem, marks=[] if n.stem in IN_A_KERNEL else pytest.mark.slow)
     for n in NOTEBOOKS],
)  # fmt: skip
def test_a_notebook_runs_unattended(source, tmp_path, toy_study, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", os.devnull)  # no images of figures: saves seconds
    before = {f: f.stat().st_mtime_ns for f in source.parent.iterdir()}
    executed = executed_by_papermill(source, tmp_path / "executed.ipynb", toy_study)
    assert {f: f.stat().st_mtime_ns for f in source.parent.iterdir()} == before
    if source.stem == "09_explorer":  # a reader without a kernel sees figures instead of widgets
        assert "widgets" not in executed.metadata
        outputs = (out for cell in executed.cells for out in cell.get("outputs", []))
        kinds = {kind for out in outputs for kind in out.get("data", {})}
        assert "application/vnd.plotly.v1+json" in kinds
        assert not any("widget" in kind for kind in kinds)


SCRIPT = """
import json, pathlib, sys
from hybrid_lib.study import notebooks
jobs = {pathlib.Path(source): given for source, given in json.load(sys.stdin).items()}
print(*notebooks.execute(jobs, pathlib.Path(".")))
"""


@pytest.mark.slow
def test_all_notebooks_run_with_colab_s_package_versions(tmp_path, toy_study, colab_python):
    jobs = {str(s): toy_parameters(s, tmp_path / s.stem, toy_study) for s in NOTEBOOKS}
    environment = {**os.environ, "BROWSER_PATH": os.devnull}
    done = subprocess.run([colab_python, "-c", SCRIPT], input=json.dumps(jobs), capture_output=True,
                          text=True, cwd=tmp_path, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    executed = [tmp_path / "notebooks" / source.name for source in NOTEBOOKS]
    assert all(file.exists() for file in executed), done.stdout
    assert all(map(checked_notebook, executed))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@every_notebook
def test_a_notebook_with_its_images_stays_small(source, tmp_path, toy_study):
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))):
        pytest.skip("there is no Chromium to draw the images")
    notebook = executed_by_papermill(source, tmp_path / "executed.ipynb", toy_study)
    drawn = [o.get("data", {}) for c in notebook.cells for o in c.get("outputs", [])]
    assert all("image/png" in d for d in drawn if "application/vnd.plotly.v1+json" in d)
    assert (tmp_path / "executed.ipynb").stat().st_size <= 200 * 1024


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_results_of_a_study_at_full_length_stay_small(tmp_path):
    """The largest: eight methods, three seeds, hundreds of epochs, made up of noise, which is what
    images compress worst."""
    rng = random.Random(0)
    columns = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    seen = {"dataset": "CIFAR-10 (made up)", "device_name": "none",
            "train_images": 9, "test_images": 9}  # fmt: skip
    for e in plan("paper", "cifar10", seeds=range(3)):
        rows = [
            {"epoch": i, "lr": e.lr, "lambdas": (), "train_seconds": 38, "test_seconds": 3}
            | {c: math.exp(-9 * i / e.epochs) + rng.uniform(0.1, 0.15) for c in columns}
            for i in range(1, e.epochs + 1)
        ]
        run_folder(tmp_path, e).mkdir(parents=True)
        History(e, rows, seen, "complete").save(run_folder(tmp_path, e))
    (source,) = [s for s in NOTEBOOKS if s.stem == notebooks.RESULTS]
    given = {"out": str(tmp_path), "scale": "paper", "dataset": "cifar10", "seeds": "0-2"}
    (executed,), failures = notebooks.execute({source: {**given, "train": False}}, tmp_path)
    assert failures == []
    checked_notebook(executed)
    assert executed.stat().st_size <= 256 * 1024
