"""Execute the notebooks on the published runs, as reading copies, and build the site.

python notebooks/publish.py copies   # data/results/reading/*.ipynb; minutes
python notebooks/publish.py site     # build/site/index.html, from what is committed; a minute
"""

import argparse
import html
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import nbformat
import plotly

from hybrid_lib.study import notebooks
from hybrid_lib.widgets import playground

ROOT = Path(__file__).resolve().parent.parent
COPIES = ROOT / "data" / "results" / "reading"
SITE = ROOT / "build" / "site"
STUDY = {"out": "../data/results/cpu-scale/clean", "seeds": "0-3", "train": False}
TEXTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "data/README.md",
         "data/results/README.md", "data/results/cpu-scale/TABLES.md",
         "data/results/cpu-long/TABLES.md", "data/results/paper/TABLES.md")  # fmt: skip
FILES = ("notebooks/*.gif", "notebooks/[0-9]*.ipynb", "data/results/**/*.png")


def sources() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def copies() -> list[str]:
    """Execute all notebooks; those that read a study get the published one. Return failures."""
    os.chdir(ROOT / "notebooks")  # their paths are relative to it
    jobs = {s: STUDY if '"seeds: str' in s.read_text("utf-8") else {} for s in sources()}
    COPIES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as out:
        executed, failures = notebooks.execute(jobs, Path(out))
        for file in executed:
            (COPIES / file.name).write_text(lighter(nbformat.read(file, 4)), "utf-8")
    return failures


def lighter(notebook: nbformat.NotebookNode) -> str:
    """Return an executed notebook as text, the same on every machine."""
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
        for output in cell.get("outputs", []):
            if table := output.get("data", {}).get("text/html"):  # drop ids no style uses
                used = lambda found, table=table: found[0] * (f"#{found[1]}" in table)  # noqa: E731
                output["data"]["text/html"] = re.sub(r' id="(T_\w+)"', used, table)
    text = json.dumps(notebook, ensure_ascii=False, separators=(",", ":"))
    return text.replace(f"{ROOT}{os.sep}", "") + "\n"


def site() -> list[str]:
    """Build front page, playground, notebooks with live figures, results and reference."""
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir(parents=True)
    (SITE / "plotly.min.js").write_text(plotly.offline.get_plotlyjs(), "utf-8")
    (SITE / "playground.html").write_text(playground.page(), "utf-8")
    for file in (file for pattern in FILES for file in ROOT.glob(pattern)):
        copy = SITE / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    for copy in sorted(COPIES.glob("*.ipynb")):
        write(f"notebooks/{copy.stem}.html", copy.stem, copy)
    with tempfile.TemporaryDirectory() as folder:
        for text in TEXTS:
            cell = nbformat.v4.new_markdown_cell(linked(text))
            prose = Path(folder, "prose.ipynb")
            nbformat.write(nbformat.v4.new_notebook(cells=[cell]), prose)
            write(page(text), cell.source.partition("\n")[0].lstrip("# "), prose)
    reference()
    return []


def page(text: str) -> str:
    """Return where a text of the repository is on the site.

    >>> page("data/results/README.md"), page("CONTRIBUTING.md")
    ('data/results/index.html', 'CONTRIBUTING.html')
    """
    return re.sub("README$", "index", text.removesuffix(".md")) + ".html"


def linked(text: str) -> str:
    """Return a text with links to the site's pages; a link to anything not on it becomes text."""
    here = (ROOT / text).parent

    def link(found: re.Match) -> str:
        words, target, heading = found.groups()
        there = os.path.relpath(here / target, ROOT).replace(os.sep, "/")
        if "://" in target or (SITE / there).is_file():
            return found[0]
        copy = SITE / "notebooks" / f"{Path(there).stem}.html"
        if there in TEXTS or copy.is_file():
            there = page(there) if there in TEXTS else f"notebooks/{copy.name}"
            return f"[{words}]({os.path.relpath(ROOT / there, here)}{heading or ''})"
        return words

    return re.sub(r"\[([^][]*)\]\(([^)#]+)(#[^)]*)?\)", link, (ROOT / text).read_text("utf-8"))


def write(name: str, title: str, notebook: Path) -> None:
    up, file = "../" * name.count("/"), SITE / name
    links = {"index": "hybrid-lib", "playground": "Playground", "data/results/index": "Results",
             "reference/hybrid_lib": "Reference", "CONTRIBUTING": "Contributing"}  # fmt: skip
    head = " · ".join(f'<a href="{up}{k}.html">{label}</a>' for k, label in links.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    notebooks.write_page(file, title, notebook, f"{up}plotly.min.js", f"<nav>{head}</nav>")
    text = with_formulas(file.read_text("utf-8"))
    as_id = lambda found: f'<h2 id="{found[1].lower().replace(" ", "-")}">{found[1]}'  # noqa: E731
    text = re.sub("<h2>([^<]+)", as_id, text)  # for links, as on GitHub
    file.write_text(text, "utf-8")


def with_formulas(page: str) -> str:
    """Return a page with its formulas as MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert  # of the extra ``site``

    def as_mathml(found: re.Match) -> str:
        _, display, *inline = found.groups()
        formula = html.unescape(display or inline[0] or inline[1] or "")
        formula = formula.replace("{aligned}", "{align*}")  # looks the same
        if not formula:
            return found[0]
        drawing = convert(formula, display="block" if display else "inline")
        return drawing.replace('columnalign="', 'style="padding: 2px 0; text-align: ')

    verbatim = r"<(pre|code|script|style)\b.*?</\1>"
    formulas = r"\$\$(.+?)\$\$|\\\((.+?)\\\)|(?<![\w$])\$([^$<>]+?)\$"
    return re.sub(f"{verbatim}|{formulas}", as_mathml, page, flags=re.DOTALL)


def reference() -> None:
    """Render the docstrings as pages."""
    import pdoc

    pdoc.render.configure(docformat="google", show_source=False)
    packages = [f"hybrid_lib.{name}" for name in ("optim", "training", "study", "widgets")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about annotations of other packages' classes
        pdoc.pdoc("hybrid_lib", *packages, output_directory=SITE / "reference")
    (SITE / "reference" / "index.html").unlink()  # it only redirects
    for file in (SITE / "reference").rglob("*.html"):
        home = f'<a href="{os.path.relpath(SITE, file.parent)}/index.html">hybrid-lib</a>'
        text = with_formulas(file.read_text("utf-8"))
        file.write_text(text.replace("<h2>API Documentation</h2>", f"<h2>{home}</h2>"), "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("copies", "site"))
    failures = {"copies": copies, "site": site}[parser.parse_args().what]()
    print("\n".join(failures))
    sys.exit(len(failures))
