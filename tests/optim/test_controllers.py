"""Adaptive λ: Hedge and SWATS follow their formulas, eager, foreach and compiled."""

import copy
import itertools
import math
import re

import pytest
import torch
from optimizers import (
    assert_close,
    observe,
    parameters,
    parameters_of,
    same,
    saved_and_loaded,
    snapshot,
    train,
    weights,
)

import hybrid_lib as hl
from hybrid_lib.optim import methods
from hybrid_lib.optim.controllers import SWATS, Hedge
from hybrid_lib.optim.rules import SGD, AdaHessian, Adam

HOW = {"eager": {"foreach": False}, "foreach": {"foreach": True}, "compiled": {"compile": True}}
pytestmark = pytest.mark.usefixtures("traced")


def every_way(names, values, compiled):
    """Test all values eagerly and with foreach, but only one compiled, which takes longer."""
    cases = [*itertools.product(("eager", "foreach"), values), ("compiled", compiled)]
    return pytest.mark.parametrize(("way", names), cases)


RULES = [Adam(weight_decay=0.01), SGD(momentum=0.9), AdaHessian(eps=0.1)]


def hedged(merge="product", **how):
    settings = {"lambdas": (0.5, 0.3, 0.2), "controller": Hedge(rate=0.7, share=0.02)}
    return hl.Hybrid(parameters(), RULES, 0.01, merge=merge, **settings, **how)


def swats(params=None, tolerance=1e-3, **settings):
    given = {"lr": 0.05, "eps": 1e-15, "weight_decay": 0.0, **settings}
    return methods.swats(params or parameters(), controller=SWATS(tolerance), **given)


# --- Formulas. ---


def vector(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


@every_way("merge", ["product", "sum", "graft"], compiled="product")
def test_hedge_follows_its_formula(way, merge):
    """A weight grows with the cosine of its rule's last direction and the new gradient."""
    optimizer, λ, last = hedged(merge, **HOW[way]), (0.5, 0.3, 0.2), None
    for step in range(5):
        diag = observe(parameters_of(optimizer), step)
        proposed = [answer for _, answer in optimizer.proposals(diag)]
        assert tuple(optimizer.param_groups[0]["lambdas"]) == pytest.approx(λ, rel=1e-6)
        optimizer.step(hess_diag=diag)
        g = vector(p.grad for p in parameters_of(optimizer))
        if last is not None:
            grown = [
                λi * math.exp(0.7 * torch.cosine_similarity(d, g, dim=0)) for λi, d in zip(λ, last)
            ]
            λ = [0.98 * x / sum(grown) + 0.02 / 3 for x in grown]
        else:  # no direction yet
            λ = [0.98 * λi + 0.02 / 3 for λi in λ]
        last = [vector(d[i] for _, d, *_ in proposed) for i in range(3)]


def swats_reference(w, gradients, lr, β1=0.9, β2=0.999, ε=1e-15, tolerance=1e-3, γ_decay=0.0):
    """Algorithm 1 of Keskar and Socher for one vector: where it ends and when it switched."""
    m, v, momentum, s, Λ = *(torch.zeros_like(w) for _ in range(3)), 0.0, None
    for k, g in enumerate(gradients, start=1):
        g = g + γ_decay * w
        if Λ is not None:
            momentum = β1 * momentum + g
            w = w - (1 - β1) * Λ * momentum
            continue
        m, v = β1 * m + (1 - β1) * g, β2 * v + (1 - β2) * g * g
        p = -lr * math.sqrt(1 - β2**k) / (1 - β1**k) * m / (v.sqrt() + ε)
        w = w + p
        if p @ g != 0:
            γ = float(p @ p / -(p @ g))
            s = β2 * s + (1 - β2) * γ
            if k > 1 and s > 0 and abs(s / (1 - β2**k) - γ) < tolerance:
                Λ, switched_at = s / (1 - β2**k), k
    return w, 0 if Λ is None else switched_at


def gradients_of(params, steps):
    drawn = []
    for step in range(steps):
        observe(params, step)
        drawn.append([p.grad.clone() for p in params])
    return drawn


@every_way("settings", [(0.0, 0.03), (0.1, 0.03), (0.0, 1e-9)], compiled=(0.1, 0.03))
def test_swats_follows_its_algorithm_over_all_tensors_at_once(way, settings):
    decay, tolerance = settings
    optimizer, steps = swats(tolerance=tolerance, weight_decay=decay, **HOW[way]), 40
    start, drawn = vector(parameters()), gradients_of(parameters(), steps)
    end, switched_at = swats_reference(
        start, map(vector, drawn), 0.05, tolerance=tolerance, γ_decay=decay
    )
    assert bool(switched_at) == (tolerance > 1e-6)
    assert switched_at < steps - 5
    assert_close([vector(weights(train(optimizer, range(steps))))], [end], rtol=1e-9)
    assert optimizer.param_groups[0]["memory"]["switched_at"] == switched_at


def test_swats_per_tensor_switches_each_tensor_at_its_own_step():
    optimizer, steps = swats([{"params": [p]} for p in parameters()], 0.01), 60
    drawn, ends = gradients_of(parameters(), steps), []
    for i, p in enumerate(parameters()):
        gradients = [g[i].flatten() for g in drawn]
        ends.append(swats_reference(p.detach().flatten(), gradients, 0.05, tolerance=0.01))
    train(optimizer, range(steps))
    for p, (end, _) in zip(parameters_of(optimizer), ends):
        torch.testing.assert_close(p.detach().flatten(), end, rtol=1e-9, atol=1e-9)
    switched_at = [group["memory"]["switched_at"] for group in optimizer.param_groups]
    assert switched_at == [k for _, k in ends]
    assert len(set(switched_at)) > 2


def test_swats_matches_another_implementation():
    """pytorch_optimizer's SWATS is right for one tensor. Its tolerance is relative, so both get the
    same gradient until they switch, at the second step."""
    theirs = pytest.importorskip("pytorch_optimizer").SWATS
    ours, theirs = swats([parameters()[0]]), theirs([parameters()[0]], lr=0.05, eps=1e-13)
    for optimizer in (ours, theirs):
        for step in (0, 0, 1, 2, 3, 4):
            observe(parameters_of(optimizer), step)
            optimizer.step()
    assert ours.param_groups[0]["memory"]["switched_at"] == 2
    assert theirs.param_groups[0]["phase"] == "sgd"
    assert_close(weights(ours), weights(theirs), rtol=1e-6)


def test_the_learning_rate_still_applies_after_the_switch():
    optimizer = swats(tolerance=0.03, momentum=0.0, dampening=0.0)
    train(optimizer, range(40))
    (group,) = optimizer.param_groups
    (_, λ), before = group["lambdas"], weights(optimizer)
    group["lr"] = 0.005
    observe(parameters_of(optimizer), 99)
    optimizer.step()
    for p, w in zip(parameters_of(optimizer), before):
        torch.testing.assert_close(p.detach(), w - 0.005 * λ * p.grad)


# --- Checkpoints, refusals and edge cases. ---

MAKE = {"hedge": hedged, "swats": lambda **how: swats(tolerance=0.03, **how)}
every_controller = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


@every_controller
@every_way("before", [1, 4, 30], compiled=4)
def test_a_checkpoint_continues_to_the_same_bits(make, way, before):
    how = HOW[way]
    straight = train(make(**how), range(before))
    state, saved = saved_and_loaded(straight.state_dict()), weights(straight)
    train(straight, range(before, before + 4))
    resumed = make(**how)
    with torch.no_grad():
        for p, w in zip(parameters_of(resumed), saved):
            p.copy_(w)
    resumed.load_state_dict(state)
    train(resumed, range(before, before + 4))
    assert same(snapshot(straight), snapshot(resumed))


def test_a_state_of_another_controller_is_refused():
    plain = methods.swats(parameters(), controller=None)
    with pytest.raises(ValueError, match=re.escape("Adam + SGD + SWATS, this is Adam + SGD")):
        plain.load_state_dict(swats().state_dict())
    with pytest.raises(ValueError, match=re.escape("Adam + SGD, this is Adam + SGD + SWATS")):
        swats().load_state_dict(plain.state_dict())


REFUSED = {
    "merge='product'.*'sum'": dict(merge="product"),
    r"SGD\) and lambdas \(1, 0\)": dict(lambdas=(0.5, 0.5)),
}


@pytest.mark.parametrize(("reason", "settings"), REFUSED.items())
def test_swats_refuses_groups_that_it_cannot_control(reason, settings):
    with pytest.raises(ValueError, match=reason):
        swats(**settings)


@pytest.mark.parametrize(
    ("make", "name", "bad"),
    [(Hedge, "rate", 0.0), (Hedge, "rate", math.inf), (Hedge, "share", -0.1), (Hedge, "share", 2),
     (SWATS, "tolerance", 0.0), (SWATS, "tolerance", math.nan)],
)  # fmt: skip
def test_settings_outside_their_range_are_refused(make, name, bad):
    with pytest.raises(ValueError, match=f"{name}="):
        make(**{name: bad})


def test_a_group_whose_weights_are_all_0_is_refused():
    with pytest.raises(ValueError, match="all 0"):
        hl.Hybrid(parameters(), RULES, 0.01, (0, 0, 0), controller=Hedge())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_very_large_rate_gives_the_best_rule_all_the_weight(sign):
    """The gradients agree or reverse, so the gains are near 1 or near -1."""
    w = torch.nn.Parameter(torch.zeros(3))
    optimizer = hl.Hybrid([w], [SGD(), Adam()], 0.1, (0.5, 0.5), controller=Hedge(1e4, share=0))
    for g in ([1.0, 2, 3], [sign * 1.0, sign * 2, sign * 3]):
        w.grad = torch.tensor(g)
        optimizer.step()
    λ = optimizer.param_groups[0]["lambdas"]
    best = 0 if sign > 0 else 1  # SGD follows the gradient, for better or worse
    assert λ[best] == pytest.approx(1)
    assert sum(λ) == pytest.approx(1)


def test_swats_averages_with_the_beta2_of_adam():
    one, other = (swats(betas=(0.9, β2), tolerance=0.03) for β2 in (0.9, 0.999))
    for optimizer in (one, other):
        train(optimizer, range(40))
    start, drawn = vector(parameters()), [*map(vector, gradients_of(parameters(), 40))]
    expected = swats_reference(start, drawn, 0.05, β2=0.9, tolerance=0.03)
    assert one.param_groups[0]["memory"]["switched_at"] == expected[1]


def test_after_the_switch_a_parameter_without_gradient_has_no_momentum_either():
    optimizer = swats(tolerance=10.0)
    moving, waiting, *_ = parameters_of(optimizer)
    observe(parameters_of(optimizer), 0)
    optimizer.step()
    observe(parameters_of(optimizer), 1)
    waiting.grad = None
    optimizer.step()
    assert optimizer.param_groups[0]["memory"]["switched_at"] == 2
    for p in (moving, waiting):
        assert not optimizer.state[p]["rules"][1]["momentum_buffer"].any()


@every_controller
def test_steps_at_lr_0_leave_the_controller_as_it_was(make):
    optimizer = make()
    before = copy.deepcopy(
        (optimizer.param_groups[0]["memory"], optimizer.param_groups[0]["lambdas"])
    )
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, range(2))
    assert before == (optimizer.param_groups[0]["memory"], optimizer.param_groups[0]["lambdas"])


def test_a_nan_gradient_leaves_the_weights_finite():
    optimizer = hedged()
    train(optimizer, range(2))
    diag = observe(parameters_of(optimizer), 2)
    parameters_of(optimizer)[0].grad.fill_(math.nan)
    optimizer.step(hess_diag=diag)
    assert all(math.isfinite(λ) for λ in optimizer.param_groups[0]["lambdas"])


# --- Proposals: what step() would do, without doing it. ---


@pytest.mark.parametrize("merge", ["product", "sum", "graft"])
@pytest.mark.parametrize("steps", [0, 3])
def test_proposals_predict_the_next_step_and_change_nothing(merge, steps):
    rules = [Adam(weight_decay=0.01), SGD(momentum=0.9), AdaHessian(eps=0.1)]
    optimizer = hl.Hybrid(parameters(), rules, 0.01, (0.5, 0.3, 0.2), merge=merge, maximize=True)
    train(optimizer, range(steps))
    diag = observe(parameters_of(optimizer), steps)
    before = snapshot(optimizer)
    expected = []
    for p, (group, d, η, D) in optimizer.proposals(diag):
        step = hl.optim.hybrid.MERGES[merge](group["lambdas"], η, list(d))
        expected.append(p.detach() - step)
        assert D is not None
    assert same(before, snapshot(optimizer))
    optimizer.step(hess_diag=diag)
    assert_close(weights(optimizer), expected)
    if steps:  # without a new diagonal, the last one counts
        diagonals = {p: D for p, (*_, D) in optimizer.proposals()}
        assert all(torch.equal(diagonals[p], D) for p, D in zip(parameters_of(optimizer), diag))


def test_proposals_work_wherever_a_step_does():
    """Before the first D, at a rate of zero, and after a rule was changed."""
    optimizer = hl.adasgd(parameters())
    observe(parameters_of(optimizer), 0)
    optimizer.param_groups[0]["lr"] = 0.0
    assert all(D is not None for _, (*_, D) in optimizer.proposals())
    plain = hl.sgd(parameters(), momentum=0.0)
    train(plain, range(2))
    plain.param_groups[0]["rules"] = (SGD(momentum=0.9),)
    observe(parameters_of(plain), 2)
    assert len(list(plain.proposals())) == len(parameters_of(plain))


def test_proposals_need_a_diagonal_where_a_step_does():
    optimizer = hl.adahessian(parameters())
    observe(parameters_of(optimizer), 0)
    with pytest.raises(RuntimeError, match="first step"):
        list(optimizer.proposals())


@pytest.mark.parametrize("foreach", [False, True])
def test_a_controller_sums_over_all_dtypes(foreach):
    """Tensors of several dtypes move in parts; the weights are those of a group of one dtype."""
    found = []
    for first in (torch.float64, torch.float32):
        params = [torch.nn.Parameter(torch.ones(2, dtype=d)) for d in (first, torch.float64)]
        settings = {"controller": Hedge(1.0), "foreach": foreach}
        optimizer = hl.Hybrid(params, [SGD(), hl.rules.Lion()], 0.01, (0.5, 0.5), **settings)
        for step in range(3):
            for w, g in zip(params, ([1.0, 3.0 * (-1) ** step], [0.1, step - 5.0])):
                w.grad = torch.tensor(g, dtype=w.dtype)
            optimizer.step()
        found.append(optimizer.param_groups[0]["lambdas"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("make", [hedged, swats])
def test_a_step_without_gradients_leaves_the_controller_as_it_was(make):
    optimizer = make()
    before = snapshot(optimizer)
    optimizer.step()
    assert same(snapshot(optimizer), before)
