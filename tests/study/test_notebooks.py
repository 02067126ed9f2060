"""Notebooks are committed clean, run from top to bottom, and refuse what they do not know.

Papermill executes each one at toy size. The cells that read a study are also executed in this
process, for studies of every kind: of one method, of none of the report's, with a run that failed.
"""

import ast
import json
import math
import os
import random
import shutil
from pathlib import Path

import filelock
import nbformat
import plotly.graph_objects as go
import pytest
import torch

import hybrid_lib as hl
from hybrid_lib.study import figures, notebooks
from hybrid_lib.study.__main__ import study
from hybrid_lib.study.planning import plan, run_folder
from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.history import History
from hybrid_lib.training.loop import run

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9]*.ipynb"))
TYPES = {"int", "float", "str", "bool"}
# What is injected for speed, where a notebook declares it; each gets a folder of its own for runs.
SMALL = {"scale": "toy", "train": True, "steps": 5, "probes": 16, "train_limit": 160, "epochs": 2,
         "workers": 1}  # fmt: skip
every_notebook = pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda source: source.stem)


def code_cells(source: Path) -> list[str]:
    return [c.source for c in nbformat.read(source, 4).cells if c.cell_type == "code"]


def declared(source: Path) -> dict[str, ast.AnnAssign]:
    """The parameters by name."""
    return {node.target.id: node for node in ast.parse(code_cells(source)[0]).body}


# --- As committed. ---


@every_notebook
def test_it_is_valid_and_carries_no_results(source):
    text = source.read_text("utf-8")
    notebook = nbformat.reads(text, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
        assert set(cell.metadata) <= {"tags"}
    assert json.loads(text)["cells"], "plain JSON"


@every_notebook
def test_it_is_a_text_with_short_cells(source):
    cells = nbformat.read(source, 4).cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    lengths = {c.source: len(c.source.splitlines()) for c in cells if c.cell_type == "code"}
    assert max(lengths.values()) <= 25
    prose = sum(len(c.source) for c in cells if c.cell_type == "markdown")
    assert prose > 600


@every_notebook
def test_the_first_code_cell_declares_parameters_with_type_and_comment(source):
    cells = [c for c in nbformat.read(source, 4).cells if c.cell_type == "code"]
    assert [c.metadata.get("tags") == ["parameters"] for c in cells] == [True] + [False] * (
        len(cells) - 1
    )
    lines = cells[0].source.splitlines()
    body = ast.parse(cells[0].source).body
    assert len(body) == len(lines), "one assignment per line"
    for node, line in zip(body, lines):
        assert isinstance(node, ast.AnnAssign), line
        assert ast.unparse(node.annotation) in TYPES, line
        value = ast.literal_eval(node.value)
        assert value is None or type(value).__name__ == ast.unparse(node.annotation), line
        assert len(line.split("  # ", 1)[1].strip()) > 3, line


# --- Executed in this process: the cells, without a kernel and without drawing. ---


def execute(source: Path, given: dict, to_the_check: bool = False) -> dict:
    """Run the code cells, ``given`` injected as papermill does; returns the globals."""
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
def quick(monkeypatch):
    """Studies execute all their notebooks in this process; returns the figures that they show."""
    chosen_for, shown = notebooks.for_study, []

    def for_study(found, scale, **given):  # at toy size: the results alone
        jobs = chosen_for(found, "demo", **given)
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
def test_a_mistyped_parameter_is_refused_by_the_cell_after_the_parameters(source):
    name = next(iter(declared(source)))
    with pytest.raises(ValueError, match=rf"{name}x is not a .*did you mean {name}\?"):
        execute(source, {f"{name}x": 1}, to_the_check=True)


@every_notebook
def test_every_default_passes_its_own_check(source):
    execute(source, {}, to_the_check=True)


@pytest.mark.parametrize(
    "only", ["sgd", "adahessian", "padam", "sgd,adasgd", "padam_sgd", "adam+adahessian"]
)
def test_a_study_of_any_methods_has_its_notebooks(only, tmp_path, quick, capsys):
    code = study(["--scale", "toy", "--only", only, "--out", str(tmp_path), "--workers", "1"])
    assert "failed" not in capsys.readouterr().out
    assert code == 0
    assert len(quick) >= 4
    assert all(isinstance(figure, go.Figure) for figure in quick)


def test_a_study_with_several_seeds_and_a_run_that_diverged_at_once_has_its_notebooks(
    tmp_path, quick, capsys, monkeypatch
):
    rates = Experiment.learning_rates
    monkeypatch.setattr(
        Experiment, "learning_rates",
        lambda self: [1e30, 1e30] if (self.name, self.seed) == ("padam_sgd", 1) else rates(self),
    )  # fmt: skip
    arguments = ["--scale", "toy", "--only", "sgd,padam_sgd", "--seeds", "0-1", "--workers", "1"]
    assert study([*arguments, "--out", str(tmp_path)]) == 1
    assert "failed: PADAM-SGD, seed 1: diverged" in capsys.readouterr().out


def test_one_experiment_that_diverges_is_shown_to_its_end(tmp_path, quick):
    (source,) = [s for s in NOTEBOOKS if "train_one" in s.stem]
    given = {"scale": "toy", "optimizer": "sgd", "lr": 1e30, "out": str(tmp_path)}
    assert execute(source, given)["history"].status == "diverged"


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
def test_taking_steps_apart_takes_the_optimizer_s_steps(optimizers, name):
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


def test_one_probe_is_nearly_noise_and_many_are_not(optimizers):
    cosines = optimizers["cosines"]["650 weights"]
    assert cosines[1] < 0.1
    assert cosines[32] > 0.5


def test_the_second_moment_of_adahessian_tracks_rows(optimizers):
    table = optimizers["curvatures"]
    assert (table["tracked"] / table["row"]).median() == pytest.approx(1, abs=0.05)
    assert (table["tracked"] / table["diagonal"]).median() > 3


@pytest.mark.parametrize(
    ("stem", "given", "faults"),
    [("02_optimizers", {"steps": 0, "probes": 7, "lr": 0.0}, ["steps=0", "probes=7", "lr=0"]),
     ("03_schedules", {"optimizer": "sgd"}, ["lambda"])],
)  # fmt: skip
def test_impossible_values_are_refused_at_once(stem, given, faults):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        execute(NOTEBOOKS[0].with_name(f"{stem}.ipynb"), given, to_the_check=True)
    assert all(fault in str(refused.value) for fault in faults)


# --- Executed by papermill. ---


@pytest.fixture(scope="session")
def toy_study(tmp_path_factory):
    """All runs of a toy study, trained once, whichever worker comes first."""
    out = tmp_path_factory.getbasetemp().parent / "toy-study"
    with filelock.FileLock(f"{out}.lock"):
        for e in plan("toy"):
            run(e, run_folder(out, e), progress=False)
    return out


def executed_by_papermill(source: Path, target: Path, toy_study: Path):
    import papermill

    known = declared(source)
    given = {**SMALL, "out": str(target.parent / "run"), "runs": str(target.parent)}
    if "seeds" in known:  # it reads a study
        given |= {"out": str(toy_study), "epochs": None}
    given = {k: v for k, v in given.items() if k in known}
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


@pytest.mark.filterwarnings("default")  # of papermill and jupyter_client
@every_notebook
def test_it_runs_without_anyone_watching(source, tmp_path, toy_study, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", os.devnull)  # figures without their images: seconds less
    before = {f: f.stat().st_mtime_ns for f in source.parent.iterdir()}
    executed_by_papermill(source, tmp_path / "executed.ipynb", toy_study)
    assert {f: f.stat().st_mtime_ns for f in source.parent.iterdir()} == before


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@every_notebook
def test_with_its_images_it_stays_small(source, tmp_path, toy_study):
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))):
        pytest.skip("there is no Chromium to draw the images")
    notebook = executed_by_papermill(source, tmp_path / "executed.ipynb", toy_study)
    drawn = [o.get("data", {}) for c in notebook.cells for o in c.get("outputs", [])]
    assert all("image/png" in d for d in drawn if "application/vnd.plotly.v1+json" in d)
    assert (tmp_path / "executed.ipynb").stat().st_size <= 200 * 1024


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_of_a_study_at_full_length_it_stays_small(tmp_path):
    """The largest: eight methods, three seeds, hundreds of epochs, which are made up here."""
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
    assert executed.stat().st_size <= 200 * 1024
