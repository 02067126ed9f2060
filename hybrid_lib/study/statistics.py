"""What several seeds can say: means with intervals, ranks with theirs, pairs, time to an accuracy.

All of it looks at the last epoch of finished runs. A run that diverged has no such accuracy: it is
counted beside every mean, and ranks below every run that finished. A run that was stopped counts
nowhere.

Two methods run with the same seed start from the same weights and see the same images in the same
order. That is why they are compared in pairs: what a seed does to both cancels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from hybrid_lib.training.experiments import EXPERIMENTS
from hybrid_lib.training.history import History

LEVEL = 0.95
RESAMPLES = 9999


def group_by_method(histories: Sequence[History]) -> dict[str, list[History]]:
    """Histories by experiment name, in the report's order."""
    known = list(EXPERIMENTS)
    groups: dict[str, list[History]] = {}
    for h in sorted(histories, key=lambda h: known.index(h.experiment.name)
                    if h.experiment.name in known else len(known)):  # fmt: skip
        groups.setdefault(h.experiment.name, []).append(h)
    return groups


def finals(histories: Sequence[History]) -> pd.DataFrame:
    """Test accuracy of the last epoch: a row per seed, a column per experiment name.

    -inf for a run that diverged, NaN where there is no finished run.

    Raises:
        ValueError: if a name has two runs of one seed.
    """
    found: dict[str, dict[int, float]] = {}
    for name, group in group_by_method(histories).items():
        of_seed = found.setdefault(name, {})
        for h in group:
            if h.experiment.seed in of_seed:
                raise ValueError(f"two runs of {name}, seed {h.experiment.seed}: compare one")
            of_seed[h.experiment.seed] = _final(h)
    return pd.DataFrame(found, dtype=float).sort_index().rename_axis("seed")


def _final(history: History) -> float:
    if history.status == "complete":
        return history.final["test_accuracy"]
    return -np.inf if history.status == "diverged" else np.nan


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """The bootstrap interval of a mean, bias-corrected and accelerated.

    Few seeds make it too narrow: of normal values, the interval at 95 % holds the true mean in 75 %
    of all cases with 3 values, 83 % with 5, 90 % with 10 and 92 % with 20 (simulated). With one
    value there is none: (nan, nan).

    >>> low, high = interval([0.61, 0.64, 0.62, 0.66, 0.63])
    >>> 0.61 < low < 0.63 < high < 0.66
    True
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return np.nan, np.nan
    if np.ptp(values) < 1e-12:  # nothing varies, which the correction would divide by
        return values.min(), values.max()
    found = stats.bootstrap(
        (values,), np.mean, confidence_level=level, n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return tuple(float(bound) for bound in found.confidence_interval)


def ranks(histories: Sequence[History], level: float = LEVEL) -> pd.DataFrame:
    """Methods from the best to the worst, with how sure their place is.

    Seeds are drawn again and again, with replacement, and the methods ranked by their means each
    time. If every method has run with every seed, the same draw serves all of them.

    Returns:
        A row per method: "mean" over finished runs with its interval ("from", "to"); "rank" (ties
        share the better one) and the interval of the rank ("rank from", "rank to"); "first", the
        share of the draws in which it has rank 1; "seeds" that finished and that "diverged".
        Where a method has fewer than two runs, nothing is known about ranks but the order.

    Raises:
        ValueError: if no run has finished.
    """
    scores = finals(histories).dropna(axis=1, how="all")
    if scores.empty:
        raise ValueError("no run has finished: there is nothing to rank")
    finite = scores.where(np.isfinite(scores))
    low_high = [interval(finite[name].dropna(), level) for name in scores]
    order = stats.rankdata(-scores.mean(), method="min").astype(int)
    drawn = _drawn_ranks(scores)
    tail = (1 - level) / 2
    table = pd.DataFrame(
        {
            "mean": finite.mean(),
            "from": [low for low, _ in low_high],
            "to": [high for _, high in low_high],
            "rank": order,
            "rank from": np.quantile(drawn, tail, axis=0, method="inverted_cdf"),
            "rank to": np.quantile(drawn, 1 - tail, axis=0, method="inverted_cdf"),
            "first": np.where(np.isnan(drawn).any(axis=0), np.nan, (drawn == 1).mean(axis=0)),
            "seeds": finite.count(),
            "diverged": np.isneginf(scores).sum(),
        },
        index=scores.columns,
    )
    return table.sort_values("rank", kind="stable").rename_axis("method")


def _drawn_ranks(scores: pd.DataFrame) -> np.ndarray:
    """Ranks by the means of redrawn seeds: a row per draw; NaN if a method has fewer than two."""
    if (scores.count() < 2).any():
        return np.full((1, scores.shape[1]), np.nan)
    rng = np.random.default_rng(0)
    if scores.notna().all(axis=None):
        rows = rng.integers(len(scores), size=(RESAMPLES, len(scores)))
        means = scores.to_numpy()[rows].mean(axis=1)
    else:
        columns = [scores[name].dropna().to_numpy() for name in scores]
        means = np.stack([rng.choice(c, (RESAMPLES, len(c))).mean(axis=1) for c in columns], axis=1)
    return stats.rankdata(-means, method="min", axis=1)


def paired(histories: Sequence[History], method: str, baseline: str = "sgd") -> pd.Series:
    """One method minus another on equal seeds, in test accuracy of the last epoch.

    Returns:
        "difference": the mean, with its interval ("from", "to"). "effect size": the mean over the
        standard deviation of the differences (Cohen's d for pairs). "p": the chance of a mean this
        far from 0 if the two were exchangeable within each seed; all 2ⁿ changes of sign are tried
        (from 14 seeds on, 9,999 random ones), so with fewer than 6 seeds no difference can reach
        p < .05. "wins": the share of seeds with the higher accuracy; half for a tie. "seeds": those
        in which both finished; "diverged": those in which one did not, which count in "wins" alone.

    Raises:
        ValueError: if one of the two is not there.
    """
    scores = finals(histories)
    for name in (method, baseline):
        if name not in scores:
            raise ValueError(f"{name!r} is not among {', '.join(scores)}")
    both = scores[[method, baseline]].dropna()
    a, b = both[method].to_numpy(), both[baseline].to_numpy()
    finite = np.isfinite(a) & np.isfinite(b)
    differences = a[finite] - b[finite]
    n = len(differences)
    spread = differences.std(ddof=1) if n > 1 else 0.0
    low, high = interval(differences)
    return pd.Series(
        {
            "difference": differences.mean() if n else np.nan,
            "from": low,
            "to": high,
            "effect size": differences.mean() / spread if spread > 1e-12 else np.nan,
            "p": _sign_flips(differences) if n > 1 else np.nan,
            "wins": ((a > b) + 0.5 * (a == b)).mean() if len(both) else np.nan,
            "seeds": n,
            "diverged": len(both) - n,
        },
        name=method,
    )


def _sign_flips(differences: np.ndarray) -> float:
    test = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(test.pvalue)


def pairs(histories: Sequence[History], baseline: str = "sgd") -> pd.DataFrame:
    """:func:`paired` of every method with ``baseline``, and "p (Holm)", p for that many questions.

    Holm's correction: the chance of even one false alarm among all rows stays below the level.

    Raises:
        ValueError: if ``baseline`` is not there, or nothing else is.
    """
    others = [name for name in group_by_method(histories) if name != baseline]
    if not others:
        raise ValueError(f"no method but {baseline}: there is nothing to compare it with")
    table = pd.DataFrame([paired(histories, name, baseline) for name in others])
    p = table["p"].sort_values()
    raised = (p * np.arange(len(p), 0, -1)).cummax().clip(upper=1)
    table.insert(table.columns.get_loc("p") + 1, "p (Holm)", raised)
    return table.astype({"seeds": int, "diverged": int}).rename_axis("method")


def best(histories: Sequence[History], level: float = LEVEL) -> str | None:
    """The name of the method that the seeds show to be the best, or None.

    It ranks first in the whole interval of its rank, no run of it diverged, and in pairs with every
    other method that finished, p is at most 1 - ``level``. With fewer than 6 seeds it is None.
    """
    table = ranks(histories, level)
    name, first = table.index[0], table.iloc[0]
    if len(table) < 2 or first["diverged"] or first["rank to"] != 1:
        return None
    against = pairs(histories, name)
    beaten = (against["p"] <= 1 - level) & (against["difference"] < 0)
    never_finished = table.loc[against.index, "seeds"] == 0
    return name if (beaten | never_finished).all() else None


def best_label(histories: Sequence[History]) -> str | None:
    """How figures call :func:`best`; None, too, where no run has finished."""
    if not any(h.status == "complete" for h in histories):
        return None
    name = best(histories)
    return next((h.label for h in histories if h.experiment.name == name), None)


def time_to(histories: Sequence[History], accuracy: float) -> pd.DataFrame:
    """How long each method takes to a test accuracy that it may lose again afterwards.

    Returns:
        A row per method: "final" accuracy (mean), "reached" (runs that did) of "seeds", and the
        medians of "epochs" and of "seconds" (of training, without the test passes). A run that
        never got there counts as later than all others: if half of them did not, there is no
        median (NaN).
    """
    rows = {}
    for name, group in group_by_method(
        [h for h in histories if h.status in ("complete", "diverged")]
    ).items():
        reached = [_first_reaching(h, accuracy) for h in group]
        epochs, seconds = np.median(np.array(reached), axis=0)
        done = [h.final["test_accuracy"] for h in group if h.status == "complete"]
        rows[name] = {
            "final": np.mean(done) if done else np.nan,
            "reached": sum(np.isfinite(epoch) for epoch, _ in reached),
            "seeds": len(group),
            "epochs": epochs,
            "seconds": seconds,
        }
    table = pd.DataFrame.from_dict(rows, orient="index").replace(np.inf, np.nan)
    return table.rename_axis("method")


def _first_reaching(history: History, accuracy: float) -> tuple[float, float]:
    seconds = 0.0
    for row in history.rows:
        seconds += row["train_seconds"]
        if row["test_accuracy"] >= accuracy:
            return float(row["epoch"]), seconds
    return np.inf, np.inf


def typical_accuracy(histories: Sequence[History]) -> float:
    """The highest multiple of .05 that at least half of the methods reach in the mean of finals.

    A level for :func:`time_to` that nobody picked by hand.
    """
    scores = finals(histories)
    means = scores.where(np.isfinite(scores)).mean().dropna()
    if means.empty:
        raise ValueError("no run has finished")
    return float(np.floor(np.quantile(means, 0.5, method="higher") * 20 + 1e-9) / 20)
