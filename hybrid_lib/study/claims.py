"""The claims of the report's discussion, each with a criterion, its numbers and a verdict.

A criterion is one or more inequalities between measured quantities. Each quantity is a mean over
the seeds with a margin, half of its 95 % interval (Student; ± in the numbers). One seed gives no
interval: the margin is then 1/√(number of test images) for accuracies, which is 0.01 for CIFAR-10,
and a fixed share for ratios of losses. A claim **holds** if every inequality holds by more than its
margin. It **does not hold** if one fails by more than its margin. Otherwise, or if runs are missing
or too short, it **cannot be told**.

Accuracies are those of the last epoch, as in the report's Table III, unless a criterion says
otherwise. Epochs are those of the experiment: "the first milestone" is epoch 100 in the report.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import pandas as pd

from hybrid_lib.optim import methods
from hybrid_lib.study import statistics, tables
from hybrid_lib.training.history import History

HOLDS, FAILS, UNTOLD = "holds", "does not hold", "cannot be told"

PADAM_SGD = ("padam_sgd", "dyn_padam_sgd")
SECOND_ORDER = ("adahessian", "adasgd")
FIRST_ORDER = ("sgd", "adam", "atmo", "dyn_atmo", *PADAM_SGD)
OTHERS = ("sgd", "adam", "atmo", "dyn_atmo", *SECOND_ORDER)
STEPPED = (*PADAM_SGD, *SECOND_ORDER)

POINTS = 0.02  # two points of accuracy; less is "not a lot"
LOSS_MARGIN = 0.05  # of a ratio of losses, with one seed
TIME_MARGIN = 0.1  # share of a ratio of times, with any number of seeds: they share a machine
Runs = dict[str, Sequence[History]]  # complete runs by method


@dataclass(frozen=True)
class Inequality:
    """``value`` ± ``margin`` must be above ``bound``; NaN is a value that could not be measured."""

    text: str
    value: float
    margin: float
    bound: float = 0.0

    @property
    def verdict(self) -> str:
        if self.value - self.margin > self.bound:
            return HOLDS
        return FAILS if self.value + self.margin < self.bound else UNTOLD


@dataclass(frozen=True)
class Claim:
    """A statement of the report, in section ``where``, about ``methods``, and how to test it."""

    topic: str
    where: str
    criterion: str
    methods: Sequence[str]
    measure: Callable[[Runs, Sequence[str]], Iterable[Inequality]]

    def judge(self, runs: Runs) -> dict:
        """The claim as a row of :func:`table`."""
        missing = [methods.label(name) for name in self.methods if name not in runs]
        measured = [] if missing else list(self.measure(runs, self.methods))
        verdicts = {inequality.verdict for inequality in measured}
        numbers = [i.text for i in measured] or [f"no complete run of {', '.join(missing)}"]
        return {
            "claim": self.topic, "section": self.where, "criterion": self.criterion,
            "numbers": "; ".join(numbers),
            "verdict": next((v for v in (FAILS, UNTOLD, HOLDS) if v in verdicts), UNTOLD),
            "n": min(len(runs.get(name, ())) for name in self.methods),
        }  # fmt: skip


def table(histories: Sequence[History]) -> pd.DataFrame:
    """One row per claim: claim, section, criterion, numbers, verdict, n (fewest seeds of a method).

    Judges only complete runs. ValueError for no history, or several data sets or protocols.
    """
    title = tables.subject(histories)
    protocols = sorted({h.experiment.protocol for h in histories})
    if len(protocols) > 1:
        raise ValueError(f"histories of protocols {', '.join(protocols)}: judge one at a time")
    runs = statistics.group_by_method([h for h in histories if h.status == "complete"])
    rows = [claim.judge(runs) for claim in CLAIMS]
    return pd.DataFrame(rows).rename_axis(f"{title}, {protocols[0]} protocol")


# --- Measurements of one run; NaN if the run is too short. ---


def mean(h: History, until: int, n: int | None = None, column: str = "test_accuracy") -> float:
    """Mean over ``n`` epochs (None: :func:`window`) up to ``until``; NaN unless all were run."""
    n = window(h) if n is None else n
    values = [row[column] for row in h.rows if until - n < row["epoch"] <= until]
    return fmean(values) if len(values) == n else math.nan


def window(h: History) -> int:
    """A tenth of the epochs, at least three: shorter windows are noise."""
    return max(3, len(h.rows) // 10)


def ends(h: History, column: str = "test_accuracy") -> tuple[float, float]:
    """Means over the last tenth of the epochs and over the tenth before."""
    n = len(h.rows)
    return mean(h, n, column=column), mean(h, n - window(h), column=column)


def last(h: History) -> float:
    return h.final["test_accuracy"]


def milestone(h: History, number: int) -> int:
    """The last epoch before the ``number``-th drop of the rate; the run's last if there is none."""
    return (*h.experiment.lr_milestones, len(h.rows), len(h.rows))[number - 1]


def jump(h: History) -> float:
    """Gain in test accuracy across the first drop of the rate."""
    drop = milestone(h, 1)
    return mean(h, drop + window(h)) - mean(h, drop)


def drift(h: History) -> float:
    """Absolute change in test accuracy from just after the second milestone to the end."""
    start = milestone(h, 2) + window(h)
    return abs(ends(h)[0] - mean(h, start)) if start + window(h) <= len(h.rows) else math.nan


def swing(h: History) -> float:
    """Highest minus lowest test accuracy in the last tenth of the epochs."""
    values = [row["test_accuracy"] for row in h.rows[-window(h) :]]
    return max(values) - min(values) if len(h.rows) >= 2 * window(h) else math.nan


def trend(h: History) -> float:
    """Gain in test accuracy from the last tenth but one of the epochs to the last."""
    return operator.sub(*ends(h))


def fall_of_loss(h: History) -> float:
    """Relative fall of the test loss from the last tenth but one of the epochs to the last."""
    return 1 - operator.truediv(*ends(h, "test_loss"))


def rise_of_loss(h: History) -> float:
    """Relative rise of the test loss from its lowest epoch to the last tenth of the epochs."""
    return ends(h, "test_loss")[0] / min(row["test_loss"] for row in h.rows) - 1


def seconds(h: History) -> float:
    """Median seconds of training plus test pass, over the epochs after the first, a warm-up."""
    return median(row["train_seconds"] + row["test_seconds"] for row in h.rows[1:] or h.rows)


# --- Inequalities between measurements. ---


def within_method(measure, bound=0.0, sign=1, one_seed=None):
    """Inequalities: each method's ``measure`` is above ``bound`` or, with ``sign`` −1, below it."""

    def inequalities(runs: Runs, names: Iterable[str]):
        for name in names:
            sample = [measure(h) for h in runs[name]]
            numbers = fmean(sample), statistics.margin(sample)
            yield _inequality(methods.label(name), numbers, runs[name], bound, sign, one_seed)

    return inequalities


def above(runs: Runs, name: str, other: str, bound: float = 0.0, measure=last) -> Inequality:
    """Inequality: ``measure`` of one method exceeds another's by more than ``bound``."""
    one, two = runs[name], runs[other]
    numbers = statistics.difference([*map(measure, one)], [*map(measure, two)])
    what, note = f"{methods.label(name)} − {methods.label(other)}", ""
    if measure is last:
        best = [fmean(h.best["test_accuracy"] for h in group) for group in (one, two)]
        note = f" (best: {_signed(best[0] - best[1])})"
    return _inequality(what, numbers, [*one, *two], bound, note=note)


def _inequality(what, numbers, histories, bound=0.0, sign=1, one_seed=None, note="") -> Inequality:
    """Build the inequality of ``numbers``, a value and its margin.

    A margin of NaN (one seed) is replaced by ``one_seed``; without that, by 1/√(number of test
    images), two standard errors of an accuracy of one half.
    """
    value, margin = numbers
    text = f"{_signed(value)} ± {margin:.3f}"
    if math.isnan(margin):
        margin = one_seed or max(h.environment.get("test_images", 1) ** -0.5 for h in histories)
        text = f"{_signed(value)}, margin {margin:.3f}"
    text = f"{what}: {'too few epochs' if math.isnan(value) else text}{note}"
    return Inequality(text, sign * value, margin, sign * bound)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def highest(runs: Runs, names: Iterable[str], measure=last) -> str:
    return max(names, key=lambda name: fmean(map(measure, runs[name])))


def slow_start(runs: Runs, _):
    """Compare early accuracies with the average of the others in the same epochs."""
    for name in PADAM_SGD:
        first = milestone(runs[name][0], 1)
        starts = {n: pd.Series({h.experiment.seed: mean(h, first, first) for h in runs[n]})
                  for n in (name, *OTHERS)}  # fmt: skip
        one = starts.pop(name)
        rest = pd.concat(starts, axis=1, join="inner").mean(axis=1, skipna=False)
        if rest.empty:
            yield Inequality("the six others share no seed", math.nan, math.nan)
        else:
            numbers = statistics.difference(one, rest)
            yield _inequality(methods.label(name), numbers, runs[name], sign=-1)


def overtaking(runs: Runs, _):
    """Compare with the best of the other methods in the epochs right after the jump."""
    for name in PADAM_SGD:
        n = window(runs[name][0])
        after = functools.partial(mean, until=milestone(runs[name][0], 1) + n, n=n)
        yield above(runs, name, highest(runs, OTHERS, after), measure=after)


def slower(runs: Runs, _):
    engines = {h.environment.get("engine") for n in (*FIRST_ORDER, *SECOND_ORDER) for h in runs[n]}
    if len(engines) > 1:
        yield Inequality("some runs were compiled, others were not", math.nan, math.nan)
        return
    first_order = fmean(median(map(seconds, runs[name])) for name in FIRST_ORDER)
    for name in SECOND_ORDER:
        ratio = median(map(seconds, runs[name])) / first_order
        text = f"{methods.label(name)}: {ratio:.2f} ×"
        yield Inequality(text, 1 - abs(ratio - 4), TIME_MARGIN * ratio)


# fmt: off
CLAIMS = (
    Claim("PADAM-SGD, constant and dynamic, tests best", "V §1",
          "accuracy of each of the two − highest of the six others > 0", (*PADAM_SGD, *OTHERS),
          lambda runs, _: [above(runs, name, highest(runs, OTHERS)) for name in PADAM_SGD]),
    Claim("PADAM-SGD still learns at the end", "V §1",
          "both forms: 1 − mean test loss in the last tenth of the epochs ÷ the tenth before > 0",
          PADAM_SGD, within_method(fall_of_loss, one_seed=LOSS_MARGIN)),
    Claim("PADAM-SGD starts slowly", "V §1",
          "mean test accuracy up to its first milestone − mean of the six others < 0, both forms",
          (*PADAM_SGD, *OTHERS), slow_start),
    Claim("PADAM-SGD jumps when its rate first drops", "V §1",
          "mean test accuracy, a tenth of the epochs after − before the first milestone > 0",
          PADAM_SGD, within_method(jump)),
    Claim("The jump takes PADAM-SGD above all others", "V §1",
          "mean test accuracy in the tenth after its first milestone − highest of the six others "
          "in the same epochs > 0", (*PADAM_SGD, *OTHERS), overtaking),
    Claim("AdaSGD, too, gains when its rate first drops", "V §1", "as for PADAM-SGD",
          ("adasgd",), within_method(jump)),
    Claim("Lowering the rate is good for generalisation", "V §1",
          "as for PADAM-SGD, for each of the four methods with milestones",
          STEPPED, within_method(jump)),
    Claim("After the second milestone not much moves", "V §1",
          f"PADAM-SGD, both forms, and AdaSGD: from the tenth after it to the last tenth, mean "
          f"test accuracy moves by less than {POINTS}",
          (*PADAM_SGD, "adasgd"), within_method(drift, POINTS, sign=-1)),
    Claim("SGD and dynamic ATMO beat Adam and ATMO", "V §2",
          "accuracy: each of the four differences > 0", ("sgd", "dyn_atmo", "adam", "atmo"),
          lambda runs, names: [above(runs, a, b) for a in names[:2] for b in names[2:]]),
    Claim("SGD is unsteady to the end", "V §2",
          f"highest − lowest test accuracy in the last tenth of the epochs > {POINTS}",
          ("sgd",), within_method(swing, POINTS)),
    Claim("Dynamic ATMO would gain from more epochs", "V §2",
          "mean test accuracy, last tenth of the epochs − the tenth before > 0",
          ("dyn_atmo",), within_method(trend)),
    Claim("AdaHessian overfits", "V §3",
          "mean test loss in the last tenth of the epochs ÷ its lowest epoch − 1 > 0.1",
          ("adahessian",), within_method(rise_of_loss, 0.1, one_seed=LOSS_MARGIN)),
    Claim("AdaHessian's accuracy is not bad even so", "V §3", f"accuracy − SGD's > −{POINTS}",
          ("adahessian", "sgd"), lambda runs, names: [above(runs, *names, -POINTS)]),
    Claim("AdaHessian would lose from more epochs", "V §3",
          "mean test accuracy, last tenth of the epochs − the tenth before < 0",
          ("adahessian",), within_method(trend, sign=-1)),
    Claim("AdaSGD ends good and stable", "V §3",
          f"accuracy − AdaHessian's > 0; its own swing in the last tenth < {POINTS}", SECOND_ORDER,
          lambda runs, _: [above(runs, "adasgd", "adahessian"),
                           *within_method(swing, POINTS, sign=-1)(runs, ["adasgd"])]),
    Claim("Second order brings no more accuracy", "V §3",
          "accuracy of the best first-order method − the better of AdaHessian and AdaSGD > 0",
          (*FIRST_ORDER, *SECOND_ORDER),
          lambda runs, _: [above(runs, highest(runs, FIRST_ORDER), highest(runs, SECOND_ORDER))]),
    Claim("A second-order epoch takes almost four times as long", "V §3",
          "median seconds of training and test pass ÷ mean of the first-order methods: from 3 to 5",
          (*FIRST_ORDER, *SECOND_ORDER), slower),
    Claim("ATMO is only good if it is dynamic", "VI",
          "accuracy: Dyn. ATMO above SGD and Adam, ATMO below both",
          ("atmo", "dyn_atmo", "sgd", "adam"),
          lambda runs, _: [above(runs, *pair) for part in ("sgd", "adam")
                           for pair in (("dyn_atmo", part), (part, "atmo"))]),
)
