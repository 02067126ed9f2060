"""Verdicts on claims follow the numbers and claim no more than the seeds support."""

from dataclasses import replace

import pytest

from hybrid_lib.study import claims, statistics
from hybrid_lib.study.claims import FAILS, HOLDS, UNTOLD
from hybrid_lib.training.experiments import EXPERIMENTS
from hybrid_lib.training.history import History

TOPICS = [claim.topic for claim in claims.CLAIMS]
EPOCHS = 40


def step(before, after, at=EPOCHS // 2):
    """A column that steps from one value to another after an epoch."""
    return lambda epoch: after if epoch > at else before


def line(start, slope, bend=0):
    """A column that is constant up to an epoch, then a straight line."""
    return lambda epoch: start + slope * max(0, epoch - bend)


# Columns with which every claim holds; those that are not given are constant.
REPORT = {
    "sgd": {"test_accuracy": lambda epoch: 0.87 + 0.02 * (-1) ** epoch},
    "adam": {"test_accuracy": line(0.84, 0)},
    "atmo": {"test_accuracy": line(0.80, 0)},
    "dyn_atmo": {"test_accuracy": line(0.77, 0.004)},
    "padam_sgd": {"test_accuracy": step(0.75, 0.95), "test_loss": line(2, -0.025)},
    "dyn_padam_sgd": {"test_accuracy": step(0.76, 0.96), "test_loss": line(2, -0.025)},
    "adahessian": {
        "test_accuracy": lambda epoch: step(0.8, 0.92)(epoch) - line(0, 0.004, bend=32)(epoch),
        "test_loss": line(0.5, 0.025), "train_seconds": line(3.7, 0),
    },
    "adasgd": {"test_accuracy": step(0.84, 0.91), "train_seconds": line(3.7, 0)},
}  # fmt: skip
# For each claim, in order, what must be changed for it to fail.
COUNTEREXAMPLES = [
    {"adasgd": {"test_accuracy": line(0.98, 0)}},
    {"padam_sgd": {"test_loss": line(1, 0.05)}},
    {"dyn_padam_sgd": {"test_accuracy": step(0.93, 0.96)}},
    {"padam_sgd": {"test_accuracy": step(0.85, 0.83)}},
    {"sgd": {"test_accuracy": line(0.98, 0)}},
    {"adasgd": {"test_accuracy": step(0.91, 0.89)}},
    {"adahessian": {"test_accuracy": step(0.92, 0.90)}},
    {"padam_sgd": {"test_accuracy": step(0.95, 0.91, at=35)}},
    {"atmo": {"test_accuracy": line(0.95, 0)}},
    {"sgd": {"test_accuracy": line(0.87, 0)}},
    {"dyn_atmo": {"test_accuracy": line(0.96, -0.004)}},
    {"adahessian": {"test_loss": line(1, 0)}},
    {"adahessian": {"test_accuracy": line(0.80, 0)}},
    {"adahessian": {"test_accuracy": line(0.70, 0.005)}},
    {"adasgd": {"test_accuracy": line(0.60, 0)}},
    {"adahessian": {"test_accuracy": line(0.99, 0)}},
    {"adasgd": {"train_seconds": line(1.2, 0)}},
    {"dyn_atmo": {"test_accuracy": line(0.70, 0)}},
]


def history(name, columns, seed=0, epochs=EPOCHS, shift=0.0):
    constant = {"test_accuracy": 0.5, "test_loss": 1.0, "train_seconds": 0.9, "test_seconds": 0.1}
    rows = [
        {"epoch": epoch} | constant | {c: value(epoch) for c, value in columns.items()}
        for epoch in range(1, epochs + 1)
    ]
    for row in rows:
        row["test_accuracy"] += shift
    experiment = replace(EXPERIMENTS[name].scaled(epochs), seed=seed)
    return History(experiment, rows, {"dataset": "Pictures", "test_images": 10_000}, "complete")


def study(*changes, seed=0, shifts=None, epochs=EPOCHS) -> list[History]:
    """A run of each method; ``shifts`` move a method's accuracies up or down."""
    columns = {name: dict(of) for name, of in REPORT.items()}
    for change in changes:
        for name, of in change.items():
            columns[name] |= of
    shifts = shifts or {}
    return [history(n, of, seed, epochs, shifts.get(n, 0.0)) for n, of in columns.items()]


def judge(histories, topic):
    """The row of the one claim that begins with ``topic``."""
    judged = claims.table(histories)
    (row,) = [row for row in judged.itertuples() if row.claim.startswith(topic)]
    return row


def seeds_of(*shifts, change=None):
    """The runs of a study per seed."""
    return [h for s, shift in enumerate(shifts) for h in study(change or {}, seed=s, shifts=shift)]


# --- Every claim can hold, fail and be undecided. ---


def test_every_claim_can_hold_at_any_length():
    assert {claim.where for claim in claims.CLAIMS} == {"V §1", "V §2", "V §3", "VI"}
    for epochs in (EPOCHS, 5 * EPOCHS):
        stretched = {
            name: {c: lambda e, f=f, k=epochs // EPOCHS: f(e / k) for c, f in of.items()}
            for name, of in REPORT.items()
            if name != "sgd"  # it goes up and down with every epoch
        }
        judged = claims.table(study(stretched, epochs=epochs))
        assert set(judged.verdict) == {HOLDS}, judged[judged.verdict != HOLDS][["claim", "numbers"]]


@pytest.mark.parametrize(
    ("topic", "change"), [*zip(TOPICS, COUNTEREXAMPLES, strict=True)], ids=TOPICS
)  # fmt: skip
def test_every_claim_can_fail(topic, change):
    assert judge(study(change), topic).verdict == FAILS


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=TOPICS)
def test_without_one_of_its_methods_a_claim_cannot_be_told(claim):
    for name in claim.methods:
        row = judge([h for h in study() if h.experiment.name != name], claim.topic)
        assert (row.verdict, row.n) == (UNTOLD, 0)
        assert EXPERIMENTS[name].label in row.numbers
    for status in ("running", "stopped", "diverged"):
        runs = [replace(h, status=status) if h.experiment.name == name else h for h in study()]
        assert judge(runs, claim.topic).numbers == row.numbers, "such a run is no evidence"


@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
def test_short_runs_decide_nothing_about_their_course(epochs):
    for topic in ("SGD is unsteady", "PADAM-SGD jumps", "PADAM-SGD still learns", "After the sec"):
        row = judge(study(epochs=epochs), topic)
        assert (row.verdict, "too few epochs" in row.numbers) == (UNTOLD, True)


# --- No more than the seeds support. ---


def test_with_one_seed_the_margin_is_that_of_the_test_set():
    few = study({"adahessian": {"test_accuracy": line(0.883, 0)}})
    assert judge(few, "AdaSGD ends").verdict == HOLDS
    for h in few:
        h.environment["test_images"] = 400
    row = judge(few, "AdaSGD ends")
    assert row.verdict == UNTOLD
    assert "+0.027, margin 0.050 (best: +0.027)" in row.numbers
    assert "±" not in "".join(claims.table(few).numbers), "one seed has no interval"


def test_several_seeds_decide_by_their_spread_with_the_margins_of_statistics():
    topic, close = "SGD and dynamic ATMO", {"sgd": {"test_accuracy": line(0.845, 0)}}
    assert judge(study(close), topic).verdict == UNTOLD  # .005 above Adam, one seed
    steady = seeds_of(*({"adam": 1e-4 * s} for s in range(3)), change=close)
    assert judge(steady, topic).verdict == HOLDS
    wilder = seeds_of(*({"adam": 0.02 * (s - 1)} for s in range(3)), change=close)
    assert (judge(wilder, topic).verdict, judge(wilder, topic).n) == (UNTOLD, 3)
    sgd, adam = (0, 0.011, 0.002, 0.004), (0.003, 0, 0.009, 0.001)
    row = judge(seeds_of(*({"sgd": a, "adam": b} for a, b in zip(sgd, adam))), topic)
    value, margin = statistics.difference([0.89 + a for a in sgd], [0.84 + a for a in adam])
    assert f"SGD − Adam: {value:+.3f} ± {margin:.3f} (best" in row.numbers
    fewer = [h for h in wilder if h.experiment.name != "adam" or not h.experiment.seed]
    assert (judge(fewer, topic).n, judge(fewer, "AdaSGD ends").n) == (1, 3)


def test_runs_are_matched_by_seed_and_not_by_position():
    """The average of the others is taken seed by seed, whatever the order of the runs."""
    topic = "PADAM-SGD starts slowly"
    seeds = seeds_of(*({"sgd": 0.06 * s, "adam": -0.06 * s} for s in range(3)))  # they cancel
    expected = claims.table(seeds)
    assert "± 0.000" in judge(seeds, topic).numbers
    of_sgd = [h for h in seeds if h.experiment.name == "sgd"]
    others = [h for h in seeds if h.experiment.name != "sgd"]
    for order in (seeds[::-1], of_sgd[::-1] + others, others + of_sgd[1:] + of_sgd[:1]):
        assert claims.table(order).equals(expected)
    assert "± 0.000" in judge(others + of_sgd[1:], topic).numbers
    alone = judge([h for h in others if h.experiment.seed] + of_sgd[:1], topic)
    assert alone.verdict == UNTOLD
    assert "share no seed" in alone.numbers


# --- Bounds and margins. ---


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [(2.6, FAILS), (2.9, UNTOLD), (3.2, UNTOLD), (3.45, HOLDS), (4.0, HOLDS), (4.5, HOLDS),
     (4.6, UNTOLD), (5.4, UNTOLD), (5.7, FAILS)],
)  # fmt: skip
@pytest.mark.parametrize("column", ["train_seconds", "test_seconds"])
def test_almost_four_times_is_three_to_five_times_training_and_test_pass(column, ratio, verdict):
    """A margin of a tenth of the ratio; a first-order epoch takes .9 s and .1 s."""
    usual = {"train_seconds": 0.9, "test_seconds": 0.1}
    slow = {c: line(s if c != column else ratio - 1 + s, 0) for c, s in usual.items()}
    row = judge(study({"adahessian": slow, "adasgd": slow}), "A second-order epoch")
    assert row.numbers == f"AdaHessian: {ratio:.2f} ×; AdaSGD: {ratio:.2f} ×"
    assert row.verdict == verdict


@pytest.mark.parametrize(
    ("topic", "at", "change", "verdict"),
    [("AdaHessian overfits", 20, change, verdict)  # a tenth more loss
     for change, verdict in ((0.02, FAILS), (0.07, UNTOLD), (0.13, UNTOLD), (0.17, HOLDS))]
    + [("PADAM-SGD still learns", 36, change, verdict)  # less loss in the last tenth of 40
       for change, verdict in ((0.06, FAILS), (0.04, UNTOLD), (-0.04, UNTOLD), (-0.06, HOLDS))],
)  # fmt: skip
def test_losses_have_a_margin_of_a_twentieth(topic, at, change, verdict):
    columns = {"test_loss": step(1, 1 + change, at)}
    changed = dict.fromkeys(("padam_sgd", "dyn_padam_sgd", "adahessian"), columns)
    assert judge(study(changed), topic).verdict == verdict


def test_a_slow_start_and_an_overtaking_are_judged_at_the_first_milestone():
    """Until epoch 20 the others average .827; AdaHessian is the best in the next 4 epochs."""
    start = judge(study(), "PADAM-SGD starts slowly").numbers
    assert start.startswith("PADAM-SGD: −0.077, margin 0.010; Dyn. PADAM-SGD: −0.067, ")
    after = judge(study(), "The jump takes PADAM-SGD above all").numbers
    assert after.startswith("PADAM-SGD − AdaHessian: +0.030, margin 0.010; Dyn.")


@pytest.mark.parametrize("epochs", [20, 40, 100])
def test_a_jump_is_measured_a_tenth_of_the_epochs_around_the_first_milestone(epochs):
    """The curve rises everywhere, so any other window or milestone gives another number."""
    w, first = max(3, epochs // 10), epochs // 2
    h = history("padam_sgd", {"test_accuracy": lambda e: (e / epochs) ** 2}, epochs=epochs)
    assert h.experiment.lr_milestones[0] == first < h.experiment.lr_milestones[1]
    column = [row["test_accuracy"] for row in h.rows]
    after, before = sum(column[first : first + w]) / w, sum(column[first - w : first]) / w
    assert claims.jump(h) == pytest.approx(after - before)
    second = h.experiment.lr_milestones[1]
    if second + 2 * w <= epochs:
        start = sum(column[second : second + w]) / w
        assert claims.drift(h) == pytest.approx(sum(column[-w:]) / w - start)


# --- Refusals. ---


@pytest.mark.parametrize(
    "message", ["no history", "protocols clean, released", "several data sets"]
)
def test_histories_that_do_not_belong_together_are_refused(message):
    first, *others = study()
    released = replace(first, experiment=replace(first.experiment, protocol="released"))
    elsewhere = replace(first, environment={"dataset": "Others", "test_images": 1})
    more = {"no history": [], "protocols clean, released": [released, *others]}
    with pytest.raises(ValueError, match=message):
        claims.table(more.get(message, [elsewhere, *others]))


def test_compiled_runs_are_not_timed_against_eager_ones():
    runs = study()
    for h in runs:
        h.environment["engine"] = "compiled" if h.experiment.needs_hessian else "eager"
    row = judge(runs, "A second-order epoch")
    assert (row.verdict, row.numbers) == (UNTOLD, "some runs were compiled, others were not")
    for h in runs:
        h.environment["engine"] = "compiled"
    assert "×" in judge(runs, "A second-order epoch").numbers
