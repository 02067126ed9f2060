"""Seed statistics are right: by hand, on random numbers, and where runs failed."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hybrid_lib.study import statistics
from hybrid_lib.training.experiments import EXPERIMENTS
from hybrid_lib.training.history import History

accuracies = st.lists(st.integers(0, 1000).map(lambda i: i / 1000), min_size=2, max_size=8)


def run(name, seed, *accuracy, status="complete", seconds=1.0):
    rows = [
        {"epoch": i + 1, "test_accuracy": a, "train_seconds": seconds, "test_seconds": 100.0}
        for i, a in enumerate(accuracy)
    ]
    return History(replace(EXPERIMENTS[name], seed=seed), rows, {"dataset": "dots"}, status)


def runs(**finals):
    """One run per method and seed, whose best epoch is not its last; None: it diverged."""
    return [
        run(name, seed, status="diverged") if a is None else run(name, seed, a + 0.05, a)
        for name, values in finals.items()
        for seed, a in enumerate(values)
    ]


def spread(mean, n=10, by=0.01, seed=0):
    return (mean + by * np.random.default_rng(seed).standard_normal(n)).tolist()


# --- Intervals. ---


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262)])
def test_the_margin_is_half_of_student_s_interval_as_tabulated(n, t):
    values = spread(0.5, n)
    expected = pytest.approx(t * np.std(values, ddof=1) / math.sqrt(n), rel=1e-3)
    assert statistics.margin(values) == expected
    table = statistics.margin(pd.DataFrame({"a": [*values, math.nan], "b": math.nan}))
    assert table["a"] == expected
    assert math.isnan(table["b"])


@pytest.mark.parametrize(("values", "half"), [([0.5] * 3, 0), ([0.5], math.nan), ([], math.nan)])
def test_one_value_has_no_margin_and_equal_values_have_margin_0(values, half):
    assert statistics.margin(values) == pytest.approx(half, nan_ok=True)


@settings(deadline=None)
@given(accuracies, accuracies)
def test_a_difference_has_welch_s_margin(one, two):
    value, margin = statistics.difference(one, two)
    assert value == pytest.approx(np.mean(one) - np.mean(two))
    parts = [np.var(sample, ddof=1) / len(sample) for sample in (one, two)]
    if sum(parts) > 1e-12:
        freedom = sum(parts) ** 2 / sum(v**2 / (len(s) - 1) for v, s in zip(parts, (one, two)))
        assert margin == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts)))
    else:
        assert margin == pytest.approx(0, abs=1e-9)
    assert math.isnan(statistics.difference(one[:1], two)[1])


# --- Ranks. ---


def test_methods_far_apart_have_certain_ranks_and_indistinguishable_ones_share_theirs():
    found = runs(sgd=spread(0.5), adam=spread(0.9, seed=1), atmo=spread(0.7, seed=2))
    table = statistics.ranks([*found, *runs(padam=spread(0.5, seed=3))])
    assert list(table.index[:2]) == ["adam", "atmo"]
    assert list(table["rank"]) == [1, 2, 3, 4]
    assert list(zip(table["rank from"], table["rank to"])) == [(1, 1), (2, 2), (3, 4), (3, 4)]
    assert table["mean"].tolist() == pytest.approx([0.9, 0.7, 0.5, 0.5], abs=0.01)
    assert table["±"]["sgd"] == pytest.approx(statistics.margin(spread(0.5)))


def test_equal_seeds_make_a_small_steady_lead_certain():
    """The lead is a tenth of the spread over seeds; runs are paired by seed, not by position."""
    base = spread(0.5, by=0.1)
    found = runs(sgd=base, adam=[a + 0.01 + i / 1e4 for i, a in enumerate(base)])
    for order in (found, found[::-1], found[:10] + found[:9:-1], found[1:]):  # a seed is missing
        assert statistics.ranks(order)["rank to"]["adam"] == 1
        assert statistics.pairs(order)["p"]["adam"] < 1e-6
    apart = [replace(h, experiment=replace(h.experiment, seed=-h.experiment.seed % 10))
             if h.experiment.name == "sgd" else h for h in found]  # fmt: skip
    assert statistics.ranks(apart)["rank to"]["adam"] == 2


def test_a_diverged_run_ranks_below_all_and_its_method_is_never_certainly_better():
    found = runs(sgd=spread(0.5, 8), adam=[*spread(0.9, 7), None], atmo=[None] * 8)
    table = statistics.ranks(found)
    assert list(table.index) == ["sgd", "adam", "atmo"]
    assert table.loc["adam", "mean"] == pytest.approx(np.mean(spread(0.9, 7)))
    assert list(table["seeds"]) == [8, 7, 0]
    assert list(table["diverged"]) == [0, 1, 8]
    assert list(table["rank from"])[:2] == [1, 1]
    assert list(table["rank to"])[:2] == [2, 3]


def test_one_seed_gives_an_order_without_intervals_and_stopped_runs_do_not_count():
    table = statistics.ranks(runs(sgd=[0.5], adam=[0.9]))
    assert list(table["rank"]) == [1, 2]
    assert table[["±", "rank from", "rank to"]].isna().all(axis=None)
    found = [*runs(sgd=[0.5, 0.6]), run("adam", 0, 0.9, status="stopped")]
    assert list(statistics.ranks(found).index) == ["sgd"]


@pytest.mark.parametrize(
    ("table", "found", "message"),
    [(statistics.ranks, [run("adam", 0, 0.9, status="stopped")], "no run has ended"),
     (statistics.ranks, runs(sgd=[0.5]) + runs(sgd=[0.6]), r"sgd has two runs of one seed"),
     (statistics.pairs, runs(adam=[0.5]), "pairs need sgd and another method; found adam"),
     (statistics.pairs, runs(sgd=[0.5]), "pairs need sgd and another method; found sgd")],
)  # fmt: skip
def test_runs_that_cannot_be_ranked_or_paired_are_refused(table, found, message):
    with pytest.raises(ValueError, match=message):
        table(found)


# --- Pairs. ---


def test_a_paired_comparison_by_hand():
    a, b = [0.50, 0.62, 0.71, 0.80], [0.48, 0.61, 0.72, 0.75]
    row = statistics.pairs(runs(adam=a, sgd=b)).loc["adam"]
    d = np.subtract(a, b)
    assert row["difference"] == pytest.approx(d.mean())
    assert row["effect size"] == pytest.approx(d.mean() / d.std(ddof=1))
    assert (row["wins"], row["seeds"], row["diverged"]) == (0.75, 4, 0)
    assert row["±"] == pytest.approx(3.182 * d.std(ddof=1) / 2, rel=1e-3)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert row["±"] == pytest.approx((high - low) / 2)
    assert row["p"] == pytest.approx(2 * stats.t.sf(d.mean() / (d.std(ddof=1) / 2), 3))


def test_only_equal_seeds_make_pairs_and_a_diverged_run_loses():
    found = [*runs(adam=[0.5, 0.6, None], sgd=[0.4, 0.4, 0.1]), run("adam", 7, 0.9)]
    row = statistics.pairs(found[::-1]).loc["adam"]
    assert row["difference"] == pytest.approx(0.15)
    assert (row["seeds"], row["diverged"], row["wins"]) == (2, 1, pytest.approx(2 / 3))
    alone = statistics.pairs([run("adam", 1, 0.5), run("sgd", 2, 0.5)]).loc["adam"]
    assert alone["seeds"] == 0
    assert alone[["difference", "p", "wins"]].isna().all()
    equal = statistics.pairs(runs(adam=[0.5, 0.6, 0.7], sgd=[0.5, 0.6, 0.7])).loc["adam"]
    assert (equal["wins"], equal["difference"], equal["±"]) == (0.5, 0, 0)
    assert equal[["p", "p (Holm)", "effect size"]].isna().all(), "there is no spread"


def test_holm_s_correction_by_hand():
    """Three p of nearly equal size: the largest times 1 is below the smallest times 3."""
    base = np.array(spread(0.5, 12, by=0.1))
    noise = 0.01 * (-1.0) ** np.arange(12)
    found = runs(sgd=base, **{
        name: (base + lead + noise).tolist()
        for name, lead in (("adam", 0.0061), ("atmo", 0.006), ("padam", 0.0059))
    })  # fmt: skip
    table = statistics.pairs(found)
    assert list(table.index) == ["adam", "atmo", "padam"], "the report's order"
    smallest, middle, largest = p = table["p"].tolist()
    assert p == sorted(p)
    assert largest < 2 * middle < 3 * smallest
    assert table["p (Holm)"].tolist() == pytest.approx([3 * smallest] * 3)
    apart = statistics.pairs(runs(sgd=base, adam=spread(0.9, 12), atmo=spread(0.5, 12, seed=3)))
    assert apart["p (Holm)"]["adam"] == pytest.approx(2 * apart["p"]["adam"])
    assert apart["p (Holm)"]["atmo"] == pytest.approx(apart["p"]["atmo"])


# --- The best, if there is one. ---


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (runs(sgd=spread(0.5, 3), adam=spread(0.9, 3, seed=1)), "adam"),
        (runs(sgd=spread(0.5, 8), adam=spread(0.9, 8, seed=1), atmo=[None] * 8), "adam"),
        (runs(sgd=[0.5], adam=[0.9]), None),
        (runs(sgd=spread(0.5), adam=spread(0.503, seed=1)), None),
        (runs(sgd=spread(0.5), adam=spread(0.9, seed=1), atmo=spread(0.9, seed=2)), None),
        (runs(sgd=spread(0.5, 8), adam=[*spread(0.9, 7), None]), None),
        (runs(sgd=spread(0.5)), None),
    ],
    ids=["far apart", "one that always diverges does not count", "one seed", "no difference",
         "two winners", "one diverged", "alone"],
)  # fmt: skip
def test_the_best_has_rank_1_throughout_its_interval(found, name):
    table = statistics.ranks(found)
    assert list(table.index[table["rank to"] == 1]) == ([name] if name else [])


def test_of_equal_methods_one_is_rarely_called_the_best():
    """Six seeds, three methods, pure noise: in at most 5 % of all studies."""
    rng, named = np.random.default_rng(0), 0
    for _ in range(60):
        noise = rng.standard_normal((3, 6))
        found = runs(sgd=noise[0], adam=noise[1], atmo=noise[2])
        named += (statistics.ranks(found)["rank to"] == 1).any()
    assert stats.binomtest(named, 60, 0.05, alternative="greater").pvalue > 0.01
