"""notebooks/params: the rows of Tables I and II as parameter files for papermill."""

import dataclasses
from pathlib import Path

import pytest
from papermill.iorw import load_notebook_node, read_yaml_file
from papermill.parameterize import parameterize_notebook

import hybrid_lib as hl
from hybrid_lib.study import parameters, planning

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
FILES = sorted((NOTEBOOKS / "params").glob("*.yaml"))


def opened(path, **more):
    """The experiment of the batch notebook, run by papermill with a parameter file."""
    notebook = load_notebook_node(str(NOTEBOOKS / "10_train_one.ipynb"))
    given = read_yaml_file(str(path)) | more
    notebook = parameterize_notebook(notebook, given)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"][:2]
    namespace = {"In": cells}
    for cell in cells:
        exec(cell, namespace)
    return planning.experiment_from(parameters.checked(namespace, planning.experiment_from)), given


def test_every_row_of_the_tables_has_its_file():
    assert {path.stem for path in FILES} == set(planning.PAPER_METHODS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_its_row_to_the_last_setting(path):
    experiment, given = opened(path)
    assert experiment == hl.EXPERIMENTS[path.stem]
    assert given["dataset"] == "cifar10"
    assert given["scale"] == "paper"
    # What the tables say stands in the file, for everyone to read and to change.
    silent = {
        field
        for field in ("epochs", "batch_size", "lr", "lr_schedule", "lr_milestones", "momentum",
                      "weight_decay", "lambda_epochs")
        if getattr(experiment, field) and field not in given
    }  # fmt: skip
    assert not silent
    assert ("lambda_start" in given) == experiment.is_hybrid
    assert f"-f notebooks/params/{path.name}" in path.read_text("utf-8")


def test_other_parameters_go_on_top():
    path = NOTEBOOKS / "params" / "adasgd.yaml"
    experiment, _ = opened(path, dataset="digits", width=8, seed=3)
    row = hl.EXPERIMENTS["adasgd"]
    assert experiment == dataclasses.replace(row, dataset="digits", width=8, seed=3)
