"""Notebook sources are committed without outputs, reading copies with them."""

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / ".pre-commit-config.yaml"
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def hooks():
    (repository,) = yaml.safe_load(CONFIG.read_text("utf-8"))["repos"]
    assert repository["repo"] == "local"  # nothing is fetched
    return {hook["id"]: hook for hook in repository["hooks"]}


def strip(*arguments):
    """Run the hook's command."""
    command = [*shlex.split(hooks()["nbstripout"]["entry"]), *map(str, arguments)]
    command[0] = shutil.which(command[0], path=PATH)
    return subprocess.run(command, capture_output=True, text=True)


def dirty(notebook):
    """The notebook as Colab, JupyterLab and papermill may leave it, with a person's name in it."""
    who = {"user": {"displayName": "Ada L.", "userId": "1815"}, "timestamp": 1, "elapsed": 2}
    for number, cell in enumerate(notebook["cells"]):
        cell["metadata"] |= {"id": f"x{number}", "executionInfo": who}
        if cell["cell_type"] == "code":
            cell["metadata"] |= {"colab": {"base_uri": "https://localhost"}, "outputId": "y"}
            cell["metadata"] |= {"papermill": {"status": "completed"}, "cellView": "form"}
            cell["execution_count"] = number
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "Ada L.\n"}]
    widgets = {"application/vnd.jupyter.widget-state+json": {}}  # without "state": invalid
    notebook["metadata"] |= {"colab": {"provenance": [], "authorship_tag": "Ada L."}}
    notebook["metadata"] |= {"widgets": widgets, "accelerator": "GPU", "gpuClass": "standard"}
    notebook["metadata"] |= {"papermill": {"output_path": "/home/ada/out.ipynb"}}
    notebook["metadata"]["language_info"] |= {"version": "3.12.1", "mimetype": "text/x-python"}
    return notebook


def test_the_hook_would_change_no_source():
    done = strip("--verify", *SOURCES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_hook_removes_all_that_editors_add(tmp_path):
    for path in SOURCES:
        left = json.dumps(dirty(json.loads(path.read_text("utf-8"))))
        assert "Ada L." in left
        (tmp_path / path.name).write_text(left, encoding="utf-8")
    assert strip("--verify", *tmp_path.iterdir()).returncode == 1
    assert strip(*tmp_path.iterdir()).returncode == 0
    for path in SOURCES:  # to the byte, so that opening a notebook leaves no diff
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_the_hook_stops_a_commit_of_an_executed_notebook(tmp_path):
    source = SOURCES[0]
    copy = tmp_path / source.name
    copy.write_text(json.dumps(dirty(json.loads(source.read_text("utf-8")))), encoding="utf-8")
    shutil.copy(CONFIG, tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {"PATH": PATH, "PRE_COMMIT_HOME": str(tmp_path / ".cache")}

    def call(*words):
        return subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True
        )  # fmt: skip

    call("git", "init", "-q")
    call("git", "add", source.name, "pyproject.toml", CONFIG.name)
    first = call(sys.executable, "-m", "pre_commit", "run")
    assert first.returncode == 1, first.stdout + first.stderr
    assert "files were modified by this hook" in first.stdout
    assert copy.read_text("utf-8") == source.read_text("utf-8")
    call("git", "add", source.name)
    second = call(sys.executable, "-m", "pre_commit", "run")
    assert second.returncode == 0, second.stdout + second.stderr


# --- Reading copies. ---


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_a_reading_copy_is_its_source_executed_and_has_a_picture_of_every_figure(source):
    stamp = runpy.run_path(ROOT / "notebooks" / "stamp_colab.py")
    copy = ROOT / "data" / "results" / "reading" / source.name
    notebook = nbformat.read(copy, 4)
    injected = [c for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", [])]
    cells = [c.source for c in notebook.cells if c not in injected]
    current = nbformat.reads(stamp["stamped"](source.read_text("utf-8"), "", ""), 4)
    assert cells == [c.source for c in current.cells], "older than its source: make copies"
    assert copy.stat().st_size <= 200 * 1024
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    assert not any(o.output_type == "error" for o in outputs)
    data = [o.get("data", {}) for o in outputs]
    assert any("image/png" in d for d in data)
    assert all("image/png" in d for d in data if "application/vnd.plotly.v1+json" in d)
