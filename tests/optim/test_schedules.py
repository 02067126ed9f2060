"""Schedules are pure functions of the epoch with the ends that they are given.

Every ramp starts at ``start``, reaches ``end`` at its horizon and stays there, never turns back and
never leaves the line between the two. Schedules are values (frozen, comparable, hashable,
printable). :class:`Released` has the released code's first epoch.
"""

import dataclasses
import math
import pickle
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lib.optim import schedules
from hybrid_lib.optim.schedules import (
    Constant,
    Cosine,
    Exponential,
    Linear,
    Released,
    Sigmoid,
    Step,
)

no_deadline = settings(deadline=None)  # a busy machine must not fail a test

RAMPS = [Linear, Cosine, Step, Exponential, Sigmoid]
EXAMPLES = [*(ramp([1, 0, 2], (0.25, 0.75, 2), 10) for ramp in RAMPS), Constant([0.3]), Released()]

weights = st.integers(0, 50_000).map(lambda thousandths: thousandths / 1000)
pairs = st.tuples(weights, weights)
horizons = st.integers(1, 500)


@st.composite
def ramps(draw):
    kind = draw(st.sampled_from(RAMPS))
    shape = {Exponential: "rate", Sigmoid: "steepness"}.get(kind)
    extra = {shape: draw(st.floats(0.01, 100))} if shape else {}
    return kind(draw(pairs), draw(pairs), draw(horizons), **extra)


@no_deadline
@given(ramps(), st.integers(0, 1000))
def test_a_ramp_starts_at_its_start_and_stays_at_its_end(ramp, later):
    assert ramp(0) == ramp.start
    assert ramp(ramp.epochs) == ramp.end
    assert ramp(ramp.epochs + later) == ramp.end


@no_deadline
@given(ramps(), st.data())
def test_a_ramp_goes_straight_to_its_end_and_never_back(ramp, data):
    epochs = sorted(data.draw(st.lists(st.integers(0, ramp.epochs), min_size=2, max_size=8)))
    done = [share_done(ramp, epoch) for epoch in epochs if ramp.start != ramp.end]
    assert all(first <= second + 1e-9 for first, second in pairwise(done))


def share_done(ramp, epoch):
    """The s in [0, 1] with weights = (1 - s) start + s end, the same for every weight."""
    now = ramp(epoch)
    widest = max(range(len(now)), key=lambda i: abs(ramp.end[i] - ramp.start[i]))
    start, end = ramp.start[widest], ramp.end[widest]
    share = (now[widest] - start) / (end - start)
    assert -1e-9 <= share <= 1 + 1e-9
    for value, a, b in zip(now, ramp.start, ramp.end):
        assert value == pytest.approx((1 - share) * a + share * b, rel=1e-9, abs=1e-9)
    return share


IN_BETWEEN = [  # after a quarter and after half of the way
    (Linear(epochs=8), 0.25, 0.5), (Cosine(epochs=8), (1 - math.sqrt(0.5)) / 2, 0.5),
    (Step(epochs=8), 0, 0),
    (Exponential(epochs=8, rate=2 * math.log(2)), (1 - 0.5**0.5) / 0.75, 0.5 / 0.75),
    (Sigmoid(epochs=8, steepness=4), (1 - math.tanh(0.5) / math.tanh(1)) / 2, 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("ramp", "quarter", "half"), IN_BETWEEN)
def test_each_shape_is_right_after_a_quarter_and_half_of_the_way(ramp, quarter, half):
    assert ramp(2) == pytest.approx((1 - quarter, quarter), abs=1e-12)
    assert ramp(4) == pytest.approx((1 - half, half), abs=1e-12)


def test_the_report_s_direction_is_the_default():
    """From the adaptive rule to SGD over 100 epochs; epoch e of 1, 2, ... uses (e - 1) / 100."""
    assert Linear() == Linear(start=(1, 0), end=(0, 1), epochs=100)
    assert [Linear()(e - 1) for e in (1, 51, 101)] == [(1, 0), (0.5, 0.5), (0, 1)]


@pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda schedule: type(schedule).__name__)
def test_schedules_are_values(schedule):
    twin = pickle.loads(pickle.dumps(schedule))
    assert twin == schedule
    assert hash(twin) == hash(schedule)
    assert eval(repr(schedule), vars(schedules)) == schedule
    assert [schedule(7), schedule(2), schedule(7)] == [twin(7), twin(2), twin(7)]  # no hidden state
    assert type(schedule(2)) is tuple
    assert len({*EXAMPLES, *EXAMPLES}) == len(EXAMPLES)
    field = dataclasses.fields(schedule)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, field, getattr(schedule, field))


BAD_WEIGHTS = [(-0.1, 1), (math.nan, 1), (math.inf, 0), (), 0.5, "ab", None, (1, "x"), (1, None)]


@pytest.mark.parametrize("bad", BAD_WEIGHTS, ids=repr)
def test_impossible_weights_are_refused_by_name(bad):
    with pytest.raises(ValueError, match="lambdas="):
        Constant(bad)
    for ramp in RAMPS:
        with pytest.raises(ValueError, match="start="):
            ramp(start=bad)
        with pytest.raises(ValueError, match="end="):
            ramp(end=bad)


def test_ends_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="one weight per rule"):
        Linear((1, 0), (0, 1, 0))


@pytest.mark.parametrize("epochs", [0, -5, 0.5, math.nan, math.inf])
@pytest.mark.parametrize("ramp", RAMPS)
def test_an_impossible_horizon_is_refused_by_name(ramp, epochs):
    with pytest.raises(ValueError, match=f"epochs={epochs}"):
        ramp(epochs=epochs)


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
def test_an_impossible_sharpness_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"rate={bad}"):
        Exponential(rate=bad)
    with pytest.raises(ValueError, match=f"steepness={bad}"):
        Sigmoid(steepness=bad)


@no_deadline
@given(horizons, pairs, pairs, pairs, st.integers(1, 600))
def test_released_has_its_own_first_epoch_and_then_the_ramp(epochs, start, end, first, epoch):
    schedule = Released(start, end, epochs, first)
    assert schedule(0) == first
    expected = Linear(start, end, epochs)(epoch)
    assert schedule(epoch) == pytest.approx(expected, rel=1e-9, abs=1e-9)
