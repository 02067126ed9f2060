"""Notebooks opened in Colab: their setup cell, and the command that stamps them.

The cell runs in a kernel without hybrid_lib, in an empty folder, without a network. Colab's own
list of packages is resolved with ours; Colab itself was not run.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
BIN = "Scripts/python.exe" if os.name == "nt" else "bin/python"
ADDRESS = "https://github.com/ada/notes"


def code(path):
    """The sources of a notebook's code cells."""
    return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


SETUP = code(SOURCES[0])[1]
STAMPED = SETUP.replace('REPO_URL = ""', f'REPO_URL = "{ADDRESS}"')


def test_every_notebook_has_the_same_short_setup_cell():
    for path in SOURCES:
        parameters, setup, *others = code(path)
        assert setup == SETUP
        assert "hybrid_lib" not in parameters
        assert "REPO_URL" not in "".join(others)
    assert len([line for line in SETUP.splitlines() if line]) <= 6


# --- The setup cell. ---

TRIAL = """
import hybrid_lib as hl
from hybrid_lib.study import planning, tables

tiny = planning.plan("toy", only=["sgd"], epochs=1, width=2)[0]
print("trained", hl.run(tiny, progress=False).status)
print("table", tables.paper("table3").shape, tables.fair("depth").shape, "home", hl.__file__)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project as a repository with one commit."""
    folder = tmp_path_factory.mktemp("origin")
    for name in ("hybrid_lib", "data/paper", "data/results/fair"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for words in ("init -q", "add -A", "-c user.name=t -c user.email=t@t commit -qm all"):
        subprocess.run(["git", *words.split()], cwd=folder, check=True)
    return folder


@pytest.fixture
def python(project, tmp_path):
    """Runs a Python with everything installed here except hybrid_lib, in an empty folder."""
    packages = sysconfig.get_path("purelib")  # an editable package is not found by PYTHONPATH
    has_pip = Path(packages, "pip").is_dir()  # an environment made by uv has none
    venv.create(tmp_path / "python", symlinks=os.name != "nt", with_pip=not has_pip)
    pins = [f"{d.name}=={d.version}\n" for d in metadata.distributions(path=[packages])]
    (tmp_path / "pins.txt").write_text("".join(pins), "utf-8")
    (tmp_path / "content").mkdir()
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": packages,
        "PIP_NO_INDEX": "1",  # download nothing, least of all something with our name
        "PIP_CONSTRAINT": str(tmp_path / "pins.txt"),
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this as "no isolation": setuptools is there
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_VALUE_0": ADDRESS,  # the project stands in for it
        "GIT_CONFIG_KEY_0": f"url.{project.as_uri()}.insteadOf",
        "OMP_NUM_THREADS": "1", "JUPYTER_PLATFORM_DIRS": "1",
    }  # fmt: skip
    how = {"cwd": tmp_path / "content", "env": environment, "stdout": subprocess.PIPE,
           "stderr": subprocess.STDOUT, "text": True, "timeout": 300}  # fmt: skip
    return lambda *words: subprocess.run([tmp_path / "python" / BIN, *words], **how)


def execute(python, folder, setup, exit_code=0):
    """Execute a notebook's head and a small training run; return the output."""
    parameters, _, imports, *_ = code(ROOT / "notebooks" / "10_train_one.ipynb")
    cells = [nbformat.v4.new_code_cell(c) for c in (parameters, setup, imports, TRIAL)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "in.ipynb")
    done = python("-m", "papermill", "in.ipynb", "out.ipynb", "--log-output")
    assert done.returncode == exit_code, done.stdout
    assert ("trained complete\ntable (8, " in done.stdout) is (exit_code == 0)
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "message"),
    [(SETUP, "AssertionError: No hybrid_lib: .*pip wheel . --no-deps.* make colab\n"),
     (STAMPED.replace("notes", "notes/nowhere"), "does not appear to be a git repository")],
    ids=["nothing available", "pip fails"],
)  # fmt: skip
def test_a_failed_setup_says_why_in_one_sentence(python, tmp_path, setup, message):
    assert re.search(message, execute(python, tmp_path / "content", setup, exit_code=1))


@pytest.mark.slow
def test_a_stamped_notebook_installs_from_its_repository(python, tmp_path):
    output = execute(python, tmp_path / "content", STAMPED)
    assert str(tmp_path / "python") in re.search("home (.*)", output)[1]


@pytest.mark.slow
def test_an_uploaded_wheel_is_preferred_and_installed_once(python, project, tmp_path):
    wheel = ["-m", "pip", "wheel", "--no-deps", str(shutil.copytree(project, tmp_path / "p"))]
    assert python(*wheel).returncode == 0
    assert "git clone" not in execute(python, tmp_path / "content", STAMPED)
    next((tmp_path / "content").glob("*.whl")).unlink()
    execute(python, tmp_path / "content", SETUP)  # the next notebook finds it installed


# --- Colab's packages. ---

LIST = Path(__file__).with_name("colab-packages.txt").read_text("utf-8").splitlines()
COLAB = dict(line.split("==") for line in LIST if not line.startswith("#"))


@pytest.fixture
def wanted():
    """The requirements of ``hybrid-lib[study]``."""
    toml = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text("utf-8"))
    project = toml["project"]
    return [*project["dependencies"], *project["optional-dependencies"].get("study", [])]


@pytest.mark.slow  # asks the package index, whose answers change
@pytest.mark.skipif(shutil.which("uv") is None, reason="there is no uv to resolve with")
def test_of_colab_s_packages_only_plotly_is_changed(wanted, tmp_path):
    # Its torch is built for another CUDA than the index's: those libraries cannot be compared.
    pins = [f"{name}=={version}\n" for name, version in COLAB.items()
            if not name.startswith(("plotly", "nvidia", "cuda"))]  # fmt: skip
    (tmp_path / "pins.txt").write_text("".join(pins), "utf-8")
    command = "uv pip compile -q - -c pins.txt --python-version 3.13 --python-platform linux"
    how = {"cwd": tmp_path, "input": "\n".join(wanted), "capture_output": True, "timeout": 300}
    done = subprocess.run(command.split(), text=True, **how)
    assert "No solution found" not in done.stderr, done.stderr
    if done.returncode:
        pytest.skip(f"nothing resolved: {done.stderr.strip()[-200:]}")
    assert "ipywidgets==7.7.1" in done.stdout


# --- The command that stamps. ---


def texts(folder):
    files = [*sorted((folder / "notebooks").glob("*.ipynb")), folder / "README.md"]
    return {file.name: file.read_text("utf-8") for file in files}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_stamping_is_idempotent_and_can_be_undone(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in ("README.md", "Makefile", "notebooks/stamp_colab.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for source in SOURCES:
        shutil.copy(source, tmp_path / "notebooks")

    def make_colab(*repo, exit_code=0):
        command = ["make", "-s", "colab", f"PYTHON={sys.executable}", *repo]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "REPO"))}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == exit_code
        return done.stderr

    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=tmp_path, check=True)
    make_colab("REPO=")
    before = texts(tmp_path)
    assert "no remote named origin" in make_colab(exit_code=2)
    origin = "https://ada:ghp_secret@github.com/ada/notes.git"
    subprocess.run(["git", "remote", "add", "origin", origin], cwd=tmp_path, check=True)
    for _ in range(2):
        make_colab()
        after = texts(tmp_path)
        assert not any("secret" in text for text in after.values())
        readme = after.pop("README.md")
        for name, text in after.items():
            title, _, mark, *_ = json.loads(text)["cells"][0]["source"]
            assert title.startswith("# ")
            assert mark.count(f"/github/ada/notes/blob/main/notebooks/{name})") == 1
            assert text.count("Open in Colab") == 1
            assert text.count(rf"REPO_URL = \"{ADDRESS}@main\"") == 1
        rows = [line for line in readme.splitlines() if "[![Open in Colab]" in line]
        assert len(rows) == len(re.findall(r"^\| \[`\d\d_", readme, re.M)) > 0
        assert all(row.count("|") == 3 for row in rows)
    make_colab("REPO=git@github.com:bob/fork.git")
    assert not any("ada/notes" in text for text in texts(tmp_path).values())
    make_colab("REPO=")
    assert texts(tmp_path) == before


@pytest.mark.parametrize(
    "address",
    ["", "/ada/notes", "https://gitlab.com/ada/notes", "https://github.com.evil.example/ada/notes",
     "https://github.com/ada", f"{ADDRESS}/tree/main", "https://ada:secret@x.org/ada/notes"],
)  # fmt: skip
def test_other_addresses_are_refused(address):
    stamp = runpy.run_path(ROOT / "notebooks" / "stamp_colab.py")
    with pytest.raises(ValueError, match="is not a GitHub repository") as refused:
        stamp["github"](address)
    assert "secret" not in str(refused.value)
