"""The playground's page and how it is shown; what the notebook says about it is true.

``test_browser_playground.py`` opens it in a browser.
"""

import json
import re

import pytest

from hybrid_lib.study import figures
from hybrid_lib.study.parameters import reason
from hybrid_lib.widgets import playground
from hybrid_lib.widgets.playground import METHODS
from hybrid_lib.widgets.surfaces import SURFACES, settled


def test_the_page_is_complete_and_small_and_makes_no_request():
    page = playground.page()
    assert len(page.encode()) <= 80_000
    assert not re.search(r"https?:|\bsrc=|@import|url\((?!#)|\bfetch\(|XMLHttpRequest", page)
    for method in METHODS.values():
        assert method.label in page
        assert method.colour in page
    for surface in SURFACES.values():
        assert surface.javascript() in page


def test_settings_are_written_into_the_page():
    settings = {
        "surface": "saddle", "methods": "adasgd, sgd", "lr": 0.02, "schedule": "cosine",
        "sgd_weight": 0.2, "sgd_weight_end": 0.7, "noise": 0.5, "seed": 3, "merge": "sum",
        "start": (1.5, 0.25), "step": 7,
    }  # fmt: skip
    page = playground.page(**settings)
    initial = json.JSONDecoder().raw_decode(page.split('"INITIAL": ')[1])[0]
    settings |= {"methods": ["adasgd", "sgd"], "start": [1.5, 0.25]}
    assert initial == settings
    assert playground.Settings().lr == SURFACES["beale"].lr


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"surface": "hill"}, r"surface='hill': .*'rosenbrock', "),
        ({"methods": "sgd, adagrad"}, r"methods='adagrad': .*'sgd', 'adam', "),
        ({"methods": ""}, r"methods=\[\]: .* at least 1 item"),
        ({"schedule": "zigzag"}, r"schedule='zigzag': .*'constant', 'linear', "),
        ({"merge": "mean"}, r"merge='mean': .*'product', 'sum' or 'graft'"),
        ({"lr": 0.0}, r"lr=0.0: .* greater than or equal to 0.000001"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"sgd_weight": 1.1, "sgd_weight_end": -1}, r"sgd_weight=1.1: .* 1; sgd_weight_end=-1: "),
        ({"noise": -0.1}, "noise=-0.1"),
        ({"seed": -1}, "seed=-1"),
        ({"step": 250}, "step=250: .* less than 250"),
        ({"start": (1.0,)}, "start"),
        ({"sgdweight": 0.5}, "sgdweight=0.5: .* not permitted"),
    ],
)
def test_impossible_settings_are_refused_with_what_is_allowed(settings, complaint):
    with pytest.raises(ValueError, match="Settings") as caught:
        playground.page(**settings)
    assert re.search(complaint, reason(caught.value))


def test_an_interactive_reader_gets_the_page_in_a_frame(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "is_interactive", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    playground.show(sgd_weight=0.3)
    (frame,) = re.findall('<iframe srcdoc="([^"]*)"', shown[0]["text/html"])
    assert "&quot;sgd_weight&quot;: 0.3" in frame
    assert "<script" not in frame


def test_without_an_interactive_reader_a_picture_is_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "is_interactive", lambda: False)
    monkeypatch.setattr(figures, "show", shown.append)
    playground.show(schedule="linear")
    names = [trace.name for trace in shown[0].data if trace.name]
    assert names[0] == "SGD: left the map after 37 steps"
    assert names[1:3] == [
        "Adam: within 0.01 after more than 250 steps",
        "ATMO: within 0.01 after 169 steps",
    ]
    assert "Beale" in shown[0].layout.title.text
    steps = [len(trace.x) for trace in shown[0].data if trace.xaxis == "x2"]
    assert steps[:2] == [37, 251], "the losses are drawn over their steps"
    with pytest.raises(ValueError, match="hill"):
        playground.show(surface="hill")


# What 01_playground.ipynb says is true.


def fates(**settings):
    """Steps until settled, or minus the steps until it left the map, or None; by method."""
    walked = playground.paths(**settings)
    return {n: settled(p) if len(p) == 251 else 1 - len(p) for n, p in walked.items()}


def test_the_opening_picture_is_as_described():
    assert fates() == {"sgd": -37, "adam": None, "atmo": 63}


def test_the_three_things_to_try_are_as_described():
    for weight, alone in ((0.0, "adam"), (1.0, "sgd")):
        walked = playground.paths(methods=f"atmo, {alone}", sgd_weight=weight)
        assert walked["atmo"] == pytest.approx(walked[alone])
    valley = {"surface": "rosenbrock", "lr": 0.003, "methods": "sgd, atmo"}
    half = fates(**valley, sgd_weight=0.5)
    assert half["sgd"] == -19 < half["atmo"] < 0
    rising = {"schedule": "linear", "sgd_weight": 0.0, "sgd_weight_end": 1.0}
    falling = {"schedule": "linear", "sgd_weight": 1.0, "sgd_weight_end": 0.0}
    assert fates(**valley, **rising)["atmo"] == 197
    noisy = {"surface": "saddle", "noise": 0.5, "methods": "atmo"}
    assert fates(**noisy, **rising) == {"atmo": None}
    assert fates(**noisy, **falling) == {"atmo": 134}
