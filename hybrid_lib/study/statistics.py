"""Seed statistics: means with intervals, ranks, paired tests.

There is one kind of interval, Student's at 95 %; ± is half of it and needs two seeds. Accuracies
are those of the last epoch of finished runs. A run that diverged has none: it is counted beside
every mean and ranks below all that finished. A run that was stopped counts nowhere. Runs with equal
seeds share initial weights and the order of images, so methods are compared in pairs, by seed.
"""

import warnings
from collections.abc import Sequence
from statistics import fmean

import numpy as np
import pandas as pd
from scipy import stats

from hybrid_lib.training.experiments import EXPERIMENTS
from hybrid_lib.training.history import History

LEVEL = 0.95


def group_by_method(histories: Sequence[History]) -> dict[str, list[History]]:
    """Histories by experiment name, in the report's order."""
    names = dict.fromkeys(h.experiment.name for h in histories)
    order = [n for n in EXPERIMENTS if n in names] + [n for n in names if n not in EXPERIMENTS]
    return {name: [h for h in histories if h.experiment.name == name] for name in order}


def finals(histories: Sequence[History]) -> pd.DataFrame:
    """Test accuracy of the last epoch: a row per seed, a column per experiment name.

    -inf: the run diverged; NaN: it has not finished. ValueError if a name has two runs of a seed.
    """
    found = {}
    for name, group in group_by_method(histories).items():
        seeds = [h.experiment.seed for h in group]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{name} has two runs of one seed (seeds {seeds}): keep one of them")
        found[name] = {h.experiment.seed: h.final["test_accuracy"] if h.status == "complete"
                       else {"diverged": -np.inf}.get(h.status) for h in group}  # fmt: skip
    return pd.DataFrame(found, dtype=float).sort_index().rename_axis("seed")


def margin(values: Sequence[float] | pd.DataFrame) -> float | pd.Series:
    """Half of a mean's 95 % interval, column by column for a table; NaN for fewer than two values.

    >>> f"0.632 ± {margin([0.61, 0.64, 0.62, 0.66, 0.63]):.3f}"
    '0.632 ± 0.024'
    """
    values = values if isinstance(values, pd.DataFrame) else pd.Series(values, dtype=float)
    return values.sem() * stats.t.ppf((1 + LEVEL) / 2, values.count() - 1)


def difference(one: Sequence[float], two: Sequence[float]) -> tuple[float, float]:
    """Difference of two means of unpaired values, and half of its 95 % interval (Welch).

    >>> "{:.3f} ± {:.3f}".format(*difference([0.90, 0.92, 0.91], [0.86, 0.88, 0.87]))
    '0.040 ± 0.023'
    """
    value = fmean(one) - fmean(two)
    if min(len(one), len(two)) < 2:
        return value, np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # if values hardly vary
        interval = stats.ttest_ind(one, two, equal_var=False).confidence_interval(LEVEL)
    return value, float(interval.high - interval.low) / 2


def pairs(histories: Sequence[History], baseline: str = "sgd") -> pd.DataFrame:
    """Test accuracy of other methods minus ``baseline``, by seed; ValueError if either is missing.

    Returns:
        A row per other method. "difference": the mean, with "±". "effect size": that mean over the
        standard deviation (Cohen's d for pairs). "p": Student's paired test, NaN if nothing varies;
        "p (Holm)": corrected for as many questions as have a p. "wins": the share of seeds with the
        higher accuracy; a tie counts half. "seeds": those in which both methods finished.
        "diverged": those in which one did not; they enter "wins" only.
    """
    scores = finals(histories)
    if baseline not in scores or len(scores.columns) < 2:
        raise ValueError(f"pairs need {baseline} and another method; found {', '.join(scores)}")
    rows = {}
    for name in scores.columns.drop(baseline):
        one, two = scores[[name, baseline]].dropna().to_numpy().T
        done = np.isfinite(one) & np.isfinite(two)
        d = pd.Series(one[done] - two[done])
        varies = d.std() > 1e-12
        rows[name] = {
            "difference": d.mean(), "±": margin(d),
            "effect size": d.mean() / d.std() if varies else np.nan,
            "p": stats.ttest_rel(one[done], two[done]).pvalue if varies else np.nan,
            "p (Holm)": np.nan, "wins": pd.Series((one > two) + (one == two) / 2).mean(),
            "seeds": len(d), "diverged": len(one) - len(d),
        }  # fmt: skip
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    table["p (Holm)"] = holm(table["p"])
    return table


def holm(p: pd.Series) -> pd.Series:
    """Holm's correction for asking several questions; NaN asks none.

    >>> holm(pd.Series([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    rising = p.dropna().sort_values()
    return (rising * np.arange(len(rising), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def ranks(histories: Sequence[History]) -> pd.DataFrame:
    """Methods from best to worst, with intervals of their ranks; ValueError if no run has ended.

    Returns:
        A row per method: "mean" of finished runs, with "±"; "rank" (ties share the better one), and
        its interval: "rank from" is 1 + the number of methods better in pairs, "rank to" all minus
        those worse, at p (Holm) ≤ .05. A method with a diverged run is never better than one that
        finished. "seeds": finished runs; below two, no interval (NaN). "diverged": diverged runs.
    """
    ended = [h for h in histories if h.status in ("complete", "diverged")]
    scores = finals(ended)
    finite = scores.replace(-np.inf, np.nan)
    seeds, diverged = finite.count(), np.isneginf(scores).sum()
    if scores.empty:
        raise ValueError("no run has ended: there is nothing to rank")
    order = scores.mean().rank(ascending=False, method="min").astype(int)
    columns = {"mean": finite.mean(), "±": margin(finite), "rank": order, "rank from": np.nan}
    table = pd.DataFrame({**columns, "rank to": np.nan, "seeds": seeds, "diverged": diverged})
    for name in scores.columns[seeds > 1] if len(table) > 1 else ():
        others = pairs(ended, name)
        significant = others["p (Holm)"] <= 1 - LEVEL
        better = significant & (others["difference"] > 0) & (diverged[others.index] == 0)
        worse = significant & (others["difference"] < 0) | (seeds[others.index] == 0)
        places = 1 + better.sum(), len(table) - worse.sum() * (diverged[name] == 0)
        table.loc[name, ["rank from", "rank to"]] = places
    return table.sort_values("rank", kind="stable").rename_axis("method")
