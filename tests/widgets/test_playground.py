"""The playground: its numbers are the optimizers' own, its widget answers, its text is true."""

import dataclasses
import sys
import time
import types

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from plotly.basedatatypes import Undefined

from hybrid_lib.optim import methods, schedules
from hybrid_lib.study import figures
from hybrid_lib.widgets import anatomy, walks
from hybrid_lib.widgets.playground import Playground, describe, draw, playground
from hybrid_lib.widgets.surfaces import SURFACES
from hybrid_lib.widgets.walks import ADAPTIVE, METHODS, STEPS, Setup, method, paths, scan, summary

BEALE, SADDLE = SURFACES["beale"], SURFACES["saddle"]
everyone = {name: method(name, lr=0.005) for name in METHODS}


def walk(surface, make, steps, weights=None):
    """The same walk by autograd and by whatever optimizer, step by step."""
    w = torch.nn.Parameter(torch.tensor(surface.start, dtype=torch.float64))
    optimizer, points = make([w]), [w.detach().clone()]
    for step in range(steps):
        loss = surface(w)
        (w.grad,) = torch.autograd.grad(loss, w)
        if weights is not None:
            optimizer.param_groups[0]["lambdas"] = weights(step)
        if getattr(optimizer, "needs_hessian", False):
            full = torch.autograd.functional.hessian(surface, w.detach())
            optimizer.step(hess_diag=[full.diagonal()])
        else:
            optimizer.step()
        points.append(w.detach().clone())
    return torch.stack(points).numpy()


# What is computed.


@pytest.mark.parametrize(
    ("name", "weights", "reference"),
    [
        ("atmo", (1, 0), lambda p: torch.optim.Adam(p, lr=0.005)),
        ("atmo", (0, 1), lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.95)),
        ("padam_sgd", (0, 1), lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.9)),
        ("adam", None, lambda p: torch.optim.Adam(p, lr=0.005)),
        ("sgd", None, lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.95)),
    ],
)
def test_one_rule_alone_walks_torchs_path(name, weights, reference):
    schedule = weights and schedules.Constant(weights)
    ours = paths(SADDLE, {name: everyone[name]}, schedule, steps=60)[name]
    assert ours.points == pytest.approx(walk(SADDLE, reference, 60), abs=1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_a_path_is_the_one_that_the_optimizer_walks_by_itself(name):
    schedule = schedules.Linear((1, 0), (0, 1), epochs=30)
    weights = schedule if name in ADAPTIVE else None
    ours = paths(SADDLE, everyone, schedule, steps=40)[name]
    assert ours.points == pytest.approx(walk(SADDLE, everyone[name], 40, weights), abs=1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_every_step_is_the_merged_direction_times_the_merged_step_size(name):
    path = paths(BEALE, everyone, schedules.Linear(epochs=50), steps=50, noise=0.1)[name]
    weighted = sum(λ[:, None] * d for λ, d in zip(path.lambdas.T, path.directions.swapaxes(0, 1)))
    assert path.merged == pytest.approx(weighted)
    moves = np.diff(path.points, axis=0)
    assert moves == pytest.approx(-path.merged_step_sizes[:, None] * path.merged, abs=1e-12)


def test_methods_walk_alone_as_they_walk_in_company():
    together = paths(BEALE, everyone, schedules.Constant((0.7, 0.3)), steps=60, noise=0.2)
    for name, make in everyone.items():
        alone = paths(BEALE, {name: make}, schedules.Constant((0.7, 0.3)), steps=60, noise=0.2)
        assert np.array_equal(alone[name].points, together[name].points)


def test_the_schedule_is_in_force_step_by_step_and_for_hybrids_only():
    schedule = schedules.Cosine((1, 0), (0, 1), 20)
    walked = paths(SADDLE, everyone, schedule, steps=20)
    assert walked["atmo"].lambdas.tolist() == [list(schedule(step)) for step in range(20)]
    assert walked["adam"].lambdas.tolist() == [[1.0]] * 20


def test_noise_is_seeded_shared_and_can_be_absent():
    def points(**settings):
        return paths(SADDLE, {"adam": everyone["adam"]}, steps=30, **settings)["adam"].points

    assert np.array_equal(points(noise=0.5, seed=1), points(noise=0.5, seed=1))
    assert not np.array_equal(points(noise=0.5, seed=1), points(noise=0.5, seed=2))
    assert np.array_equal(points(seed=1), points(seed=2))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    points(noise=0.5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_path_that_leaves_the_map_says_when_and_never_settles():
    path = paths(BEALE, {"sgd": method("sgd", lr=1.0)}, steps=40)["sgd"]
    assert path.left is not None
    assert path.settled() is None
    assert "leaves the map" in summary({"sgd": path}).iloc[0, 0]
    assert "has left the map" in describe(path, "sgd", 39)


def test_settled_is_the_step_after_the_last_loss_above_the_tolerance():
    path = paths(SADDLE, {"adam": method("adam", lr=0.1)}, steps=100)["adam"]
    swings = dataclasses.replace(path, losses=np.array([1, 0.001, 0.5, 0.002, 0.001]))
    assert swings.settled(0.01) == 3
    assert swings.settled(2) == 0
    assert swings.settled(0.001) is None


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"steps": 0}, "steps=0"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"noise": float("nan")}, "noise=nan"),
    ],
)
def test_impossible_walks_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        paths(BEALE, everyone, **settings)


def test_recording_changes_nothing():
    def trained(watched):
        w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = methods.atmo([w], lr=0.1)
        if watched:
            anatomy.record(optimizer.param_groups[0])
        for _ in range(5):
            w.grad = (w**3).detach()
            optimizer.step()
        return w.detach()

    assert torch.equal(trained(watched=True), trained(watched=False))


# What is set up and drawn.


def test_a_setup_names_all_its_faults():
    with pytest.raises(ValueError, match=r"surface='hill'.*adagrad.*lr=0.*'zigzag'.*sgd_weight=2"):
        Setup("hill", "sgd, adagrad", lr=0, schedule="zigzag", sgd_weight=2)


def test_what_is_known_is_not_computed_again(monkeypatch):
    known = {}
    Setup(methods="adam, atmo").paths(known)
    walked = []
    monkeypatch.setattr(
        walks, "paths", lambda s, new, *rest: walked.extend(new) or paths(s, new, *rest)
    )
    found = Setup(methods="sgd, adam, atmo", sgd_weight=0.7).paths(known)
    assert list(found) == ["sgd", "adam", "atmo"]
    assert walked == ["sgd", "atmo"]  # λ is nothing to Adam


def test_the_figure_names_the_surface_and_draws_the_directions_of_a_step():
    setup = Setup(methods="atmo, sgd", sgd_weight=0.25)
    figure = draw(setup, "atmo", step=3)
    assert "Beale" in figure.layout.title.text
    assert {t.name for t in figure.data if t.visible is not False} >= {"SGD", "ATMO", "minimum"}
    tips = {t.name: np.array([t.x[-1], t.y[-1]]) for t in figure.data if "direct" in (t.name or "")}
    between = 0.75 * tips["Adam direction"] + 0.25 * tips["SGD direction"]
    assert tips["merged direction"] == pytest.approx(between)


@pytest.mark.parametrize("surface", SURFACES)
def test_every_surface_can_be_drawn_with_every_method(surface):
    figure = draw(Setup(surface, METHODS, noise=0.1, schedule="sigmoid"), "adasgd", STEPS - 1)
    assert len(figure.to_json()) < 150_000  # executed notebooks stay small


# The widget, without a browser (tests/test_browser.py has one).


@pytest.fixture
def open_playground():
    return Playground(Setup())


def ends(widget, name="ATMO"):
    trace = next(t for t in widget.picture.figure.data if t.name == name)
    return float(trace.x[-1]), float(trace.y[-1])


def test_every_control_changes_the_path(open_playground):
    for name, value in {
        "sgd_weight": 0.4, "schedule": "linear", "sgd_weight_end": 0.6, "noise": 0.3, "seed": 5,
        "lr": 0.002, "surface": "saddle",
    }.items():  # fmt: skip
        before = ends(open_playground)
        open_playground.controls[name].value = value
        assert ends(open_playground) != before, name
    assert open_playground.setup.lr == SADDLE.lr  # a new surface brings its own rate


def test_a_message_to_the_page_leaves_nothing_undefined(open_playground, monkeypatch):
    """Else views opened later are without what one trace kept while others changed."""
    sent, figure = [], open_playground.picture.figure
    monkeypatch.setattr(figure, "_send_update_msg", lambda **message: sent.append(message))
    for name, value in {"surface": "himmelblau", "sgd_weight": 0.4, "step": 3}.items():
        open_playground.controls[name].value = value
    open_playground.controls["methods"]["adasgd"].value = True
    assert len(sent) == 4, "one for each change"
    for message in sent:
        for key, values in message["restyle_data"].items():
            for index, value in zip(message["trace_indexes"], values, strict=True):
                trace = figure.data[index]
                assert value is not Undefined or key not in trace or trace[key] is None


def test_methods_come_and_go(open_playground):
    def shown():
        return {t.name for t in open_playground.picture.figure.data if t.visible is True}

    open_playground.controls["methods"]["padam_sgd"].value = True
    assert "PADAM-SGD" in shown()
    open_playground.controls["methods"]["atmo"].value = False
    assert "ATMO" not in shown()
    assert "ATMO" not in open_playground.status.value
    assert open_playground.controls["arrows_of"].value == "padam_sgd"


def test_the_step_moves_the_arrows_and_not_the_paths(open_playground):
    before = ends(open_playground), ends(open_playground, "merged direction")
    open_playground.controls["step"].value = 40
    assert ends(open_playground) == before[0]
    assert ends(open_playground, "merged direction") != before[1]
    assert "step 40" in open_playground.status.value


@pytest.mark.parametrize(
    ("control", "value", "field", "complaint"),
    [
        ("lr", 0.0, "lr", "above 0"),
        ("lr", -1.0, "lr", "above 0"),
        ("methods", False, "methods", "none given"),
    ],
)
def test_an_impossible_choice_is_answered_beside_its_control(
    open_playground, control, value, field, complaint
):
    before = ends(open_playground)
    widgets = open_playground.controls[control]
    for widget in widgets.values() if control == "methods" else [widgets]:
        widget.value = value
    assert complaint in open_playground.messages[field].value
    assert open_playground.messages[field] in descendants(open_playground.box)
    if control == "lr":
        assert ends(open_playground) == before
        widgets.value = 0.02
    else:
        widgets["atmo"].value = True
    assert open_playground.messages[field].value == ""


def test_without_a_hybrid_lambda_says_that_it_weighs_nothing(open_playground):
    open_playground.controls["methods"]["atmo"].value = False
    assert "no hybrid" in open_playground.messages["sgd_weight"].value


def test_it_answers_within_a_fifth_of_a_second():
    widget, seconds = Playground(Setup(methods=METHODS)), []
    for weight in (0.2, 0.3, 0.4, 0.5, 0.6):
        start = time.process_time()  # of this process: others may keep the machine busy
        widget.controls["sgd_weight"].value = weight
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.2


def test_every_control_has_a_visible_name(open_playground):
    names = [w.description for w in descendants(open_playground.box) if controllable(w)]
    assert len(names) == 15
    assert all(names)
    sliders = [w for w in descendants(open_playground.box) if "Slider" in type(w).__name__]
    assert len(sliders) == 4  # each beside a number with a name, with which it moves


def test_slider_and_number_move_together(open_playground):
    slider = next(w for w in descendants(open_playground.box) if type(w).__name__ == "FloatSlider")
    slider.value = 0.35
    assert open_playground.controls["sgd_weight"].value == 0.35
    open_playground.controls["sgd_weight"].value = 0.15
    assert slider.value == 0.15


def test_it_fits_light_and_dark_pages(open_playground):
    layout = open_playground.picture.figure.layout
    assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0,0,0,0)"


def descendants(widget):
    children = getattr(widget, "children", ())
    return [widget, *(d for child in children for d in descendants(child))]


def controllable(widget):
    kind = type(widget).__name__
    return kind in ("Dropdown", "Checkbox") or kind.endswith("Text")


# In a notebook.


def test_without_a_front_end_there_is_a_picture_and_no_widget(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "is_interactive", lambda: False)
    monkeypatch.setattr(figures, "show", shown.append)
    monkeypatch.setattr("IPython.display.display", shown.append)
    assert playground() is None
    figure, table = shown
    assert type(figure) is go.Figure
    assert list(table.index) == ["SGD", "Adam", "ATMO"]


def test_colab_is_asked_to_show_widgets(monkeypatch):
    asked = []
    output = types.SimpleNamespace(enable_custom_widget_manager=lambda: asked.append(True))
    colab = types.ModuleType("google.colab")
    colab.output = output
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(figures, "is_interactive", lambda: True)
    assert playground() is not None
    assert asked == [True]


# What 01_playground.ipynb says is so.


def settled(name, **settings):
    return Setup(methods=name, **settings).paths()[name]


def test_the_opening_picture():
    assert settled("sgd").left == 37
    assert settled("adam").settled() is None
    assert settled("atmo", sgd_weight=0.1).settled() == 63
    assert scan(Setup())["atmo"].idxmin() == 0.1


def test_the_three_things_to_try():
    for weight, alone in ((0.0, "adam"), (1.0, "sgd")):
        path = settled("atmo", sgd_weight=weight)
        assert path.points[:37] == pytest.approx(settled(alone).points[:37])
    rosenbrock = {"surface": "rosenbrock", "lr": 0.003}
    assert settled("sgd", **rosenbrock).left == 19
    assert settled("atmo", sgd_weight=0.5, **rosenbrock).left < 19
    linear = {"schedule": "linear", "sgd_weight": 0.0, "sgd_weight_end": 1.0}
    assert settled("atmo", **rosenbrock, **linear).settled() == 197
    noisy = {"surface": "saddle", "noise": 0.5}
    assert settled("atmo", **noisy, **linear).settled() is None
    turned = {"schedule": "linear", "sgd_weight": 1.0, "sgd_weight_end": 0.0}
    assert settled("atmo", **noisy, **turned).settled() == 147


# What 02_optimizers.ipynb says of the merge.


def test_bias_correction_scales_the_whole_step():
    atmo = anatomy.step_sizes(methods.atmo, [1, 10, 44])
    assert atmo.tolist() == pytest.approx([5.5, 1.27, 1.005], rel=5e-3)
    padam_sgd = anatomy.step_sizes(methods.padam_sgd, [1, 100, 391, 3000])
    assert padam_sgd.tolist() == pytest.approx([0.66, 0.65, 0.78, 0.99], abs=6e-3)


def test_the_second_moment_of_adahessian_tracks_rows():
    table = anatomy.what_v_tracks(anatomy.logistic_regression(), n_probes=200)
    assert (table["tracked"] / table["row"]).median() == pytest.approx(1, abs=0.05)
    assert (table["tracked"] / table["diagonal"]).median() > 3


def test_one_probe_is_nearly_noise_and_many_are_not():
    cosines = anatomy.probe_cosines(anatomy.logistic_regression(), 256)
    assert cosines[1] < 0.1
    assert cosines[32] > 0.5
