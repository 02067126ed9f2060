"""The playground's page in a real Chromium: its arithmetic, and what a reader sees and uses.

Run with ``make browser``. Screenshots go where ``test_browser.py`` puts them.
"""

import itertools
import re

import pytest
import torch
from test_browser import browser, pytestmark, shots  # noqa: F401

from hybrid_lib.optim.hybrid import MERGES
from hybrid_lib.optim.schedules import SHAPES, Constant
from hybrid_lib.widgets import playground
from hybrid_lib.widgets.playground import METHODS
from hybrid_lib.widgets.surfaces import STEPS, SURFACES, normal


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "playground.html"
    file.write_text(playground.page(), "utf-8")
    return file.as_uri()


@pytest.fixture
def visit(browser, address):  # noqa: F811
    """A function that opens the page; at the end its console must be clean."""
    contexts, complaints = [], []

    def opened(link="", motion="reduce", **settings):
        contexts.append(browser.new_context(reduced_motion=motion, **settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address + link)
        page.wait_for_function("document.querySelector('#story').innerText")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


# --- Arithmetic. ---


def by_python(points, name, settings):
    """Where the Python optimizer goes from each of the page's points.

    Before every step it is moved to the page's point; its buffers, weights and noise are its own.
    If it moved on from its own point, rounding would grow with every step on steeper surfaces.
    """
    ends = [(1 - λ, λ) for λ in (settings["sgd_weight"], settings["sgd_weight_end"])]
    shape, surface = settings["schedule"], SURFACES[settings["surface"]]
    weights = Constant(ends[0]) if shape == "constant" else SHAPES[shape](*ends, STEPS)
    w, draws, reached = torch.zeros(2, dtype=torch.float64), normal(settings["seed"]), []
    merge = settings["merge"]
    optimizer = METHODS[name]([w], lr=settings["lr"], weight_decay=0.0, merge=merge)
    for step, point in enumerate(points[:-1]):
        w.copy_(torch.tensor(point, dtype=torch.float64))
        if METHODS[name].is_hybrid:
            optimizer.param_groups[0]["lambdas"] = weights(step)
        g, D = torch.tensor(surface.at(*point)[1:], dtype=torch.float64).view(2, 2)
        noise = torch.tensor([next(draws), next(draws)], dtype=torch.float64)
        w.grad = g + settings["noise"] * noise
        optimizer.step(hess_diag=[D])
        reached.append(w.tolist())
    return reached


COMBINATIONS = [
    *itertools.product(SURFACES, ["constant"], ["product"], [0.0]),
    *itertools.product(["himmelblau"], SHAPES, ["product"], [0.0]),
    *itertools.product(["saddle"], ["cosine"], MERGES, [0.3]),
]


def test_the_page_computes_what_the_optimizers_do(visit):
    page, compared = visit(), 0
    for surface, schedule, merge, noise in COMBINATIONS:
        settings = {
            "surface": surface, "schedule": schedule, "merge": merge, "noise": noise, "seed": 5,
            "sgd_weight": 0.2, "sgd_weight_end": 0.7, "lr": SURFACES[surface].lr,
            "methods": [n for n, m in METHODS.items() if m.is_hybrid or schedule == "constant"
                        or noise],
        }  # fmt: skip
        paths = page.evaluate("settings => playground.walk(settings)", settings)
        for name in settings["methods"]:
            points = paths[name]["points"]
            if paths[name]["left"] is None:
                assert len(points) == STEPS + 1
            ours = torch.tensor(by_python(points, name, settings), dtype=torch.float64)
            theirs = torch.tensor(points[1:], dtype=torch.float64)
            torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9, msg=f"{name} {settings}")
            compared += len(points) - 1
    assert compared > 20_000


def test_on_their_own_page_and_optimizers_arrive_at_the_same_points(visit):
    page = visit()
    for settings in ({}, {"surface": "ravine"}, {"noise": 0.4, "surface": "saddle", "seed": 11}):
        chosen = playground.Settings(methods=list(METHODS), **settings).model_dump()
        paths = page.evaluate("settings => playground.walk(settings)", chosen)
        for name, ours in playground.paths(methods=list(METHODS), **settings).items():
            points = torch.tensor(paths[name]["points"], dtype=torch.float64)
            n = len(points) - (paths[name]["left"] is not None)  # the last step is off the map
            torch.testing.assert_close(points[:n], torch.tensor(ours[:n, :2]), rtol=1e-6, atol=1e-6)
            assert len(points) == len(ours)
            assert paths[name]["settled"] == playground.settled(ours)


# --- What a reader sees and uses. ---

ATMO = "tr[data-method=atmo] td"


def drag(page, name, value):
    page.locator(f"[name={name}]").evaluate(
        "(input, value) => { input.value = value;"
        " input.dispatchEvent(new Event('input', {bubbles: true}));"
        " input.dispatchEvent(new Event('change', {bubbles: true})); }", str(value),
    )  # fmt: skip
    drawn(page)


def drawn(page):
    """Wait until the page is up to date: it draws once per frame."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def arrows(page):
    return page.locator("#map .arrow:not(.edge)").evaluate_all("all => all.map(a => a.innerHTML)")


def test_with_reduced_motion_the_finished_picture_stands_still(visit):
    page = visit()
    story = page.inner_text("#story")
    for sentence in (
        "SGD overshoots and leaves the map after 37 steps.",
        "ATMO with λ = 0.1 stays within 0.01 of the lowest loss after 63 steps.",
        "Adam is still on its way after 250 steps.",
    ):
        assert sentence in story
    assert page.locator(ATMO).all_inner_texts() == ["ATMO", "63", "3.1·10⁻⁴"]
    assert page.locator("tr[data-method=sgd] td").nth(1).inner_text() == "left after 37"
    before = page.inner_html("#map svg")
    page.wait_for_timeout(500)
    assert page.inner_html("#map svg") == before


def test_the_animation_plays_once_and_then_stands_still(visit):
    page = visit(motion="no-preference")
    page.wait_for_function("playground.state.step > 5")
    assert "37 steps" not in page.inner_text("#story")
    page.wait_for_function("playground.state.step > 40")
    assert re.search("37 steps", page.inner_text("#story"))
    assert "63 steps" not in page.inner_text("#story")
    page.get_by_role("button", name="Play", exact=True).wait_for(timeout=15_000)
    assert "250 steps" in page.inner_text("#story")
    before = page.inner_html("#map svg")
    page.wait_for_timeout(500)
    assert page.inner_html("#map svg") == before


def test_dragging_lambda_moves_paths_arrows_and_table_in_every_frame(visit):
    page = visit()
    paths, before = page.locator("#map .path, #chart .path"), arrows(page)
    assert len(before) == 3
    drawn = paths.evaluate_all("all => all.map(path => path.getAttribute('d'))")
    drag(page, "sgd_weight", 0.3)
    redrawn = paths.evaluate_all("all => all.map(path => path.getAttribute('d'))")
    assert [a != b for a, b in zip(drawn, redrawn)] == [False, False, True] * 2
    assert arrows(page) != before
    assert page.locator(ATMO).nth(1).inner_text() == "206"
    drawn_per_second = page.evaluate(
        """new Promise(done => {
             const λ = document.querySelector('#sgd_weight'), began = performance.now();
             let frames = 0;
             const next = now => {
               if (now - began > 1000) return done(1000 * frames / (now - began));
               λ.value = 0.01 * (++frames % 100);
               λ.dispatchEvent(new Event('input', { bubbles: true }));
               requestAnimationFrame(next);
             };
             requestAnimationFrame(next);
           })"""
    )
    print(f"\nplayground: {drawn_per_second:.0f} pictures a second while λ is dragged")
    assert drawn_per_second > 1  # 30 or more on a machine that does nothing else


def test_every_control_changes_the_picture(visit):
    page = visit()
    for name, value in {
        "schedule": "cosine", "sgd_weight_end": 0.6, "merge": "graft", "noise": 0.5, "seed": 5,
        "lr": -2.3, "x": 0.5, "y": 1.2, "surface": "saddle", "step": 9,
    }.items():  # fmt: skip
        before = page.inner_html("#map svg")
        drag(page, name, value)
        assert page.inner_html("#map svg") != before, name
    assert page.evaluate("playground.state.lr") == SURFACES["saddle"].lr
    page.get_by_label("AdaSGD").check()
    page.get_by_label("Arrows of").select_option("adasgd")
    drawn(page)
    assert "AdaHessian's step" in page.inner_text("#step-text")
    for name in METHODS:
        page.locator(f"[value={name}][type=checkbox]").uncheck()
    page.get_by_text("No method is chosen").wait_for()
    page.get_by_role("button", name="Reset").click()
    drawn(page)
    assert page.locator(ATMO).nth(1).inner_text() == "63"


def test_a_click_on_the_map_sets_the_start_and_a_link_restores_the_state(visit):
    page = visit()
    drag(page, "sgd_weight", 0.25)
    page.locator("#map svg").click(position={"x": 200, "y": 150})
    drawn(page)
    x, y = page.evaluate("playground.state.start")
    assert page.get_by_label("Start x").input_value() == f"{x:g}"
    assert page.get_by_label("Start y").input_value() == f"{y:g}"
    page.get_by_role("button", name="Copy link").click()
    drawn(page)
    link = page.get_by_label("Link to this state").input_value()
    assert link == page.url
    other = visit("#" + link.partition("#")[2])
    assert other.evaluate("playground.state") == page.evaluate("playground.state")
    assert other.inner_html("#map svg") == page.inner_html("#map svg")
    page = visit("#surface=himmelblau&lr=0.01")  # another surface's own rate
    page.get_by_role("button", name="Copy link").click()
    link = page.get_by_label("Link to this state").input_value()
    assert visit("#" + link.partition("#")[2]).evaluate("playground.state.lr") == 0.01
    wrong = visit("#surface=hill&sgd_weight=2&seed=3&step=1.5&constructor=1")
    for fault in ("surface=hill (rosenbrock", "sgd_weight=2 (0 to 1)", "step=1.5", "constructor=1"):
        assert fault in wrong.inner_text("#note")
    assert wrong.evaluate("playground.state.seed") == 3


def test_the_playground_can_be_used_by_keyboard_alone(visit):
    page = visit()
    page.get_by_role("slider", name="Step").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    drawn(page)
    assert page.evaluate("playground.state.step") == 4
    labelled = "all => all.every(i => i.labels?.length || i.ariaLabel || i.innerText)"
    assert page.locator("input, select, button").evaluate_all(labelled)


def test_the_page_fits_and_follows_light_and_dark_mode(visit, shots):  # noqa: F811
    for width, scheme in ((1080, "light"), (1080, "dark"), (380, "light"), (380, "dark")):
        page = visit(viewport={"width": width, "height": 900}, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.screenshot(path=shots / f"playground-{width}-{scheme}.png", full_page=True)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
