"""The optimizers behave as PyTorch optimizers should, whatever happens between the steps.

A single rule matches PyTorch's own SGD or Adam, or an independent package's AdaHessian or Padam.
Groups, schedulers, closures, missing gradients, checkpoints, copies and low precision work at any
moment of a run. Impossible input is refused with the reason, before anything has moved.
"""

import contextlib
import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import (
    OPTIMIZERS,
    SHAPES,
    assert_close,
    observe,
    parameters,
    parameters_of,
    same,
    saved_and_loaded,
    snapshot,
    train,
    weights,
)  # fmt: skip
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_lib.optim import methods
from hybrid_lib.optim.hybrid import Hybrid
from hybrid_lib.optim.rules import SGD, AdaHessian, Adam, Lion, Padam

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
no_deadline = settings(deadline=None)  # a busy machine must not fail a test


# --- A single rule matches a known optimizer. ---


PUBLIC = [  # pytorch_optimizer's Padam: no AMSGrad maximum, the released bias correction
    *[("SGD", "sgd", settings, {}) for settings in (
        dict(momentum=0.0, weight_decay=0.0), dict(momentum=0.95, weight_decay=5e-4),
        dict(momentum=0.9, dampening=0.3, weight_decay=0.0),
        dict(momentum=0.9, nesterov=True, weight_decay=0.1))],
    *[("Adam", "adam", settings, {}) for settings in (
        dict(weight_decay=0.0), dict(betas=(0.8, 0.99), eps=1e-3, weight_decay=0.1),
        dict(amsgrad=True, betas=(0.9, 0.9), weight_decay=0.0))],
    ("Adam", "padam", dict(amsgrad=True, betas=(0.9, 0.9), weight_decay=0.1),
     dict(partial=0.5, bias_correction="consistent")),
    *[("AdaHessian", "adahessian", dict(betas=(0.9, 0.99), eps=1e-4, hessian_power=k,
                                        weight_decay=γ), {})
      for k in (1.0, 0.5) for γ in (0.0, 0.1)],
    *[("PAdam", "padam", dict(betas=(0.9, 0.99), weight_decay=0.05, partial=p), {"amsgrad": False})
      for p in (0.5, 0.25, 1 / 8)],
    *[("Lion", "lion", dict(betas=(0.9, 0.99), weight_decay=γ), {}) for γ in (0.0, 0.1)],
]  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours", "settings", "only_ours"), PUBLIC)
def test_a_method_matches_another_implementation(theirs, ours, settings, only_ours):
    """Both get the same D, since a package's own estimator is not under test here."""
    in_torch = hasattr(torch.optim, theirs)
    package = torch.optim if in_torch else pytest.importorskip("pytorch_optimizer")
    ours = getattr(methods, ours)(parameters(), lr=0.01, **settings, **only_ours)
    theirs = getattr(package, theirs)(parameters(), lr=0.01, **settings)
    assert_close(weights(train(ours, range(100))), weights(train(theirs, range(100))))


# --- The merge. ---


MIXTURE = (Adam(), SGD(momentum=0.9), AdaHessian(eps=0.1))


@every_optimizer
def test_foreach_matches_the_loop_for_mixed_precisions(name):
    def mixed():
        dtypes = torch.float64, torch.float32, torch.bfloat16, torch.bfloat16
        return [torch.nn.Parameter(p.detach().to(d)) for p, d in zip(parameters(), dtypes)]

    both = [OPTIMIZERS[name](mixed(), foreach=foreach) for foreach in (False, True)]
    for step in range(6):
        for optimizer in both:
            (group,) = optimizer.param_groups
            group["lr"] = 0.1 / (1 + step)
            group["lambdas"] = ((1.0,), (0.25 * (step % 5), 1.0))[len(group["rules"]) - 1]
            train(optimizer, [step])
    for a, b in zip(*map(weights, both)):
        torch.testing.assert_close(a, b)


class Counting(TorchDispatchMode):
    """Counts the operations that reach a device."""

    n = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.n += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["atmo", "adasgd", "adahessian"])
def test_a_foreach_step_dispatches_few_operations(name):
    """However many parameters there are; on a GPU each operation is a launch."""
    params = parameters(dtype=torch.float32, shapes=[(3,)] * 62)
    optimizer = train(getattr(methods, name)(params, foreach=True), [0])
    diag = observe(params, 1)
    with Counting() as counting:
        optimizer.step(hess_diag=diag)
    assert counting.n <= 60


@pytest.mark.parametrize("lambdas", [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)])
def test_rules_without_weight_still_move_their_buffers(lambdas):
    """If they gain weight later, they are as warm as if they had always had it."""
    ours = train(Hybrid(parameters(), MIXTURE, 0.01, lambdas), range(7))
    all_on = train(Hybrid(parameters(), MIXTURE, 0.01, (1.0, 1.0, 1.0)), range(7))
    for p, q in zip(parameters_of(ours), parameters_of(all_on)):
        assert same(ours.state[p]["rules"], all_on.state[q]["rules"])
        assert all(buffers for buffers in ours.state[p]["rules"])


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("lambdas", [(0.0, 1.0), torch.tensor([0.0, 1.0])], ids=str)
@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"compile": True}], ids=str)
def test_a_rule_without_weight_cannot_spoil_the_step(how, lambdas):
    """On flat curvature AdaHessian with eps = 0 proposes nan and inf, and 0 * nan is nan."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = Hybrid([w], (AdaHessian(eps=0.0), SGD()), 0.1, lambdas, **how)
    w.grad = torch.tensor([0.0, 1.0])
    optimizer.step(hess_diag=[torch.zeros(2)])
    torch.testing.assert_close(w.detach(), torch.tensor([1.0, 1.9]))


@pytest.mark.parametrize("foreach", [False, True])
def test_a_graft_is_never_longer_than_its_rules_steps(foreach):
    """The norm of so short a direction is lost: its square is 0."""
    w = torch.nn.Parameter(torch.zeros(100))
    rules = SGD(), Lion()
    optimizer = Hybrid([w], rules, 1e-3, (0, 1), merge="graft", foreach=foreach)
    for size in (1e-24, 1e-21, 1e-18, 1.0):
        w.grad = torch.full((100,), size)
        before = w.detach().clone()
        optimizer.step()
        assert (w - before).norm() < 1.001 * 1e-3 * 100**0.5
    assert (w - before).norm() > 0.999 * 1e-3 * 100**0.5


@every_optimizer
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_and_diagonals_are_only_read_and_may_reuse_their_memory(name, maximize):
    """As under zero_grad(set_to_none=False): no buffer may be the gradient itself."""
    how = {"weight_decay": 0.0, "maximize": maximize}
    params = parameters()
    optimizer, twin = OPTIMIZERS[name](params, **how), OPTIMIZERS[name](parameters(), **how)
    memory = [torch.empty_like(p) for p in params]
    for step in range(3):
        diag = observe(params, step)
        for p, grad in zip(params, memory):
            p.grad = grad.copy_(p.grad)
        given = copy.deepcopy((memory, diag))
        optimizer.step(hess_diag=diag)
        assert same((memory, diag), given)
    assert same(weights(optimizer), weights(train(twin, range(3))))


# --- The report's constructors. ---


L2 = dict(weight_decay=5e-4)
TABLE_I = {  # lr, weights, decoupled decay, rules
    "sgd": (0.01, (1.0,), 0.0, (SGD(0.95, **L2),)),
    "adam": (0.001, (1.0,), 0.0, (Adam(**L2),)),
    "atmo": (0.01, (0.5, 0.5), 0.0, (Adam(**L2), SGD(0.95, **L2))),
    "padam_sgd": (0.01, (0.5, 0.5), 0.0,
                  (Padam(weight_decay=0.025, amsgrad=False), SGD(0.9, weight_decay=0.025))),
    "adahessian": (0.15, (1.0,), 5e-4, (AdaHessian(),)),
    "adasgd": (0.1, (0.5, 0.5), 0.0, (AdaHessian(), SGD(0.95, **L2))),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE_I)
def test_the_defaults_are_those_of_table_i(name):
    (group,) = getattr(methods, name)(parameters()).param_groups
    keys = "lr", "lambdas", "decoupled_weight_decay", "rules"
    assert tuple(group[k] for k in keys) == TABLE_I[name]


def test_every_rule_of_a_hybrid_has_its_own_defaults():
    (group,) = methods.get_method("lion+padam+adam")(parameters()).param_groups
    assert group["rules"] == (Lion(), Padam(), Adam())


# --- Groups. ---


def test_every_group_follows_its_own_settings():
    own_settings = [
        dict(lr=0.3),
        dict(rules=(SGD(momentum=0.5),), lambdas=(0.5,)),
        dict(rules=(AdaHessian(eps=0.1),), lambdas=(1.0,), decoupled_weight_decay=0.2),
        dict(lambdas=(0.1, 0.8), maximize=True),
    ]
    common = dict(rules=(Adam(), SGD(0.9)), lr=0.1, lambdas=(0.5, 0.5))
    together = Hybrid(
        [{"params": [p], **own} for p, own in zip(parameters(), own_settings)], **common
    )
    apart = [Hybrid([p], **{**common, **own}) for p, own in zip(parameters(), own_settings)]
    for step in range(6):
        together.step(hess_diag=observe(parameters_of(together), step))
        diag = observe([p for optimizer in apart for p in parameters_of(optimizer)], step)
        for optimizer, D in zip(apart, diag):
            optimizer.step(hess_diag=[D])
    assert same(weights(together), [w for optimizer in apart for w in weights(optimizer)])


@every_optimizer
@pytest.mark.parametrize("before", [0, 3])
def test_a_group_may_join_at_any_time(name, before):
    first, late = parameters()[:2], parameters()[2:]
    optimizer = train(OPTIMIZERS[name](first), range(before))
    optimizer.add_param_group({"params": late, "lr": 0.05})
    alone = train(OPTIMIZERS[name](parameters()[:2]), range(before))
    fresh = OPTIMIZERS[name](parameters()[2:], lr=0.05)
    for step in range(10, 13):
        optimizer.step(hess_diag=observe(first + late, step))
        separate = parameters_of(alone) + parameters_of(fresh)
        diag = observe(separate, step)
        alone.step(hess_diag=diag[:2])
        fresh.step(hess_diag=diag[2:])
    assert same(weights(optimizer), weights(alone) + weights(fresh))


def new():
    return torch.nn.Parameter(torch.ones(2))


complex_ = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
REFUSED_GROUPS = [
    *[(dict(lr=lr), ValueError, f"lr={lr!r}") for lr in (0.0, math.nan, math.inf, "0.1")],
    (dict(lambdas=("0.5", "0.5")), ValueError, "lambdas="),
    (dict(lambdas=0.5), ValueError, "lambdas=0.5"),
    *[(dict(lambdas=(0.5, λ)), ValueError, "lambdas=") for λ in (-0.5, math.nan)],
    *[(dict(lambdas=λ), ValueError, "2 rules") for λ in ((0.5,), (1, 1, 1))],
    (dict(rules=(), lambdas=()), ValueError, "0 rules"),
    (dict(merge="mean"), ValueError, "merge='mean'.*product"),
    *[(dict(decoupled_weight_decay=γ), ValueError, "decoupled_weight_decay")
      for γ in (-1.0, math.nan)],
    *[(dict(rules=rules), TypeError, "not a rule") for rules in (("adam", "sgd"), (Adam, SGD))],
    (dict(params=[new(), complex_]), TypeError, "complex"),
    (dict(params=[new() * 2]), ValueError, "leaf"),
    (dict(params=["w"]), TypeError, "Tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("group", "error", "reason"), REFUSED_GROUPS)
def test_a_refused_group_says_why_and_leaves_the_optimizer_as_it_was(group, error, reason):
    group = {"params": [new()], **group}
    with pytest.raises(error, match=reason):
        methods.atmo([group])
    optimizer = train(methods.atmo(parameters()), range(3))
    before, defaults = snapshot(optimizer), dict(optimizer.defaults)
    with pytest.raises(error, match=reason):
        optimizer.add_param_group(group)
    assert same(snapshot(optimizer), before)
    assert optimizer.defaults == defaults
    optimizer.add_param_group({"params": [new()]})  # and it still accepts a valid group
    train(optimizer, range(3, 5))


# --- Missing and sparse gradients, closures, the Hessian diagonal. ---


@every_optimizer
def test_a_parameter_without_gradient_waits(name):
    """It neither moves nor counts steps; later it steps as if it had not skipped any."""
    params = parameters()
    optimizer = OPTIMIZERS[name](params)
    waiting, before = params[1], snapshot(optimizer)
    optimizer.step()  # no parameter has one
    assert same(snapshot(optimizer), before)
    start = waiting.detach().clone()
    for step in (0, 1, 2):
        diag = observe(params, step)
        waiting.grad = None
        optimizer.step(hess_diag=diag)
    assert torch.equal(waiting, start)
    assert "step" not in optimizer.state[waiting]
    for step in (3, 4):
        optimizer.step(hess_diag=observe(params, step))
    assert [optimizer.state[p]["step"] for p in params] == [5, 2, 5, 5]

    twin = train(OPTIMIZERS[name](parameters()), (3, 4))
    assert torch.equal(waiting, parameters_of(twin)[1])


def test_sparse_gradients_are_refused_and_nothing_moves():
    dense, embedding = new(), torch.nn.Embedding(4, 2, sparse=True)
    optimizer = methods.atmo([{"params": [dense]}, {"params": embedding.parameters()}])
    dense.grad = torch.ones(2)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"sparse.*dense"):
        optimizer.step()
    assert same(snapshot(optimizer), before)


def test_a_closure_is_called_once_with_gradients_enabled():
    params, twin, calls = parameters(), methods.sgd(parameters()), []
    optimizer = methods.sgd(params)

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p**4).sum() for p in params)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == sum((p**4).sum() for p in parameters_of(twin)).item()
    assert calls == [True]
    for p in parameters_of(twin):
        p.grad = 4 * p.detach() ** 3
    assert twin.step() is None
    assert_close(weights(optimizer), weights(twin))


@pytest.mark.parametrize("name", ["adahessian", "adasgd"])
def test_without_a_new_hessian_diagonal_the_last_one_is_used(name):
    """For all parameters or for some."""
    implicit, explicit = OPTIMIZERS[name](parameters()), OPTIMIZERS[name](parameters())
    last = [None] * 4
    for step, fresh in enumerate([(0, 1, 2, 3), (), (1,), (0, 3), (), (0, 1, 2, 3), ()]):
        diag = observe(parameters_of(implicit), step)
        observe(parameters_of(explicit), step)
        new_or_none = [D if i in fresh else None for i, D in enumerate(diag)]
        last = [D if i in fresh else last[i] for i, D in enumerate(diag)]
        implicit.step(hess_diag=iter(new_or_none) if fresh else None)
        explicit.step(hess_diag=last)
    assert same(weights(implicit), weights(explicit))


def test_the_last_hessian_diagonal_is_kept_as_a_copy():
    """The caller may write into the same memory later."""
    params = parameters()
    optimizer, twin = methods.adahessian(params), methods.adahessian(parameters())
    diag = observe(params, 0)
    optimizer.step(hess_diag=diag)
    for D in diag:
        D.fill_(math.nan)
    twin.step(hess_diag=observe(parameters_of(twin), 0))
    for one in (optimizer, twin):
        observe(parameters_of(one), 1)
        one.step()
    assert same(weights(optimizer), weights(twin))


def test_a_hessian_diagonal_may_have_another_precision():
    a, b = methods.adahessian(parameters(dtype=torch.float32)), methods.adahessian(parameters())
    for step in range(3):
        a.step(hess_diag=[D.double() for D in observe(parameters_of(a), step)])
        b.step(hess_diag=[D.float() for D in observe(parameters_of(b), step)])
    assert [w.dtype for w in weights(a) + weights(b)] == [torch.float32] * 4 + [torch.float64] * 4
    for x, y in zip(weights(a), weights(b)):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "atmo", "padam"])
def test_a_hessian_diagonal_that_no_rule_needs_is_not_kept(name):
    params = parameters()
    with_diag, without = OPTIMIZERS[name](params), OPTIMIZERS[name](parameters())
    assert not with_diag.needs_hessian
    with_diag.step(hess_diag=observe(params, 0))
    observe(parameters_of(without), 0)
    without.step()
    assert same(snapshot(with_diag), snapshot(without))
    assert "hess_diag" not in with_diag.state[params[0]]


def test_any_rule_of_any_group_may_need_the_hessian():
    groups = [{"params": [new()]}, {"params": [new()], "rules": (AdaHessian(),), "lambdas": (1,)}]
    assert Hybrid(groups, (SGD(),), 0.1).needs_hessian
    assert methods.adasgd([new()]).needs_hessian
    assert not Hybrid(groups[:1], (SGD(),), 0.1).needs_hessian


UNFIT = [
    (lambda diag: None, RuntimeError, "hessian_diagonal"),
    (lambda diag: [*diag[:3], None], RuntimeError, "hessian_diagonal"),
    (lambda diag: diag[:3], ValueError, "3 tensors.*4 parameters"),
    (lambda diag: [*diag, diag[0]], ValueError, "5 tensors.*4 parameters"),
    (lambda diag: [diag[0], diag[2], diag[1], diag[3]], ValueError, r"hess_diag\[1\].*shape"),
    (lambda diag: [*diag[:3], diag[3].reshape(1)], ValueError, r"hess_diag\[3\].*shape"),
]


@pytest.mark.parametrize(("spoil", "error", "reason"), UNFIT)
@pytest.mark.parametrize("name", ["adahessian", "adasgd"])
def test_a_hessian_diagonal_that_does_not_fit_is_refused(name, spoil, error, reason):
    params = parameters()
    optimizer = OPTIMIZERS[name](params)
    diag, before = observe(params, 0), snapshot(optimizer)
    with pytest.raises(error, match=reason):
        optimizer.step(hess_diag=spoil(diag))
    assert same(snapshot(optimizer), before)
    optimizer.step(hess_diag=diag)


def test_a_refused_step_does_not_keep_its_hessian_diagonal():
    params = parameters()
    optimizer = train(methods.adahessian(params), range(2))
    before, diag = snapshot(optimizer), observe(params, 2)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr=nan"):
        optimizer.step(hess_diag=diag)
    optimizer.param_groups[0]["lr"] = 0.15
    assert same(snapshot(optimizer), before)


# --- Values out of range. ---

any_float = st.one_of(
    st.floats(), st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, math.nan, math.inf, -math.inf])
)


def not_negative(x):
    return 0 <= x < math.inf


ALLOWED = {
    (SGD, "momentum"): not_negative, (SGD, "weight_decay"): not_negative,
    (SGD, "dampening"): lambda x: 0 <= x <= 1,
    (Adam, "eps"): not_negative, (Adam, "weight_decay"): not_negative,
    (Padam, "eps"): not_negative, (Padam, "weight_decay"): not_negative,
    (Padam, "partial"): lambda x: 0 < x <= 0.5,
    (AdaHessian, "eps"): not_negative, (AdaHessian, "hessian_power"): lambda x: 0 < x <= 1,
}  # fmt: skip


@pytest.mark.parametrize(("rule", "field"), ALLOWED, ids=lambda v: getattr(v, "__name__", v))
@no_deadline
@given(value=any_float)
def test_a_rule_accepts_exactly_the_values_in_its_range(rule, field, value):
    if ALLOWED[rule, field](value):
        assert getattr(rule(**{field: value}), field) == value
    else:
        with pytest.raises(ValueError, match=field):
            rule(**{field: value})


@pytest.mark.parametrize("rule", [Adam, Padam, AdaHessian, Lion])
@no_deadline
@given(betas=st.tuples(any_float, any_float))
def test_betas_must_lie_in_0_to_1(rule, betas):
    if all(0 <= beta < 1 for beta in betas):
        assert rule(betas=list(betas)).betas == betas
    else:
        with pytest.raises(ValueError, match="betas"):
            rule(betas=betas)


CONTRADICT = [
    (SGD, dict(nesterov=True), "nesterov"),
    (SGD, dict(nesterov=True, momentum=0.9, dampening=0.1), "nesterov"),
    *[(Adam, dict(betas=betas), "betas") for betas in ((0.9,), (0.9, 0.99, 0.999))],
    (Padam, dict(bias_correction="maybe"), "bias_correction='maybe'"),
    *[(AdaHessian, dict(spatial_average=bad), f"spatial_average={bad!r}")
      for bad in ("rows", 0, -3, 2.0, True)],
    (methods.atmo, dict(params=[], weight_decay_in="adam"), "weight_decay_in='adam'"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "settings", "reason"), CONTRADICT)
def test_unknown_or_contradictory_settings_are_refused(rule, settings, reason):
    with pytest.raises(ValueError, match=reason):
        rule(**settings)


@no_deadline
@given(lr=any_float, lambdas=st.lists(any_float, max_size=3), decay=any_float)
def test_impossible_rates_are_refused_at_construction_and_at_the_step(lr, lambdas, decay):
    fine = len(lambdas) == 2 and all(map(not_negative, [*lambdas, decay, lr]))
    refused = pytest.raises(ValueError, match=r"lr=|lambdas=|decoupled_weight_decay=")
    with contextlib.nullcontext() if fine and lr > 0 else refused:
        Hybrid([new()], (Adam(), SGD()), lr, lambdas, decay)

    optimizer = Hybrid([new(), new()], (Adam(), SGD()), 0.1, (1, 1))
    optimizer.add_param_group({"params": [new()]})
    for p in parameters_of(optimizer):
        p.grad = torch.ones(2)
    optimizer.param_groups[1].update(lr=lr, lambdas=lambdas, decoupled_weight_decay=decay)
    with contextlib.nullcontext() if fine else refused:  # lr = 0 is fine: schedulers end there
        optimizer.step()
    unmoved = all(torch.equal(p, torch.ones(2)) for p in parameters_of(optimizer))
    assert fine or (unmoved and not optimizer.state)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "changed", [{"merge": "mean"}, {"lr": torch.tensor([0.1])}, {"lr": torch.tensor([0.1, 0.2])}]
)
def test_a_setting_that_became_impossible_is_refused_before_anything_moves(changed, foreach):
    optimizer = Hybrid([new()], (Adam(), SGD()), 0.1, (1, 1), foreach=foreach)
    (w,) = parameters_of(optimizer)
    w.grad = torch.ones(2)
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[0].update(changed)
    with pytest.raises(ValueError, match=r"merge='mean'|lr=tensor"):
        optimizer.step()
    optimizer.param_groups[0].update(merge="product", lr=0.1)
    assert same(snapshot(optimizer), before)


def test_weight_decay_in_sgd_is_sgd_s_wherever_it_stands():
    for name in ("adam+sgd", "sgd+adam"):
        optimizer = methods.get_method(name)([new()], weight_decay=0.1, weight_decay_in="sgd")
        decays = {type(r): r.weight_decay for r in optimizer.param_groups[0]["rules"]}
        assert decays == {SGD: 0.1, Adam: 0.0}
    with pytest.raises(ValueError, match=r"weight_decay_in.*no SGD"):
        methods.get_method("adam+lion")([new()], weight_decay=0.1, weight_decay_in="sgd")


@pytest.mark.parametrize("make", [methods.sgd, methods.adahessian, methods.lion])
def test_an_impossible_decay_is_refused_by_the_name_that_was_given(make):
    with pytest.raises(ValueError, match=r"^weight_decay=-1"):
        make(parameters(), weight_decay=-1)


# --- Checkpoints and copies. ---


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(OPTIMIZERS)), st.sampled_from([torch.float64, torch.bfloat16]),
    st.integers(0, 4), st.integers(1, 3), st.booleans(),
)  # fmt: skip
def test_a_checkpoint_at_any_step_continues_bit_by_bit(name, dtype, before, after, second_group):
    def build(params):
        optimizer = OPTIMIZERS[name](params[:3])
        if second_group:
            optimizer.add_param_group({"params": params[3:], "lr": 0.02})
        return optimizer

    def run(optimizer, steps):
        params = parameters_of(optimizer)
        for step in steps:
            diag = observe(params, step)
            params[step % len(params)].grad = None  # as in frozen layers and unused heads
            optimizer.step(hess_diag=diag if step % 3 == 0 else None)

    original = build(parameters(dtype=dtype))
    run(original, range(before))
    original.param_groups[0]["lr"] *= 0.5  # as a scheduler does
    saved_weights, saved = saved_and_loaded([weights(original), original.state_dict()])

    resumed = build(parameters(seed=1, dtype=dtype))
    for p, w in zip(parameters_of(resumed), saved_weights):
        p.data.copy_(w)
    resumed.load_state_dict(saved)
    assert same(resumed.state_dict(), original.state_dict())

    for optimizer in (original, resumed):
        if before == 0:
            optimizer.step(hess_diag=observe(parameters_of(optimizer), 99))
        run(optimizer, range(before, before + after))
    assert same(snapshot(resumed), snapshot(original))


def test_loading_restores_every_number_that_decides_a_step():
    """The loading optimizer has other numbers, so that none is right by accident."""
    given = dict(lr=0.03, lambdas=(0.2, 0.9), maximize=True, merge="sum")
    named = list(zip("abcd", parameters()))
    saved = methods.adasgd(named, weight_decay_in="both", **given).state_dict()
    optimizer = methods.adasgd(named, weight_decay=0.0, compile=True, foreach=True)
    optimizer.load_state_dict(saved_and_loaded(saved))
    (group,) = optimizer.param_groups
    expected = {**given, "decoupled_weight_decay": 5e-4, "param_names": list("abcd")}
    expected["rules"] = (AdaHessian(), SGD(0.95, weight_decay=5e-4))
    expected |= {"compile": True, "foreach": True}  # how to compute is not loaded
    assert {k: group[k] for k in expected} == expected


def test_hooks_before_and_after_loading_are_called():
    """As in torch, a pre-hook may change the state, and a post-hook sees it loaded."""
    saved = train(methods.adasgd(parameters()), range(3)).state_dict()
    optimizer, after = methods.adasgd(parameters()), []

    def zeroed(_, state_dict):
        state = copy.deepcopy(state_dict["state"])
        for buffers in state.values():
            buffers["rules"][0]["exp_avg"].zero_()
        return {**state_dict, "state": state}

    optimizer.register_load_state_dict_pre_hook(zeroed)
    optimizer.register_load_state_dict_post_hook(
        lambda o: after.extend(s["rules"][0]["exp_avg"].abs().sum() for s in o.state.values())
    )
    optimizer.load_state_dict(saved)
    assert after == [0, 0, 0, 0]
    assert all(s["rules"][0]["exp_avg_sq"].abs().sum() > 0 for s in optimizer.state.values())
    assert optimizer.state[parameters_of(optimizer)[0]]["step"] == 3


@every_optimizer
def test_torch_s_distributed_checkpoints_accept_a_fresh_optimizer(name):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = OPTIMIZERS[name](model.parameters())
    saved = checkpoint.get_optimizer_state_dict(model, optimizer)
    assert set(saved["state"]) == {"weight", "bias"}
    assert same(before, weights(optimizer))
    if optimizer.needs_hessian:  # the empty step leaves no diagonal behind
        observe(parameters_of(optimizer), 0)
        with pytest.raises(RuntimeError, match="hessian_diagonal"):
            optimizer.step()


@pytest.mark.parametrize("rules", [(SGD(), Adam()), (Adam(), SGD()), (SGD(), SGD(0.9))])
def test_full_state_dicts_of_torch_distributed_keep_rules_without_buffers(rules):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    whole, model = checkpoint.StateDictOptions(full_state_dict=True), torch.nn.Linear(3, 2)
    first, other = (Hybrid(model.parameters(), rules, 0.1, [0.5] * len(rules)) for _ in range(2))
    saved = checkpoint.get_optimizer_state_dict(model, train(first, range(3)), options=whole)
    before = snapshot(first)
    model.zero_grad()
    checkpoint.set_optimizer_state_dict(model, other, saved, options=whole)
    assert same(snapshot(other), before)
    train(other, [3])
    assert {state["step"] for state in other.state.values()} == {4}


@every_optimizer
def test_neither_saving_nor_loading_shares_memory_with_the_copy(name):
    source, copied = OPTIMIZERS[name](parameters()), OPTIMIZERS[name](parameters())
    train(source, range(2))
    saved = source.state_dict()
    kept = copy.deepcopy(saved)
    copied.load_state_dict(saved)
    source_before = snapshot(source)
    train(copied, range(2, 5))
    assert same(saved, kept)
    assert same(snapshot(source), source_before)


PRECISIONS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@every_optimizer
@pytest.mark.parametrize("saved_in", PRECISIONS)
@pytest.mark.parametrize("loaded_in", PRECISIONS)
def test_a_checkpoint_may_continue_in_another_precision(name, saved_in, loaded_in):
    """As in PyTorch, buffers follow the parameters' precision, but never below float32."""

    def assert_wide(optimizer, dtype):
        for p in parameters_of(optimizer):
            assert p.dtype == dtype
            tensors = [t for buffers in optimizer.state[p]["rules"] for t in buffers.values()]
            assert {t.dtype for t in tensors} == {torch.promote_types(dtype, torch.float32)}

    source = train(OPTIMIZERS[name](parameters(dtype=saved_in)), range(2))
    assert_wide(source, saved_in)
    optimizer = OPTIMIZERS[name](parameters(dtype=loaded_in))
    optimizer.load_state_dict(saved_and_loaded(source.state_dict()))
    assert_wide(train(optimizer, range(2, 4)), loaded_in)


def test_numpy_numbers_are_saved_as_python_numbers():
    """Weights and settings often come from np.linspace; torch.load would refuse its scalars."""
    ramp = np.linspace(0, 1, 5)
    optimizer = methods.atmo(parameters(), momentum=ramp[3], eps=ramp[1])
    optimizer.param_groups[0].update(lambdas=(ramp[1], ramp[3]), lr=ramp[1], note=ramp[:2])
    saved = saved_and_loaded(train(optimizer, range(2)).state_dict())
    assert saved["param_groups"][0]["lambdas"] == (0.25, 0.75)
    assert saved["param_groups"][0]["note"] == [0.0, 0.25]


OTHERS = {
    "other rules": lambda: methods.padam_sgd(parameters()),
    "rules in another order": lambda: Hybrid(parameters(), (SGD(), Adam()), 0.1, (1, 1)),
    "one rule fewer": lambda: methods.adam(parameters()),
    "torch's SGD": lambda: torch.optim.SGD(parameters(), lr=0.1, momentum=0.9),
    "torch's Adam": lambda: torch.optim.Adam(parameters()),
    "fewer parameters": lambda: methods.atmo(parameters()[:3]),
    "more groups": lambda: methods.atmo([{"params": [p]} for p in parameters()]),
    "other shapes": lambda: methods.atmo(parameters(shapes=[(3,), *SHAPES[1:]])),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_optimizer_s_state_is_refused(other):
    optimizer = train(methods.atmo(parameters()), range(2))
    before, foreign = snapshot(optimizer), train(other(), range(2)).state_dict()
    with pytest.raises(ValueError):  # noqa: PT011  (some of the words are torch's)
        optimizer.load_state_dict(foreign)
    assert same(snapshot(optimizer), before)
    train(optimizer, range(2, 4))


@every_optimizer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_independent(name, copied):
    original = train(OPTIMIZERS[name](parameters()), range(3))
    twin = copied(original)
    before = snapshot(original)
    train(twin, range(3, 6))
    assert same(snapshot(original), before)
    assert same(snapshot(train(original, range(3, 6))), snapshot(twin))


# --- Precision and memory layout. ---


@every_optimizer
def test_a_bfloat16_step_is_the_exact_step_rounded_once(name):
    low, exact = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    exact = [torch.nn.Parameter(p.detach().double()) for p in exact]
    a, b = OPTIMIZERS[name](low), OPTIMIZERS[name](exact)
    for step in range(3):
        diag = observe(low, step)
        for p, q in zip(low, exact):
            q.data.copy_(p)
            q.grad = p.grad.double()
        a.step(hess_diag=diag)
        b.step(hess_diag=[D.double() for D in diag])
        for p, q in zip(low, exact):
            ulp = torch.finfo(torch.bfloat16).eps * q.abs()
            assert ((p.double() - q).abs() <= 0.501 * ulp + 1e-6).all()


@pytest.mark.parametrize("foreach", [False, True])
def test_decoupled_decay_acts_in_bfloat16(foreach):
    w = torch.nn.Parameter(torch.full((4,), 2.0, dtype=torch.bfloat16))
    optimizer = Hybrid([w], [SGD()], 0.5, decoupled_weight_decay=0.5, foreach=foreach)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert w.tolist() == [1.5] * 4


@every_optimizer
def test_strided_parameters_step_like_contiguous_ones(name):
    def as_channels_last(p):
        return torch.nn.Parameter(p.detach().to(memory_format=torch.channels_last))

    plain = parameters(shapes=[(2, 3, 4, 4)])
    strided = [as_channels_last(p) for p in plain]
    a, b = OPTIMIZERS[name](plain), OPTIMIZERS[name](strided)
    for step in range(3):
        a.step(hess_diag=observe(plain, step))
        diag = observe(strided, step)
        strided[0].grad = strided[0].grad.to(memory_format=torch.channels_last)
        b.step(hess_diag=[diag[0].to(memory_format=torch.channels_last)])
    assert strided[0].stride() == as_channels_last(plain[0]).stride()
    assert_close(weights(a), weights(b))


@pytest.mark.parametrize("average", [None, "kernel", "auto", 4])
def test_empty_parameters_are_supported(average):
    """Layers of width zero exist, and their mean is over nothing."""
    params = parameters(shapes=[(0,), (0, 3), (2,)])
    optimizer = methods.adasgd(params, spatial_average=average)
    before = params[2].detach().clone()
    optimizer.step(hess_diag=observe(params, 0))
    assert not torch.equal(params[2], before)


def test_training_keeps_no_graph_and_its_state_does_not_grow():
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer, sizes = methods.adasgd([w]), []
    for _ in range(3):
        w.grad, D = w.detach() ** 3, 12 * w**2  # D has a graph
        optimizer.step(hess_diag=[D])
        state = optimizer.state[w]
        tensors = [t for buffers in state["rules"] for t in buffers.values()] + [state["hess_diag"]]
        assert not any(t.requires_grad for t in tensors)
        sizes.append(sum(t.numel() for t in tensors))
    assert sizes == [sizes[0]] * 3
    assert w.is_leaf
