"""Publish trained runs: compact histories, tables and figures.

    python data/results/publish.py runs/reproduction-cpu data/results/cpu-scale

Copies the histories of ``train.py``'s runs with numbers rounded to five digits, and renders
``TABLES.md`` (Table III redone, times, claims, the audit) and the report's five figures beside
them. Given only the published folder, it renders that again, which takes seconds.

    python data/results/publish.py data/results/cpu-scale
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from hybrid_lib import EXPERIMENTS, History
from hybrid_lib.study import claims, figures, statistics, tables
from hybrid_lib.training.history import load_all, write_atomically

PROTOCOLS = ("released", "clean")


def compact(history: History) -> History:
    """Return the history with numbers rounded to five digits."""

    def rounded(value):
        return float(f"{value:.5g}") if isinstance(value, float) else value

    rows = [{k: rounded(v) for k, v in row.items()} for row in history.rows]
    environment = {**history.environment, "rounded": "rows to five digits"}
    return History(history.experiment, rows, environment, history.status, history.note)


def publish(source: Path, target: Path) -> None:
    """Copy every history with rows from ``source`` to the same place below ``target``."""
    for file in sorted(source.rglob("history.json")):
        history = History.load(file)
        if history.rows:
            folder = target / file.parent.relative_to(source)
            folder.mkdir(parents=True, exist_ok=True)
            compact(history).save(folder)


def audit_table(audited: Sequence[History], rows: Sequence[History]) -> pd.DataFrame:
    """Compare each audit with the row that it changes: the setting, and both last accuracies.

    Values are means over the seeds in which both are complete; the difference is seed by seed,
    with its ±.
    """
    row_of = {(h.experiment.protocol, h.experiment.name, h.experiment.seed): h
              for h in rows if h.status == "complete"}  # fmt: skip
    table = []
    for h in audited:
        e = h.experiment
        name = e.name.partition("-")[0]
        row = row_of.get((e.protocol, name, e.seed))
        if row is None or h.status != "complete":
            continue
        before, after = asdict(row.experiment), asdict(e)
        changed = [f"{k}: {before[k]} → {v}" for k, v in after.items()
                   if v != before[k] and k != "name"]  # fmt: skip
        table.append(
            {
                "method": row.label, "protocol": e.protocol, "changed": "; ".join(changed),
                "report": tables.paper("table3")["test_accuracy"][name],
                "row": row.final["test_accuracy"], "audit": h.final["test_accuracy"],
                "row's best": row.best["test_accuracy"], "audit's best": h.best["test_accuracy"],
            }
        )  # fmt: skip
    if not table:
        return pd.DataFrame()
    each = pd.DataFrame(table)
    each.insert(6, "difference", each["audit"] - each["row"])
    by_setting = each.groupby(["method", "protocol", "changed"], sort=False)
    means = by_setting.mean()
    means.insert(4, "±", by_setting["difference"].agg(statistics.margin))
    return means.assign(seeds=by_setting.size()).reset_index()


def markdown(table: pd.DataFrame, digits: int = 4) -> str:
    """Format a table as GitHub Markdown."""

    def cell(value) -> str:
        if isinstance(value, float):
            return "–" if value != value else f"{value:.{digits}f}"
        return str(value).replace("|", "\\|").replace("\n", "<br>")

    lines = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    lines += [[cell(v) for v in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_full_size(h: History) -> bool:
    """Return whether a run has the report's length, width and number of images."""
    e, ours = h.experiment, EXPERIMENTS[h.experiment.name]
    return (e.epochs, e.width, e.train_limit) == (ours.epochs, ours.width, None)


def _sizes(histories: Sequence[History]) -> str:
    images = "{train_images:,} training and {test_images:,} test images"
    sizes = {f"width {h.experiment.width}, {images.format(**h.environment)}" for h in histories}
    coarse = {h.experiment.precision: [] for h in histories if h.experiment.precision != "float32"}
    for h in histories:
        coarse.get(h.experiment.precision, []).append(h.label)
    how = {"bfloat16": "convolutions in bfloat16"}
    precisions = [f"{', '.join(labels)}: {how.get(p, p)}" for p, labels in coarse.items()]
    return "; ".join([*sorted(sizes), *precisions])


def _figures(found: Sequence[History]) -> Iterator[tuple[int, go.Figure, list[History]]]:
    """Yield the report's Figures 1 to 5: number, figure and the runs shown."""
    yield 1, figures.panels(found), found
    yield 2, figures.epoch_seconds(found), found
    for number, title, shown, beside in (
        (3, "First-order methods", lambda e: not e.needs_hessian, ()),
        (4, "Second-order methods", lambda e: e.needs_hessian, ("sgd", "adam")),
        (5, "Hybrid methods", lambda e: e.is_hybrid, ()),
    ):
        if any(shown(h.experiment) for h in found):
            runs = [h for h in found if shown(h.experiment) or h.experiment.name in beside]
            yield number, figures.curves(runs, title=f"{title}: test accuracy"), runs


def render(folder: Path) -> list[Path]:
    """Write ``TABLES.md`` and five pictures per protocol from the histories below ``folder``."""
    written, sections = [], []
    by_protocol = {p: load_all(folder / p) for p in PROTOCOLS}
    everything = [h for found in by_protocol.values() for h in found]
    if not everything:
        raise FileNotFoundError(f"{folder}: no histories below {' or '.join(PROTOCOLS)}")
    for protocol, found in by_protocol.items():
        found.sort(key=lambda h: (list(EXPERIMENTS).index(h.experiment.name), h.experiment.seed))
        if not found:
            continue
        accuracies = tables.accuracies(found)
        ended = accuracies["status"].str.contains("complete")  # other runs stopped early
        difference = accuracies["final"] - accuracies["report (CIFAR-10)"]
        accuracies["final − report"] = difference.where(ended)
        if ended.all():
            for rank, column in {"rank": "final", "report's rank": "report (CIFAR-10)"}.items():
                ranks = accuracies[column].rank(ascending=False, method="min")
                accuracies[rank] = ranks.astype("Int64")
        sections += [
            f"## Table III, protocol {protocol}", markdown(accuracies.reset_index()),
            "### Seconds per epoch", markdown(tables.seconds(found).reset_index(), 2),
            "### The report's claims", markdown(claims.table(found).reset_index(drop=True)),
        ]  # fmt: skip
        for number, figure, shown in _figures(found):
            picture = folder / f"{protocol}-figure{number}.png"
            title = figure.layout.title
            title.text += f", {protocol} protocol"
            title.subtitle.text = f"{_sizes(shown)}; {title.subtitle.text}"
            figure.update_layout(paper_bgcolor="white", plot_bgcolor="white")
            figure.write_image(picture, width=1000, height=figure.layout.height)
            sections.append(f"![Figure {number}, protocol {protocol}]({picture.name})")
            written.append(picture)
    audits = load_all(folder / "audit")
    table = audit_table(audits, everything)
    if len(table):
        sections += ["## Audit: one hidden setting changed at a time", markdown(table)]
    machines = {f"{e['device_name']}, torch {e['torch']}"
                for h in everything + audits for e in h.environments}  # fmt: skip
    head = (
        f"# {tables.subject(everything)}\n\nResNet18, {_sizes(everything)}; "
        f"{len(everything) + len(audits)} runs on {'; '.join(sorted(machines))}. "
        "Made by `publish.py` from the histories beside this page. ± is half of a 95 % interval "
        "(Student): of *final* in the first tables, of the seed-by-seed difference in the audit; "
        'with one seed there is none. A claim\'s "tenth of the epochs" is at least three epochs. '
        "Seconds are comparable only if the machine did nothing else."
    )
    if not all(_is_full_size(h) for h in everything):
        head += " These runs are smaller than the report's, which explains most of final − report."
    page = folder / "TABLES.md"
    write_atomically(page, ("\n\n".join([head, *sections]) + "\n").encode())
    return [page, *written]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="[TRAINED] PUBLISHED")
    *source, target = parser.parse_args(arguments).folders
    for folder in source:
        publish(folder, target)
    for file in render(target):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
