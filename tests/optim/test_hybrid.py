"""The optimizers behave as PyTorch optimizers should, whatever happens between the steps.

One rule alone is PyTorch's own SGD or Adam, and an independent package's AdaHessian and Padam;
groups, schedulers, closures, missing gradients, checkpoints, copies and low precision work at any
moment of a run; what is impossible is refused with the reason, and then nothing has moved.
"""

import copy
import dataclasses
import io
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_lib.optim import methods
from hybrid_lib.optim.curvature import hessian_diagonal
from hybrid_lib.optim.hybrid import Hybrid
from hybrid_lib.optim.rules import SGD, AdaHessian, Adam, Lion, Padam

SHAPES = [(2, 3, 2, 2), (4, 3), (5,), ()]
OPTIMIZERS = {
    "sgd": lambda params, **kw: methods.sgd(params, nesterov=True, **kw),
    "adam": lambda params, **kw: methods.adam(params, amsgrad=True, **kw),
    "atmo": lambda params, **kw: methods.atmo(params, lambdas=(0.7, 0.4), **kw),
    "padam": methods.padam,
    "padam_sgd": lambda params, **kw: methods.padam_sgd(params, dampening=0.1, **kw),
    "adahessian": lambda params, **kw: methods.adahessian(params, spatial_average="auto", **kw),
    "adasgd": lambda params, **kw: methods.adasgd(params, spatial_average=4, **kw),
    "lion_sgd": methods.lion_sgd,
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
unhurried = settings(deadline=None)  # a busy machine is no fault
quick = settings(max_examples=30, deadline=None)


# --- Random runs: the same seed gives the same parameters, gradients and Hessian diagonals. ---


def parameters(seed=0, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(s, dtype=torch.float64, generator=generator).to(dtype))
        for s in shapes
    ]


def observe(params, step):
    """Gradients and D of one step: functions of the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)

    def normal(p):
        return torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype)

    for p in params:
        p.grad = normal(p)
    return [normal(p) for p in params]


def train(optimizer, steps):
    """Observe and step; a public witness, which knows no hess_diag, only gets the gradients."""
    params = parameters_of(optimizer)
    for step in steps:
        diag = observe(params, step)
        if isinstance(optimizer, Hybrid):
            optimizer.step(hess_diag=diag)
        else:
            optimizer.step()
    return optimizer


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def weights(optimizer):
    return [p.detach().clone() for p in parameters_of(optimizer)]


def same(a, b):
    """Bit-equal, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)  # nan is nan


def assert_close(a, b, atol=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=atol)


def snapshot(optimizer):
    return copy.deepcopy((weights(optimizer), optimizer.state_dict()))


# --- Witnesses: one rule alone, or with all the weight, is a known optimizer. ---

ALONE = {
    "SGD": (SGD(), lambda p: torch.optim.SGD(p, lr=0.01)),
    "SGD, momentum": (
        SGD(momentum=0.95, weight_decay=5e-4),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.95, weight_decay=5e-4),
    ),
    "SGD, dampened": (
        SGD(momentum=0.9, dampening=0.3),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.3),
    ),
    "SGD, Nesterov": (
        SGD(momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "Adam": (Adam(), lambda p: torch.optim.Adam(p, lr=0.01)),
    "Adam, L2": (
        Adam(betas=(0.8, 0.99), eps=1e-3, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99), eps=1e-3, weight_decay=0.1),
    ),
    "Adam, AMSGrad": (
        Adam(amsgrad=True, betas=(0.9, 0.9)),
        lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, betas=(0.9, 0.9)),
    ),
    "Padam at p = 1/2": (
        Padam(partial=0.5, amsgrad=True, betas=(0.9, 0.9), bias_correction="consistent"),
        lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, betas=(0.9, 0.9)),
    ),
}


@pytest.mark.parametrize("rule_and_witness", ALONE.values(), ids=ALONE)
@pytest.mark.parametrize("position", ["alone", "first", "last"])
def test_all_weight_on_one_rule_is_pytorch_s_optimizer(rule_and_witness, position):
    rule, witness = rule_and_witness
    other = Padam(betas=(0.5, 0.5)) if isinstance(rule, SGD) else SGD(momentum=0.5)
    rules, lambdas = {
        "alone": ((rule,), (1.0,)),
        "first": ((rule, other), (1.0, 0.0)),
        "last": ((other, rule), (0.0, 1.0)),
    }[position]
    ours = train(Hybrid(parameters(), rules, 0.01, lambdas), range(100))
    assert_close(weights(ours), weights(train(witness(parameters()), range(100))))


@pytest.mark.parametrize(
    ("constructor", "witness"),
    [
        (methods.sgd, lambda p, **kw: torch.optim.SGD(p, momentum=0.95, weight_decay=5e-4, **kw)),
        (methods.adam, lambda p, **kw: torch.optim.Adam(p, weight_decay=5e-4, **kw)),
    ],
    ids=["sgd", "adam"],
)
@pytest.mark.parametrize("maximize", [False, True])
def test_the_named_baselines_are_pytorch_s(constructor, witness, maximize):
    ours = train(constructor(parameters(), lr=0.01, maximize=maximize), range(20))
    theirs = train(witness(parameters(), lr=0.01, maximize=maximize), range(20))
    assert_close(weights(ours), weights(theirs))


@pytest.mark.parametrize("hessian_power", [1.0, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adahessian_is_the_public_package_s(hessian_power, weight_decay):
    """Both are fed the same D: the package's own estimator is not under test here."""
    package = pytest.importorskip("pytorch_optimizer")
    same_for_both = dict(
        lr=0.15, betas=(0.9, 0.99), weight_decay=weight_decay, eps=1e-4, hessian_power=hessian_power
    )
    ours = methods.adahessian(parameters(), **same_for_both)
    theirs = package.AdaHessian(parameters(), **same_for_both)
    for step in range(50):
        ours.step(hess_diag=observe(parameters_of(ours), step))
        theirs.step(hessian=observe(parameters_of(theirs), step))
    assert_close(weights(ours), weights(theirs))


@pytest.mark.parametrize("partial", [0.5, 0.25, 1 / 8])
def test_padam_is_the_public_package_s(partial):
    """Theirs has no AMSGrad maximum, and the released bias correction."""
    package = pytest.importorskip("pytorch_optimizer")
    same_for_both = dict(lr=0.1, betas=(0.9, 0.99), weight_decay=0.05, partial=partial)
    ours = train(methods.padam(parameters(), amsgrad=False, **same_for_both), range(50))
    theirs = train(package.PAdam(parameters(), **same_for_both), range(50))
    assert_close(weights(ours), weights(theirs))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lion_is_the_public_package_s(weight_decay):
    package = pytest.importorskip("pytorch_optimizer")
    same_for_both = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=weight_decay)
    ours = train(methods.lion(parameters(), **same_for_both), range(50))
    theirs = train(package.Lion(parameters(), **same_for_both), range(50))
    assert_close(weights(ours), weights(theirs))


# --- The merge. ---


def moved_once(rules, lambdas, lr=0.125, grad_scale=1.0, **settings):
    params = parameters()
    optimizer = Hybrid(params, rules, lr, lambdas, **settings)
    before = weights(optimizer)
    diag = observe(params, 0)
    for p in params:
        p.grad *= grad_scale
    optimizer.step(hess_diag=diag)
    return [w - w0 for w, w0 in zip(weights(optimizer), before)]


MIXTURE = (Adam(), SGD(momentum=0.9), AdaHessian(eps=0.1))
some_lambdas = st.tuples(*[st.floats(0, 2)] * 3)


@quick
@given(some_lambdas, st.sampled_from([0.5, 2.0, 3.0]))
def test_the_merge_is_a_product_of_sums(lambdas, c):
    """So c times the weights moves c^2 times as far, but c times the learning rate only c times."""
    moved = moved_once(MIXTURE, lambdas)
    assert_close(moved_once(MIXTURE, [c * λ for λ in lambdas]), [c**2 * d for d in moved], 1e-9)
    assert_close(moved_once(MIXTURE, lambdas, lr=0.125 * c), [c * d for d in moved], 1e-9)


@quick
@given(st.integers(0, 2), st.sampled_from([0.0, 1.0, 0.3]))
def test_with_one_rule_alone_all_merges_are_that_rule_s_step(which, λ):
    """For graft, where that rule is the first."""
    lambdas = [λ if i == which else 0.0 for i in range(3)]
    steps = [λ * d for d in moved_once([MIXTURE[which]], (1.0,))]
    first = [MIXTURE[which], *MIXTURE[:which], *MIXTURE[which + 1 :]]
    assert_close(moved_once(MIXTURE, lambdas, merge="sum"), steps, 1e-9)
    assert_close(moved_once(first, (λ, 0.0, 0.0), merge="graft"), steps, 1e-9)


def test_a_grafted_step_has_one_rule_s_direction_and_another_s_length():
    rules = (Adam(), SGD())
    adam, sgd = moved_once(rules[:1], (1.0,)), moved_once(rules[1:], (1.0,))
    for moved, a, s in zip(moved_once(rules, (0.0, 1.0), merge="graft"), adam, sgd):
        torch.testing.assert_close(moved.norm(), s.norm())
        torch.testing.assert_close(moved / moved.norm(), a / a.norm())


@pytest.mark.parametrize("how", [{}, {"foreach": True}], ids=["loop", "foreach"])
def test_a_grafted_step_without_direction_stands_still(how):
    w = torch.nn.Parameter(torch.ones(3))
    w.grad = torch.zeros(3)
    optimizer = Hybrid([w], (Adam(), SGD(weight_decay=0.1)), 0.1, (0.5, 0.5), merge="graft", **how)
    optimizer.step()
    assert torch.equal(w, torch.ones(3))


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_foreach_is_the_loop(name, dtype):
    both = [OPTIMIZERS[name](parameters(dtype=dtype), foreach=foreach) for foreach in (False, True)]
    for step in range(6):
        for optimizer in both:
            (group,) = optimizer.param_groups
            group["lr"] = 0.1 / (1 + step)
            group["lambdas"] = ((1.0,), (0.25 * (step % 5), 1.0))[len(group["rules"]) - 1]
            train(optimizer, [step])
    for a, b in zip(*map(weights, both)):
        torch.testing.assert_close(a, b)


def test_foreach_takes_several_precisions_in_one_group():
    def mixed(**how):
        params = parameters(dtype=torch.float32)
        params[1] = torch.nn.Parameter(params[1].detach().double())
        params[2] = torch.nn.Parameter(params[2].detach().bfloat16())
        return methods.adasgd(params, **how)

    loop, foreach = (train(mixed(foreach=foreach), range(4)) for foreach in (False, True))
    for a, b in zip(weights(loop), weights(foreach)):
        torch.testing.assert_close(a, b)


class Counting(TorchDispatchMode):
    """Counts the operations that reach a device."""

    n = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.n += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "most"), [("atmo", 60), ("adasgd", 60), ("adahessian", 60)])
def test_a_foreach_step_dispatches_few_operations(name, most):
    """However many parameters there are: on a GPU each is a launch."""
    params = parameters(dtype=torch.float32, shapes=[(3,)] * 62)
    optimizer = train(getattr(methods, name)(params, foreach=True), [0])
    diag = observe(params, 1)
    with Counting() as counting:
        optimizer.step(hess_diag=diag)
    assert counting.n <= most


def test_half_and_half_is_not_half_of_each_step():
    """At step 1 with g = 1: d = (0.1, 1), eta = (1, 0.1) for lr = 0.1, as in Hybrid's docstring."""
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    w.grad = torch.ones_like(w)
    Hybrid([w], (Adam(eps=0.0), SGD()), 0.1, (0.5, 0.5)).step()
    assert w.item() == pytest.approx(-(0.5 * 1 + 0.5 * 0.1) * (0.5 * 1 * 0.1 + 0.5 * 1))


@quick
@given(some_lambdas, st.permutations(range(3)))
def test_the_order_of_rules_does_not_matter(lambdas, order):
    shuffled = Hybrid(parameters(), [MIXTURE[i] for i in order], 0.01, [lambdas[i] for i in order])
    straight = Hybrid(parameters(), MIXTURE, 0.01, lambdas)
    assert_close(weights(train(shuffled, range(4))), weights(train(straight, range(4))), 1e-9)


def test_adam_does_not_see_the_scale_of_the_loss():
    rules = (Adam(eps=0.0),)
    assert_close(moved_once(rules, (1.0,), grad_scale=1024.0), moved_once(rules, (1.0,)))


@pytest.mark.parametrize("lambdas", [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)])
def test_rules_without_weight_still_move_their_buffers(lambdas):
    """Faded in later, they are as warm as if they had always had weight."""
    ours = train(Hybrid(parameters(), MIXTURE, 0.01, lambdas), range(7))
    all_on = train(Hybrid(parameters(), MIXTURE, 0.01, (1.0, 1.0, 1.0)), range(7))
    for p, q in zip(parameters_of(ours), parameters_of(all_on)):
        assert same(ours.state[p]["rules"], all_on.state[q]["rules"])
        assert all(buffers for buffers in ours.state[p]["rules"])


def test_no_weight_at_all_stands_still():
    optimizer = Hybrid(parameters(), MIXTURE, 0.01, (0.0, 0.0, 0.0))
    before = weights(optimizer)
    assert same(weights(train(optimizer, range(3))), before)


def test_a_rule_without_weight_cannot_spoil_the_step():
    """0 * nan is nan: AdaHessian with eps = 0 on flat curvature answers nan and inf."""
    params = parameters()
    optimizer = Hybrid(params, (AdaHessian(eps=0.0), SGD()), 0.1, (0.0, 1.0))
    observe(params, 0)
    params[0].grad[0] = 0.0
    expected = [p.detach() - 0.1 * p.grad for p in params]
    optimizer.step(hess_diag=[torch.zeros_like(p) for p in params])
    assert_close(weights(optimizer), expected)


@every_optimizer
def test_maximizing_is_minimizing_the_negative(name):
    up = OPTIMIZERS[name](parameters(), maximize=True)
    down = OPTIMIZERS[name](parameters())
    for step in range(5):
        up.step(hess_diag=observe(parameters_of(up), step))
        diag = observe(parameters_of(down), step)
        for p in parameters_of(down):
            p.grad.neg_()
        down.step(hess_diag=[-D for D in diag])
    assert same(weights(up), weights(down))


@every_optimizer
def test_gradients_and_hessian_diagonals_are_only_read(name):
    params = parameters()
    optimizer = OPTIMIZERS[name](params, maximize=True)
    for step in range(3):
        diag = observe(params, step)
        given = copy.deepcopy(([p.grad for p in params], diag))
        optimizer.step(hess_diag=diag)
        assert same(([p.grad for p in params], diag), given)


@every_optimizer
def test_gradients_may_live_in_the_same_memory_for_ever(name):
    """As with zero_grad(set_to_none=False): no buffer may be the gradient itself."""
    params = parameters()
    optimizer = OPTIMIZERS[name](params, weight_decay=0.0)
    twin = OPTIMIZERS[name](parameters(), weight_decay=0.0)
    memory = [torch.empty_like(p) for p in params]
    for step in range(3):
        diag = observe(params, step)
        for p, grad in zip(params, memory):
            p.grad = grad.copy_(p.grad)
        optimizer.step(hess_diag=diag)
    assert same(weights(optimizer), weights(train(twin, range(3))))


# --- The report's constructors. ---


def test_the_defaults_are_those_of_table_i():
    p = parameters()
    rows = {
        "sgd": (methods.sgd(p), 0.01, (1.0,), 0.0, [SGD(0.95, weight_decay=5e-4)]),
        "adam": (methods.adam(p), 0.001, (1.0,), 0.0, [Adam(weight_decay=5e-4)]),
        "atmo": (
            methods.atmo(p),
            0.01,
            (0.5, 0.5),
            0.0,
            [Adam(weight_decay=5e-4), SGD(0.95, weight_decay=5e-4)],
        ),
        "padam_sgd": (
            methods.padam_sgd(p),
            0.01,
            (0.5, 0.5),
            0.0,
            [Padam(weight_decay=0.025, amsgrad=False), SGD(0.9, weight_decay=0.025)],
        ),
        "adahessian": (methods.adahessian(p), 0.15, (1.0,), 5e-4, [AdaHessian()]),
        "adasgd": (
            methods.adasgd(p),
            0.1,
            (0.5, 0.5),
            0.0,
            [AdaHessian(), SGD(0.95, weight_decay=5e-4)],
        ),
    }
    for name, (optimizer, lr, lambdas, decoupled, rules) in rows.items():
        (group,) = optimizer.param_groups
        ours = (group["lr"], group["lambdas"], group["decoupled_weight_decay"], [*group["rules"]])
        assert ours == (lr, lambdas, decoupled, rules), name


@pytest.mark.parametrize(
    ("constructor", "l2", "decoupled"),
    [(methods.atmo, 0.3, 0.0), (methods.padam_sgd, 0.3, 0.0), (methods.adasgd, None, 0.3)],
    ids=["atmo", "padam_sgd", "adasgd"],
)
def test_where_weight_decay_goes(constructor, l2, decoupled):
    def decays(where):
        (group,) = constructor(parameters(), weight_decay=0.3, weight_decay_in=where).param_groups
        rules = [getattr(rule, "weight_decay", None) for rule in group["rules"]]
        return *rules, group["decoupled_weight_decay"]

    assert decays("both") == (l2, 0.3, decoupled)
    assert decays("sgd") == (l2 and 0.0, 0.3, 0.0)
    with pytest.raises(ValueError, match="weight_decay_in='adam'"):
        decays("adam")


def test_every_rule_of_a_hybrid_has_its_own_defaults():
    (group,) = methods.get_method("lion+padam+adam")(parameters()).param_groups
    assert group["rules"] == (Lion(), Padam(), Adam())


def test_averages_may_keep_the_sign():
    for make in (methods.adahessian, methods.adasgd):
        rule = make(parameters(), signed_average=True).param_groups[0]["rules"][0]
        assert rule == AdaHessian(signed_average=True)


def test_decoupled_decay_shrinks_by_the_learning_rate_alone():
    """Not by the merged rate: w (1 - eta gamma) with eta as given, before the move."""
    w = torch.nn.Parameter(torch.tensor([2.0]))
    w.grad = torch.zeros(1)
    Hybrid([w], (Adam(), SGD()), 0.5, (3.0, 4.0), decoupled_weight_decay=0.1).step()
    assert w.item() == pytest.approx(2.0 * (1 - 0.5 * 0.1))


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
        everyone = parameters_of(alone) + parameters_of(fresh)
        diag = observe(everyone, step)
        alone.step(hess_diag=diag[:2])
        fresh.step(hess_diag=diag[2:])
    assert same(weights(optimizer), weights(alone) + weights(fresh))


def new():
    return torch.nn.Parameter(torch.ones(2))


REFUSED_GROUPS = {
    "lr 0": (dict(lr=0.0), ValueError, "lr=0.0"),
    "lr nan": (dict(lr=math.nan), ValueError, "lr=nan"),
    "lr inf": (dict(lr=math.inf), ValueError, "lr=inf"),
    "lr text": (dict(lr="0.1"), ValueError, "lr='0.1'"),
    "lambda text": (dict(lambdas=("0.5", "0.5")), ValueError, "lambdas="),
    "lambda a number": (dict(lambdas=0.5), ValueError, "lambdas=0.5"),
    "merge unknown": (dict(merge="mean"), ValueError, "merge='mean'.*product"),
    "lambda negative": (dict(lambdas=(0.5, -0.5)), ValueError, "lambdas="),
    "lambda nan": (dict(lambdas=(0.5, math.nan)), ValueError, "lambdas="),
    "lambda missing": (dict(lambdas=(0.5,)), ValueError, "2 rules"),
    "lambda too many": (dict(lambdas=(1, 1, 1)), ValueError, "2 rules"),
    "no rules": (dict(rules=(), lambdas=()), ValueError, "0 rules"),
    "decay negative": (dict(decoupled_weight_decay=-1.0), ValueError, "decoupled_weight_decay"),
    "decay nan": (dict(decoupled_weight_decay=math.nan), ValueError, "decoupled_weight_decay"),
    "a name, not a rule": (dict(rules=("adam", "sgd")), TypeError, "not a rule"),
    "a class, not a rule": (dict(rules=(Adam, SGD)), TypeError, "not a rule"),
    "complex": (
        dict(params=[new(), torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]),
        TypeError,
        "complex",
    ),
    "not a leaf": (dict(params=[new() * 2]), ValueError, "leaf"),
    "not a tensor": (dict(params=["w"]), TypeError, "Tensor"),
}


@pytest.mark.parametrize(("group", "error", "reason"), REFUSED_GROUPS.values(), ids=REFUSED_GROUPS)
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
    optimizer.add_param_group({"params": [new()]})  # and it still takes what is right
    train(optimizer, range(3, 5))


def test_a_parameter_belongs_to_one_group():
    params = parameters()
    optimizer = methods.atmo(params)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [params[0]]})
    assert len(optimizer.param_groups) == 1


# --- Gradients: missing, sparse; closures; the Hessian diagonal. ---


@every_optimizer
def test_a_parameter_without_gradient_waits(name):
    """It neither moves nor ages: later it steps as if the others' steps had not been."""
    params = parameters()
    optimizer = OPTIMIZERS[name](params)
    waiting = params[1]
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


@every_optimizer
def test_a_step_without_any_gradient_does_nothing(name):
    optimizer = OPTIMIZERS[name](parameters())
    before = snapshot(optimizer)
    optimizer.step()
    assert same(snapshot(optimizer), before)


def test_sparse_gradients_are_refused_and_nothing_moves():
    dense, embedding = new(), torch.nn.Embedding(4, 2, sparse=True)
    optimizer = methods.atmo([{"params": [dense]}, {"params": embedding.parameters()}])
    dense.grad = torch.ones(2)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"sparse.*dense"):
        optimizer.step()
    assert same(snapshot(optimizer), before)


@every_optimizer
def test_a_closure_is_called_once_with_gradients_on(name):
    params, calls = parameters(), []

    def loss_of(params):
        return sum((p**4).sum() for p in params)

    optimizer, twin = OPTIMIZERS[name](params), OPTIMIZERS[name](parameters())
    diag = [12 * p.detach() ** 2 for p in params]

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss

    before = loss_of(params).item()
    assert optimizer.step(closure, hess_diag=diag).item() == before
    assert calls == [True]
    loss_of(parameters_of(twin)).backward()
    assert twin.step(hess_diag=diag) is None
    assert same(weights(optimizer), weights(twin))


@pytest.mark.parametrize("name", ["adahessian", "adasgd"])
def test_no_new_hessian_diagonal_uses_the_last_one(name):
    """For all parameters, or for one."""
    implicit, explicit = OPTIMIZERS[name](parameters()), OPTIMIZERS[name](parameters())
    last = [None] * 4
    for step, fresh in enumerate([(0, 1, 2, 3), (), (1,), (0, 3), (), (0, 1, 2, 3), ()]):
        diag = observe(parameters_of(implicit), step)
        observe(parameters_of(explicit), step)
        new_or_none = [D if i in fresh else None for i, D in enumerate(diag)]
        last = [D if i in fresh else last[i] for i, D in enumerate(diag)]
        implicit.step(hess_diag=new_or_none if fresh else None)
        explicit.step(hess_diag=last)
    assert same(weights(implicit), weights(explicit))


def test_the_last_hessian_diagonal_is_the_one_that_was_given():
    """Not whatever the caller computes into the same memory later."""
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


def test_any_iterable_of_hessian_diagonals_will_do():
    a, b = methods.adahessian(parameters()), methods.adahessian(parameters())
    a.step(hess_diag=iter(observe(parameters_of(a), 0)))
    b.step(hess_diag=tuple(observe(parameters_of(b), 0)))
    assert same(weights(a), weights(b))


def test_a_hessian_diagonal_may_come_in_another_precision():
    a, b = methods.adahessian(parameters(dtype=torch.float32)), methods.adahessian(parameters())
    for step in range(3):
        a.step(hess_diag=[D.double() for D in observe(parameters_of(a), step)])
        b.step(hess_diag=[D.float() for D in observe(parameters_of(b), step)])
    assert [w.dtype for w in weights(a) + weights(b)] == [torch.float32] * 4 + [torch.float64] * 4
    for x, y in zip(weights(a), weights(b)):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "atmo", "padam"])
def test_a_hessian_diagonal_nobody_needs_is_not_kept(name):
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


@pytest.mark.parametrize(
    ("spoil", "error", "reason"),
    [
        (lambda diag: None, RuntimeError, "hessian_diagonal"),
        (lambda diag: [*diag[:3], None], RuntimeError, "hessian_diagonal"),
        (lambda diag: diag[:3], ValueError, "3 tensors.*4 parameters"),
        (lambda diag: [*diag, diag[0]], ValueError, "5 tensors.*4 parameters"),
        (lambda diag: [diag[0], diag[2], diag[1], diag[3]], ValueError, r"hess_diag\[1\].*shape"),
        (lambda diag: [*diag[:3], diag[3].reshape(1)], ValueError, r"hess_diag\[3\].*shape"),
    ],
    ids=["none", "one missing", "too few", "too many", "swapped", "almost the shape"],
)
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
ALLOWED = {
    (SGD, "momentum"): lambda x: 0 <= x < math.inf,
    (SGD, "weight_decay"): lambda x: 0 <= x < math.inf,
    (SGD, "dampening"): lambda x: 0 <= x <= 1,
    (Adam, "eps"): lambda x: 0 <= x < math.inf,
    (Adam, "weight_decay"): lambda x: 0 <= x < math.inf,
    (Padam, "eps"): lambda x: 0 <= x < math.inf,
    (Padam, "weight_decay"): lambda x: 0 <= x < math.inf,
    (Padam, "partial"): lambda x: 0 < x <= 0.5,
    (AdaHessian, "eps"): lambda x: 0 <= x < math.inf,
    (AdaHessian, "hessian_power"): lambda x: 0 < x <= 1,
}


@pytest.mark.parametrize(("rule", "field"), ALLOWED, ids=lambda v: getattr(v, "__name__", v))
@unhurried
@given(value=any_float)
def test_a_rule_takes_exactly_the_values_of_its_range(rule, field, value):
    if ALLOWED[rule, field](value):
        assert getattr(rule(**{field: value}), field) == value
    else:
        with pytest.raises(ValueError, match=field):
            rule(**{field: value})


@pytest.mark.parametrize("rule", [Adam, Padam, AdaHessian])
@unhurried
@given(betas=st.tuples(any_float, any_float))
def test_betas_lie_in_0_to_1(rule, betas):
    if all(0 <= beta < 1 for beta in betas):
        assert rule(betas=list(betas)).betas == betas
    else:
        with pytest.raises(ValueError, match="betas"):
            rule(betas=betas)


@pytest.mark.parametrize(
    ("rule", "settings", "reason"),
    [
        (SGD, dict(nesterov=True), "nesterov"),
        (SGD, dict(nesterov=True, momentum=0.9, dampening=0.1), "nesterov"),
        (Adam, dict(betas=(0.9,)), "betas"),
        (Adam, dict(betas=(0.9, 0.99, 0.999)), "betas"),
        (Padam, dict(bias_correction="maybe"), "bias_correction='maybe'"),
        (AdaHessian, dict(spatial_average="rows"), "spatial_average='rows'"),
        (AdaHessian, dict(spatial_average=0), "spatial_average=0"),
        (AdaHessian, dict(spatial_average=-3), "spatial_average=-3"),
        (AdaHessian, dict(spatial_average=2.0), "spatial_average=2.0"),
        (AdaHessian, dict(spatial_average=True), "spatial_average=True"),
    ],
)
def test_settings_that_contradict_are_refused(rule, settings, reason):
    with pytest.raises(ValueError, match=reason):
        rule(**settings)


def test_rules_are_values():
    assert Adam(betas=[0.9, 0.99]) == Adam(betas=(0.9, 0.99))
    assert len({SGD(0.9), SGD(0.9), SGD(0.95), Adam(), AdaHessian()}) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        Adam().eps = 1.0


@unhurried
@given(lr=any_float, lambdas=st.lists(any_float, max_size=3), decay=any_float)
def test_impossible_rates_are_refused_at_construction_and_at_the_step(lr, lambdas, decay):
    fine = (
        len(lambdas) == 2
        and all(0 <= λ < math.inf for λ in lambdas)
        and 0 <= decay < math.inf
        and 0 <= lr < math.inf
    )

    def build():
        return Hybrid([new()], (Adam(), SGD()), lr, lambdas, decay)

    if fine and lr > 0:
        build()
    else:
        with pytest.raises(ValueError, match=r"lr=|lambdas=|decoupled_weight_decay="):
            build()

    optimizer = Hybrid([new(), new()], (Adam(), SGD()), 0.1, (1, 1))
    optimizer.add_param_group({"params": [new()]})
    for p in parameters_of(optimizer):
        p.grad = torch.ones(2)
    optimizer.param_groups[1].update(lr=lr, lambdas=lambdas, decoupled_weight_decay=decay)
    if fine:  # lr = 0 too: schedulers end there
        optimizer.step()
        return
    with pytest.raises(ValueError, match=r"lr=|lambdas=|decoupled_weight_decay="):
        optimizer.step()
    assert all(torch.equal(p, torch.ones(2)) for p in parameters_of(optimizer))
    assert not optimizer.state


# --- Checkpoints and copies. ---


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(OPTIMIZERS)),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.integers(0, 4),
    st.integers(1, 3),
    st.booleans(),
)
def test_a_checkpoint_at_any_moment_continues_bit_by_bit(name, dtype, before, after, second_group):
    def build(params):
        optimizer = OPTIMIZERS[name](params[:3])
        if second_group:
            optimizer.add_param_group({"params": params[3:], "lr": 0.02})
        return optimizer

    def run(optimizer, steps):
        params = parameters_of(optimizer)
        for step in steps:
            diag = observe(params, step)
            params[step % len(params)].grad = None  # frozen layers and unused heads
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
    """Into an optimizer that has others: nothing is right by accident."""
    given = dict(lr=0.03, lambdas=(0.2, 0.9), maximize=True, merge="sum")
    source = methods.adasgd(parameters(), weight_decay_in="both", **given)
    saved = saved_and_loaded(source.state_dict())
    optimizer = methods.adasgd(parameters(), weight_decay=0.0, compile=True, foreach=True)
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert {k: group[k] for k in given} == given
    assert group["decoupled_weight_decay"] == 5e-4
    assert group["rules"] == (AdaHessian(), SGD(0.95, weight_decay=5e-4))
    assert (group["compile"], group["foreach"]) == (True, True)  # how to compute is its own


def test_loading_hooks_have_their_say():
    """As with torch's own: a hook before may change the state, a hook after sees it loaded."""
    saved = train(methods.adasgd(parameters()), range(3)).state_dict()
    optimizer, after = methods.adasgd(parameters()), []

    def zeroed(_, state_dict):
        state = copy.deepcopy(state_dict["state"])
        for of_one in state.values():
            of_one["rules"][0]["exp_avg"].zero_()
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
def test_torch_s_distributed_checkpoints_take_a_fresh_optimizer(name):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = OPTIMIZERS[name](model.parameters())
    saved = checkpoint.get_optimizer_state_dict(model, optimizer)
    assert set(saved["state"]) == {"weight", "bias"}
    assert same(before, weights(optimizer))
    if optimizer.needs_hessian:  # the empty step has left no diagonal behind
        observe(parameters_of(optimizer), 0)
        with pytest.raises(RuntimeError, match="hessian_diagonal"):
            optimizer.step()


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


@pytest.mark.parametrize("saved_in", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loaded_in", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["atmo", "adasgd"])
def test_a_checkpoint_may_continue_in_another_precision(name, saved_in, loaded_in):
    """As with PyTorch's own: buffers follow the parameters, but never below float32."""
    saved = train(OPTIMIZERS[name](parameters(dtype=saved_in)), range(2)).state_dict()
    optimizer = OPTIMIZERS[name](parameters(dtype=loaded_in))
    optimizer.load_state_dict(saved_and_loaded(saved))
    train(optimizer, range(2, 4))
    for p in parameters_of(optimizer):
        tensors = [t for buffers in optimizer.state[p]["rules"] for t in buffers.values()]
        assert {t.dtype for t in tensors} == {torch.promote_types(loaded_in, torch.float32)}


def test_numpy_s_numbers_are_saved_as_plain_ones():
    """Weights and settings often come from np.linspace; torch.load would refuse its scalars."""
    ramp = np.linspace(0, 1, 5)
    optimizer = methods.atmo(parameters(), momentum=ramp[3], eps=ramp[1])
    optimizer.param_groups[0].update(lambdas=(ramp[1], ramp[3]), lr=ramp[1])
    saved = saved_and_loaded(train(optimizer, range(2)).state_dict())
    assert saved["param_groups"][0]["lambdas"] == (0.25, 0.75)


def test_a_checkpoint_holds_tensors_and_primitives_only():
    def kinds(value):
        if isinstance(value, dict):
            return set().union(*map(kinds, [*value.keys(), *value.values()]))
        if isinstance(value, (list, tuple)):
            return set().union(set(), *map(kinds, value))
        return {type(value)}

    state = train(methods.adasgd(parameters()), range(2)).state_dict()
    assert kinds(state) <= {torch.Tensor, str, int, float, bool, type(None)}


OTHERS = {
    "other rules": lambda: methods.padam_sgd(parameters()),
    "rules in another order": lambda: Hybrid(parameters(), (SGD(), Adam()), 0.1, (1, 1)),
    "one rule less": lambda: methods.adam(parameters()),
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
def test_copies_live_on_their_own(name, copied):
    original = train(OPTIMIZERS[name](parameters()), range(3))
    twin = copied(original)
    before = snapshot(original)
    train(twin, range(3, 6))
    assert same(snapshot(original), before)
    assert same(snapshot(train(original, range(3, 6))), snapshot(twin))


def test_named_parameters_are_taken_as_pytorch_takes_them():
    net = torch.nn.Linear(3, 2).double()
    optimizer = methods.atmo(net.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    train(optimizer, range(2))
    resumed = methods.atmo(copy.deepcopy(net).named_parameters())
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert same(snapshot(train(resumed, [2])), snapshot(train(optimizer, [2])))


# --- Schedulers. ---

SCHEDULERS = {
    "cosine, down to 0": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "milestones": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 6], gamma=0.1),
    "warm-up": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: min(1, epoch / 4)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.3, total_steps=20, cycle_momentum=False
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_pytorch_s_schedulers_drive_the_learning_rate(scheduler):
    ours = methods.sgd(parameters(), lr=0.1)
    theirs = torch.optim.SGD(parameters(), lr=0.1, momentum=0.95, weight_decay=5e-4)
    driven = [(optimizer, scheduler(optimizer)) for optimizer in (ours, theirs)]
    for step in range(12):
        for optimizer, schedule in driven:
            train(optimizer, [step])
            schedule.step()
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    assert_close(weights(ours), weights(theirs))


# --- Precision and memory layout. ---


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_float32_buffers(name, dtype):
    params = parameters(dtype=dtype)
    optimizer = train(OPTIMIZERS[name](params), range(2))
    for _ in range(2):
        for p in params:
            assert p.dtype == dtype
            tensors = [t for buffers in optimizer.state[p]["rules"] for t in buffers.values()]
            assert tensors
            assert {t.dtype for t in tensors} == {torch.float32}
        optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))


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


def test_the_second_moment_of_a_bfloat16_parameter_decays():
    """In bfloat16, 0.999 v rounds back to v and one early gradient would be remembered for ever."""
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = methods.adam([w], weight_decay=0.0)
    for step in range(1000):
        w.grad = torch.full_like(w, float(step == 0))
        optimizer.step()
    v = optimizer.state[w]["rules"][0]["exp_avg_sq"]
    torch.testing.assert_close(v, torch.full((3,), 0.001 * 0.999**999), rtol=1e-3, atol=0)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_optimizer_finds_a_minimum(name, dtype):
    w = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=dtype))
    optimizer = OPTIMIZERS[name]([w], lr=0.02)
    target, curvature = torch.tensor([1.0, 0.5], dtype=dtype), torch.tensor([1.0, 4.0], dtype=dtype)
    first = None
    for _ in range(400):
        loss = (curvature * (w - target) ** 2).sum()
        first = first or loss.item()
        (w.grad,), diag = hessian_diagonal(loss, [w])
        optimizer.step(hess_diag=diag)
    assert loss.item() < 0.01 * first


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
def test_empty_parameters_are_no_obstacle(average):
    """Layers of width zero exist; their mean is over nothing."""
    params = parameters(shapes=[(0,), (0, 3), (2,)])
    optimizer = methods.adasgd(params, spatial_average=average)
    before = params[2].detach().clone()
    optimizer.step(hess_diag=observe(params, 0))
    assert not torch.equal(params[2], before)


def test_training_holds_no_graph_and_grows_no_state():
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = methods.adasgd([w])
    held = []
    for _ in range(3):
        (w.grad,), diag = hessian_diagonal((w**4).sum(), [w])
        optimizer.step(hess_diag=diag)
        state = optimizer.state[w]
        tensors = [t for buffers in state["rules"] for t in buffers.values()] + [state["hess_diag"]]
        assert not any(t.requires_grad for t in tensors)
        held.append(sum(t.numel() for t in tensors))
    assert held == [held[0]] * 3
    assert w.is_leaf
    assert w.requires_grad


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_adahessian_takes_newton_steps_on_a_parabola(curvature, distance):
    """One step with lr = 1: the bias corrections cancel, and g / |D| is the whole distance."""
    w = torch.nn.Parameter(torch.tensor([distance], dtype=torch.float64))
    optimizer = methods.adahessian([w], lr=1.0, weight_decay=0.0, eps=0.0)
    (w.grad,), diag = hessian_diagonal((curvature * w**2 / 2).sum(), [w])
    optimizer.step(hess_diag=diag)
    assert abs(w.item()) < 1e-9 * distance
