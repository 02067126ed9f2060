"""The explorer in JupyterLab, in a real Chromium: a run is started, watched, stopped, compared.

Run with ``make browser``; screenshots are kept as in ``test_browser.py``.
"""

import json
import re
import subprocess
import sys
import time
import urllib.request

import pytest
from test_browser import NOTEBOOKS, _open, browser, lab, pytestmark, set_theme, shots  # noqa: F401

import hybrid_lib as hl

SIZE = {"width": 1400, "height": 1000}


@pytest.fixture
def opened(lab, browser, tmp_path):  # noqa: F811 - pytest passes fixtures by name
    """The page of the explorer's notebook, its runs kept in a folder of the test."""
    notebook = json.loads((NOTEBOOKS / "09_explorer.ipynb").read_text("utf-8"))
    for cell in notebook["cells"]:
        if cell["metadata"].get("tags") == ["parameters"]:
            source = "".join(cell["source"])
            cell["source"] = source.replace('runs: str = ""', f"runs: str = {str(tmp_path)!r}")
    content = json.dumps({"type": "notebook", "format": "json", "content": notebook}).encode()
    name = f"{tmp_path.name}.ipynb"  # one of its own: a name that was open has a kernel already
    request = urllib.request.Request(f"{lab}/api/contents/{name}", content, method="PUT")
    urllib.request.urlopen(request).close()
    began = time.perf_counter()
    page, complaints = _open(lab, browser, name)
    page.set_viewport_size(SIZE)
    page.get_by_role("button", name="Start", exact=True).wait_for(timeout=120_000)
    print(f"\nexplorer: Start can be pressed {time.perf_counter() - began:.1f} s after opening")
    yield page, complaints
    page.close()


def points(page):
    """How many epochs the first curve shows; 0 without curves."""
    return page.evaluate(
        """() => {
             const plots = [...document.querySelectorAll('.jupyter-widgets .js-plotly-plot')];
             const curves = plots.find(p => p.layout.yaxis.title.text.startsWith('loss'));
             return curves && curves._fullData.length ? curves._fullData[0].x.length : 0;
           }"""
    )


def wait_for_points(page, count):
    end = time.monotonic() + 60
    while points(page) < count:
        assert time.monotonic() < end, f"{points(page)} points"
        page.wait_for_timeout(100)


def press(page, name, until):
    """Press a button; again, should the page not have been listening yet."""
    button, said = page.get_by_role("button", name=name, exact=True), _status(page)
    for _ in range(5):
        if button.is_enabled():
            button.click()
        try:
            said.filter(has_text=re.compile(until)).wait_for(timeout=8000)
            return
        except Exception:
            continue
    texts = page.locator(".jp-OutputArea-output :is([role=status], [role=alert])").all_inner_texts()
    raise AssertionError(f"{name}: {texts}")


def _control(page, label):
    return page.get_by_label(label, exact=True)


def _status(page):
    return page.locator(".jp-OutputArea-output [role=status]")


def test_start_watch_stop_compare_and_repeat(opened, shots, tmp_path):  # noqa: F811
    page, complaints = opened
    press(page, "Start", "epoch")
    wait_for_points(page, 2)
    before = points(page)
    wait_for_points(page, before + 1)  # they grow by themselves
    page.screenshot(path=shots / "explorer-running.png")

    page.evaluate(
        """() => {
             const said = document.querySelector('.jp-OutputArea-output [role=status]');
             const stop = [...document.querySelectorAll('button')]
               .find(b => b.textContent.trim() === 'Stop');
             window.answered = null;
             const pressed = performance.now();
             const view = setInterval(() => {
               const now = document.querySelector('.jp-OutputArea-output [role=status]');
               if (now && now.textContent.startsWith('stopped')) {
                 window.answered = performance.now() - pressed;
                 clearInterval(view);
               }
             }, 5);
             stop.click();
           }"""
    )
    page.wait_for_function("window.answered !== null", timeout=20_000)
    print(f"Stop answered after {page.evaluate('window.answered') / 1000:.2f} s")
    assert "Start goes on" in _status(page).inner_text()
    kept = points(page)
    (folder,) = tmp_path.glob("*-1")
    assert len(hl.History.load(folder).rows) == kept

    # A second run beside the first.
    press(page, "Reset", "^\\s*$")
    _control(page, "Network width").fill("4")
    _control(page, "Epochs").fill("2")
    page.keyboard.press("Tab")
    page.wait_for_timeout(500)
    press(page, "Start", "complete")
    page.get_by_label("Earlier runs", exact=True).select_option(index=0)
    page.wait_for_function(
        """() => [...document.querySelectorAll('.jupyter-widgets .js-plotly-plot')]
                   .some(p => p._fullData.length === 8)"""
    )
    rate = _control(page, "Learning rate η")
    right = rate.input_value()
    rate.fill("-1")
    page.keyboard.press("Tab")
    page.get_by_role("alert").filter(has_text="greater than 0").wait_for()
    assert page.get_by_role("button", name="Start", exact=True).is_disabled()
    _screenshots(page, shots)
    rate.fill(right)
    page.keyboard.press("Tab")
    page.get_by_role("alert").filter(has_text="greater than 0").wait_for(state="hidden")

    # The command in the box, run as it stands elsewhere, has the same numbers.
    code = _control(page, "With Python").input_value()
    (folder,) = tmp_path.glob("*-2")
    first = _numbers(folder)
    folder.rename(folder.with_name("moved"))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert _numbers(folder) == first
    assert complaints == []
    print(f"screenshots: {shots}")


def test_the_keyboard_alone_is_enough(opened):
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


def _screenshots(page, folder):
    page.set_viewport_size({"width": 1400, "height": 1700})
    _control(page, "With Python").scroll_into_view_if_needed()
    for theme in ("Dark", "Light"):
        set_theme(page, theme)
        page.screenshot(path=folder / f"explorer-{theme.lower()}.png")
    page.set_viewport_size(SIZE)


def _numbers(folder):
    rows = hl.History.load(folder).rows
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
