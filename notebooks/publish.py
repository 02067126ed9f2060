"""Reading copies of the notebooks, executed on the published runs, and the site made of them.

python notebooks/publish.py copies   # data/results/reading/*.ipynb; minutes
python notebooks/publish.py site     # build/site/index.html, from what is committed; seconds
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import plotly

from hybrid_lib.study import notebooks
from hybrid_lib.widgets import playground

ROOT = Path(__file__).resolve().parent.parent
COPIES = ROOT / "data" / "results" / "reading"
STUDY = {"out": str(ROOT / "data/results/cpu-scale/clean"), "seeds": "0-3", "train": False}
SITE = ROOT / "build" / "site"


def copies() -> int:
    """Execute all notebooks; those that read a study read the published one."""
    jobs = {}
    for source in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        text = source.read_text("utf-8")
        jobs[source] = {k: v for k, v in STUDY.items() if '"seeds: str' in text}
    with tempfile.TemporaryDirectory() as out:
        executed, failed = notebooks.execute(jobs, Path(out))
        COPIES.mkdir(exist_ok=True)
        for file in executed:
            shutil.copy(file, COPIES)
    print("\n".join(failed))
    return len(failed)


def site() -> int:
    """Front page, playground, notebooks with live figures, results, and docstrings as reference."""
    shutil.rmtree(SITE, ignore_errors=True)
    for folder in ("notebooks", "data/results/cpu-scale"):
        (SITE / folder).mkdir(parents=True)
    (SITE / "plotly.min.js").write_text(plotly.offline.get_plotlyjs(), "utf-8")
    (SITE / "playground.html").write_text(playground.page(), "utf-8")
    for picture in ("notebooks/playground.gif", *ROOT.glob("data/results/**/*.png")):
        shutil.copy(ROOT / picture, SITE / (ROOT / picture).relative_to(ROOT))
    for copy in sorted(COPIES.glob("*.ipynb")):
        page = SITE / "notebooks" / f"{copy.stem}.html"
        notebooks.write_page(page, copy.stem, copy, js="../plotly.min.js")
    for text, page in {"README.md": "index", "data/results/README.md": "data/results/index",
                       "data/results/cpu-scale/TABLES.md": "data/results/cpu-scale/TABLES",
                       "CONTRIBUTING.md": "CONTRIBUTING"}.items():  # fmt: skip
        prose = SITE / f"{page}.ipynb"
        cell = nbformat.v4.new_markdown_cell(linked((ROOT / text).read_text("utf-8")))
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), prose)
        up = "../" * page.count("/")
        notebooks.write_page(
            prose.with_suffix(".html"), "hybrid-lib", prose, js=f"{up}plotly.min.js"
        )
        prose.unlink()
    reference = [sys.executable, "-m", "pdoc", "-d", "google", "-o", SITE / "reference"]
    return subprocess.run([*reference, "hybrid_lib"], cwd=ROOT).returncode


def linked(text: str) -> str:
    """Links of the repository's texts, as they are on the site; what is not there is no link."""
    text = re.sub(r"\]\(data/results/README\.md\)", "](data/results/index.html)", text)
    text = re.sub(
        r"\]\((?:\.\./)*data/results/reading/(\w+)\.ipynb\)", r"](notebooks/\1.html)", text
    )
    text = re.sub(r"\]\((CONTRIBUTING|(?:cpu-scale/)?TABLES)\.md\)", r"](\1.html)", text)
    return re.sub(r"(?<!!)\[([^][]*)\]\((?!https?:|#)[^)]*\.(?!html)\w+\)", r"\1", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("copies", "site"))
    sys.exit(globals()[parser.parse_args().what]())
