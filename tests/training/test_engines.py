"""The two engines of a training pass agree; refused or skipped compilation gives the reason.

The compiled engine's function is checked uncompiled on whole networks in float64, where it must
agree to 1e-10, and compiled on a network of one convolution; ``-m slow`` compiles all of ResNet18.
"""

import copy
import dataclasses
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import after, numbers

import hybrid_lib as hl
from hybrid_lib.study import planning
from hybrid_lib.training import engines
from hybrid_lib.training.data import generator
from hybrid_lib.training.models import BatchNorm, Convolution, resnet18
from hybrid_lib.training.tasks import ImageClassification, image_model, load_task

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class OneConvolution(nn.Module):
    """The smallest network that has all a pass needs."""

    def __init__(self, classes=3):
        super().__init__()
        self.convolution, self.norm = Convolution(1, 2, 3, 1, 1), BatchNorm(2)
        self.head = nn.Linear(2, classes)

    def forward(self, x, statistics=None):
        x = torch.tanh(self.norm(self.convolution(x), statistics))
        return self.head(x.mean(dim=(2, 3)))

    def running_statistics(self):
        return [self.norm.running_mean, self.norm.running_var]

    def absorb(self, statistics):
        torch._foreach_lerp_(self.running_statistics(), statistics, self.norm.momentum)


def experiment(name="adahessian", **changes):
    return planning.plan("toy", only=[name], **{"batch_size": 8, **changes})[0]


def task(e):
    """A task for its loss alone; tests pass batches to the engines."""
    return ImageClassification(e, None)


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
        engines.eager_pass(one, task(e))(x, y, drawn[0]),
        engines.compiled_pass(other, task(e))(x, y, drawn[1]),
    )
    for a, b in zip(one.running_statistics(), other.running_statistics(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert not torch.equal(a, torch.zeros_like(a))


def test_the_compiled_engine_agrees_and_compiles_once():
    e = experiment()
    one, other = OneConvolution().double(), OneConvolution().double()
    other.load_state_dict(one.state_dict())
    eager, fast = (engines.eager_pass(one, task(e)), engines.compiled_pass(other, task(e)))
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
    eager, fast = (engines.eager_pass(one, task(e)), engines.compiled_pass(other, task(e)))
    for due in (True, False) if e.hessian_every > 1 else (True,):
        theirs, ours = (probes(), probes()) if due else (None, None)
        result = fast(x.contiguous(memory_format=torch.channels_last), y, ours)
        assert_equal_passes([t for t in eager(x, y, theirs) if t is not None],
                            [t for t in result if t is not None])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("small", [True, pytest.param(False, id="whole_network")])
def test_a_compiled_run_matches_the_eager_one_up_to_rounding_and_resumes_to_the_bit(
    small, tmp_path, monkeypatch
):
    if small:  # compiles in seconds instead of minutes
        torch.manual_seed(0)
        weights = OneConvolution(10)
        monkeypatch.setattr(ImageClassification, "build_model", lambda _: copy.deepcopy(weights))
    # A low rate: at a high one, rounding changes the course within a few steps.
    e = experiment("adasgd", epochs=3, width=2, train_limit=48, test_limit=40, lr=1e-4)
    eager = hl.run(e, progress=False, compile=False)
    whole = hl.run(e, tmp_path / "whole", progress=False, compile=True)
    hl.run(e, tmp_path / "cut", progress=False, compile=True, should_stop=after(10))
    cut = hl.run(e, tmp_path / "cut", progress=False)  # compiled again, although not asked to

    assert numbers(cut.rows) == numbers(whole.rows)
    assert whole.environment["engine"] == cut.environment["engine"] == "compiled"
    assert whole.rows[0]["train_loss"] == pytest.approx(eager.rows[0]["train_loss"], rel=1e-3)


def test_a_fraction_of_a_batch_is_its_first_images_and_counts_once_in_the_statistics():
    e, x, y = experiment(hessian_fraction=0.55), *batch(8)
    model, whole = network(), network()
    _, _, grads, diag = engines.eager_pass(model, task(e))(x, y, probes())
    _, _, gradient, _ = engines.eager_pass(whole, task(e))(x, y, None)
    assert_equal_passes(grads, gradient)
    assert_equal_passes(model.running_statistics(), whole.running_statistics())
    again = network()
    loss = F.cross_entropy(again(x[:5]), y[:5])  # 4.4, rounded up
    assert_equal_passes(diag, hl.hessian_diagonal(loss, again.parameters(), 1, probes())[1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_diagonal_is_right_under_mixed_precision(precision):
    """Coarser but of the same size, so no factor slips in. The noise is bfloat16's own."""
    e = experiment(precision=precision)
    model = image_model(e, 3, 1).train()
    x, y = batch(64)
    _, _, _, diag = engines.eager_pass(model, task(e))(x.float(), y, probes())
    exact = image_model(e, 3, 1).double().train()
    for module in exact.modules():
        if isinstance(module, Convolution):
            module.compute_dtype = None
    _, _, _, reference = engines.eager_pass(exact, task(e))(x, y, probes())
    ours, theirs = (torch.cat([D.flatten().double() for D in d]) for d in (diag, reference))
    assert ours.norm() / theirs.norm() == pytest.approx(1, abs=0.3)
    assert F.cosine_similarity(ours, theirs, dim=0) > (0.8 if precision == "bfloat16" else 0.999)


@pytest.mark.parametrize("engine", [engines.eager_pass, engines.compiled_pass])
def test_small_gradients_survive_float16(monkeypatch, engine):
    """A ten-thousandth of the loss has a ten-thousandth of the gradient; without scaling, less."""
    monkeypatch.setattr(engines, "compiled", lambda function, what, **options: function)
    x, y = batch(64)

    def gradient(precision, factor):
        e = experiment("atmo", precision=precision, batch_size=64)
        of, model = task(e), image_model(e, 3, 1).train()
        plain = of.loss
        object.__setattr__(of, "loss", lambda outputs, y: factor * plain(outputs, y))
        _, _, grads, _ = engine(model, of)(x.float(), y, None)
        return torch.cat([g.flatten() for g in grads]) / factor

    exact, coarse, small = (
        gradient(*of) for of in (("float32", 1), ("float16", 1), ("float16", 1e-4))
    )
    assert (small - coarse).norm() < 0.02 * coarse.norm()
    assert 0 < (coarse - exact).norm() < 0.2 * exact.norm()
    assert gradient("float16", 1e6).abs().max() == 0, "one overflow drops the whole step"


def test_only_long_runs_are_compiled_by_default(monkeypatch):
    monkeypatch.setattr(engines, "why_not_compile", lambda device: "")

    def compiles(experiments, n):
        images = SimpleNamespace(n_train=n, device=torch.device("cpu"))
        return {engines.should_compile(e, images) for e in experiments}

    assert compiles(planning.plan("toy"), 160) == compiles(planning.plan("demo"), 1200) == {False}
    assert compiles(planning.plan("demo", "cifar10"), 10_000) == {False}
    assert compiles(planning.plan("paper"), 50_000) == {True}


# --- Refusals. ---


WITHOUT_COMPILER = """
    import sys, torch, hybrid_lib as hl
    from hybrid_lib.training import engines, loop
    from hybrid_lib.study import planning
    (e,) = planning.plan("toy", only=["sgd"], epochs=1, width=2, train_limit=32, test_limit=16)
    loop.should_compile = lambda e, task, begun: engines.should_compile(e, task, "compiled")
    history = hl.run(e, progress=False)
    print(history.status, "|", history.environment["engine"])
    try:
        hl.run(e, progress=False, compile=True)
    except hl.CannotCompile as error:
        print("refused |", error)
"""


@pytest.mark.slow
def test_without_a_compiler_a_run_is_eager_and_says_why_and_compile_true_is_refused(tmp_path):
    environment = {
        **os.environ, "CXX": str(tmp_path / "no-compiler"), "PATH": str(tmp_path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WITHOUT_COMPILER)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reason, auto, refused = done.stdout.splitlines()
    assert reason.startswith("SGD: training eagerly, since a test function cannot be compiled here")
    assert auto == "complete | eager"
    assert refused.startswith("refused | ")
    assert "cannot be compiled here" in refused


BEGUN = [  # a long run, how it began, whether there is a compiler, whether it is compiled
    (False, None, True, False), (True, None, True, True), (True, None, False, False),
    (True, "eager", True, False), (False, "compiled", True, True),
]  # fmt: skip


@pytest.mark.parametrize(("long", "begun", "compiler", "compiles"), BEGUN)
def test_a_resumed_run_keeps_its_engine(monkeypatch, long, begun, compiler, compiles):
    monkeypatch.setattr(engines, "why_not_compile", lambda device: "" if compiler else "none here")
    e = dataclasses.replace(experiment("sgd"), epochs=10_000 if long else 1)
    assert engines.should_compile(e, load_task(e), begun) == compiles


@pytest.mark.parametrize("name", ["atmo", "adasgd"])
@pytest.mark.parametrize("engine", [engines.eager_pass, engines.compiled_pass])
def test_a_training_step_never_reads_values_from_the_device(monkeypatch, name, engine):
    monkeypatch.setattr(engines, "compiled", lambda function, what, **options: function)
    e = experiment(name, precision="bfloat16")
    e = dataclasses.replace(e, hessian_fraction=0.5) if e.needs_hessian else e
    model = image_model(e, 10, 3).to("meta", memory_format=torch.channels_last)
    x = torch.empty(8, 3, 32, 32, device="meta")
    optimizer = e.build_optimizer(model.parameters())
    drawn = torch.Generator() if e.needs_hessian else None
    loss, right, grads, diag = engine(model, task(e))(
        x, torch.empty(8, device="meta").long(), drawn
    )
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g
    optimizer.step(hess_diag=diag)
    assert {t.device.type for t in (loss, right, *model.parameters())} == {"meta"}
