"""The way in from Colab: the setup cell of the notebooks, and the command that stamps them.

The cell runs in a kernel that cannot see hybrid_lib, in an empty folder, beside a package that
answers to google.colab, without network. Real Colab was not run: its own versions of packages, its
widget manager and its front end are not covered.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata, resources
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
TRIAL = """
import dataclasses
import sys

import torch

import hybrid_lib as hl
from hybrid_lib.training import data
from hybrid_lib.study import figures, planning

tiny = planning.plan("toy", only=["sgd"], epochs=1, width=2)[0]
print("trained", hl.run(tiny, progress=False).status)
print("table", figures.paper("table3").shape)
print("from", hl.__file__)
print("project", data.PROJECT)
print("colab", "google.colab" in sys.modules)
"""


def code(path):
    """The sources of a notebook's code cells."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def setup_cell():
    return next(source for source in code(SOURCES[-1]) if "REPO_URL =" in source)


# The cell as text.


def test_the_setup_cell_is_the_same_in_every_notebook_that_has_it():
    found = {path.name: s for path in SOURCES for s in code(path) if "REPO_URL =" in s}
    assert len(found) >= 7
    assert len(set(found.values())) == 1
    assert len(setup_cell().splitlines()) <= 22


def test_it_stands_between_the_parameters_and_the_first_import():
    for path in SOURCES:
        sources = code(path)
        places = [i for i, source in enumerate(sources) if "REPO_URL =" in source]
        uses = [i for i, source in enumerate(sources) if "import hybrid_lib" in source
                or "from hybrid_lib" in source]  # fmt: skip
        assert places in ([1], []), path.name
        assert not places or min(uses) == 2, path.name


def test_it_is_not_mistaken_for_a_parameters_cell():
    from hybrid_lib.study.parameters import checked

    stamped = setup_cell().replace('REPO_URL = ""', 'REPO_URL = "https://github.com/ada/notes"')
    chosen = checked({"In": ["", "epochs: int = 3", stamped], "epochs": 3}, lambda _: None)
    assert vars(chosen) == {"epochs": 3}


def test_pip_is_never_given_a_bare_name():
    assert "github.com" not in re.sub(r'REPO_URL = ".*"', "", setup_cell())
    assert '"install", "-c", keep, *found[0]]' in setup_cell()  # and found holds paths, URLs


# The cell at work.


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A folder with everything that the test environment has installed, but for hybrid_lib."""
    folder = tmp_path_factory.mktemp("installed")
    for kind in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(kind)).iterdir():
            ours = entry.name.lower().lstrip("_").startswith(("hybrid_lib", "editable___hybrid"))
            if not ours and not (folder / entry.name).exists() and entry.suffix != ".pth":
                (folder / entry.name).symlink_to(entry)
    if not (folder / "pip").exists():  # an environment made by uv has none
        pytest.importorskip("ensurepip", reason="this Python has neither pip nor ensurepip")
        (wheel,) = resources.files("ensurepip").joinpath("_bundled").glob("pip-*.whl")
        zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def kernel(seen, tmp_path):
    """A Python environment and an empty folder to work in; ``run`` opens a notebook there."""
    builder = venv.EnvBuilder(symlinks=os.name != "nt", with_pip=False)
    builder.create(tmp_path / "python")
    python = builder.ensure_directories(tmp_path / "python").env_exe
    colab = tmp_path / "colab" / "google" / "colab"
    colab.mkdir(parents=True)
    (colab.parent / "__init__.py").touch()
    (colab / "__init__.py").touch()
    (colab / "output.py").write_text("def enable_custom_widget_manager(): pass\n")
    (tmp_path / "colab" / "sitecustomize.py").write_text("import google.colab\n")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "colab"), str(seen)]),
        "PIP_NO_INDEX": "1",  # nothing is to be downloaded, least of all something of our name
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this as "no isolation": setuptools is there
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "JUPYTER_PLATFORM_DIRS": "1",
    }
    empty = tmp_path / "content"
    empty.mkdir()

    def run(folder=empty, url="", more=TRIAL):
        """Open the batch notebook's head in ``folder``: parameters, setup, imports and ``more``."""
        cells = code(ROOT / "notebooks" / "10_train_one.ipynb")[:3]
        cells[1] = re.sub('REPO_URL = ".*?"', f'REPO_URL = "{url}"', cells[1])
        (folder / "trial.ipynb").write_text(notebook([*cells, more]), encoding="utf-8")
        command = [python, "-m", "papermill", "trial.ipynb", "out.ipynb", "--log-output"]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        return SimpleNamespace(code=done.returncode, text=done.stderr + done.stdout)

    return SimpleNamespace(run=run, folder=empty, python=python, environment=environment)


def notebook(sources):
    cells = [
        {"cell_type": "code", "execution_count": None, "id": f"cell-{i}", "metadata": {},
         "outputs": [], "source": source}
        for i, source in enumerate(sources)
    ]  # fmt: skip
    cells[0]["metadata"]["tags"] = ["parameters"]
    kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernelspec}, "nbformat": 4}
    return json.dumps(whole | {"nbformat_minor": 5})


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project as a repository with one commit."""
    folder = tmp_path_factory.mktemp("origin") / "some-fork"
    drop = shutil.ignore_patterns("__pycache__", "*.egg-info", ".ipynb_checkpoints")
    for name in ("hybrid_lib", "notebooks", "data/paper"):
        shutil.copytree(ROOT / name, folder / name, ignore=drop)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for words in ("init -q", "add -A", "-c user.name=t -c user.email=t@t commit -qm all"):
        subprocess.run(["git", *words.split()], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(project, seen, tmp_path_factory):
    """What ``pip wheel . --no-deps`` makes of the project."""
    source, folder = tmp_path_factory.mktemp("source") / "p", tmp_path_factory.mktemp("wheel")
    shutil.copytree(project, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    environment = os.environ | {"PYTHONPATH": str(seen)}  # has pip in any case
    subprocess.run([*command, "-w", folder, source], check=True, env=environment)
    (made,) = folder.glob("*.whl")
    return made


def test_nothing_available_is_one_sentence_and_exit_code_1(kernel):
    done = kernel.run()
    assert done.code == 1
    last = done.text.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: no hybrid_lib: ")
    for way_out in ("pip wheel . --no-deps", "clone the repository", "make colab"):
        assert way_out in last
    assert sorted(os.listdir(kernel.folder)) == ["out.ipynb", "trial.ipynb"]


def test_clone_of_the_stamped_repository(kernel, project):
    done = kernel.run(url=project.as_uri())
    assert done.code == 0, done.text
    clone = kernel.folder / "hybrid-lib"
    assert "trained complete" in done.text
    assert f"from {clone / 'hybrid_lib'}" in done.text
    assert f"project {clone}" in done.text  # so that published histories are found
    assert "colab True" in done.text


def test_uploaded_wheel(kernel, wheel):
    shutil.copy(wheel, kernel.folder)
    done = kernel.run()
    assert done.code == 0, done.text
    assert "trained complete" in done.text
    assert "table (8, " in done.text  # the report's numbers travel in the wheel
    assert "site-packages" in re.search("from (.*)", done.text)[1]
    # The next notebook of this runtime finds it installed and asks for nothing.
    (kernel.folder / wheel.name).unlink()
    again = [kernel.python, "-c", setup_cell()]
    assert subprocess.run(again, cwd=kernel.folder, env=kernel.environment).returncode == 0


@pytest.mark.slow
def test_uploaded_zip(kernel, project):
    shutil.make_archive(
        kernel.folder / "hybrid-lib-main", "zip", project.parent, project.name
    )  # as GitHub makes it: one folder inside
    done = kernel.run()
    assert done.code == 0, done.text
    assert "trained complete" in done.text


@pytest.mark.slow
def test_notebook_inside_a_clone(kernel, project):
    clone = kernel.folder / "My Drive" / "study"
    shutil.copytree(project, clone)
    done = kernel.run(clone / "notebooks", url="file:///nowhere")
    assert done.code == 0, done.text
    assert "trained complete" in done.text
    assert f"project {clone}" in done.text


def test_pip_keeps_the_runtime_and_says_why_it_fails(kernel, wheel):
    """A package that asks for another torch than the runtime's is refused, in pip's own words."""
    name = wheel.name.replace("0.1.0", "9.9.9")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(kernel.folder / name, "w") as new:
        for item in old.namelist():
            content = old.read(item)
            if item.endswith("METADATA"):
                content = content.replace(b"Requires-Dist: torch>=", b"Requires-Dist: torch<")
                content = content.replace(b"Version: 0.1.0", b"Version: 9.9.9")
            new.writestr(item.replace("0.1.0", "9.9.9"), content)
    done = kernel.run()
    assert done.code == 1
    assert "RuntimeError: pip:" in done.text
    version = re.escape(metadata.version("torch"))  # beside constraints of the user's own, if any
    assert re.search(rf"\(constraint\) torch\S*=={version}", done.text)


def test_an_address_that_cannot_be_cloned(kernel):
    done = kernel.run(url="file:///nowhere/at/all")
    assert done.code == 1
    assert "RuntimeError: pip:" in done.text
    assert "does not appear to be a git repository" in done.text


def test_nothing_happens_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", None)
    exec(compile(setup_cell(), "setup", "exec"), {})
    assert list(tmp_path.iterdir()) == []


# The command that stamps.


@pytest.fixture(scope="module")
def stamp():
    spec = importlib.util.spec_from_file_location("s", ROOT / "notebooks" / "stamp_colab.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path, stamp):
    """The notebooks and the README, unstamped, in a repository without a remote."""
    for path in SOURCES:
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "notebooks")
    shutil.copy(ROOT / "README.md", tmp_path)
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=tmp_path, check=True)
    assert stamp.main(["--clear", "--root", str(tmp_path)]) == 0
    return tmp_path


def texts(folder):
    files = [*sorted((folder / "notebooks").glob("*.ipynb")), folder / "README.md"]
    return {file.name: file.read_text("utf-8") for file in files}


def test_stamping_is_idempotent_and_can_be_undone(stamp, copy):
    before = texts(copy)
    for _ in range(2):
        assert stamp.main(["https://github.com/ada/notes", "--root", str(copy)]) == 0
        after = texts(copy)
        for name, text in after.items():
            if name.endswith(".ipynb"):
                cells = json.loads(text)["cells"]
                title, _, mark, *_ = cells[0]["source"]
                assert title.startswith("# ")
                assert mark.count(f"/github/ada/notes/blob/main/notebooks/{name})") == 1
                assert text.count("Open in Colab") == 1
                assert text.count(r"REPO_URL = \"https://github.com/ada/notes\"") == text.count(
                    "REPO_URL ="
                )
        rows = [line for line in after["README.md"].splitlines() if "Open in Colab" in line]
        assert len(rows) == len(re.findall(r"^\| `\d\d_", after["README.md"], re.M)) > 0
        assert all(row.count("|") == 3 for row in rows)
    assert stamp.main(["git@github.com:bob/fork.git", "--root", str(copy)]) == 0
    assert not any("ada/notes" in text for text in texts(copy).values())
    assert stamp.main(["--clear", "--root", str(copy)]) == 0
    assert texts(copy) == before


def test_origin_is_the_default_and_its_password_is_not_copied(stamp, copy):
    remote = "https://ada:ghp_secret@github.com/ada/notes.git"
    subprocess.run(["git", "remote", "add", "origin", remote], cwd=copy, check=True)
    assert stamp.main(["--root", str(copy)]) == 0
    assert all("github/ada/notes/blob/main" in t for n, t in texts(copy).items() if n[0].isdigit())
    assert not any("secret" in text for text in texts(copy).values())


@pytest.mark.parametrize(
    "address",
    ["https://gitlab.com/ada/notes", "/home/ada/notes", "https://github.com/ada", "",
     "https://github.com/ada/notes/tree/main", "https://github.com.evil.example/ada/notes",
     "https://ada:secret@example.org/ada/notes"],
)  # fmt: skip
def test_other_addresses_are_refused(stamp, copy, capsys, address):
    before = texts(copy)
    assert stamp.main([address, "--root", str(copy)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("make colab: ")
    assert "secret" not in said
    assert texts(copy) == before


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_colab(copy):
    shutil.copy(ROOT / "Makefile", copy)
    shutil.copy(ROOT / "notebooks" / "stamp_colab.py", copy / "notebooks")
    before = texts(copy)

    def make(*words):
        command = ["make", "-s", "colab", f"PYTHON={sys.executable}", *words]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "REPO"))}
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)

    refused = make()
    assert refused.returncode == 2
    assert "no remote named origin" in refused.stderr
    assert make("REPO=https://github.com/ada/notes").returncode == 0
    assert texts(copy) != before
    assert make("REPO=").returncode == 0
    assert texts(copy) == before
