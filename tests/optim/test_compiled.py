"""A compiled step and a foreach step are the loop's step, whatever changes between the steps."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import hybrid_lib as hl
from hybrid_lib.optim.compiled import CannotCompile, compiled

# --- What cannot be compiled. ---


def branches(x):
    return x + 1 if x.sum() > 0 else x - 1


def test_a_function_that_cannot_be_compiled_is_named_in_one_line():
    with pytest.raises(CannotCompile, match="my function cannot be compiled here") as refused:
        compiled(branches, "my function")(torch.ones(3))
    assert "\n" not in str(refused.value)
    assert refused.value.__cause__ is not None


@pytest.mark.parametrize("switch", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_a_compiler_that_is_switched_off_is_none(monkeypatch, switch):
    monkeypatch.setenv(switch, "1")
    with pytest.raises(CannotCompile, match=f"{switch}.* is set") as refused:
        compiled(lambda x: x.sin(), "my function")(torch.zeros(2))
    assert "\n" not in str(refused.value)


def test_errors_that_are_not_the_compiler_s_pass_through(monkeypatch):
    def out_of_memory(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with pytest.raises(torch.OutOfMemoryError):
        compiled(out_of_memory, "a function")(torch.ones(1))


# --- The optimizer's step. ---

NAMES = ("sgd", "adam", "atmo", "padam", "padam_sgd", "adahessian", "adasgd")


def twins(make, dtype=torch.float64, **settings):
    """Two optimizers on equal parameters, eager and compiled."""
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(n, generator=draw, dtype=dtype) for n in ((5,), (8, 5))]
    return [make([nn.Parameter(w.clone()) for w in start], compile=c, **settings) for c in (0, 1)]


def take_steps(optimizers, n, seed=0, rates=None):
    draw = torch.Generator().manual_seed(seed)
    for step in range(n):
        params = [o.param_groups[0]["params"] for o in optimizers]
        g = [torch.randn(w.shape, generator=draw, dtype=w.dtype) for w in params[0]]
        D = [torch.randn(w.shape, generator=draw, dtype=w.dtype) for w in params[0]]
        for optimizer, mine in zip(optimizers, params):
            if rates is not None:
                (group,) = optimizer.param_groups
                group["lr"], weights = rates(step)
                group["lambdas"] = weights[: len(group["rules"])]
            for w, gradient in zip(mine, g):
                w.grad = gradient.clone()
            optimizer.step(hess_diag=[d.clone() for d in D] if optimizer.needs_hessian else None)


def assert_twins_agree(eager, fast, rtol=1e-11):
    for a, b in zip(eager.param_groups[0]["params"], fast.param_groups[0]["params"]):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def schedule(step):
    return 0.01 / (1 + step), (1 - step / 10, step / 10)


EVERY_RULE = (  # and every branch in one, so that one compilation checks them all
    hl.rules.Adam(weight_decay=0.1),
    hl.rules.SGD(momentum=0.9, dampening=0.2, weight_decay=0.01),
    hl.rules.SGD(momentum=0.9, nesterov=True),
    hl.rules.Padam(partial=0.2, amsgrad=True),
    hl.rules.Padam(partial=1 / 8, bias_correction="consistent"),
    hl.rules.AdaHessian(eps=0.1, hessian_power=0.7, spatial_average="auto"),
    hl.rules.Lion(),
)


def every_rule(merge, **how):
    draw = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=draw).double()) for n in ((4, 3), (5,), ())]
    return hl.Hybrid(params, EVERY_RULE, 0.01, (1,) * 7, 0.1, maximize=True, merge=merge, **how)


@pytest.mark.parametrize("how", [{"compile": True}, {"foreach": True}], ids=["compiled", "foreach"])
@pytest.mark.parametrize("merge", ["product", "sum", "graft"])
def test_every_rule_and_every_merge_is_the_loop_s(how, merge):
    def rates(step):  # a rule without weight among them
        return 0.01 / (1 + step), [(i + step) % 3 / 4 for i in range(7)]

    both = every_rule(merge), every_rule(merge, **how)
    take_steps(both, 4, rates=rates)
    for optimizer in both:  # one parameter waits and is a step behind from then on
        optimizer.param_groups[0]["params"][1].grad = None
        optimizer.step()
    take_steps(both, 3, seed=1, rates=rates)
    assert_twins_agree(*both)
    counts = [state["step"] for state in both[1].state_dict()["state"].values()]
    assert counts == [8, 7, 8]


def test_schedules_compile_nothing():
    eager, fast = twins(hl.atmo)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    take_steps((eager, fast), 11, rates=schedule)  # from (1, 0) to (0, 1)
    assert_twins_agree(eager, fast)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_step_keeps_to_the_precision_of_the_parameters(dtype):
    eager, fast = twins(hl.atmo, dtype)
    take_steps((eager, fast), 20)
    assert_twins_agree(eager, fast, 1e-5 if dtype == torch.float32 else 1e-2)


def test_eager_and_compiled_optimizers_read_each_other_s_states():
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
    take_steps((eager, fast, other_eager, other_fast), 3, seed=1)
    for optimizer in (fast, other_eager, other_fast):
        assert_twins_agree(eager, optimizer)
    assert copy.deepcopy(fast).param_groups[0]["compile"]


def test_a_compiled_step_leaves_out_parameters_without_gradient():
    eager, fast = twins(hl.atmo)
    for optimizer in (eager, fast):
        for step in range(5):
            for i, w in enumerate(optimizer.param_groups[0]["params"]):
                w.grad = torch.ones_like(w) if i == 0 or step % 2 else None
            optimizer.step()
    assert_twins_agree(eager, fast)
    assert [s["step"] for s in fast.state_dict()["state"].values()] == [5, 2]


def test_a_compiled_step_follows_changes_of_its_group_and_mixed_precisions():
    def make(params, compile):
        params[1].data = params[1].data.float()
        return hl.atmo(params, compile=compile)

    eager, fast = twins(make)
    for step in range(6):
        for optimizer in (eager, fast):
            (group,) = optimizer.param_groups
            if step == 2:  # a rule that wants another buffer
                adam, sgd = group["rules"]
                group["rules"] = (dataclasses.replace(adam, amsgrad=True), sgd)
            if optimizer is fast:
                group["compile"] = step != 4
        take_steps((eager, fast), 1, seed=step)
    assert "max_exp_avg_sq" in fast.state[fast.param_groups[0]["params"][0]]["rules"][0]
    assert_twins_agree(eager, fast, 1e-5)
    assert {s["step"] for s in fast.state_dict()["state"].values()} == {6}


def test_a_compiled_step_follows_settings_that_torch_does_not_look_at():
    eager, fast = twins(hl.atmo)
    for step in range(8):
        for optimizer in (eager, fast):
            (group,) = optimizer.param_groups
            group["maximize"] = 3 <= step < 5
            group["decoupled_weight_decay"] = 0.5 if step >= 6 else 0.0
        take_steps((eager, fast), 1, seed=step)
        assert_twins_agree(eager, fast)


def test_a_compiled_step_follows_a_number_that_leaves_the_buffers_alone():
    both = twins(hl.adam)
    for step in range(4):
        for optimizer in both:
            (group,) = optimizer.param_groups
            group["rules"] = (dataclasses.replace(group["rules"][0], eps=(1e-8, 10.0)[step // 2]),)
        take_steps(both, 1, seed=step)
        assert_twins_agree(*both)


def test_a_compiled_rule_without_weight_cannot_spoil_the_step():
    """AdaHessian with eps = 0 on flat curvature answers nan and inf."""
    rules = (hl.rules.AdaHessian(eps=0.0), hl.rules.SGD())
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = hl.Hybrid([w], rules, 0.1, (0.0, 1.0), compile=True)
    w.grad = torch.tensor([0.0, 1.0])
    optimizer.step(hess_diag=[torch.zeros(2)])
    torch.testing.assert_close(w.detach(), torch.tensor([1.0, 1.9]))


def test_rules_changed_after_a_load_are_not_compiled_into_the_old_buffers():
    eager, fast = twins(hl.atmo)
    take_steps((eager, fast), 2)
    for optimizer in (eager, fast):
        optimizer.load_state_dict(optimizer.state_dict())
        (group,) = optimizer.param_groups
        adam, sgd = group["rules"]
        group["rules"] = (dataclasses.replace(adam, amsgrad=True), sgd)
    take_steps((eager, fast), 4, seed=1)
    assert_twins_agree(eager, fast)
    group["rules"] += (hl.rules.SGD(),)
    group["lambdas"] += (0.1,)
    with pytest.raises(RuntimeError, match="rules were added"):
        fast.step()


def test_a_compiled_step_follows_a_state_that_is_cleared_or_lies_otherwise_in_memory():
    """Buffers are not checked at every step: what may change them must be seen by other means."""
    eager, fast = twins(hl.atmo)
    take_steps((eager, fast), 3)
    for optimizer in (eager, fast):
        saved = optimizer.state_dict()
        for state in saved["state"].values():
            for buffers in state["rules"]:
                for name, b in buffers.items():
                    buffers[name] = b.transpose(0, -1).contiguous().transpose(0, -1)
        optimizer.load_state_dict(saved)
    take_steps((eager, fast), 3, seed=1)
    assert_twins_agree(eager, fast)
    for optimizer in (eager, fast):
        optimizer.state.clear()
    take_steps((eager, fast), 3, seed=2)
    assert_twins_agree(eager, fast)


def without_momentum(params, compile):
    return hl.sgd(params, momentum=0, compile=compile)


@pytest.mark.parametrize("again", [copy.deepcopy, None], ids=["copied", "loaded"])
@pytest.mark.parametrize(
    ("make", "change"),
    [(without_momentum, {"momentum": 0.9}), (hl.adam, {"amsgrad": True})],
    ids=["momentum", "amsgrad"],
)
def test_a_buffer_that_changed_rules_want_is_made_after_a_copy_too(make, change, again):
    both = twins(make)
    take_steps(both, 3)
    for optimizer in both:
        (group,) = optimizer.param_groups
        group["rules"] = (dataclasses.replace(group["rules"][0], **change),)
    if again:
        both = list(map(again, both))
    else:
        for optimizer in both:
            optimizer.load_state_dict(optimizer.state_dict())
    take_steps(both, 5, seed=1)
    assert_twins_agree(*both)
    buffers = [list(o.state[o.param_groups[0]["params"][0]]["rules"][0]) for o in both]
    assert buffers[0] == buffers[1] != []


@pytest.mark.parametrize("without", [0, 1])
def test_rules_changed_while_a_parameter_has_no_gradient(without):
    both = twins(hl.adam)
    take_steps(both, 3)
    for optimizer in both:
        (group,) = optimizer.param_groups
        group["rules"] = (dataclasses.replace(group["rules"][0], amsgrad=True),)
        for i, w in enumerate(group["params"]):
            w.grad = None if i == without else torch.ones_like(w)
        optimizer.step()
    take_steps(both, 4, seed=1)
    assert_twins_agree(*both)


@dataclasses.dataclass(frozen=True)
class Mean:
    """A rule of one's own."""

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


class Looking(Mean):
    def propose(self, seen, buffers, lr, corrections):
        return seen.g if seen.g.sum() > 0 else -seen.g, lr


def hybrid_of(rule):
    return lambda params, **settings: hl.Hybrid(params, [rule], 0.1, **settings)


def test_a_rule_of_one_s_own_compiles():
    both = twins(hybrid_of(Mean()))
    take_steps(both, 6)
    assert_twins_agree(*both)


@pytest.mark.parametrize("how", [{}, {"foreach": True}])
def test_a_rule_must_keep_its_buffers(how):
    """A tensor in a buffer's place would be lost in a compiled step: refused in every step."""
    optimizer = hybrid_of(Rebinding())([nn.Parameter(torch.ones(2))], **how)
    with pytest.raises(TypeError, match="in place"):
        take_steps((optimizer,), 1)


def test_a_rule_that_looks_at_values_is_refused_in_a_line():
    eager, fast = twins(hybrid_of(Looking()))
    take_steps((eager,), 1)
    with pytest.raises(CannotCompile, match="the optimizer's step cannot be compiled") as refused:
        take_steps((fast,), 1)
    assert "\n" not in str(refused.value)
    assert {state["step"] for state in fast.state.values()} == {0}  # nothing has moved


def reset_mean(state):
    state["rules"][0]["exp_avg"] = torch.zeros_like(state["rules"][0]["exp_avg"])


def reset_count(state):
    state["step"] = 0


@pytest.mark.parametrize("reset", [reset_mean, reset_count, dict.clear])
def test_a_compiled_step_sees_what_is_put_into_a_state(reset):
    both = twins(hl.adam)
    take_steps(both, 4)
    for optimizer in both:
        reset(optimizer.state[optimizer.param_groups[0]["params"][0]])
    take_steps(both, 3, seed=1)
    assert_twins_agree(*both)
    counts = [[s["step"] for s in o.state_dict()["state"].values()] for o in both]
    assert counts[0] == counts[1]


def test_a_new_diagonal_is_written_where_the_last_one_was():
    """A captured step reads it there."""
    optimizers = twins(hl.adahessian)
    take_steps(optimizers, 3)
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    kept = [state["hess_diag"] for state in states]
    before = [D.clone() for D in kept]
    take_steps(optimizers, 1, seed=1)
    assert all(D is state["hess_diag"] for D, state in zip(kept, states))
    assert not any(torch.equal(a, b) for a, b in zip(kept, before))


@pytest.mark.slow
def test_many_groups_and_a_scheduled_decay_compile():
    """torch gives up on a function after eight compilations."""
    both = []
    for compile in (False, True):
        weights = [torch.linspace(-1, 1, 3 + i, dtype=torch.float64) for i in range(10)]
        groups = [{"params": [nn.Parameter(w)], "lr": 0.1 / len(w)} for w in weights]
        both.append(hl.adam(groups, compile=compile))
    for step in range(4):
        for optimizer in both:
            for group in optimizer.param_groups:
                (w,) = group["params"]
                w.grad = w.detach() * (1 + step)
            optimizer.step()
    for a, b in zip(*[[g["params"][0] for g in o.param_groups] for o in both]):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    eager, fast = twins(hl.adam)
    for step in range(12):
        for optimizer in (eager, fast):
            optimizer.param_groups[0]["decoupled_weight_decay"] = 0.01 * (step + 1)
        take_steps((eager, fast), 1, seed=step)
    assert_twins_agree(eager, fast)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


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


@pytest.mark.parametrize("name", NAMES)
def test_a_step_asks_nothing_of_the_values_on_a_device(name):
    """Meta tensors have none: what waited for a GPU would fail here."""
    w = nn.Parameter(torch.empty(3, 4, device="meta"))
    optimizer = getattr(hl, name)([w])
    (group,) = optimizer.param_groups
    group["lr"] = torch.empty((), device="meta")
    group["lambdas"] = torch.empty(len(group["rules"]), device="meta")
    for _ in range(3):
        w.grad = torch.empty_like(w)
        optimizer.step(hess_diag=[torch.empty_like(w)] if optimizer.needs_hessian else None)
    assert w.device.type == "meta"
