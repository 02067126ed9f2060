"""Execute notebooks in parallel, and write interactive pages that load only plotly.js.

A study's report is its results notebook with the code hidden.
"""

import ast
import asyncio
import contextlib
import html
import json
import os
import shutil
import signal
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import ClassVar

import nbconvert
import nbformat
import papermill
import plotly
from jupyter_client.manager import AsyncKernelManager

from hybrid_lib.study.planning import method
from hybrid_lib.study.progress import one_line
from hybrid_lib.study.running import cores
from hybrid_lib.training import data
from hybrid_lib.training.history import History, write_atomically

NOTEBOOKS = data.PROJECT / "notebooks"
RESULTS, SWEEP = "08_results", "11_sweep"
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }}
h1, h2 {{ line-height: 1.2 }} h2 {{ margin-top: 2em }}
table {{ border-collapse: collapse }} td, th {{ padding: .3em .8em; text-align: right }}
table:not(.dataframe, [id^=T_]) :is(td, th) {{ text-align: left; vertical-align: top }}
tbody tr {{ border-top: 1px solid #ccc }} .output_html {{ overflow-x: auto }}
pre {{ overflow-x: auto }} .highlight pre {{ background: #f5f5f5; color: #222; padding: .5em }}
@media (prefers-color-scheme: dark) {{ .highlight pre {{ filter: invert(.9) hue-rotate(180deg) }} }}
img {{ max-width: 100% }} .failed {{ border-left: 4px solid #D55E00; padding-left: 1em }}
{css}
</style>
<script src="{js}"></script>
<body>
{body}
</body></html>
"""


def for_study(found: Sequence[History], scale: str, **given) -> dict[Path, dict]:
    """Map each notebook that reads a study with these histories to the parameters to inject.

    At toy scale, only the results. Notebooks with none of the study's methods are left out.
    """
    names, jobs = list(dict.fromkeys(method(h.experiment) for h in found)), {}
    for source in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        declared = papermill.inspect_notebook(source)
        reads_a_study = "train" in declared and "space" not in declared
        if not reads_a_study or (scale == "toy" and source.stem != RESULTS):
            continue
        methods = ast.literal_eval(declared.get("methods", {}).get("default", "''"))
        if present := [n for n in methods.split(",") if n in names] if methods else names:
            values = {"scale": scale, **given, "train": False, "methods": ",".join(present)}
            jobs[source] = {k: v for k, v in values.items() if k in declared}
        else:
            print(f"notebook {source.stem}: none of its methods is in this study")
    return jobs


def execute(jobs: dict[Path, dict], out: Path) -> tuple[list[Path], list[str]]:
    """Execute notebooks with parameters into ``out/notebooks``, as many at once as there are cores.

    Returns:
        The executed notebooks, each with its page beside it, and a line for each that failed.
    """
    folder, failures = out / "notebooks", []
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "plotly.min.js", plotly.offline.get_plotlyjs().encode("utf-8"))
    pool = ThreadPoolExecutor(cores())
    futures = {pool.submit(_execute, source, folder, given): source
               for source, given in jobs.items()}  # fmt: skip
    try:
        for future in as_completed(futures):
            name = futures[future].stem
            if error := future.exception():
                failures.append(f"notebook {name}: {one_line(error)}")
                for unfinished in folder.glob(f"{name}.*"):
                    unfinished.unlink()
            print(f"notebook {name}: {'failed' if error else 'executed'}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for manager in PrivateKernelManager.started:  # some run on after an interrupt
            if manager.has_kernel and manager.provisioner.pid:
                os.kill(manager.provisioner.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        pool.shutdown()
    return [f for s in jobs if (f := folder / s.name).exists()], sorted(failures)


def _execute(source: Path, folder: Path, given: dict) -> None:
    executed, how = folder / source.name, {"kernel_manager_class": PrivateKernelManager}
    try:
        papermill.execute_notebook(source, executed, given, progress_bar=False, cwd=".", **how)
    finally:
        with contextlib.suppress(RuntimeError):  # there may be no loop yet
            asyncio.get_event_loop().close()  # papermill made it for this thread
    text = json.dumps(nbformat.read(executed, 4), ensure_ascii=False, separators=(",", ":"))
    write_atomically(executed, text.encode())  # nbformat's indentation would be a sixth of it
    write_page(executed.with_suffix(".html"), source.stem, executed, "../plotly.min.js")


def report(out, title, jobs, main: str, found: Sequence[History], failures) -> list[str]:
    """Execute notebooks and write the one named ``main``, code hidden, as ``out/report.html``.

    Failures are listed at its top. Returns a line for each notebook that failed.
    """
    executed, failed = execute(jobs, out)
    if not any(NOTEBOOKS.glob("[0-9]*.ipynb")):
        failed.append(f"no notebooks in {NOTEBOOKS}: run this in the project's folder for figures")
    items = "".join(f"<li>{html.escape(line)}</li>" for line in [*failures, *failed])
    head = f'<div class="failed"><h2>What failed</h2><ul>{items}</ul></div>' if items else ""
    machines = {f"{e['device_name']}, torch {e['torch']}" for h in found for e in h.environments}
    links = [f'<a href="notebooks/{f.stem}.html">{f.stem}</a>' for f in executed]
    head += (f"<p>Runs: {len(found)}, on {html.escape('; '.join(sorted(machines)))}. Notebooks "
             f"executed on them: {', '.join(links) or 'none'}.</p>")  # fmt: skip
    main_notebook = next((file for file in executed if file.stem == main), None)
    write_page(out / "report.html", title, main_notebook, "plotly.min.js", head, code=False)
    return failed


def write_page(page: Path, title: str, executed: Path | None, js: str, head="", code=True) -> None:
    """Write an executed notebook as a page that loads nothing but ``js``."""
    exporter = nbconvert.HTMLExporter(
        template_name="basic", exclude_input=not code, exclude_input_prompt=True,
        exclude_output_prompt=True, exclude_anchor_links=True,
    )  # fmt: skip
    notebook = nbformat.read(executed, 4) if executed else nbformat.v4.new_notebook()
    if not code:
        notebook.cells = [cell for cell in notebook.cells if "-setup" not in cell.get("id", "")]
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            figure = output.get("data", {}).get("application/vnd.plotly.v1+json")
            if figure:
                figure["layout"].pop("width", None)  # as wide as the page
                output["data"] = {"text/html": plotly.io.to_html(
                    figure, include_plotlyjs=False, full_html=False, validate=False)}  # fmt: skip
    body, resources = exporter.from_notebook_node(notebook)
    css = "\n".join(resources["inlining"]["css"]) if code else ""
    text = PAGE.format(title=html.escape(title), css=css, js=js, body=head + body)
    write_atomically(page, text.encode("utf-8"))


class PrivateKernelManager(AsyncKernelManager):
    """A manager of kernels with one thread each, reached through private files, not open ports."""

    transport = "tcp" if os.name == "nt" else "ipc"
    started: ClassVar = weakref.WeakSet()

    def __init__(self, **settings):
        super().__init__(**settings)
        self.started.add(self)
        if self.transport == "ipc":  # in a private folder, deleted with the manager
            folder = tempfile.mkdtemp(prefix="hybrid-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self.ip = f"{folder}/kernel"

    async def start_kernel(self, **how):
        """Start a kernel with one thread: several share the cores, as runs do."""
        how["env"] = {**os.environ, **how.get("env", {}), "OMP_NUM_THREADS": "1"}
        await super().start_kernel(**how)
