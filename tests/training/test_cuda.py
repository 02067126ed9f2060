"""On an NVIDIA GPU: runs match the CPU's, nothing waits within an epoch, memory stays flat."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_graphs import METHODS, losses
from toys import after, image_folder, numbers, toy

import hybrid_lib as hl
from hybrid_lib.optim import curvature
from hybrid_lib.training import engines
from hybrid_lib.training.data import generator
from hybrid_lib.training.experiments import get_experiment
from hybrid_lib.training.loop import gpu_settings
from hybrid_lib.training.tasks import ImageClassification, image_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of cuDNN and of torch's compiler
]

LOW_RATE = {"lr": 1e-4}  # at a high one, rounding changes the course within a few steps


@pytest.fixture
def probes_of_the_cpu(monkeypatch):
    """Draw the probes on the CPU, wherever they are used: a GPU draws others from the same seed."""
    draw = curvature.random_bits

    def random_bits(params, generator):
        on_cpu = torch.Generator().manual_seed(generator.initial_seed())
        return draw([p.cpu() for p in params], on_cpu).to(params[0].device)

    monkeypatch.setattr(curvature, "random_bits", random_bits)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_matches_the_cpu(name, probes_of_the_cpu):
    """Where D is nearly 0 its rounding counts: other strides change a CPU's losses by .4 %, too."""
    found = losses(name, "cuda", **LOW_RATE)
    rel = 3e-2 if get_experiment(name).needs_hessian else 1e-2
    assert found == pytest.approx(losses(name, "cpu", **LOW_RATE), rel=rel)


@pytest.mark.parametrize("name", METHODS)
def test_a_captured_run_matches_the_one_before_capture(name):
    found = losses(name, "cuda", capture=True, **LOW_RATE)
    assert found == pytest.approx(losses(name, "cuda", **LOW_RATE), rel=1e-2)


def test_gradients_and_diagonals_match_the_cpu(probes_of_the_cpu):
    for ours, theirs in zip(
        one_pass("float32", torch.float64), one_pass("float32", torch.float64, "cpu")
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.fixture
def pictures(tmp_path):
    """16x16 pixels, since 8x8 leave one at the last stage, whose layout compilers mistake."""

    def draw(part, label, i):
        return np.random.default_rng(100 * label + i).integers(0, 256, (16, 16, 3), "u1")

    return f"folder:{image_folder(tmp_path / 'images', draw, n=50)}"


@pytest.mark.parametrize("capture", [False, True])
def test_a_compiled_run_matches_the_eager_one(capture, pictures):
    # Steps with and without a new diagonal.
    changes = {"hessian_every": 2, "dataset": pictures, "width": 4, **LOW_RATE}
    found = losses("adasgd", "cuda", capture=capture, compile=True, **changes)
    assert found == pytest.approx(losses("adasgd", "cuda", **changes), rel=1e-2)


@pytest.mark.parametrize("compile", [False, True])
def test_a_captured_run_on_text_matches_the_cpu(compile):
    changes = {"dataset": "python-docs", "width": 8, **LOW_RATE}
    found = losses("atmo", "cuda", capture=True, compile=compile, **changes)
    assert found == pytest.approx(losses("atmo", "cpu", **changes), rel=1e-2)


def test_a_capture_that_fails_leaves_torch_as_it_was(monkeypatch):
    """The run goes on or says how to, since reading a value may end capturing for good."""
    expected, loss = losses("adasgd", "cuda", **LOW_RATE), ImageClassification.loss

    def reads_a_value(*arguments, **how):
        value = loss(*arguments, **how)
        assert value.item() > 0
        return value

    with monkeypatch.context() as patched:
        patched.setattr(ImageClassification, "loss", reads_a_value)
        try:
            found = losses("adasgd", "cuda", capture=True, **LOW_RATE)
        except RuntimeError as error:
            if "capture=False" not in str(error):
                raise
            found = losses("adasgd", "cuda", **LOW_RATE)
    assert found == pytest.approx(expected, rel=1e-3)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert losses("adasgd", "cuda", capture=True, **LOW_RATE) == pytest.approx(expected, rel=1e-2)


def one_pass(precision: str, dtype: torch.dtype, device="cuda") -> tuple[torch.Tensor, ...]:
    """Gradient and diagonal of ResNet18 at its initial weights, on 64 random images."""
    e = replace(hl.EXPERIMENTS["adahessian"], width=16, precision=precision)
    model = image_model(e, 10, 3).to(device, dtype, memory_format=torch.channels_last).train()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 32, 32, generator=draw, dtype=torch.float64).to(device, dtype)
    y = torch.arange(64, device=device) % 10
    with gpu_settings(e):
        run = engines.eager_pass(model, ImageClassification(e, None))
        _, _, grads, diag = run(x, y, generator("probes", 0, 0, device))
    return tuple(torch.cat([t.flatten().double().cpu() for t in part]) for part in (grads, diag))


@pytest.mark.parametrize(
    ("precision", "of_gradient", "of_diagonal"),
    [("float32", 0.02, 0.02), ("tf32", 0.1, 0.15), ("bfloat16", 0.5, 0.6)],
)
def test_lower_precision_stays_within_bounds(precision, of_gradient, of_diagonal):
    """Relative to the norm. Two probes' diagonals differ by 1.1 to 1.8 on that scale."""
    exact = one_pass("float32", torch.float64)
    for ours, theirs, bound in zip(
        one_pass(precision, torch.float32), exact, (of_gradient, of_diagonal)
    ):
        assert (ours - theirs).norm() / theirs.norm() < bound
        assert F.cosine_similarity(ours, theirs, dim=0) > 1 - bound


def test_an_interrupted_run_resumes_to_the_same_numbers(tmp_path):
    """Up to rounding: a GPU sums in another order from run to run."""
    e = toy("adasgd", epochs=5, train_limit=100, lr=1e-3)
    whole = hl.run(e, tmp_path / "whole", "cuda", progress=False)
    hl.run(e, tmp_path / "cut", "cuda", progress=False, should_stop=after(17))
    cut = hl.run(e, tmp_path / "cut", "cuda", progress=False)
    assert whole.environment["cuda_graphs"]
    for ours, theirs in zip(numbers(cut.rows), numbers(whole.rows)):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


@pytest.mark.parametrize("capture", [False, True])
def test_nothing_waits_for_the_gpu_within_an_epoch(capture):
    steps = iter(range(10_000))

    def watch():  # polled before each of an epoch's seven steps; captures end within three epochs
        epoch, step = divmod(next(steps), 7)
        within = epoch > 2 and 0 < step < 6
        torch.cuda.set_sync_debug_mode("error" if within else "default")
        return False

    e = toy("adasgd", epochs=6, train_limit=100, dataset="digits", augment=True)
    try:
        history = hl.run(e, None, "cuda", progress=False, should_stop=watch, capture=capture)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert history.status == "complete"


@pytest.mark.parametrize("capture", [False, True])
def test_memory_stays_flat_over_epochs(capture):
    allocated = []
    e = toy("dyn_padam_sgd", epochs=8, lambda_epochs=2)
    hl.run(e, None, "cuda", progress=False, capture=capture,
           on_epoch=lambda history: allocated.append(torch.cuda.memory_allocated()))  # fmt: skip
    assert allocated[-1] == allocated[-3]
