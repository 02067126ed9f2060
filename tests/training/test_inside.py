"""Hybrids beyond the report's: some layers merged, adaptive λ, a look inside."""

from dataclasses import replace

import pytest
import torch
from children import outcome
from toys import toy

import hybrid_lib as hl
from hybrid_lib.optim.rules import SGD, Adam
from hybrid_lib.training import inside, loop, tasks
from hybrid_lib.training.engines import eager_pass, training_step
from hybrid_lib.training.experiments import EXPERIMENTS, get_experiment
from hybrid_lib.training.inside import look_inside


def toy_of(name, **changes):
    """Three epochs of any method at toy size."""
    sizes = {"dataset": "digits", "width": 4, "batch_size": 16, "train_limit": 40, "test_limit": 30}
    return replace(get_experiment(name).scaled(3), **sizes, **changes)


# --- Layers that are merged, and the others. ---


def test_layers_that_are_not_merged_follow_the_last_rule_alone():
    """Compared with two groups made by hand: one with both rules, one with SGD alone."""
    for on in ("norms_and_head", "matrices"):
        e = toy("dyn_atmo", lambda_on=on, weight_decay=0.01)
        task = tasks.load_task(e)
        ours, theirs = task.build_model(), task.build_model()
        named = dict(theirs.named_parameters())
        matrices = {n for n, p in named.items() if p.dim() > 1 and not n.startswith("head")}
        merged = matrices if on == "matrices" else named.keys() - matrices
        assert 0 < len(merged) < len(named)
        parts = (
            [p for n, p in named.items() if n in merged],
            [p for n, p in named.items() if n not in merged],
        )
        both = Adam(weight_decay=0.01), SGD(momentum=0.95, weight_decay=0.01)
        others = {"params": parts[1], "rules": both[1:], "lambdas": (1,)}
        by_hand = hl.Hybrid([{"params": parts[0]}, others], both, e.lr, e.lambdas()(0))
        optimizers = e.build_optimizer(ours.named_parameters()), by_hand
        for model, optimizer in zip((ours, theirs), optimizers):
            step = training_step(model, eager_pass(model, task), optimizer)
            for x, y in task.training_batches(0, torch.contiguous_format):
                step(x, y, None)
        for a, b in zip(ours.parameters(), theirs.parameters()):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["adasgd", "adahessian+lion", "lion+adahessian"])
@pytest.mark.parametrize("on", ["norms_and_head", "matrices"])
def test_every_parameter_gets_its_own_hessian_diagonal(name, on, monkeypatch):
    """Groups reorder parameters, so D must be reordered with them."""
    given = {}

    def remember(optimizer, arguments, keywords):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        given.update(zip(params, keywords["hess_diag"], strict=True))

    e = toy_of(name, lambda_on=on)
    task = tasks.load_task(e)
    model = task.build_model()
    optimizer = e.build_optimizer(model.named_parameters())
    optimizer.register_step_pre_hook(remember)
    diagonals = [torch.full_like(p, i) for i, p in enumerate(model.parameters())]

    def one_pass(x, y, probes):
        loss, right, grads, _ = eager_pass(model, task)(x, y, None)
        return loss, right, grads, diagonals

    step = training_step(model, one_pass, optimizer)
    step(*next(task.training_batches(0, torch.contiguous_format)), torch.Generator())
    for p, D in zip(model.parameters(), diagonals):
        assert torch.equal(given[p], D)


def test_decoupled_decay_applies_only_where_its_rule_does():
    """In AdaHessian + SGD the layers that are not merged follow SGD, which has its own decay."""
    e = replace(EXPERIMENTS["adasgd"], weight_decay_in="both", lambda_on="matrices")
    model = hl.resnet18(width=4)
    merged, others = e.build_optimizer(model.named_parameters()).param_groups
    assert (merged["decoupled_weight_decay"], others["decoupled_weight_decay"]) == (5e-4, 0)
    assert others["rules"] == merged["rules"][1:]
    with pytest.raises(ValueError, match="named_parameters"):
        e.build_optimizer(model.parameters())


# --- Runs. ---

RUNS = {
    "three rules": ("adam+lion+sgd", {"lambda_schedule": "cosine"}),
    "hedge": ("atmo", {"lambda_schedule": "hedge", "lambda_rate": 2.0}),
    "hedge of three": ("padam+adahessian+sgd", {"lambda_schedule": "hedge", "merge": "sum"}),
    "hedge per tensor": ("padam_sgd", {"lambda_schedule": "hedge", "lambda_per": "tensor"}),
    "swats": ("swats", {"lambda_tolerance": 1.0}),
    "swats per tensor": ("swats", {"lambda_tolerance": 1e-4, "lambda_per": "tensor"}),
    "some layers": ("dyn_padam_sgd", {"lambda_on": "norms_and_head"}),
    "hedge on some layers": ("atmo", {"lambda_schedule": "hedge", "lambda_on": "matrices"}),
}


@pytest.mark.parametrize(("name", "changes"), RUNS.values(), ids=RUNS)
def test_an_interrupted_run_resumes_to_the_same_bits(name, changes, tmp_path):
    e, steps = toy_of(name, **changes), iter(range(99))
    straight = loop.run(e, tmp_path / "a", progress=False)
    stopped = loop.run(e, tmp_path / "b", progress=False, should_stop=lambda: next(steps) == 4)
    assert (straight.status, stopped.status) == ("complete", "stopped")
    resumed = loop.run(e, tmp_path / "b", progress=False)
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")
    assert all(len(row["lambdas"]) == len(e.method.rules) for row in resumed.rows)


SEVERAL_GROUPS = {
    "some layers": ("dyn_padam_sgd", {"lambda_on": "matrices"}),
    "per tensor": ("padam_sgd", {"lambda_schedule": "hedge", "lambda_per": "tensor"}),
}


@pytest.mark.parametrize(("name", "changes"), SEVERAL_GROUPS.values(), ids=SEVERAL_GROUPS)
def test_every_group_gets_the_rate_of_the_epoch(name, changes):
    e, seen = toy_of(name, **changes), []

    def watch(model, optimizer):
        return lambda: seen.append([g["lr"] for g in optimizer.param_groups]) or {}

    loop.run(e, progress=False, watch=watch)
    rates = e.learning_rates()
    assert len(set(rates)) > 1 < len(seen[0])
    assert [set(of_groups) for of_groups in seen] == [{rate} for rate in rates]


def test_rows_hold_the_mean_of_the_tensors_weights():
    seen = []

    def watch(model, optimizer):
        return lambda: seen.append([g["lambdas"] for g in optimizer.param_groups]) or {}

    e = toy_of("padam_sgd", lambda_schedule="hedge", lambda_per="tensor", lambda_rate=5.0)
    h = loop.run(e, progress=False, watch=watch)
    for row, of_groups in zip(h.rows, seen):
        assert len(set(of_groups)) > 1
        means = [sum(weights) / len(weights) for weights in zip(*of_groups)]
        assert row["lambdas"] == pytest.approx(means)


def test_adaptive_weights_are_logged():
    h = loop.run(toy_of("atmo", lambda_schedule="hedge", lambda_rate=5.0), progress=False)
    seen = [row["lambdas"] for row in h.rows]
    assert len(set(seen)) == 3
    assert all(sum(λ) == pytest.approx(1) for λ in seen)
    switched = loop.run(toy_of("swats", lambda_tolerance=1.0), progress=False).rows
    assert [row["switched_at"] for row in switched] == [[2]] * 3
    assert all(row["lambdas"][0] == 0 < row["lambdas"][1] for row in switched)


# --- A look inside. ---


MERGED = [("dyn_atmo", "product"), ("adasgd", "sum"), ("adam+lion+sgd", "graft"),
          ("sgd", "product")]  # fmt: skip


@pytest.mark.parametrize(("name", "merge"), MERGED)
def test_a_look_inside_changes_nothing_and_measures_every_layer(name, merge):
    e = toy_of(name, merge=merge)
    plain, seen = (loop.run(e, progress=False, **how) for how in ({}, {"watch": look_inside}))
    n, layers = len(e.method.rules), {"stem.0", "blocks.7.conv2", "blocks.2.shortcut.0", "head"}
    for row, usual in zip(seen.rows, plain.rows):
        looked = row.pop("inside")
        assert ("hessian_age" in row) == e.needs_hessian
        assert row.pop("hessian_age", 0) == 0
        drop = ("train_seconds", "test_seconds")
        assert all(row[k] == usual[k] for k in usual if k not in drop)
        assert layers < looked.keys()
        for layer in looked.values():
            assert len(layer["cosines"]) == n * (n - 1) // 2
            assert all(-1.001 <= c <= 1.001 for c in layer["cosines"] if c is not None)
            assert sum(layer["shares"]) == pytest.approx(1, abs=2e-3)
            assert layer["step_size"] > 0
            assert ("curvature" in layer) == e.needs_hessian


@pytest.mark.slow
def test_a_look_inside_measures_the_same_in_compiled_and_eager_runs():
    e = toy_of("dyn_atmo")
    eager, compiled = (loop.run(e, progress=False, watch=look_inside, compile=c)
                       for c in (False, True))  # fmt: skip
    for one, other in zip(eager.rows, compiled.rows):
        for layer, seen in one["inside"].items():
            for key, value in seen.items():
                assert other["inside"][layer][key] == pytest.approx(value, rel=0.05, abs=0.01)


def test_a_look_inside_measures_the_actual_movement(monkeypatch):
    """Compared with the weights before and after a step, and with both rules by hand."""
    e = toy("atmo", lr=0.05)
    task = tasks.load_task(e)
    model = task.build_model()
    optimizer = e.build_optimizer(model.named_parameters())
    row = look_inside(model, optimizer)
    step = training_step(model, eager_pass(model, task), optimizer)
    head = model.head.weight, model.head.bias
    before = [p.detach().clone() for p in head]
    step(*next(task.training_batches(0, torch.contiguous_format)), None)
    moved = torch.cat([(a - b.detach()).flatten() for a, b in zip(before, head)])
    g = torch.cat([p.grad.flatten() for p in head])
    w = torch.cat([a.flatten() for a in before])
    g = g + 5e-4 * w
    adam = 0.1 * g / (g.abs() + 1e-8)  # (1 - beta1) g over its own root; SGD proposes g
    seen = row()["inside"]["head"]
    plain = torch.cat([p.grad.flatten() for p in head])
    assert seen["step_size"] == pytest.approx((moved.norm() / plain.norm()).item(), rel=1e-3)
    assert seen["cosines"] == [
        pytest.approx(torch.cosine_similarity(adam, g, dim=0).item(), rel=1e-2)
    ]
    share = (g @ moved / ((adam + g) @ moved)).item()
    assert seen["shares"] == pytest.approx([1 - share, share], abs=2e-3)
    assert row() == {}


@pytest.mark.parametrize("merge", ["product", "sum", "graft"])
def test_a_look_inside_measures_the_movement_of_every_merge(merge):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 4, bias=False)
    optimizer = hl.Hybrid(model.parameters(), [Adam(), SGD()], 0.1, (0.25, 0.5), merge=merge)
    row, w = look_inside(model, optimizer), model.weight
    w.grad, before = torch.randn(4, 5), w.detach().clone()
    optimizer.step()
    moved = ((before - w.detach()).norm() / w.grad.norm()).item()
    assert row()["inside"]["weight"]["step_size"] == pytest.approx(moved, rel=1e-3)


def test_the_curvature_of_a_layer_is_the_quantiles_of_its_diagonal():
    model = torch.nn.Linear(101, 1, bias=False)
    optimizer = hl.adahessian(model.parameters())
    row, model.weight.grad = look_inside(model, optimizer), torch.ones(1, 101)
    optimizer.step(hess_diag=[torch.arange(-50.0, 51.0).view(1, 101)])
    expected = [100 * q - 50 for q in inside.QUANTILES]
    assert row()["inside"]["weight"]["curvature"] == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("on", ["norms_and_head", "matrices"])
def test_a_layer_may_mix_merged_and_other_parameters(on, monkeypatch):
    """A transformer's layer has a matrix and a bias. Checked by hand, parameter by parameter."""
    sizes = {"dataset": "python-docs", "width": 8, "train_limit": 64, "test_limit": 8}
    e = replace(get_experiment("atmo").scaled(1), **sizes, batch_size=16, lambda_on=on)
    task = tasks.load_task(e)
    model = task.build_model()
    optimizer = e.build_optimizer(model.named_parameters())
    proposed, name_of = {}, {p: name for name, p in model.named_parameters()}

    def remember(optimizer, arguments, keywords):
        proposed.update((name_of[p], answer) for p, answer in optimizer.proposals())

    optimizer.register_step_pre_hook(remember)
    row = look_inside(model, optimizer)
    step = training_step(model, eager_pass(model, task), optimizer)
    for x, y in task.training_batches(0, torch.contiguous_format):
        row()
        step(x, y, None)
    seen = row()["inside"]
    assert [*seen] == [*dict.fromkeys(n.rpartition(".")[0] or n for n in name_of.values())]
    mixed = 0
    for layer, measured in seen.items():
        parts = [
            own for name, own in proposed.items() if (name.rpartition(".")[0] or name) == layer
        ]
        merged = [d for _, d, *_ in parts if len(d) == 2]
        mixed += 0 < len(merged) < len(parts)
        if merged:
            one, other = (torch.cat([d[i].flatten() for d in merged]) for i in range(2))
            cosine = torch.cosine_similarity(one, other, dim=0).item()
            assert measured["cosines"] == [pytest.approx(cosine, abs=1e-3)]
        else:
            assert measured["cosines"] == []
        along = torch.zeros(2)  # of Adam and of SGD, along the movement
        for group, d, η, _ in parts:
            size = sum(λi * ηi for λi, ηi in zip(group["lambdas"], η))
            steps = [size * λi * di.flatten() for λi, di in zip(group["lambdas"], d)]
            along[2 - len(d) :] += torch.stack([step @ sum(steps) for step in steps])
        shares = (along / along.sum()).tolist()[2 - len(measured["shares"]) :]
        assert measured["shares"] == pytest.approx(shares, abs=2e-3)
    assert mixed > 3


def test_a_look_inside_accepts_an_iterator_for_d_and_ignores_closures():
    model = torch.nn.Linear(2, 1)
    optimizer = hl.adahessian(model.parameters())
    row = look_inside(model, optimizer)
    optimizer.step(lambda: torch.zeros(()))  # a closure that computes no gradient
    assert row() == {}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(hess_diag=(torch.ones_like(p) for p in model.parameters()))
    assert row()["inside"].keys() == {"weight", "bias"}


def test_watching_and_capturing_exclude_each_other(monkeypatch):
    task = tasks.load_task(toy("sgd"))
    monkeypatch.setattr(type(task), "device", torch.device("cuda"))
    with pytest.raises(ValueError, match=r"capture=True.*watch"):
        loop.run(toy("sgd"), capture=True, watch=look_inside)


def test_the_age_of_d_is_counted_between_estimates(tmp_path):
    e, steps = toy("adasgd", hessian_every=7), iter(range(99))
    h = loop.run(e, progress=False, watch=look_inside)
    n = -(-40 // e.batch_size)
    assert [row["hessian_age"] for row in h.rows] == [epoch * n % 7 for epoch in range(3)]
    loop.run(e, tmp_path, progress=False, watch=look_inside,
             should_stop=lambda: next(steps) == 4)  # fmt: skip
    resumed = loop.run(e, tmp_path, progress=False, watch=look_inside)
    assert [row["hessian_age"] for row in resumed.rows][1] is None  # unknown after resuming
    D = h.rows[0]["inside"]["head"]["curvature"]
    assert len(D) == len(inside.QUANTILES)
    assert sorted(D) == D
