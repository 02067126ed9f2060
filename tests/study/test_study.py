"""The commands: from nothing to a report that needs no network, and what they refuse."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
from test_running import waited_for

from hybrid_lib.study import notebooks, running, sweeps
from hybrid_lib.study.__main__ import study, sweep
from hybrid_lib.training.history import History, load_all

ROOT = Path(__file__).parents[2]
may_warn = pytest.mark.filterwarnings("default")  # papermill, nbconvert and jupyter_client warn


@pytest.fixture
def no_notebooks(monkeypatch):
    """Skip the notebooks of studies; a report still says what failed."""
    monkeypatch.setattr(notebooks, "execute", lambda jobs, out: ([], []))


@pytest.fixture
def call(capsys):
    """Call a command in this process; returns exit code, stdout and stderr."""

    def call(*arguments, command=study):
        code = command([*map(str, arguments), "--workers", "1"])
        return code, *capsys.readouterr()

    return call


def links(page: str) -> list[str]:
    return re.findall(r'<a\b[^>]*?\bhref="([^"]*)"', page)


def check_page(page: str, figures: int, js: str = "plotly.min.js"):
    """The page fetches only plotly.js, and all its figures are interactive."""
    fetched = re.findall(r"(?:url\(|@import\s*)[\"']?([^\"')]*)", page)
    for tag in re.findall(r"<(?!a\b)\w[^>]*>", page):
        fetched += re.findall(r"\b(?:src|srcset|poster|data|background|href)=[\"']?([^\"'>]*)", tag)
    assert [f for f in fetched if not f.startswith("data:")] == [js]
    assert page.count("Plotly.newPlot(") == figures
    assert "image/png" not in page, "a still picture in place of a figure"


# --- From command to report. ---


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A toy study by ``python -m``, without a browser that could draw images."""
    out = tmp_path_factory.mktemp("studies") / "a study, größer"
    where = {"BROWSER_PATH": os.devnull, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    words = ("--scale", "toy", "--only", "sgd,adasgd", "--seeds", "0-1", "--workers", "2",
             "--out", str(out))  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "hybrid_lib.study", *words], capture_output=True,
                          env={**os.environ, **where}, timeout=300)  # fmt: skip
    return out, done.returncode, done.stdout.decode("utf-8", "surrogateescape"), done.stderr


def test_a_toy_study_trains_and_writes_its_report(toy):
    out, code, shown, errors = toy
    # jupyter_client interrupts a kernel before it ends it, and a slow one may say so.
    ended = b"[IPKernelApp] ERROR | KeyboardInterrupt caught in kernel.\n"
    assert (code, errors.replace(ended, b"")) == (0, b"")
    folders = sorted(f.name for f in (out / "runs").iterdir())
    assert folders == ["adasgd-seed0", "adasgd-seed1", "sgd-seed0", "sgd-seed1"]
    for folder in folders:
        h = History.load(out / "runs" / folder)
        assert (h.status, len(h.rows)) == ("complete", 2)
    assert re.search(r"^SGD, seed 1: complete, test accuracy 0\.\d{4}; \d of 4 done", shown, re.M)
    assert shown.rstrip().endswith("report.html")
    assert re.search(r"^AdaSGD +0\.8771 +0\.\d+", shown, re.M)

    page = (out / "report.html").read_text("utf-8")
    check_page(page, figures=page.count("plotly-graph-div"))
    assert page.count("plotly-graph-div") >= 3
    assert "<title>Hybrid optimizers on handwritten digits</title>" in page
    assert "claims on handwritten digits" in page
    assert "±" in page
    assert "What failed" not in page
    assert "import " not in page.partition("<body>")[2], "code is hidden"
    assert links(page) == ["notebooks/08_results.html"]
    beside = (out / "notebooks" / "08_results.html").read_text("utf-8")
    assert "planning" in beside, "code is shown"
    check_page(beside, figures=page.count("Plotly.newPlot("), js="../plotly.min.js")
    assert [f.name for f in out.rglob("*.js")] == ["plotly.min.js"]


@may_warn
@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no Chromium")
def test_the_pages_are_interactive_in_a_browser_without_a_network(tmp_path, call, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", os.devnull)
    assert call("--scale", "toy", "--only", "sgd,adasgd", "--out", tmp_path)[0] == 0
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"),
                                          args=["--no-sandbox"])  # fmt: skip
        for name in ("report.html", "notebooks/08_results.html"):
            page, requested, errors = browser.new_page(), [], []
            page.context.set_offline(True)
            page.on("request", lambda request, urls=requested: urls.append(request.url))
            page.on("console", lambda message, errors=errors: errors.append(message.text))
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.goto((tmp_path / name).as_uri())
            figures = page.locator(".plotly-graph-div")
            page.wait_for_function("document.querySelectorAll('.main-svg').length > 2")
            drawn = page.locator(".plotly-graph-div:has(.main-svg)")
            assert drawn.count() == figures.count() >= 3
            assert {url.partition(":")[0] for url in requested} <= {"file", "data", "blob"}
            assert errors == []
            before = page.locator(".legendtoggle").count()
            page.locator(".legendtoggle").first.click(force=True)  # hides a line, in every panel
            page.wait_for_timeout(600)
            assert before
            assert page.evaluate(
                "document.querySelector('.plotly-graph-div:has(.legendtoggle)').data"
                ".some(t => t.visible)"
            )
        browser.close()


@may_warn
def test_a_sweep_trains_and_writes_its_table_and_report(tmp_path, call, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", os.devnull)
    file, out = tmp_path / "rates.yaml", tmp_path / "out"
    file.write_text("{scale: toy, seeds: 0-1, grid: {lr: [0.01, 1.0e+30], batch_size: [32, 500]}}")
    code, shown, _ = call(file, "--out", out, command=sweep)
    assert code == 1
    assert shown.count("seed 0: diverged, loss") == 2, "as it happens, and in the end"
    assert shown.count("refused, batch_size=500") == 2
    assert "sgd-batch_size32-lr0.01, seed 1: complete, test accuracy 0." in shown

    table = pd.read_csv(out / "table.csv", index_col="run")
    assert list(table.columns) == ["lr", *sweeps.MEASURED]
    kept = {(h.experiment.name, h.experiment.seed): h for h in load_all(out)}
    assert len(table) == len(kept) == 4
    for name, row in table.iterrows():
        h = kept[name, row["seed"]]
        assert (row["lr"], row["status"]) == (h.experiment.lr, h.status)
        if h.status == "complete":
            assert row["test_accuracy"] == pytest.approx(h.final["test_accuracy"])
            assert row["train_seconds"] == pytest.approx(sum(r["train_seconds"] for r in h.rows))
        else:
            assert pd.isna(row["test_accuracy"])
    page = (out / "report.html").read_text("utf-8")
    check_page(page, figures=1)  # only one setting is left to vary
    assert "<title>Sweep on handwritten digits</title>" in page
    failed = page.partition("What failed")[2].partition("</ul>")[0]
    assert (failed.count("<li>"), failed.count("refused, batch_size=500")) == (4, 2)

    monkeypatch.setattr(notebooks, "execute", lambda jobs, out: ([], []))
    before = {f: f.stat().st_mtime_ns for f in out.rglob("history.json")}
    assert call(file, "--out", out, command=sweep)[0] == 1
    assert {f: f.stat().st_mtime_ns for f in out.rglob("history.json")} == before


# --- Failures leave the rest alone. ---


def test_a_run_that_fails_is_named_and_the_others_finish(tmp_path, no_notebooks, call, monkeypatch):
    real = running.run

    def failing(e, *args, **how):
        if e.name == "adam":
            raise RuntimeError("the <disk> is\nfull & slow")
        return real(e, *args, **how)

    command = ("--scale", "toy", "--only", "sgd,adam,atmo", "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(running, "run", failing)
        code, shown, _ = call(*command)
    assert code == 1
    assert "failed: Adam, seed 0: RuntimeError: full & slow" in shown
    page = (tmp_path / "report.html").read_text("utf-8")
    assert re.search("What failed.*Adam, seed 0: RuntimeError: full &amp; slow", page)
    assert {f.name for f in (tmp_path / "runs").iterdir()} == {"sgd-seed0", "atmo-seed0"}
    assert call(*command)[0] == 0
    assert "What failed" not in (tmp_path / "report.html").read_text("utf-8")


def test_a_run_that_diverged_at_once_counts_but_alone_makes_no_report(
    tmp_path, no_notebooks, call, monkeypatch
):
    real = running.run

    def diverging(e, *args, **how):
        history = real(e, *args, **how)
        diverged = e.name == "adam" and e.seed == 1
        return dataclasses.replace(history, rows=[], status="diverged") if diverged else history

    monkeypatch.setattr(running, "run", diverging)
    command = ("--scale", "toy", "--out", tmp_path, "--only")
    code, shown, _ = call(*command, "sgd,adam", "--seeds", "0-1")
    assert (code, "1 complete, 1 diverged" in shown) == (1, True)
    code, _, errors = call(*command, "adam", "--seeds", "1")
    assert (code, "Adam, seed 1: diverged" in errors) == (2, True)


def notebook(*cells: str):
    made = [nbformat.v4.new_code_cell(source) for source in cells]
    made[0].metadata["tags"] = ["parameters"]
    meta = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=made, metadata=meta)


@may_warn
def test_notebooks_that_fail_are_named_and_the_others_finish(tmp_path, call, monkeypatch):
    """Two of them wait for each other in their kernels, so they must run at the same time."""
    sources, out = tmp_path / "sources", tmp_path / "out"
    sources.mkdir()
    head = "train: bool = True  # x\nseeds: str = ''  # x\nmethods: str = "
    start = f"import pathlib, time\nhere = pathlib.Path({str(tmp_path)!r})\n"
    meet = start + "(here / {!r}).touch()\nwhile not (here / {!r}).exists(): time.sleep(.01)"
    for name, made in {
        "01_good.ipynb": notebook(f"{head}'adam,sgd'", meet.format("a", "b"),
                                  "print('seeds', seeds, 'train', train, methods)"),
        "02_bad.ipynb": notebook(f"{head}''", meet.format("b", "a"),
                                 "raise RuntimeError('a <bad> cell')"),
        "03_other_methods.ipynb": notebook(f"{head}'adam,atmo'", "raise AssertionError"),
        "04_trains_itself.ipynb": notebook("epochs: int = 1  # x", "raise AssertionError"),
    }.items():  # fmt: skip
        nbformat.write(made, sources / name)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", sources)
    monkeypatch.setattr(notebooks, "cores", lambda: 2)
    code, shown, _ = call("--scale", "demo", "--epochs", "1", "--only", "sgd", "--out", out)
    assert code == 1
    assert re.search(r"failed: notebook 02_bad: .*RuntimeError: a <bad> cell", shown)
    assert "03_other_methods: none of its methods is in this study" in shown
    assert {f.name for f in (out / "notebooks").iterdir()} == {"01_good.html", "01_good.ipynb"}
    executed = nbformat.read(out / "notebooks" / "01_good.ipynb", 4)
    assert executed.cells[-1].outputs[0].text == "seeds 0 train False sgd\n"
    assert "seeds 0 train False" in (out / "notebooks" / "01_good.html").read_text("utf-8")
    page = (out / "report.html").read_text("utf-8")
    assert "a &lt;bad&gt; cell" in page
    assert links(page) == ["notebooks/01_good.html"]


@may_warn
def test_without_its_notebooks_a_study_says_why_its_report_is_empty(tmp_path, call, monkeypatch):
    """As where the package is installed and used outside the project's folder."""
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path / "notebooks")
    code, shown, _ = call("--scale", "toy", "--only", "sgd", "--out", tmp_path / "out")
    assert (code, "failed: no notebooks in" in shown) == (1, True)
    assert "no notebooks in" in (tmp_path / "out" / "report.html").read_text("utf-8")


@may_warn
def test_an_interrupted_study_ends_the_kernel_of_its_notebook(tmp_path, call, monkeypatch):
    pid = tmp_path / "pid"
    waits = f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))"
    nbformat.write(notebook("train: bool = True  # x", waits + "\ntime.sleep(99)"),
                   tmp_path / "01_waits.ipynb")  # fmt: skip
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)

    def interrupt():
        waited_for(lambda: pid.exists() and pid.read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    before = signal.getsignal(signal.SIGTERM)
    words = ("--scale", "demo", "--epochs", "1", "--only", "sgd", "--out", tmp_path)
    code, _, errors = call(*words)
    signal.signal(signal.SIGTERM, before)
    assert (code, errors) == (130, "stopped; repeat the same command to resume\n")
    assert not psutil.pid_exists(int(pid.read_text()))


# --- Options. ---


def test_options_for_engine_and_threads_reach_the_runs(monkeypatch, tmp_path, no_notebooks, call):
    used, real = [], running.run
    monkeypatch.setattr(
        running, "run",
        lambda *a, **how: used.append((how["compile"], how["threads"])) or real(*a, **how),
    )  # fmt: skip
    command = ("--scale", "toy", "--only", "sgd", "--out", tmp_path)
    assert call(*command, "--no-compile", "--threads", "3")[0] == call(*command)[0] == 0
    assert used == [(False, 3), (None, None)]


@pytest.mark.parametrize("words", ["--workers 0", "--threads -1"])
def test_impossible_numbers_are_refused(words, tmp_path, capsys):
    assert study(["--scale", "toy", "--out", str(tmp_path / "new"), *words.split()]) == 2
    assert ": at least 1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_cluster_s_device_need_not_exist_here(monkeypatch, tmp_path, call):
    def reached(*_, **how):
        raise RuntimeError(f"on {how['device']} of {how['cluster']}")

    monkeypatch.setattr("hybrid_lib.study.__main__.run_many", reached)
    command = ("--scale", "toy", "--device", "cuda", "--cluster", "slurm:x.yaml", "--out", tmp_path)
    code, _, errors = call(*command)
    assert code == 2
    assert "on cuda of slurm:x.yaml" in errors
