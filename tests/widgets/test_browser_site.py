"""The site in a real Chromium, without a network: no request, no error, no dead link."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_browser import browser, pytestmark, shots  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built from a copy of the committed files."""
    project = tmp_path_factory.mktemp("project")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    for name in listed.stdout.split():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    command = [sys.executable, "notebooks/publish.py", "site"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return project / "build" / "site"


def test_the_site_is_complete_without_a_network(site, browser, shots):  # noqa: F811
    pages, links, places, complaints = sorted(site.rglob("*.html")), set(), set(), []
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.on("request", lambda r: complaints.append(r.url) if r.url.startswith("http") else None)
    for file in pages:
        page.goto(file.as_uri())
        links |= set(page.evaluate("[...document.links].map(a => decodeURI(a.href))"))
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        places |= {f"{file.as_uri()}#{i}" for i in ids}
        figures = page.locator(".js-plotly-plot")
        if file.parent.name == "notebooks" and file.stem != "01_playground":
            assert figures.count() + page.locator("img").count() > 0, file
        assert "$$" not in page.locator("body").inner_text(), file
    assert complaints == []
    to_headings = {link for link in links if link.startswith("file:") and "#" in link}
    assert {link for link in to_headings - places if "/reference/" not in link} == set()
    ours = {link.split("#")[0] for link in links if link.startswith("file:")}
    ours = {link.removeprefix("file://") for link in ours}
    assert {link for link in ours if not Path(link).is_file()} == set()
    assert {str(file) for file in pages} - ours == set(), "pages that no link leads to"
    for name in ("index", "notebooks/02_optimizers", "notebooks/08_results", "data/results/index",
                 "reference/hybrid_lib/optim/rules"):  # fmt: skip
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.goto((site / f"{name}.html").as_uri())
            page.wait_for_timeout(500)
            page.screenshot(path=shots / f"site-{Path(name).name}-{scheme}.png")
    context.close()
