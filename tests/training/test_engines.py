"""The two engines of a training pass agree, and compiling is refused, or left, in so many words.

The compiled engine's function is checked uncompiled on whole networks in float64, where it must
agree to 1e-10, and compiled on a network of one convolution; ``slow`` compiles all of ResNet18.
"""

import copy
import dataclasses
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hybrid_lib as hl
from hybrid_lib.optim.compiling import CannotCompile, compiled
from hybrid_lib.study import planning
from hybrid_lib.training import engines, loop
from hybrid_lib.training.data import generator
from hybrid_lib.training.models import BatchNorm, Convolution, resnet18

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class OneConvolution(nn.Module):
    """What a pass needs of a network, as small as can be."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = Convolution(1, 2, 3, 1, 1), BatchNorm(2)
        self.head = nn.Linear(2, 3)

    def forward(self, x, statistics=None):
        x = torch.tanh(self.norm(self.convolution(x), statistics))
        return self.head(x.mean(dim=(2, 3)))

    def running_statistics(self):
        return [self.norm.running_mean, self.norm.running_var]


def experiment(name="adahessian", **changes):
    return planning.plan("toy", only=[name], **{"batch_size": 8, **changes})[0]


def network(stem="cifar"):
    torch.manual_seed(0)
    return resnet18(num_classes=3, in_channels=1, width=2, stem=stem).double().train()


def batch(n, pixels=8, classes=3):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, pixels, pixels, generator=draw, dtype=torch.float64)
    return x, torch.randint(0, classes, (n,), generator=draw)


def probes():
    return generator("probes", 0, 0)


def assert_equal_passes(ours, theirs):
    """Within 1e-10, or the rounding of a tensor's largest numbers where they cancel."""
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        size = 1 if b is None else max(1, float(b.abs().max()))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12 * size)


def flat(result):
    return [t for part in result for t in (part if isinstance(part, (list, tuple)) else [part])]


ENGINES = [
    ("sgd", {}), ("adahessian", {}), ("adahessian", {"hessian_samples": 3}),
    ("adasgd", {"hessian_fraction": 0.5}), ("adasgd", {"hessian_fraction": 0.01}),
]  # fmt: skip


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize(("name", "changes"), ENGINES)
def test_the_engines_agree_on_a_whole_network(monkeypatch, name, changes, stem):
    monkeypatch.setattr(engines, "compiled", lambda function, what, **options: function)
    e = experiment(name, **changes)
    one, other = network(stem), network(stem)
    x, y = batch(8, pixels=8 if stem == "cifar" else 64)
    drawn = [probes() if e.needs_hessian else None for _ in range(2)]
    assert_equal_passes(
        engines.eager_pass(one, e)(x, y, drawn[0]), engines.compiled_pass(other, e)(x, y, drawn[1])
    )
    for a, b in zip(one.running_statistics(), other.running_statistics(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert not torch.equal(a, torch.zeros_like(a))


def test_the_compiled_engine_agrees_and_compiles_once():
    e = experiment()
    one, other = OneConvolution().double(), OneConvolution().double()
    other.load_state_dict(one.state_dict())
    eager, fast = engines.eager_pass(one, e), engines.compiled_pass(other, e)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    ours, theirs = probes(), probes()
    for n in (8, 8, 5, 8):  # 5: an epoch's last batch
        x, y = batch(n)
        assert_equal_passes(eager(x, y, theirs), fast(x, y, ours))
    assert_equal_passes(one.running_statistics(), other.running_statistics())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"hessian_every": 2, "hessian_fraction": 0.5}])
def test_the_compiled_engine_agrees_on_a_whole_network(changes):
    e = experiment("adasgd", **changes)
    one, other = network(), network().to(memory_format=torch.channels_last)
    x, y = batch(8)
    eager, fast = engines.eager_pass(one, e), engines.compiled_pass(other, e)
    for due in (True, False) if e.hessian_every > 1 else (True,):
        theirs, ours = (probes(), probes()) if due else (None, None)
        result = fast(x.contiguous(memory_format=torch.channels_last), y, ours)
        assert_equal_passes([t for t in eager(x, y, theirs) if t is not None],
                            [t for t in result if t is not None])  # fmt: skip


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_run_up_to_rounding_and_resumes_to_the_bit(tmp_path):
    # A small rate: at a large one rounding grows into another course within a few steps.
    e = experiment("adasgd", epochs=3, width=2, train_limit=48, test_limit=40, lr=1e-4)
    eager = hl.run(e, progress=False, compile=False)
    whole = hl.run(e, tmp_path / "whole", progress=False, compile=True)
    asked = []
    hl.run(
        e, tmp_path / "cut", progress=False, compile=True,
        should_stop=lambda: asked.append(0) or len(asked) > 10,
    )  # fmt: skip
    cut = hl.run(e, tmp_path / "cut", progress=False)  # compiled again, without being told

    def numbers(history):
        return [{k: v for k, v in r.items() if "seconds" not in k} for r in history.rows]

    assert numbers(cut) == numbers(whole)
    assert whole.environment["engine"] == cut.environment["engine"] == "compiled"
    assert whole.rows[0]["train_loss"] == pytest.approx(eager.rows[0]["train_loss"], rel=1e-3)


def test_the_part_of_a_batch_is_its_first_images_and_counts_once_in_the_statistics():
    e, x, y = experiment(hessian_fraction=0.5), *batch(8)
    model, whole = network(), network()
    _, _, grads, diag = engines.eager_pass(model, e)(x, y, probes())
    _, _, gradient, _ = engines.eager_pass(whole, e)(x, y, None)
    assert_equal_passes(grads, gradient)
    assert_equal_passes(model.running_statistics(), whole.running_statistics())
    again = network()
    loss = F.cross_entropy(again(x[:4]), y[:4])
    assert_equal_passes(diag, hl.hessian_diagonal(loss, again.parameters(), 1, probes())[1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_diagonal_is_right_under_mixed_precision(precision):
    """Coarser, but of the same size: no factor slips in. The noise is that of bfloat16 itself."""
    e = experiment(precision=precision)
    model = e.build_model(3, 1).train()
    x, y = batch(64)
    _, _, _, diag = engines.eager_pass(model, e)(x.float(), y, probes())
    exact = e.build_model(3, 1).double().train()
    for module in exact.modules():
        if isinstance(module, Convolution):
            module.compute_dtype = None
    _, _, _, reference = engines.eager_pass(exact, e)(x, y, probes())
    ours, theirs = (torch.cat([D.flatten().double() for D in d]) for d in (diag, reference))
    assert ours.norm() / theirs.norm() == pytest.approx(1, abs=0.3)
    assert F.cosine_similarity(ours, theirs, dim=0) > (0.8 if precision == "bfloat16" else 0.999)


def test_only_long_runs_are_worth_compiling():
    for scale, n in (("toy", 160), ("demo", 1200)):
        assert not any(engines.worth_compiling(e, n) for e in planning.plan(scale))
    demo_images = planning.plan("demo", "cifar10")
    assert not any(engines.worth_compiling(e, 10_000) for e in demo_images)
    assert all(engines.worth_compiling(e, 50_000) for e in planning.plan("paper"))


# --- Refusals. ---


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


WITHOUT_COMPILER = """
    import sys, torch, hybrid_lib as hl
    from hybrid_lib.training import engines, loop
    from hybrid_lib.study import planning
    (e,) = planning.plan("toy", only=["sgd"], epochs=1, width=2, train_limit=32, test_limit=16)
    loop.worth_compiling = lambda experiment, n: True
    history = hl.run(e, progress=False)
    print(history.status, "|", history.environment["engine"])
    try:
        hl.run(e, progress=False, compile=True)
    except hl.CannotCompile as error:
        print("refused |", error)
"""


def test_without_a_compiler_auto_trains_eagerly_and_says_why_and_a_demand_is_refused(tmp_path):
    environment = {
        **os.environ, "CXX": str(tmp_path / "no-compiler"), "PATH": str(tmp_path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WITHOUT_COMPILER)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, auto, asked = done.stdout.splitlines()
    assert said.startswith("SGD: training eagerly, since a test function cannot be compiled here")
    assert auto.startswith("complete | eager: a test function cannot be compiled here")
    assert asked.startswith("refused | ")
    assert "cannot be compiled here" in asked


ENGINE_CHOICES = [
    # asked for, long enough, begun with, a compiler -> the engine
    (None, False, None, True, "eager"),
    (None, True, None, True, "compiled"),
    (None, True, None, False, "eager: no compiler"),
    (None, True, "eager", True, "eager"),
    (None, True, "eager: no gcc then", True, "eager: no gcc then"),
    (None, False, "compiled", True, "compiled"),
    (True, False, None, False, "compiled"),  # and refused when it comes to it
    (False, True, "compiled", True, "eager"),
]


@pytest.mark.parametrize(("asked", "long", "begun", "compiler", "engine"), ENGINE_CHOICES)
def test_the_engine_is_the_one_asked_for_or_begun_with(
    monkeypatch, asked, long, begun, compiler, engine
):
    monkeypatch.setattr(loop, "worth_compiling", lambda e, n: long)
    monkeypatch.setattr(loop, "why_not_compile", lambda device: "" if compiler else "no compiler")
    e = experiment("sgd")
    assert loop._engine(e, loop.loaded(e), asked, begun) == engine


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


# Two of seven by default: those that use every rule but Padam's; the others under ``slow``.
@pytest.mark.parametrize(
    "name",
    [n if n in ("atmo", "adasgd") else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)
def test_a_compiled_step_is_the_eager_step_and_schedules_compile_nothing(name):
    eager, fast = twins(getattr(hl, name))
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
class Rebinding:
    """A rule of one's own that puts a new tensor in its buffer's place."""

    needs_hessian = False

    def propose(self, seen, buffers, lr, t):
        buffers["mean"] = 0.9 * buffers.get("mean", 0) + seen.g
        return buffers["mean"], lr


def test_a_rule_may_replace_its_buffers():
    both = twins(lambda params, compile: hl.Hybrid(params, [Rebinding()], 0.1, compile=compile))
    take_steps(both, 6)
    assert_twins_agree(*both)


def test_a_rule_that_looks_at_values_is_refused_in_a_line():
    @dataclasses.dataclass(frozen=True)
    class Looking(Rebinding):
        def propose(self, seen, buffers, lr, t):
            return seen.g / (1 + seen.g.abs().max().item()), lr

    eager, fast = twins(
        lambda params, compile: hl.Hybrid(params, [Looking()], 0.1, compile=compile)
    )
    take_steps((eager, fast), 1)
    with pytest.raises(CannotCompile, match="the optimizer's step cannot be compiled") as refused:
        take_steps((fast,), 1)
    assert "\n" not in str(refused.value)


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


@pytest.mark.parametrize("name", ["atmo", "adasgd"])
@pytest.mark.parametrize("engine", [engines.eager_pass, engines.compiled_pass])
def test_a_training_step_asks_nothing_of_the_values_on_a_device(monkeypatch, name, engine):
    monkeypatch.setattr(engines, "compiled", lambda function, what, **options: function)
    e = experiment(name, precision="bfloat16")
    e = dataclasses.replace(e, hessian_fraction=0.5) if e.needs_hessian else e
    model = e.build_model(10, 3).to("meta", memory_format=torch.channels_last)
    x = torch.empty(8, 3, 32, 32, device="meta")
    optimizer = e.build_optimizer(model.parameters())
    drawn = torch.Generator() if e.needs_hessian else None
    loss, right, grads, diag = engine(model, e)(x, torch.empty(8, device="meta").long(), drawn)
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g
    optimizer.step(hess_diag=diag)
    assert {t.device.type for t in (loss, right, *model.parameters())} == {"meta"}
