"""The optimizers compute what the report's algorithms say, for any hyper-parameters.

Algorithms 1 to 4 are written out below literally: one weight at a time, in Python floats, every
average as the sum over the whole past that Algorithm 3 prints. This is slow and obvious and shares
nothing with the library. For random gradients, Hessian diagonals, rates and hyper-parameters, both
must end at the same weights.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_lib.optim import methods
from hybrid_lib.optim.hybrid import Hybrid
from hybrid_lib.optim.rules import SGD, AdaHessian, Adam, Lion, Padam

SHAPES = [(2, 2, 3, 3), (3, 5), (2, 2, 3), (7,), ()]

# --- The algorithms. g, w, D: one entry's values at steps 1..t. They return (direction, eta). ---


def average(β, x):
    """(1 - β) * sum over i = 1..t of β^(t-i) x_i"""
    t = len(x)
    return (1 - β) * sum(β ** (t - i) * x[i - 1] for i in range(1, t + 1))


def second_moment(β2, x, maximum):
    """v_t, or the largest of v_1..v_t"""
    v = [average(β2, [xi**2 for xi in x[:s]]) for s in range(1, len(x) + 1)]
    return max(v) if maximum else v[-1]


def decayed(g, w, γ):
    return [gi + γ * wi for gi, wi in zip(g, w)]


def delta_sgd(g, w, D, η, *, μ, d, nesterov, γ):
    g = decayed(g, w, γ)
    if μ == 0:
        return g[-1], η
    b = g[0]
    for gi in g[1:]:
        b = μ * b + (1 - d) * gi
    return (g[-1] + μ * b if nesterov else b), η


def delta_adam(g, w, D, η, *, β1, β2, ε, γ, amsgrad):
    g, t = decayed(g, w, γ), len(g)
    v = second_moment(β2, g, amsgrad)
    return average(β1, g) / (math.sqrt(v / (1 - β2**t)) + ε), η / (1 - β1**t)


def delta_padam(g, w, D, η, *, β1, β2, ε, γ, amsgrad, p, reading):
    g, t = decayed(g, w, γ), len(g)
    m, v = average(β1, g), second_moment(β2, g, amsgrad)
    if reading == "none":  # Algorithm 1, where ε = 0: m / v^p
        return m / (math.sqrt(v) + ε) ** (2 * p), η
    if reading == "released":
        return m / (math.sqrt(v) + ε) ** (2 * p), η * math.sqrt(1 - β2**t) / (1 - β1**t)
    return m / (math.sqrt(v / (1 - β2**t)) + ε) ** (2 * p), η / (1 - β1**t)


def delta_adahessian(g, w, D, η, *, β1, β2, ε, k):
    t = len(g)
    v = math.sqrt(second_moment(β2, D, False) / (1 - β2**t)) ** k
    return average(β1, g) / (v + ε), η / (1 - β1**t)


def delta_lion(g, w, D, η, *, β1, β2):
    c = β1 * average(β2, g[:-1]) + (1 - β1) * g[-1]
    return math.copysign(1, c) if c else 0.0, η


def product(proposals, λ):
    """How far each entry of a tensor moves; proposals: for each entry, one (d, η) per rule."""
    η_merged = sum(λi * η for λi, (_, η) in zip(λ, proposals[0]))
    return [η_merged * sum(λi * d for λi, (d, _) in zip(λ, entry)) for entry in proposals]


def sum_of_steps(proposals, λ):
    return [sum(λi * η * d for λi, (d, η) in zip(λ, entry)) for entry in proposals]


def graft(proposals, λ):
    norms = [math.sqrt(sum((η * d) ** 2 for d, η in rule)) for rule in zip(*proposals)]
    length = sum(λi * norm for λi, norm in zip(λ, norms))
    first = math.sqrt(sum(entry[0][0] ** 2 for entry in proposals))
    return [length * entry[0][0] / first if first else 0.0 for entry in proposals]


MERGES = {"product": product, "sum": sum_of_steps, "graft": graft}


def spatially_averaged(D, shape, how, signed):
    """D^(s) of one tensor, flat and row-major: every entry becomes the mean of its block."""
    length = {None: 1, "kernel": 1, "auto": shape[-1] if len(shape) in (2, 3) else 1}.get(how, how)
    if how in ("kernel", "auto") and len(shape) == 4:
        length = shape[2] * shape[3]
    averaged = []
    for start in range(0, len(D), length):
        block = [x if signed or how is None else abs(x) for x in D[start : start + length]]
        averaged += [sum(block) / len(block)] * len(block)
    return averaged


def reference(case, deltas, how=None, signed=False, merge="product"):
    """All weights after all steps; ``deltas``: a function and its arguments for each rule."""
    sign = -1 if case.maximize else 1
    ends = []
    for i, shape in enumerate(SHAPES):
        D_s = [spatially_averaged(D[i].flatten().tolist(), shape, how, signed) for D in case.D]
        g_s = [[sign * x for x in g[i].flatten().tolist()] for g in case.g]
        w_s = [[w] for w in case.w[i].flatten().tolist()]
        for t, (η, λ) in enumerate(zip(case.η, case.λ), start=1):
            proposals = []
            for entry, w in enumerate(w_s):
                g, D = ([x[entry] for x in x_s[:t]] for x_s in (g_s, D_s))
                proposals.append([delta(g, w, D, η, **letters) for delta, letters in deltas])
            for w, moved in zip(w_s, MERGES[merge](proposals, λ)):
                w.append(w[-1] * (1 - η * case.γ_decoupled) - moved)
        ends += [w[-1] for w in w_s]
    return ends


# --- Random cases: hypothesis draws the settings, the seed fills the tensors. ---


class Case:
    """Start weights; for each step gradients, Hessian diagonals (some repeat the last), η and λ."""

    def __init__(self, seed, steps, n_rules, maximize=False, γ_decoupled=0.0, foreach=False):
        generator = torch.Generator().manual_seed(seed)

        def normal():
            return [
                torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES
            ]

        self.maximize, self.γ_decoupled, self.foreach = maximize, γ_decoupled, foreach
        self.w, self.g = normal(), [normal() for _ in range(steps)]
        self.g[0][1][0] = 0.0  # a row of dead units
        self.g[0][4] *= 0.0  # a tensor of them: a graft has no direction
        self.η = (10 ** -(1 + 2 * torch.rand(steps, generator=generator))).tolist()
        self.λ = (1.5 * torch.rand(steps, n_rules, generator=generator) - 0.3).relu().tolist()
        refreshed = torch.rand(steps, generator=generator) < 0.6
        self.D, self.given = [], []
        for t in range(steps):
            fresh = t == 0 or bool(refreshed[t])
            self.D.append(normal() if fresh else self.D[-1])
            self.given.append(self.D[-1] if fresh else None)

    def library(self, constructor, **settings):
        """All weights after all steps of the real optimizer."""
        params = [torch.nn.Parameter(w.clone()) for w in self.w]
        how = {"maximize": self.maximize, "foreach": self.foreach}
        optimizer = constructor(params, lr=1.0, **how, **settings)
        for g, D, η, λ in zip(self.g, self.given, self.η, self.λ):
            optimizer.param_groups[0].update(lr=η, lambdas=λ)
            for p, gi in zip(params, g):
                p.grad = gi.clone()
            optimizer.step(hess_diag=D)
        return torch.cat([p.detach().flatten() for p in params]).tolist()


def cases(n_rules, decoupled=False):
    return st.builds(
        Case, seed=st.integers(0, 2**32), steps=st.integers(1, 6), n_rules=st.just(n_rules),
        maximize=st.booleans(), foreach=st.booleans(),
        γ_decoupled=st.sampled_from([0.0, 0.03] if decoupled else [0.0]),
    )  # fmt: skip


@st.composite
def sgd_letters(draw):
    μ = draw(st.sampled_from([0.0, 0.5, 0.95]))
    d = draw(st.sampled_from([0.0, 0.3, 1.0]))
    return dict(μ=μ, d=d, nesterov=μ > 0 and d == 0 and draw(st.booleans()), γ=draw(decays))


decays = st.sampled_from([0.0, 5e-4, 0.1])
ADAPTIVE = {
    "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.9, 0.999])),
    "eps": st.sampled_from([1e-8, 1e-4, 0.1]), "weight_decay": decays, "amsgrad": st.booleans(),
    "partial": st.sampled_from([1 / 8, 1 / 4, 0.37, 1 / 2]),
    "bias_correction": st.sampled_from(["released", "none", "consistent"]),
    "hessian_power": st.sampled_from([0.3, 0.5, 1.0]),
    "spatial_average": st.sampled_from([None, "kernel", "auto", 1, 2, 4, 5, 1000]),
    "signed_average": st.booleans(),
}  # fmt: skip
RULES = {  # the arguments of each delta, and the settings that they stand for
    Adam: (delta_adam, {"ε": "eps", "γ": "weight_decay", "amsgrad": "amsgrad"}),
    Padam: (delta_padam, {"ε": "eps", "γ": "weight_decay", "amsgrad": "amsgrad", "p": "partial",
                          "reading": "bias_correction"}),
    AdaHessian: (delta_adahessian, {"ε": "eps", "k": "hessian_power"}),
    Lion: (delta_lion, {}),
}  # fmt: skip
fuzzed = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def assert_same(ours, expected):
    assert ours == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", methods.METHODS)
@fuzzed
@given(st.data())
def test_a_method_follows_its_algorithm(name, data):
    """With weight_decay_in="sgd" γ is in SGD alone, as Algorithm 2 prints it; with "both" it is in
    both rules, as in Algorithm 4."""
    adaptive, hybrid = methods.METHODS[name].rules[0], methods.METHODS[name].is_hybrid
    case, given, deltas = data.draw(cases(1 + hybrid)), {}, []
    if hybrid or adaptive is SGD:
        sgd = data.draw(sgd_letters())
        given = {"momentum": sgd["μ"], "dampening": sgd["d"], "nesterov": sgd["nesterov"]}
        given["weight_decay"] = sgd["γ"]
        deltas = [(delta_sgd, sgd)]
    if adaptive is not SGD:
        delta, letters = RULES[adaptive]
        fields = methods.METHODS[name].settings.keys() & ADAPTIVE.keys() - given.keys()
        given |= {f: data.draw(ADAPTIVE[f]) for f in sorted(fields)}
        (β1, β2), γ = given["betas"], given["weight_decay"]
        if hybrid:
            given["weight_decay_in"] = data.draw(st.sampled_from(["both", "sgd"]))
            γ *= given["weight_decay_in"] == "both"
        named = {"β1": β1, "β2": β2} | {letter: given[f] for letter, f in letters.items()}
        if "γ" in named:
            named["γ"] = γ
        else:
            case.γ_decoupled = γ
        deltas.insert(0, (delta, named))
    how, signed = given.get("spatial_average"), given.get("signed_average")
    merge = methods.METHODS[name].defaults.get("merge", "product")
    ours = case.library(getattr(methods, name), controller=None, **given)  # the case sets λ
    assert_same(ours, reference(case, deltas, how, signed, merge))


@fuzzed
@given(cases(5, decoupled=True), st.sampled_from(sorted(MERGES)), st.integers(0, 4))
def test_five_rules_merge_as_the_formula_says(case, merge, first):
    pairs = [
        (SGD(momentum=0.9, weight_decay=0.01),
         (delta_sgd, dict(μ=0.9, d=0.0, nesterov=False, γ=0.01))),
        (AdaHessian((0.8, 0.9), 0.01, 0.5),
         (delta_adahessian, dict(β1=0.8, β2=0.9, ε=0.01, k=0.5))),
        (Padam((0.5, 0.99), 1e-3, amsgrad=True, partial=0.25, bias_correction="none"),
         (delta_padam, dict(β1=0.5, β2=0.99, ε=1e-3, γ=0, amsgrad=True, p=0.25, reading="none"))),
        (Adam((0.9, 0.95), 1e-4, weight_decay=0.1),
         (delta_adam, dict(β1=0.9, β2=0.95, ε=1e-4, γ=0.1, amsgrad=False))),
        (Lion((0.9, 0.5)), (delta_lion, dict(β1=0.9, β2=0.5))),
    ]  # fmt: skip
    rules, deltas = zip(*pairs[first:], *pairs[:first])
    settings = dict(decoupled_weight_decay=case.γ_decoupled, merge=merge)
    ours = case.library(Hybrid, rules=rules, lambdas=(1, 1, 1, 1, 1), **settings)
    assert_same(ours, reference(case, deltas, merge=merge))
