"""The notebooks in JupyterLab, in a real Chromium: what a reader sees and uses.

Run with ``make browser``. Screenshots, light and dark, go to the folder that the environment
variable SCREENSHOTS names, or to one that the test prints.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt install chromium"),
    pytest.mark.filterwarnings("default"),  # the browser's own
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab with its own settings, on copies of the notebooks."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install .[lab]")
    home = tmp_path_factory.mktemp("lab")
    work = home / "notebooks"
    work.mkdir()
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        shutil.copy(notebook, work)
    settings = home / "settings" / "@jupyterlab"
    for name, values in {
        "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are on the page
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }.items():
        file = settings / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), "utf-8")
    options = ["--expose-app-in-browser", "--ServerApp.port_retries=0", "--IdentityProvider.token="]
    places = {
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "JUPYTERLAB_SETTINGS_DIR": settings.parent,
    }
    with serving(
        [sys.executable, "-m", "jupyter", "lab", *options], "ServerApp", home, places
    ) as url:
        yield url


@pytest.fixture(scope="module")
def classic(colab_python, tmp_path_factory):
    """The address of a classic notebook, the closest stand-in for Colab's front end."""
    home = tmp_path_factory.mktemp("classic")
    shutil.copytree(NOTEBOOKS, home / "notebooks")
    command = [colab_python, "-m", "notebook", "--NotebookApp.token="]
    with serving(command, "NotebookApp", home, {}) as url:
        yield url


@contextlib.contextmanager
def serving(command: list, app: str, home: Path, environment: dict):
    """Start a notebook server without this machine's settings; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"port": port, "ip": "127.0.0.1", "disable_check_xsrf": True}
    command = [*command, "--no-browser", "--allow-root"]
    command += [f"--{app}.{name}={value}" for name, value in options.items()]
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = {name: home / name.lower() for name in folders} | environment
    with open(home / "server.log", "w") as log:
        server = subprocess.Popen(
            command, cwd=home / "notebooks", stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {name: str(value) for name, value in environment.items()},
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(lambda: urllib.request.urlopen(f"{address}/api", timeout=1), 90, command[2])
        yield address
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install .[test]")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def shots(tmp_path):
    """Where screenshots are kept."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("front", ["lab", pytest.param("classic", marks=pytest.mark.slow)])
def test_the_playground_responds_in_its_frame(front, browser, shots, request):
    open_in, address = (
        {"lab": _open, "classic": _open_classic}[front],
        request.getfixturevalue(front),
    )
    page, complaints = open_in(address, browser, "01_playground.ipynb")
    page.locator("iframe[srcdoc]").wait_for(timeout=120_000)
    frame = page.frame_locator("iframe[srcdoc]")
    frame.locator("#story").filter(has_text="63 steps").wait_for(timeout=60_000)
    λ = frame.get_by_role("slider", name="λ of SGD")
    λ.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")  # the keyboard alone is enough
    frame.locator("tr[data-method=atmo]").filter(has_text="206").wait_for()
    frame.get_by_role("button", name="Copy as Python").click()
    python = frame.get_by_label("Link to this state").input_value()
    assert python.startswith('playground.show(surface="beale", methods="sgd, adam, atmo", lr=0.01')
    for theme, scheme in {"Light": "light", "Dark": "dark"}.items() if front == "lab" else ():
        set_theme(page, theme)
        assert frame.locator("html").evaluate("html => html.style.colorScheme") == scheme
        page.screenshot(path=shots / f"playground-{scheme}.png")
    page.screenshot(path=shots / f"playground-{front}.png")
    assert complaints == []
    page.close()


def set_theme(page, theme: str) -> None:
    change = "theme => void jupyterapp.commands.execute('apputils:change-theme', {theme})"
    page.evaluate(change, f"JupyterLab {theme}")
    page.wait_for_timeout(1500)


def _open(lab: str, browser, notebook: str):
    """A page with all cells of a notebook run, and the list of what its console complains of."""
    page = browser.new_page(viewport={"width": 1500, "height": 1250})
    complaints = []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{lab}/lab/tree/{notebook}?reset")  # no tabs of earlier pages
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)
    page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")
    return page, complaints


def _open_classic(address, browser, notebook: str):
    page, complaints = browser.new_page(), []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{address}/notebooks/{notebook}")
    page.wait_for_function("window.Jupyter?.notebook?.kernel?.is_connected()", timeout=60_000)
    page.wait_for_timeout(6000)  # widgets made before the page has registered them are lost
    page.evaluate("Jupyter.notebook.execute_all_cells()")
    return page, complaints


def _wait(ready, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if ready():
                return
        except OSError:
            pass
        if time.monotonic() > end:
            raise TimeoutError(f"{what} was not ready after {seconds} s")
        time.sleep(0.3)
