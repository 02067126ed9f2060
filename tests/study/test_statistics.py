"""What is said about several seeds holds: by hand, on random numbers, and where runs failed."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hybrid_lib.study import statistics
from hybrid_lib.training.experiments import EXPERIMENTS
from hybrid_lib.training.history import History

accuracies = st.lists(st.floats(0, 1), min_size=2, max_size=8)


def run(name, seed, *accuracy, status="complete", seconds=1.0):
    rows = [
        {"epoch": i + 1, "test_accuracy": a, "train_seconds": seconds}
        for i, a in enumerate(accuracy)
    ]
    return History(replace(EXPERIMENTS[name], seed=seed), rows, {"dataset": "dots"}, status)


def runs(**finals):
    """One run per method and seed, of one epoch; None: it diverged."""
    return [
        run(name, seed, *([] if a is None else [a]), status="diverged" if a is None else "complete")
        for name, values in finals.items()
        for seed, a in enumerate(values)
    ]


def spread(mean, n=10, by=0.01, seed=0):
    return (mean + by * np.random.default_rng(seed).standard_normal(n)).tolist()


# --- Intervals. ---


@given(accuracies)
@settings(deadline=None, max_examples=25)
def test_an_interval_lies_within_the_values(values):
    low, high = statistics.interval(values)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12


def test_an_interval_s_coverage_is_what_its_text_says():
    """5 normal values: 83 %; not 95 %, which is why the text says so."""
    rng, hits, n = np.random.default_rng(1), 0, 120
    for _ in range(n):
        low, high = statistics.interval(rng.standard_normal(5))
        hits += low <= 0 <= high
    assert stats.binomtest(hits, n, 0.83).pvalue > 0.001
    assert stats.binomtest(hits, n, 0.95).pvalue < 0.01


def test_one_value_has_no_interval_and_equal_values_one_of_no_length():
    assert all(math.isnan(bound) for bound in statistics.interval([0.5]))
    assert all(math.isnan(bound) for bound in statistics.interval([]))
    assert statistics.interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    assert statistics.interval([0.1 + 0.2, 0.3]) == (0.3, 0.1 + 0.2)


# --- Ranks. ---


def test_methods_far_apart_have_sure_ranks():
    table = statistics.ranks(
        runs(sgd=spread(0.5), adam=spread(0.9, seed=1), atmo=spread(0.7, seed=2))
    )
    assert list(table.index) == ["adam", "atmo", "sgd"]
    assert list(table["rank"]) == list(table["rank from"]) == list(table["rank to"]) == [1, 2, 3]
    assert list(table["first"]) == [1, 0, 0]
    assert (table["from"] < table["mean"]).all()
    assert (table["mean"] < table["to"]).all()


def test_methods_that_cannot_be_told_apart_share_their_ranks():
    table = statistics.ranks(runs(sgd=spread(0.5), adam=spread(0.5, seed=1)))
    assert list(table["rank from"]) == [1, 1]
    assert list(table["rank to"]) == [2, 2]
    assert table["first"].sum() == pytest.approx(1, abs=0.01)
    assert table["first"].min() > 0.02


def test_equal_seeds_make_a_small_steady_lead_sure():
    """The difference is a tenth of the spread over seeds; each draw has the same seeds for both."""
    base = spread(0.5, by=0.1)
    together = statistics.ranks(runs(sgd=base, adam=[a + 0.01 for a in base]))
    assert together.loc["adam", "rank to"] == 1
    apart = statistics.ranks(
        runs(sgd=base, adam=[a + 0.01 for a in base])[:-1]
    )  # a seed is missing
    assert apart.loc["adam", "rank to"] == 2


def test_ranks_do_not_depend_on_the_order_of_the_runs():
    found = runs(sgd=spread(0.5), adam=spread(0.51, seed=1), atmo=spread(0.52, seed=2))
    table = statistics.ranks(found)
    assert table.loc[list(table.index)].equals(statistics.ranks(found[::-1]).loc[list(table.index)])


def test_a_run_that_diverged_ranks_below_all_and_is_counted():
    table = statistics.ranks(runs(sgd=[0.5, 0.5, 0.5], adam=[0.9, None, 0.9]))
    assert list(table.index) == ["sgd", "adam"]
    assert table.loc["adam", "mean"] == 0.9
    assert (table.loc["adam", "seeds"], table.loc["adam", "diverged"]) == (2, 1)
    # It is drawn at least once in 1 - (2/3)^3 of all draws.
    assert table.loc["sgd", "first"] == pytest.approx(19 / 27, abs=0.02)


def test_one_seed_orders_but_knows_nothing_of_ranks():
    table = statistics.ranks(runs(sgd=[0.5], adam=[0.9]))
    assert list(table["rank"]) == [1, 2]
    assert table[["from", "to", "rank from", "rank to", "first"]].isna().all(axis=None)


def test_stopped_runs_count_nowhere():
    found = [*runs(sgd=[0.5, 0.6]), run("adam", 0, 0.9, status="stopped")]
    assert list(statistics.ranks(found).index) == ["sgd"]
    with pytest.raises(ValueError, match="no run has finished"):
        statistics.ranks(found[-1:])


def test_two_runs_of_one_seed_are_refused():
    with pytest.raises(ValueError, match="two runs of sgd, seed 0"):
        statistics.ranks(runs(sgd=[0.5]) + runs(sgd=[0.6]))


# --- Pairs. ---


def test_a_pair_by_hand():
    a, b = [0.50, 0.62, 0.71, 0.80], [0.48, 0.61, 0.72, 0.75]
    row = statistics.paired(runs(adam=a, sgd=b), "adam")
    d = np.subtract(a, b)
    assert row["difference"] == pytest.approx(d.mean())
    assert row["effect size"] == pytest.approx(d.mean() / d.std(ddof=1))
    assert (row["wins"], row["seeds"], row["diverged"]) == (0.75, 4, 0)
    assert row["from"] < row["difference"] < row["to"]
    means = [abs(np.dot(signs, d)) for signs in product((-1, 1), repeat=4)]
    assert row["p"] == pytest.approx(np.mean([m >= abs(d.sum()) - 1e-12 for m in means]))


@given(accuracies, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=15)
def test_a_pair_turned_round_is_its_mirror_image(values, random):
    others = [random.random() for _ in values]
    found = runs(adam=values, sgd=others)
    one, two = statistics.paired(found, "adam", "sgd"), statistics.paired(found, "sgd", "adam")
    assert one["difference"] == pytest.approx(-two["difference"], abs=1e-12)
    assert one["p"] == pytest.approx(two["p"])
    assert one["wins"] == pytest.approx(1 - two["wins"])


def test_without_a_difference_p_is_as_large_as_can_be():
    row = statistics.paired(runs(adam=[0.5, 0.6, 0.7], sgd=[0.5, 0.6, 0.7]), "adam")
    assert (row["p"], row["wins"], row["difference"]) == (1, 0.5, 0)
    assert math.isnan(row["effect size"])


def test_only_equal_seeds_make_pairs_and_a_diverged_run_is_a_lost_one():
    found = [*runs(adam=[0.5, 0.6, None], sgd=[0.4, 0.4, 0.1]), run("adam", 7, 0.9)]
    row = statistics.paired(found, "adam")
    assert row["difference"] == pytest.approx(0.15)
    assert (row["seeds"], row["diverged"], row["wins"]) == (2, 1, pytest.approx(2 / 3))
    alone = statistics.paired([run("adam", 1, 0.5), run("sgd", 2, 0.5)], "adam")
    assert alone["seeds"] == 0
    assert alone[["difference", "p", "wins"]].isna().all()


def test_an_absent_method_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'padam' is not among sgd, adam"):
        statistics.paired(runs(sgd=[0.5], adam=[0.5]), "padam", "sgd")
    with pytest.raises(ValueError, match="'sgd' is not among adam"):
        statistics.pairs(runs(adam=[0.5]))
    with pytest.raises(ValueError, match="no method but sgd"):
        statistics.pairs(runs(sgd=[0.5]))


def test_holm_s_correction_by_hand():
    found = runs(
        sgd=spread(0.5), adam=spread(0.51, seed=1), atmo=spread(0.9, seed=2), padam=[0.5] * 10
    )
    table = statistics.pairs(found)
    assert list(table.index) == ["adam", "atmo", "padam"]
    p = sorted(table["p"])
    by_hand = [
        min(1, 3 * p[0]),
        min(1, max(3 * p[0], 2 * p[1])),
        min(1, max(3 * p[0], 2 * p[1], p[2])),
    ]
    assert sorted(table["p (Holm)"]) == pytest.approx(by_hand)
    assert table["p"].idxmin() == table["p (Holm)"].idxmin() == "atmo"


# --- The best, if there is one. ---


def test_a_lead_in_every_one_of_six_seeds_carries_best_and_in_five_it_does_not():
    base = spread(0.5, 6)
    lead = [a + 0.1 for a in base]
    assert statistics.best(runs(sgd=base, adam=lead)) == "adam"
    assert statistics.best(runs(sgd=base[:5], adam=lead[:5])) is None


@pytest.mark.parametrize(
    "found",
    [
        runs(sgd=[0.5], adam=[0.9]),
        runs(sgd=spread(0.5), adam=spread(0.503, seed=1)),
        runs(sgd=spread(0.5), adam=spread(0.9, seed=1), atmo=spread(0.9, seed=2)),
        runs(sgd=spread(0.5, 8), adam=[*spread(0.9, 7), None]),
        runs(sgd=spread(0.5)),
    ],
    ids=["one seed", "no difference", "two winners", "one diverged", "alone"],
)
def test_otherwise_nobody_is_best(found):
    assert statistics.best(found) is None


def test_who_never_finishes_does_not_stand_in_the_way():
    found = runs(sgd=spread(0.5, 8), adam=spread(0.9, 8, seed=1), atmo=[None] * 8)
    assert statistics.best(found) == "adam"


def test_of_methods_that_are_equal_one_is_called_best_at_most_rarely():
    """Six seeds, three methods, nothing but noise: in at most 5 % of all studies."""
    rng, named = np.random.default_rng(0), 0
    for _ in range(40):
        noise = rng.standard_normal((3, 6))
        named += statistics.best(runs(sgd=noise[0], adam=noise[1], atmo=noise[2])) is not None
    assert stats.binomtest(named, 40, 0.05, alternative="greater").pvalue > 0.01


# --- Time to an accuracy. ---


def test_the_time_to_an_accuracy_by_hand():
    found = [
        run("sgd", 0, 0.2, 0.5, 0.4, seconds=2),  # it counts although it is lost again
        run("sgd", 1, 0.5, 0.5, 0.7, seconds=4),
        run("sgd", 2, 0.1, 0.1, 0.1, seconds=2),
        run("adam", 0, 0.9, 0.9),
        run("adam", 1, 0.1, 0.1),
        run("adam", 2, status="diverged"),
        run("adam", 3, 0.9, status="stopped"),
    ]
    table = statistics.time_to(found, 0.5)
    sgd, adam = table.loc["sgd"], table.loc["adam"]
    assert (sgd["reached"], sgd["seeds"], sgd["epochs"], sgd["seconds"]) == (2, 3, 2, 4)
    assert sgd["final"] == pytest.approx(0.4)
    assert (adam["reached"], adam["seeds"]) == (1, 3)
    assert math.isnan(adam["epochs"])
    assert math.isnan(adam["seconds"])
    assert adam["final"] == pytest.approx(0.5)


def test_the_typical_accuracy_is_one_that_half_of_the_methods_have():
    assert statistics.typical_accuracy(runs(sgd=[0.5, 0.52], adam=[0.9], atmo=[0.63])) == 0.6
    assert statistics.typical_accuracy(runs(sgd=[0.52], adam=[0.97])) == 0.95
    assert statistics.typical_accuracy(runs(sgd=[0.65])) == 0.65
    with pytest.raises(ValueError, match="no run has finished"):
        statistics.typical_accuracy(runs(sgd=[None]))
