"""Compiled and foreach steps match the plain loop, whatever changes between the steps.

Where many compilations are needed, they stop before code is generated; ``-m slow`` generates it.
"""

import copy
import dataclasses

import pytest
import torch
from optimizers import OPTIMIZERS, assert_close, observe, parameters, parameters_of, train, weights
from torch import nn

import hybrid_lib as hl
from hybrid_lib.optim import hybrid
from hybrid_lib.optim.compiled import CannotCompile, compiled

# --- Functions that cannot be compiled. ---


def branches(x):
    return x + 1 if x.sum() > 0 else x - 1


def test_a_function_that_cannot_be_compiled_is_named_in_one_line():
    with pytest.raises(CannotCompile, match="my function cannot be compiled here") as refused:
        compiled(branches, "my function")(torch.ones(3))
    assert "\n" not in str(refused.value)
    assert refused.value.__cause__ is not None


def test_a_compiled_function_follows_its_python_arguments():
    twice = compiled(lambda x, plus: x + 1 if plus else x - 1, "a test function")
    assert [twice(torch.zeros(1), plus).item() for plus in (True, False)] == [1.0, -1.0]


@pytest.mark.parametrize("switch", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_the_variable_that_switches_the_compiler_off_is_named(monkeypatch, switch):
    monkeypatch.setenv(switch, "1")
    with pytest.raises(CannotCompile, match=f"{switch}.* is set") as refused:
        compiled(lambda x: x.sin(), "my function")(torch.zeros(2))
    assert "\n" not in str(refused.value)


def test_errors_that_are_not_the_compiler_s_are_raised_unchanged(monkeypatch):
    def out_of_memory(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with pytest.raises(torch.OutOfMemoryError):
        compiled(out_of_memory, "a function")(torch.ones(1))


# --- The optimizer's step. ---


def twins(make, dtype=torch.float64, **settings):
    """Two optimizers on equal parameters, eager and compiled."""
    shapes = (5,), (8, 5)
    return [make(parameters(dtype=dtype, shapes=shapes), compile=c, **settings) for c in (0, 1)]


def take_steps(optimizers, n, first=0, rates=None):
    for step in range(first, first + n):
        for optimizer in optimizers:
            if rates is not None:
                (group,) = optimizer.param_groups
                group["lr"], group["lambdas"] = rates(step)
            train(optimizer, [step])


def assert_twins_agree(eager, fast, rtol=1e-11):
    assert_close(weights(eager), weights(fast), rtol)


def schedule(step):
    return 0.01 / (1 + step), (1 - step / 10, step / 10)


EVERY_RULE = (  # and every branch, so that one compilation checks them all
    hl.rules.Adam(weight_decay=0.1),
    hl.rules.SGD(momentum=0.9, dampening=0.2, weight_decay=0.01),
    hl.rules.SGD(momentum=0.9, nesterov=True),
    hl.rules.Padam(partial=0.2, amsgrad=True),
    hl.rules.Padam(partial=1 / 8, bias_correction="consistent"),
    hl.rules.AdaHessian(eps=0.1, hessian_power=0.7, spatial_average="auto"),
    hl.rules.Lion(),
)


def hybrid_of_many_rules(merge, **how):
    """With every rule for the product; with three for the others, which compile faster."""
    params = parameters(shapes=[(4, 3), (5,), ()])
    rules = EVERY_RULE if merge == "product" else EVERY_RULE[:3]
    λ = (1,) * len(rules)
    return hl.Hybrid(params, rules, 0.01, λ, 0.1, maximize=True, merge=merge, **how)


@pytest.mark.parametrize("merge", ["product", "sum", "graft"])
@pytest.mark.parametrize(
    "way", ["foreach", "traced", pytest.param("compiled", marks=pytest.mark.slow)]
)
def test_every_rule_and_every_merge_matches_the_loop(merge, way, request):
    if way == "traced":
        request.getfixturevalue("traced")
    how = {"foreach": True} if way == "foreach" else {"compile": True}
    both = hybrid_of_many_rules(merge), hybrid_of_many_rules(merge, **how)
    n = len(both[0].param_groups[0]["rules"])

    def rates(step):  # some of them 0
        return 0.01 / (1 + step), [(i + step) % 3 / 4 for i in range(n)]

    take_steps(both, 4, rates=rates)
    for optimizer in both:  # one parameter skips a step and stays one behind
        optimizer.param_groups[0]["params"][1].grad = None
        optimizer.step()
    take_steps(both, 3, first=20, rates=rates)
    assert_twins_agree(*both)
    counts = [state["step"] for state in both[1].state_dict()["state"].values()]
    assert counts == [8, 7, 8]


def test_schedules_cause_no_recompilation():
    eager, fast = twins(hl.atmo)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    take_steps((eager, fast), 11, rates=schedule)  # from (1, 0) to (0, 1)
    assert_twins_agree(eager, fast)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_step_matches_at_the_precision_of_the_parameters(dtype):
    eager, fast = twins(hl.atmo, dtype)
    take_steps((eager, fast), 20)
    assert_twins_agree(eager, fast, 1e-5 if dtype == torch.float32 else 1e-2)


def test_eager_and_compiled_optimizers_load_each_other_s_states():
    eager, fast = twins(hl.atmo)
    take_steps((eager, fast), 3)
    saved = fast.state_dict()
    assert [s["step"] for s in saved["state"].values()] == [3, 3]
    other_eager, other_fast = twins(hl.atmo)
    for optimizer in (other_eager, other_fast):
        for w, v in zip(optimizer.param_groups[0]["params"], fast.param_groups[0]["params"]):
            w.data.copy_(v)
        optimizer.load_state_dict(saved)
    assert [o.param_groups[0]["compile"] for o in (other_eager, other_fast)] == [False, True]
    take_steps((eager, fast, other_eager, other_fast), 3, first=20)
    for optimizer in (fast, other_eager, other_fast):
        assert_twins_agree(eager, optimizer)
    assert copy.deepcopy(fast).param_groups[0]["compile"]


def with_rule(**fields):
    """Replace fields of the group's first rule."""

    def change(optimizer):
        (group,) = optimizer.param_groups
        group["rules"] = (dataclasses.replace(group["rules"][0], **fields), *group["rules"][1:])
        return optimizer

    return change


def setting(**settings):
    return lambda optimizer: optimizer.param_groups[0].update(settings)


def reloaded(optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def with_other_strides(optimizer):
    """Lay its buffers out differently in memory."""
    for state in optimizer.state.values():
        for buffers in state["rules"]:
            for name, b in buffers.items():
                buffers[name] = b.transpose(0, -1).contiguous().transpose(0, -1)
    return optimizer


def first_state(optimizer):
    return optimizer.state[parameters_of(optimizer)[0]]


def with_new_mean(optimizer):
    first_state(optimizer)["rules"][0]["exp_avg"] = torch.zeros(5, dtype=torch.float64)


def without_gradient(which):
    """Change a rule and take a step in which one parameter has no gradient."""

    def change(optimizer):
        observe(parameters_of(with_rule(amsgrad=True)(optimizer)), 60)
        parameters_of(optimizer)[which].grad = None
        optimizer.step()

    return change


def plain_sgd(params, compile):
    return hl.sgd(params, momentum=0, compile=compile)


momentum, amsgrad = with_rule(momentum=0.9), with_rule(amsgrad=True)
CHANGES = {
    "maximize": (hl.atmo, setting(maximize=True), setting(maximize=False)),
    "decay": (hl.atmo, setting(decoupled_weight_decay=0.5), setting(decoupled_weight_decay=0.0)),
    "merge": (hl.atmo, setting(merge="sum")),
    "a number that leaves the buffers alone": (hl.adam, with_rule(eps=10.0), with_rule(eps=1e-8)),
    "eager for a while": (hl.atmo, setting(compile=False), setting(compile=True)),
    "another buffer": (hl.atmo, amsgrad),
    "another buffer after a load": (hl.atmo, reloaded, amsgrad),
    "another buffer, then loaded": (hl.adam, lambda o: reloaded(amsgrad(o))),
    "another buffer, then copied": (hl.adam, lambda o: copy.deepcopy(amsgrad(o))),
    "momentum, then copied": (plain_sgd, lambda o: copy.deepcopy(momentum(o))),
    "the first has no gradient": (hl.adam, without_gradient(0)),
    "the second has no gradient": (hl.adam, without_gradient(1)),
    "other strides": (hl.atmo, with_other_strides),
    "other strides, then loaded": (hl.atmo, lambda o: reloaded(with_other_strides(o))),
    "the state is cleared": (hl.atmo, lambda o: o.state.clear()),
    "one state is cleared": (hl.adam, lambda o: first_state(o).clear()),
    "a buffer is put in": (hl.adam, with_new_mean),
    "a count is put in": (hl.adam, lambda o: first_state(o).update(step=0)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_compiled_step_follows_changes_between_steps(name, request):
    if "strides" not in name:  # generated code alone depends on them
        request.getfixturevalue("traced")
    make, *changes = CHANGES[name]
    both = twins(make)
    take_steps(both, 3)
    for i, change in enumerate(changes, start=1):
        both = [change(optimizer) or optimizer for optimizer in both]
        take_steps(both, 3, first=20 * i)
        assert_twins_agree(*both)
    states = [o.state_dict()["state"].values() for o in both]
    eager, fast = ([(s["step"], [[*b] for b in s["rules"]]) for s in each] for each in states)
    assert eager == fast


def test_a_compiled_step_takes_several_precisions_in_one_group():
    def make(params, compile):
        params[1].data = params[1].data.float()
        return hl.atmo(params, compile=compile)

    both = twins(make)
    take_steps(both, 4)
    assert_twins_agree(*both, 1e-5)


def test_rules_added_after_the_first_step_are_refused():
    optimizer = train(hl.atmo(parameters()), range(2))
    (group,) = optimizer.param_groups
    group.update(rules=(*group["rules"], hl.rules.SGD()), lambdas=(0.5, 0.5, 0.1))
    with pytest.raises(RuntimeError, match="rules were added"):
        train(optimizer, [2])


@dataclasses.dataclass(frozen=True)
class Mean:
    """A custom rule."""

    needs_hessian = False

    def init(self, w):
        return {"mean": torch.zeros_like(w)}

    def corrections(self, t):
        return (1 / (1 - 0.9**t),)

    def propose(self, seen, buffers, lr, corrections):
        buffers["mean"].mul_(0.9).add_(seen.g, alpha=0.1)
        return buffers["mean"].mul(corrections[0]), lr


class Rebinding(Mean):
    def propose(self, seen, buffers, lr, corrections):
        buffers["mean"] = buffers["mean"].mul(0.9)
        return buffers["mean"], lr


class Branching(Mean):
    def propose(self, seen, buffers, lr, corrections):
        return seen.g if seen.g.sum() > 0 else -seen.g, lr


def hybrid_of(rule):
    return lambda params, **settings: hl.Hybrid(params, [rule], 0.1, **settings)


def test_a_custom_rule_compiles():
    both = twins(hybrid_of(Mean()))
    take_steps(both, 6)
    assert_twins_agree(*both)


@pytest.mark.parametrize("how", [{}, {"foreach": True}])
def test_a_rule_that_replaces_a_buffer_is_refused(how):
    """A compiled step would lose the new tensor, so every kind of step refuses it."""
    optimizer = hybrid_of(Rebinding())([nn.Parameter(torch.ones(2))], **how)
    with pytest.raises(TypeError, match="in place"):
        take_steps((optimizer,), 1)


def test_a_rule_that_branches_on_values_is_refused_in_one_line_by_the_compiler():
    eager, fast = twins(hybrid_of(Branching()))
    take_steps((eager,), 1)
    with pytest.raises(CannotCompile, match="the optimizer's step cannot be compiled") as refused:
        take_steps((fast,), 1)
    assert "\n" not in str(refused.value)
    assert {state["step"] for state in fast.state.values()} == {0}  # nothing has moved


def test_a_new_diagonal_is_written_into_the_tensor_of_the_last_one():
    """A captured step reads that tensor."""
    optimizers = twins(hl.adahessian)
    take_steps(optimizers, 3)
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    kept = [state["hess_diag"] for state in states]
    before = [D.clone() for D in kept]
    take_steps(optimizers, 1, first=20)
    assert all(D is state["hess_diag"] for D, state in zip(kept, states))
    assert not any(torch.equal(a, b) for a, b in zip(kept, before))


@pytest.mark.slow
def test_many_groups_and_a_scheduled_decay_compile():
    """torch gives up on a function after eight compilations."""
    both = []
    for compile in (False, True):
        groups = [{"params": [w]} for w in parameters(shapes=[(3 + i,) for i in range(10)])]
        both.append(train(hl.adam(groups, compile=compile), range(4)))
    assert_twins_agree(*both)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    eager, fast = twins(hl.adam)
    for step in range(12):
        for optimizer in (eager, fast):
            optimizer.param_groups[0]["decoupled_weight_decay"] = 0.01 * (step + 1)
        take_steps((eager, fast), 1, first=step)
    assert_twins_agree(eager, fast)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


def test_parameters_may_share_a_gradient_one_moment_and_not_the_next():
    both = [hl.sgd(parameters(shapes=[(4,)] * 3), momentum=0, compile=c) for c in (False, True)]
    for pattern in ((0, 0, 1), (0, 1, 1)):
        for optimizer in both:
            grads = [torch.full((4,), value, dtype=torch.float64) for value in (1, 3)]
            for p, i in zip(parameters_of(optimizer), pattern):
                p.grad = grads[i]
            optimizer.step()
        assert_twins_agree(*both)


def test_rates_and_weights_may_be_tensors():
    eager, fast = twins(hl.atmo)
    plain, _ = twins(hl.atmo)
    for optimizer in (eager, fast):
        (group,) = optimizer.param_groups
        group["lr"] = torch.tensor(0.02, dtype=torch.float64)
        group["lambdas"] = torch.tensor([0.25, 0.75], dtype=torch.float64)
    plain.param_groups[0].update(lr=0.02, lambdas=(0.25, 0.75))
    take_steps((plain, eager, fast), 4)
    assert_twins_agree(plain, eager)
    assert_twins_agree(plain, fast)
    (group,) = fast.state_dict()["param_groups"]
    assert (group["lr"], group["lambdas"]) == (0.02, (0.25, 0.75))
    eager.param_groups[0]["lambdas"] = torch.tensor([0.5, float("nan")])
    with pytest.raises(ValueError, match="finite and at least 0"):
        eager.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_never_reads_values_from_the_device(name):
    """Meta tensors have no values, so anything that waits for a GPU would fail here."""
    w = nn.Parameter(torch.empty(3, 4, device="meta"))
    optimizer = OPTIMIZERS[name]([w])
    (group,) = optimizer.param_groups
    group["lr"] = torch.empty((), device="meta")
    group["lambdas"] = torch.empty(len(group["rules"]), device="meta")
    for _ in range(3):
        w.grad = torch.empty_like(w)
        optimizer.step(hess_diag=[torch.empty_like(w)] if optimizer.needs_hessian else None)
    assert w.device.type == "meta"


def test_a_step_that_compiles_anew_each_time_is_refused_in_the_end(traced, monkeypatch):
    """As with layers skipped at random: other parameters have gradients at each step."""
    monkeypatch.setattr(hybrid, "MOST_COMPILATIONS", 3)
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(4)]
    optimizer = hl.sgd(params, compile=True)
    for p in (*params[:3], *params[:3]):
        optimizer.zero_grad()
        p.grad = torch.ones(1)
        optimizer.step()
    optimizer.zero_grad()
    params[3].grad = torch.ones(1)
    with pytest.raises(CannotCompile, match="compile=False"):
        optimizer.step()
