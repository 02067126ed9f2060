"""The project keeps its rules on imports, dependencies, public names and committed files."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hybrid_lib as hl
from hybrid_lib.study.__main__ import study

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings its twin
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LIBRARY = {
    str(file.relative_to(ROOT / "hybrid_lib").with_suffix("")): file
    for file in (ROOT / "hybrid_lib").rglob("*.py")
}
README = ROOT / "README.md"
needs_readme = pytest.mark.skipif(not README.exists(), reason="there is no README.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

ROOMS = ["optim", "training", "study", "widgets"]  # each may import from those before it


# --- Imports. ---


def imports(file: Path) -> set[str]:
    """Dotted names of everything that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_rooms(file: Path) -> set[str]:
    """The rooms of the library that a file imports from."""
    parts = [name.split(".") for name in imports(file) if name.split(".")[0] == "hybrid_lib"]
    assert all(part[1] in ROOMS for part in parts), f"{file}: imports must name the room"
    return {part[1] for part in parts}


def test_every_module_is_in_a_room():
    assert {name.partition("/")[0] for name in LIBRARY} == {*ROOMS, "__init__"}


@pytest.mark.parametrize("name", sorted(LIBRARY.keys() - {"__init__"}))
def test_a_room_imports_only_from_itself_and_those_above(name):
    room = ROOMS.index(name.partition("/")[0])
    assert imported_rooms(LIBRARY[name]) <= {*ROOMS[: room + 1]}


DASK = {"dask", "distributed", "dask_jobqueue"}
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
BROUGHT_BY = {"IPython": "ipykernel", "nbformat": "nbconvert", "traitlets": "ipywidgets"}
BASE, STUDY = PROJECT["dependencies"], PROJECT["optional-dependencies"]["study"]


@pytest.mark.parametrize(("rooms", "lines"), [(ROOMS[:2], BASE), (ROOMS, BASE + STUDY)])
def test_every_imported_package_is_declared(rooms, lines):
    declared = {re.match(r"[\w-]+", line).group().replace("-", "_") for line in lines}
    files = [file for name, file in LIBRARY.items() if name.partition("/")[0] in rooms]
    used = {name.split(".")[0] for file in files for name in imports(file)}
    used -= {*sys.stdlib_module_names, "hybrid_lib", "google"}  # google.colab is Colab's own
    used -= DASK | ({"pandas"} if lines == BASE else set())  # only in History.frame, when called
    names = {DISTRIBUTIONS.get(name, BROUGHT_BY.get(name, name)).replace("-", "_") for name in used}
    assert names <= declared


WITHOUT_STUDY = """
import sys
for name in ("pandas", "plotly", "yaml", "tqdm", "papermill", "nbconvert", "ipywidgets"):
    sys.modules[name] = None
import hybrid_lib as hl
from dataclasses import replace
short = replace(hl.EXPERIMENTS["adasgd"], dataset="digits", width=2, epochs=1, train_limit=256,
                lr_schedule="constant", lr_milestones=())
print(hl.run(short, progress=False).status)
try:
    import hybrid_lib.widgets.explorer
except ImportError as error:
    print(error)
"""


def test_without_the_study_extra_a_run_trains_and_the_explorer_says_what_to_install():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_STUDY], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    trained, refused = done.stdout.splitlines()
    assert trained == "complete"
    assert "pip install -e '.[study]'" in refused


def test_dask_is_optional():
    """Only study/cluster imports it, and only inside functions."""
    assert {
        n for n, file in LIBRARY.items() if DASK & {name.split(".")[0] for name in imports(file)}
    } == {"study/cluster"}
    tree = ast.parse(LIBRARY["study/cluster"].read_text("utf-8"))
    at_the_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [line for line in map(ast.unparse, at_the_top) if any(name in line for name in DASK)]


LIGHT = """
import sys, warnings
warnings.simplefilter("error")
from hybrid_lib import padam_sgd
heavy = {"plotly", "sklearn", "torchvision", "papermill", "IPython", "ipywidgets", "distributed"}
print(sorted(heavy & {*sys.modules}))
import importlib, torch, hybrid_lib
w = torch.nn.Parameter(torch.ones(3))
optimizer = padam_sgd([w], lr=hybrid_lib.EXPERIMENTS["padam_sgd"].learning_rates()[0])
w.square().sum().backward()
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)  # torch's compiler takes as long to import as torch
torch.__version__ = "2.5.1"
try:
    importlib.reload(hybrid_lib)
except ImportError as error:
    print(error)
"""


def test_importing_the_library_is_light_and_refuses_an_old_torch():
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    loaded, compiler, refusal = done.stdout.splitlines()
    assert (loaded, compiler) == ("[]", "False")
    assert "2.6" in refusal
    assert "2.5.1" in refusal


# --- Public names. ---

SIGNATURES = {
    hl.rules.SGD: "momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0",
    hl.rules.Adam: "betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, amsgrad=False",
    hl.rules.Padam: "betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, amsgrad=True, partial=0.125",
    hl.rules.AdaHessian: "betas=(0.9, 0.999), eps=1e-08, hessian_power=1.0, spatial_average=None",
    hl.Hybrid: "params, rules, lr, lambdas=(1.0,), decoupled_weight_decay=0.0",
    hl.hessian_diagonal: "loss, params, n_samples=1, generator=None",
    hl.schedules.Constant: "lambdas",
    hl.schedules.Linear: "start=(1.0, 0.0), end=(0.0, 1.0), epochs=100",
    hl.resnet18: "num_classes=10, in_channels=3, width=64, stem='cifar'",
    hl.run: "experiment, out=None, device=None",
    hl.History.load: "path",
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signatures_begin_as_promised(function):
    parameters = [
        p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()
    ]
    text = ", ".join(str(p) for p in parameters)
    assert f"{text}, ".startswith(f"{SIGNATURES[function]}, ")


def test_methods_have_the_promised_names():
    names = "sgd adam atmo dyn_atmo padam_sgd dyn_padam_sgd adahessian adasgd padam"
    assert list(hl.EXPERIMENTS) == names.split()
    for name in ("atmo", "padam", "padam_sgd", "adahessian", "adasgd"):
        assert list(inspect.signature(getattr(hl, name)).parameters)[:2] == ["params", "lr"]
    assert set(hl.__all__) <= set(dir(hl))


def test_experiments_have_the_promised_fields():
    promised = "name dataset width stem epochs batch_size lr seed train_limit test_limit"
    fields = set(inspect.signature(hl.Experiment).parameters)
    assert {*promised.split(), "protocol", "precision"} <= fields


# --- Installation, commands and the README. ---


def test_conda_and_pip_ask_for_the_same_python_and_extras():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    *plain, nested = environment["dependencies"]
    assert f"python{PROJECT['requires-python']}" in plain
    (install,) = nested["pip"]
    extras = re.fullmatch(r"-e \.\[([\w,-]+)\]", install).group(1).split(",")
    assert set(extras) == set(PROJECT["optional-dependencies"])
    assert PROJECT["requires-python"] == ">=3.10"


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([a-z]+):", makefile, re.M))


def test_make_has_the_targets_study_and_test():
    assert {"study", "test"} <= targets()
    assert "make test" in (ROOT / ".ci" / "run").read_text("utf-8")


@needs_readme
def test_every_make_command_of_the_readme_exists():
    used = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(blocks("sh"))))
    assert {"study", "test"} <= used <= targets()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S)


@needs_readme
def test_the_python_code_of_the_readme_runs():
    codes, known = blocks("python"), {}
    assert codes
    for code in codes:  # in order, as a reader runs them
        exec(compile(code, "README.md", "exec"), known)


@needs_readme
def test_every_hybrid_study_option_of_the_readme_exists(capsys):
    with pytest.raises(SystemExit):
        study(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    lines = [
        line for block in blocks("sh") for line in block.splitlines() if "hybrid-study" in line
    ]
    assert lines
    assert set(re.findall(r"--[a-z-]+", "\n".join(lines))) <= known


@needs_readme
def test_the_readme_names_every_notebook_and_contributing_every_module():
    text = README.read_text("utf-8")
    notebooks = {file.stem for file in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    assert {name for name in notebooks if f"`{name}`" not in text} == set()
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rooms = {f"`{name}.py`" for name in LIBRARY if "__" not in name}
    assert {name for name in rooms if name.split("/")[1] not in text} == set()


# --- What is committed. ---


@pytest.fixture(scope="module")
def committed() -> dict[Path, str]:
    """The text of every file that is, or would be, committed; binary files count as empty, since
    their bytes may spell anything."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert all(file.stat().st_size < 2 * 2**20 for file in files), "files over 2 MiB"
    read = {file: file.read_bytes() for file in files}
    return {f: "" if b"\0" in b else b.decode("utf-8", "replace") for f, b in read.items()}


HOME = str(Path.home()) if Path.home() != Path(Path.home().anchor) else str(ROOT)
FORBIDDEN = {  # spelt so that this file does not contain them
    "a package registry's host": r"py[p]i\.org|pythonho[s]ted\.org|npm[j]s\.org|deb\.deb[i]an\.org"
    r"|conda\.anaco[n]da\.org|download\.pyto[r]ch\.org|cra[t]es\.io",
    "a path of one machine": rf"(?<![\w.~$}}])(?:{re.escape(str(ROOT))}\b|{re.escape(HOME)}/)"
    r"|(?<![\w.~$}])/(?:ho[m]e|Us[e]rs|wo[r]k|mn[t])/(?!ada/|you/)\w+/|[A-Z]:\\Us[e]rs",
    "a mark of unfinished work": r"\b(?:TO[D]O|FIX[M]E|X[X]X)\b",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_committed_file_contains(what, committed):
    found = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file, text in committed.items()
        for match in [re.search(FORBIDDEN[what], text)]
        if match
    ]
    assert found == []


def test_neither_runs_nor_downloads_are_committed(committed):
    folders = {file.relative_to(ROOT).parts[0] for file in committed}
    assert not folders & {"runs", ".venv", "build"}
    parts = [file.relative_to(ROOT).parts for file in committed]
    below_data = {part[1] for part in parts if part[0] == "data"}
    assert below_data <= {"README.md", "paper", "results"}
