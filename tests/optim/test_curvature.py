"""The estimate of the Hessian diagonal is Hutchinson's and leaves nothing behind.

Rows of one parameter that do not interact are independent draws, so a single call gives thousands:
their distinct values show every possible probe, their frequencies show fair and independent signs,
and their mean and variance are compared with the exact Hessian, off-diagonals included. Further
tests cover edge cases, and that no graph, gradient or random state outlives a call.
"""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from hybrid_lib.optim.curvature import hessian_diagonal, rademacher
from hybrid_lib.optim.methods import adahessian

H = torch.tensor(
    [[2.0, 0.7, -1.1, 0.3], [0.7, -1.0, 0.4, 0.0], [-1.1, 0.4, 0.5, 2.0], [0.3, 0.0, 2.0, 3.0]],
    dtype=torch.float64,
)
OFF_DIAGONAL = (H**2).sum(1) - H.diag() ** 2  # the variance of one probe, entry by entry


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def leaf(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=seeded(seed)).requires_grad_()


def draws(n, n_samples=1, seed=0):
    """n independent estimates of the diagonal of H, one per row."""
    x = leaf(n, 4)
    _, (D,) = hessian_diagonal(((x @ H) * x).sum() / 2, [x], n_samples, seeded(seed))
    return D


def test_over_all_probes_the_mean_is_exact_and_the_variance_known():
    D = draws(2000)
    distinct, counts = D.round(decimals=9).unique(dim=0, return_counts=True)
    assert len(distinct) == 2**3  # z and -z give the same, so half of the 2^4 probes
    torch.testing.assert_close(distinct.mean(0), H.diag())
    torch.testing.assert_close(distinct.var(0, correction=0), OFF_DIAGONAL)
    assert (counts - 250).abs().max() < 4 * (2000 / 8 * 7 / 8) ** 0.5  # all equally often


@pytest.mark.parametrize("n_samples", [1, 2, 5])
def test_samples_are_averaged_and_independent(n_samples):
    n = 20_000
    D = draws(n, n_samples)
    variance = OFF_DIAGONAL / n_samples
    assert ((D.mean(0) - H.diag()).abs() < 4 * (variance / n).sqrt()).all()
    torch.testing.assert_close(D.var(0), variance, rtol=0.06, atol=0)


def test_the_signs_are_independent_between_parameters():
    """If a and b shared a probe, D would always be 2 + 5, an error that averaging keeps."""
    a, b = leaf(1000), leaf(1000, seed=1)
    _, (D_a, D_b) = hessian_diagonal((a**2 + 5 * a * b).sum(), [a, b], 1, seeded())
    values, counts = D_a.unique(return_counts=True)
    assert values.tolist() == [-3, 7]
    assert abs(counts[0] - 500) < 4 * 250**0.5
    torch.testing.assert_close(D_a - 2, D_b)


def test_rademacher_draws_fair_independent_signs():
    n = 100_000
    (z,) = rademacher([torch.empty(n, 2)], seeded())
    assert set(z.flatten().tolist()) == {-1.0, 1.0}
    assert (z.mean(0).abs() < 4 / n**0.5).all()
    for product in (z[:, 0] * z[:, 1], z[1:, 0] * z[:-1, 0]):
        assert abs(product.mean()) < 4 / n**0.5


def small_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2), torch.nn.Sigmoid()
    ).double()


@given(seed=st.integers(0, 2**31), n_samples=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_a_loss_given_as_a_function_has_the_same_gradient_and_diagonal(seed, n_samples):
    params = [leaf(4, 3, seed=seed), leaf(3, seed=seed + 1)]

    def loss_of(params):
        A, b = params
        logits = torch.tanh(A) @ (b**2)
        return logits.logsumexp(0) + (A**3).sum(), {"logits": logits}

    loss, other = loss_of(params)
    expected = hessian_diagonal(loss, params, n_samples, seeded(seed))
    *found, seen = hessian_diagonal(loss_of, params, n_samples, seeded(seed))
    torch.testing.assert_close(tuple(found), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(seen["logits"], other["logits"].detach())
    assert not any(t.requires_grad for t in [*found[0], *found[1], seen["logits"]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.sampled_from([(), (5,), (2, 3), (2, 1, 3, 3)]))
def test_on_a_diagonal_hessian_every_probe_is_exact(seed, n_samples, shape):
    x, a = leaf(*shape, seed=seed), leaf(*shape, seed=seed + 1).detach()
    (g,), (D,) = hessian_diagonal((a * x**4).sum(), [x], n_samples, seeded(seed))
    torch.testing.assert_close(g, 4 * a * x.detach() ** 3)
    torch.testing.assert_close(D, 12 * a * x.detach() ** 2)


@pytest.mark.parametrize(
    ("dtype", "n_samples", "rtol"),
    [
        (torch.float64, 512, 1e-12), (torch.float32, 512, 1e-4), (torch.bfloat16, 1, 0.02),
        (torch.bfloat16, 512, 0.02), (torch.float16, 512, 0.003),
    ],
)  # fmt: skip
@pytest.mark.parametrize("of_function", [False, True])
def test_precision_follows_the_parameter_not_the_number_of_samples(
    dtype, n_samples, rtol, of_function
):
    x = torch.tensor([1.0, -2.0, 0.5], dtype=dtype, requires_grad=True)
    if of_function:
        (g,), (D,), _ = hessian_diagonal(lambda p: ((p[0] ** 4).sum(), ()), [x], n_samples)
    else:
        (g,), (D,) = hessian_diagonal((x**4).sum(), [x], n_samples)
    assert g.dtype == dtype
    assert D.dtype in (dtype, torch.float32)
    exact = torch.tensor([12.0, 48.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(D.double(), exact, rtol=rtol, atol=0)


def test_the_same_seed_draws_the_same_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert torch.equal(draws(50, 3, seed=1), draws(50, 3, seed=1))
    assert not torch.equal(draws(50, 3, seed=1), draws(50, 3, seed=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_one_is_used_and_moves_on():
    x = leaf(50, 4)

    def once():
        return hessian_diagonal(((x @ H) * x).sum(), [x])[1][0]

    torch.manual_seed(3)
    first, second = once(), once()
    torch.manual_seed(3)
    assert torch.equal(once(), first)
    assert not torch.equal(first, second)


X, W, U = (leaf(3, seed=seed) for seed in range(3))
EDGE_CASES = {  # loss, parameters; for all entries, gradients (or None) and diagonals
    "one enters linearly": (lambda: (X**2).sum() + W.sum(), [X, W], [2 * X, 1], [2, 0]),
    "one is unused": (lambda: (X**2).sum(), [W, X], [None, 2 * X], [0, 2]),
    "all enter linearly": (lambda: 3 * X.sum() + W.sum(), [X, W], [3, 1], [0, 0]),
    # The gradient of W has a graph, but W is not in it.
    "curved elsewhere": (lambda: (W * U**2).sum(), [W], [U**2], [0]),
    "any iterable": (lambda: (X**2).sum(), iter([X]), [2 * X], [2]),
}  # fmt: skip


@pytest.mark.parametrize(("loss", "params", "grads", "diag"), EDGE_CASES.values(), ids=EDGE_CASES)
def test_parameters_without_curvature_or_without_gradient(loss, params, grads, diag):
    found = hessian_diagonal(loss(), params, n_samples=2)
    for ours, expected in zip(found[0] + found[1], grads + diag, strict=True):
        assert (ours is None) == (expected is None)
        assert ours is None or ours.equal(0 * W.detach() + expected)


@pytest.mark.parametrize("n_samples", [1, 3])
def test_no_gradient_is_written_and_the_results_are_detached(n_samples):
    x, w = leaf(3), leaf(3, seed=1)
    x.grad = torch.full((3,), 5.0).double()
    grads, diag = hessian_diagonal((x**3 + x * w).sum(), [x, w], n_samples)
    assert x.grad.tolist() == [5, 5, 5]
    assert w.grad is None
    assert not any(t.requires_grad or t.grad_fn for t in grads + diag)
    of_function = hessian_diagonal(lambda p: ((p[0] ** 3 + p[0] * w).sum(), p[0] * w), [x])
    grads, diag, other = of_function  # w is used but is no parameter
    assert not any(t.requires_grad or t.grad_fn for t in [*grads, *diag, other])


class SavedTensor:
    """A tensor that a graph saved for its backward pass; freed with the last graph to hold it."""

    def __init__(self, tensor, alive):
        self.tensor = tensor
        alive.add(self)


@pytest.mark.parametrize("n_samples", [1, 3])
def test_no_graph_outlives_the_loss(n_samples):
    """The garbage collector is off, since a cycle would fill memory between its runs."""
    net, x, alive = small_net(), leaf(8, 3).detach(), weakref.WeakSet()
    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: SavedTensor(tensor, alive), lambda saved: saved.tensor
        ):
            for _ in range(50):
                loss = net(x).square().sum()
                assert len(alive) > 0
                results = hessian_diagonal(loss, net.parameters(), n_samples)
                del loss
                assert len(alive) == 0
        assert len(results) == 2  # alive, but they hold no graph
    finally:
        gc.enable()


STRIDED = {
    "channels_last": lambda: leaf(2, 3, 2, 2).detach().to(memory_format=torch.channels_last),
    "transposed": lambda: leaf(3, 5).detach().t(),
    "sliced": lambda: leaf(6, 4).detach()[::2, 1:],
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strides_change_neither_results_nor_draws(layout):
    def estimate(x):
        return hessian_diagonal((x.sum() ** 2 + (x**3).sum()), [x], 2, seeded())

    x = STRIDED[layout]().requires_grad_()
    plain = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    assert not x.is_contiguous()
    assert plain.is_contiguous()
    (g,), (D,) = estimate(x)
    (g_plain,), (D_plain,) = estimate(plain)
    torch.testing.assert_close(g, g_plain, check_stride=False)
    torch.testing.assert_close(D, D_plain, check_stride=False)


def test_the_diagonal_can_be_estimated_under_no_grad():
    """An optimizer's step runs under no_grad; a loss computed before is still differentiable."""
    x = leaf(3)
    loss = (x**2).sum()
    with torch.no_grad():
        _, (D,) = hessian_diagonal(loss, [x])
    assert D.tolist() == [2, 2, 2]


# --- Losses that cannot be differentiated twice: the refusal says what to do. ---


def attention_loss(q):
    return F.scaled_dot_product_attention(q, q, q).square().mean()


def lstm():
    return nn.LSTM(3, 2, batch_first=True), torch.randn(2, 4, 3)


def diagonal_of_an_lstm_function():
    net, x = lstm()
    names = [name for name, _ in net.named_parameters()]

    def loss(params):
        y, _ = torch.func.functional_call(net, dict(zip(names, params)), (x,))
        return y.square().mean(), ()

    return hessian_diagonal(loss, net.parameters())


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


def diagonal_of_a_checkpoint():
    """All its gradients are None and D would be 0, so AdaHessian would divide by epsilon."""
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    return hessian_diagonal(
        checkpoint(net, leaf(4, 3, dtype=torch.float32), use_reentrant=True).sum(), net.parameters()
    )


def diagonal_of_a_frozen_parameter():
    net = nn.Linear(3, 2)
    net.weight.requires_grad_(False)
    return hessian_diagonal(net(torch.randn(4, 3)).square().mean(), net.parameters())


def diagonal_of_a_compiled_model():
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    fast = torch.compile(net, backend="aot_eager")
    return hessian_diagonal(fast(torch.randn(4, 3)).square().mean(), net.parameters())


def diagonal_of_attention(as_function=False):
    q = leaf(1, 2, 4, 8, dtype=torch.float32)
    loss = (lambda p: (attention_loss(p[0]), ())) if as_function else attention_loss(q)
    return hessian_diagonal(loss, [q])


REFUSED = {
    "attention": (diagonal_of_attention, r"sdpa_kernel\(SDPBackend.MATH\)"),
    "attention, forward": (lambda: diagonal_of_attention(True), r"sdpa_kernel\(SDPBackend.MATH\)"),
    "an LSTM, forward": (diagonal_of_an_lstm_function, "pass the loss itself"),
    "a compiled model": (diagonal_of_a_compiled_model, "before torch.compile"),
    "a reentrant checkpoint": (diagonal_of_a_checkpoint, "use_reentrant=False"),
    "a frozen parameter": (diagonal_of_a_frozen_parameter, r"params at \[0\].*frozen"),
    "a custom backward": (
        lambda: hessian_diagonal(OnceOnly.apply(w := leaf(3)).sum(), [w]), "not differentiable",
    ),
    "a bare tensor": (lambda: hessian_diagonal((X**2).sum(), X), "a list of tensors"),
    "no samples": (lambda: hessian_diagonal((X**2).sum(), [X], 0), "n_samples=0"),
    "no scalar": (lambda: hessian_diagonal(X**2, [X]), r"\(3,\).*scalar"),
    "no graph": (lambda: hessian_diagonal(torch.zeros(()), [leaf(3)]), "no graph"),
    "no parameters": (lambda: hessian_diagonal(leaf(3).sum(), []), "params is empty"),
    "no parameters, forward": (lambda: hessian_diagonal(lambda p: (), []), "params is empty"),
}  # fmt: skip


@pytest.mark.parametrize(("attempt", "advice"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore")  # torch's own, of checkpoints and compilers
def test_a_refusal_says_what_to_do_instead(attempt, advice):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=advice) as refused:
        attempt()
    assert "\n" not in str(refused.value)


class OutOfMemory(torch.autograd.Function):
    """Multiplication by two; its backward pass runs out of memory."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def test_a_lack_of_memory_is_not_explained_by_the_loss():
    with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator"):
        hessian_diagonal(OutOfMemory.apply(w := leaf(3)).sum(), [w])


def test_what_the_refusals_suggest_works():
    with sdpa_kernel(SDPBackend.MATH):
        _, (D,) = diagonal_of_attention()
    assert D.abs().sum() > 0
    net, x = lstm()
    _, diag = hessian_diagonal(net(x)[0].square().mean(), net.parameters())
    assert all(D.abs().sum() > 0 for D in diag)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    again = checkpoint(net, leaf(4, 3, dtype=torch.float32), use_reentrant=False).square().sum()
    _, diag = hessian_diagonal(again, net.parameters())
    assert all(D.abs().sum() > 0 for D in diag)


def test_with_a_grad_scaler_only_the_diagonal_is_taken_from_the_plain_loss():
    ends = []
    for scaled in (False, True):
        torch.manual_seed(0)
        net, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()), torch.randn(8, 3)
        params, probes = list(net.parameters()), torch.Generator().manual_seed(1)
        optimizer, loss = adahessian(params), net(x).square().mean()
        if scaled:
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            scaler.scale(loss).backward(retain_graph=True)
            scaler.step(optimizer, hess_diag=hessian_diagonal(loss, params, 1, probes)[1])
        else:
            grads, diagonal = hessian_diagonal(loss, params, 1, probes)
            for p, g in zip(params, grads):
                p.grad = g
            optimizer.step(hess_diag=diagonal)
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(*ends)
