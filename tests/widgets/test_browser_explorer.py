"""The explorer in a real Chromium: a run is started, watched, stopped, compared.

In JupyterLab, and in the closest stand-in for Colab's front end: the classic notebook with Colab's
versions of widgets. Run with ``make browser``; screenshots are kept as in ``test_browser.py``.
"""

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.request

import pytest
from test_browser import (  # noqa: F401
    NOTEBOOKS,
    _open,
    _open_classic,
    browser,
    classic,
    lab,
    pytestmark,
    set_theme,
    shots,
)

import hybrid_lib as hl

CURVES = "[...document.querySelectorAll('.hybrid-explorer [data-panel=loss] path[data-points]')]"
SIZE = {"width": 1400, "height": 1000}
FAKE_COLAB = """import sys, types
colab = types.ModuleType("google.colab")
colab.output = types.SimpleNamespace(enable_custom_widget_manager=lambda: None)
sys.modules |= {"google": types.ModuleType("google"), "google.colab": colab}"""


@pytest.fixture
def opened(request, browser, tmp_path):  # noqa: F811 - pytest passes fixtures by name
    """The page of the explorer's notebook, which keeps its runs in the test's folder."""
    front = getattr(request, "param", "lab")
    address = request.getfixturevalue("lab" if front == "lab" else "classic")
    notebook = json.loads((NOTEBOOKS / "09_explorer.ipynb").read_text("utf-8"))
    for cell in notebook["cells"]:
        if cell["metadata"].get("tags") == ["parameters"]:
            source = "".join(cell["source"])
            cell["source"] = source.replace('runs: str = ""', f"runs: str = {str(tmp_path)!r}")
        elif front == "colab" and cell["source"][0].startswith("explorer = explore("):
            cell["source"] = [f"{FAKE_COLAB}\n", *cell["source"]]
    content = json.dumps({"type": "notebook", "format": "json", "content": notebook}).encode()
    name = f"{tmp_path.name}.ipynb"  # a new one: an opened notebook has a kernel already
    url = f"{address}/api/contents/{name}"
    urllib.request.urlopen(urllib.request.Request(url, content, method="PUT")).close()
    page, complaints = (_open if front == "lab" else _open_classic)(address, browser, name)
    began = time.perf_counter()  # the cells have been started
    page.get_by_role("button", name="Start", exact=True).wait_for(timeout=120_000)
    print(f"\nexplorer in {front}: Start appears after {time.perf_counter() - began:.1f} s")
    page.set_viewport_size(SIZE)
    yield page, complaints
    page.close()


def points(page):
    """How many epochs the runs' first curve shows; 0 without curves."""
    return int(page.evaluate(f"{CURVES}[0]?.dataset.points ?? 0"))


def wait_for_points(page, count):
    page.wait_for_function(f"({CURVES}[0]?.dataset.points ?? 0) >= {count}", timeout=90_000)


def press(page, name, until):
    """Press a button, again if the page was not listening yet."""
    button = page.get_by_role("button", name=name, exact=True)
    for _ in range(5):
        if button.is_visible() and button.is_enabled():
            button.click()
        with contextlib.suppress(Exception):
            return _status(page).filter(has_text=re.compile(until)).wait_for(timeout=8000)
    raise AssertionError(f"{name}: {page.locator('.hybrid-explorer').inner_text()}")


def _control(page, label):
    return page.get_by_label(label, exact=True)


def _status(page):
    return page.locator(".hybrid-explorer [role=status]")


@pytest.mark.parametrize(
    "opened", ["lab", pytest.param("classic", marks=pytest.mark.slow)], indirect=True
)
def test_start_watch_stop_compare_and_repeat(opened, shots, tmp_path, request):  # noqa: F811
    page, complaints = opened
    front = request.node.callspec.params["opened"]
    press(page, "Start", "epoch")
    wait_for_points(page, 2)
    wait_for_points(page, points(page) + 1)  # they grow by themselves
    page.screenshot(path=shots / f"explorer-{front}-running.png")

    press(page, "Stop", "^stopped")
    assert "Start resumes" in _status(page).inner_text()
    (folder,) = tmp_path.glob("*-1")
    assert len(hl.History.load(folder).rows) == points(page)

    # A second run beside the first, and a third one that waits for it.
    press(page, "Reset", "^\\s*$")
    _control(page, "Network width").fill("4")
    _control(page, "Epochs").fill("4")
    page.keyboard.press("Tab")
    page.wait_for_timeout(500)
    press(page, "Start", "epoch")
    _control(page, "Epochs").fill("2")
    page.keyboard.press("Tab")
    page.wait_for_timeout(500)
    press(page, "Queue", "complete")
    page.get_by_label("Earlier runs", exact=True).select_option(index=[0, 1])
    page.wait_for_function(f"{CURVES}.length === 6")  # training and test of three runs
    _legend_and_cross_hair(page)
    page.get_by_label(re.compile("the report's accuracies")).check()
    page.locator("path[data-part=report]").wait_for()
    right_ends = page.evaluate("""() => ['path[data-part=report]', '.hybrid-curves > svg'].map(
        (name) => document.querySelector(name).getBoundingClientRect().right)""")
    assert right_ends[0] <= right_ends[1], "the report's later epochs are left out"
    rate = _control(page, "Learning rate η")
    right = rate.input_value()
    rate.fill("-1")
    page.keyboard.press("Tab")
    page.get_by_role("alert").filter(has_text="greater than 0").wait_for()
    assert page.get_by_role("button", name="Start", exact=True).is_disabled()
    _screenshots(page, shots, front)
    rate.fill(right)
    page.keyboard.press("Tab")
    page.get_by_role("alert").filter(has_text="greater than 0").wait_for(state="hidden")

    # The command in the box, run unchanged elsewhere, gives the same numbers.
    code = _control(page, "With Python").input_value()
    (folder,) = tmp_path.glob("*-3")
    first = _numbers(folder)
    folder.rename(folder.with_name("moved"))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert _numbers(folder) == first
    assert complaints == []
    print(f"screenshots: {shots}")


@pytest.mark.slow
@pytest.mark.parametrize("opened", ["colab"], indirect=True)
def test_in_colab_curves_grow_while_the_run_occupies_the_notebook(opened):
    page, complaints = opened
    press(page, "Start", "epoch")
    wait_for_points(page, 1)
    wait_for_points(page, points(page) + 1)
    page.evaluate("Jupyter.notebook.kernel.interrupt()")
    _status(page).filter(has_text="interrupt; Start resumes").wait_for(timeout=20_000)
    press(page, "Start", "epoch")
    assert complaints == []


def test_a_look_inside_is_a_map_of_layers(opened, shots):  # noqa: F811
    page, complaints = opened
    page.get_by_label("look inside", exact=False).check()
    _control(page, "Epochs").fill("3")
    page.keyboard.press("Tab")
    press(page, "Start", "complete")
    cells = page.locator("[data-panel=inside] rect[data-layer]")
    layers = page.evaluate(
        "new Set([...document.querySelectorAll('rect[data-layer]')].map(r => r.dataset.layer)).size"
    )
    assert cells.count() == 3 * layers > 100
    choice = page.locator(".hybrid-curves select")
    colours = set()
    for name in ("share of SGD in the movement", "cosine of Padam and SGD", "movement ÷ gradient"):
        choice.select_option(name)
        page.locator('rect[data-layer="0"][data-column="1"]').hover()
        assert re.search(
            r"stem.0, epoch 2:\s+[-.e\d]+", page.locator("[data-panel=inside]").text_content()
        )
        colours.add(cells.nth(1).get_attribute("fill"))
    assert len(colours) > 1
    panel = page.locator("[data-panel=inside]")
    panel.focus()
    for key, here in (("ArrowDown", "stem.1, epoch 2"), ("ArrowRight", "stem.1, epoch 3")):
        page.keyboard.press(key)
        assert here in panel.get_attribute("aria-label")
    page.locator(".hybrid-explorer").screenshot(path=shots / "explorer-inside.png")
    assert complaints == []


def test_the_explorer_can_be_used_by_keyboard_alone(opened):
    page, complaints = opened
    _control(page, "Method").focus()
    reached = []
    for _ in range(60):
        here = page.evaluate(
            """() => { const e = document.activeElement;
                       return e.textContent.trim() && e.tagName === 'BUTTON' ? e.textContent.trim()
                         : (e.labels && e.labels[0] ? e.labels[0].textContent : e.tagName); }"""
        )
        reached.append(here)
        page.keyboard.press("Tab")
    for name in ("Method", "Name of the run", "Start", "Reset", "Learning rate η", "λ at the start",
                 "Data set", "Seed", "Earlier runs", "With papermill", "With Python"):  # fmt: skip
        assert name in reached, " | ".join(reached)
    _control(page, "Name of the run").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    _status(page).filter(has_text="epoch").wait_for(timeout=30_000)
    page.get_by_role("button", name="Stop", exact=True).focus()
    page.keyboard.press("Space")
    _status(page).filter(has_text="stopped").wait_for(timeout=30_000)
    assert complaints == []


def _legend_and_cross_hair(page):
    """A click hides a run and another one shows it; the table follows pointer and keys."""
    name = page.locator(".hybrid-curves button", has_text="-1")
    for pressed, count in (("false", 4), ("true", 6)):
        name.click()
        page.wait_for_function(f"{CURVES}.length === {count}")
        assert name.get_attribute("aria-pressed") == pressed
    assert page.locator("[data-panel=inside]").is_hidden()  # no run was looked into
    figure, head = (
        page.locator(".hybrid-curves > svg").first,
        page.locator(".hybrid-curves th").first,
    )
    assert head.inner_text() == "last epoch"
    box = figure.bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 90)
    assert head.inner_text() == "epoch 1"
    page.mouse.move(0, 0)
    figure.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert head.inner_text() == "epoch 3"
    cells = page.locator(".hybrid-curves tbody tr").first.locator("td").all_inner_texts()
    assert cells[2].replace("\n", "") == "––"  # a run of two epochs has no third


def _screenshots(page, folder, front):
    page.set_viewport_size({"width": 1400, "height": 1700})
    _control(page, "With Python").scroll_into_view_if_needed()
    for theme in ("Dark", "Light") if front == "lab" else ("Light",):
        if front == "lab":
            set_theme(page, theme)
        fills = page.evaluate(
            """() => ['text', 'h4', 'table button', '.widget-label'].map(name => {
                 const look = getComputedStyle(document.querySelector('.hybrid-explorer ' + name));
                 return name === 'text' ? look.fill : look.color;
               })"""
        )
        assert len(set(fills)) == 1, fills  # the figure's text is as readable as the page's
        page.screenshot(path=folder / f"explorer-{front}-{theme.lower()}.png")
    page.set_viewport_size({"width": 760, "height": 1700})
    page.wait_for_timeout(500)
    page.screenshot(path=folder / f"explorer-{front}-narrow.png")
    page.set_viewport_size(SIZE)


def _numbers(folder):
    rows = hl.History.load(folder).rows
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
