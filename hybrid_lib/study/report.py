"""One HTML page of a study: figures and tables of its histories, read without a network."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from hybrid_lib.study import claims, figures, statistics
from hybrid_lib.training.history import History, write_atomically

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .3em .8em; text-align: right }
th:first-child, td:first-child, .words th, .words td { text-align: left }
.words { font-size: 14px } .words td { vertical-align: top }
.words td:nth-child(n+4) { white-space: nowrap } .words td:nth-child(5) { font-weight: bold }
tbody tr { border-top: 1px solid #ccc }
</style>
{body}
</html>
"""
TABLE_NOTE = (
    "The column of the report is its Table III: CIFAR-10 at full length, one run each. It is "
    "comparable with the others only on that data set and at that length. &quot;best&quot; is "
    "chosen by the test set. ± is the standard deviation over seeds; the interval of the mean is a "
    "bootstrap's, too narrow for few seeds (with 3, at 95 %, about three in four hold the mean). "
    "Bold: first in rank, and p &le; .05 in pairs with every other method (6 seeds or more)."
)
RANK_NOTE = (
    "Ranks by the mean, in 95 % of 9,999 draws of the seeds; one seed has no such interval. A run "
    "that diverged ranks below all others."
)
PAIRS_NOTE = (
    "Methods with equal seeds share initial weights and the order of images. Effect size: mean "
    "over standard deviation of the differences. p: over all changes of sign (or 9,999 of them); "
    "with n seeds it is never below 2/2&#8319;. p (Holm): corrected for the number of rows."
)
TIME_TO_NOTE = (
    "First epoch at that accuracy or above, medians over seeds; seconds are those of training. The "
    "level is the highest multiple of .05 that half of the methods have in the last epoch."
)
CLAIMS_NOTE = (
    "Every claim of the report's discussion (sections V and VI) as an inequality, judged on the "
    "runs of this page: with other images, networks or numbers of epochs than the report's, a "
    "verdict is about those. ± is half of the 95 % interval over seeds or, with one seed, a margin "
    "for the size of the test set; what does not clear it cannot be told."
)
TIME_NOTE = "The report's ratios come from a T4 or P100 at full width."


def write_report(
    out: Path, found: list[History], pages: Iterable[Path] = (), failures: Iterable[str] = ()
) -> Path:
    """Write ``out/report.html``: figures and tables of the histories; it needs no network.

    A method is in bold where :func:`hybrid_lib.study.statistics.best` names it, and only there.
    """
    machines = {f"{h.environment['device_name']}, torch {h.environment['torch']}" for h in found}
    sizes = {f"{h.environment['train_images']:,} training images, width {h.experiment.width}, "
             f"protocol {h.experiment.protocol}" for h in found}  # fmt: skip
    sections = [
        ("Test accuracy", _accuracies(found), TABLE_NOTE),
        *_over_seeds(found),
        ("Loss and accuracy (Figure 1)", figures.panels(found), ""),
        _claims(found),
        ("Time per epoch (Figure 2)", figures.epoch_seconds(found), TIME_NOTE),
        ("Schedules (Table II)", figures.schedules(h.experiment for h in found), ""),
    ]
    links = "".join(f'<li><a href="notebooks/{p.name}">{p.stem}</a></li>' for p in pages)
    if links:
        sections.append(("Notebooks", f"<p>Executed on these runs:</p><ul>{links}</ul>", ""))
    intro = f"ResNet18, {'; '.join(sorted(sizes))}. {len(found)} runs on {'; '.join(machines)}."
    return write_page(
        out, f"Hybrid optimizers on {figures.subject(found)}", intro, sections, failures
    )


def write_page(
    out: Path, title: str, intro: str, sections: Iterable[tuple], failures: Iterable[str] = ()
) -> Path:
    """Write ``out/report.html`` from sections of (title, figure or HTML, note as HTML)."""
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(intro)}</p>"]
    if failures:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in failures)
        body.append(f"<h2>What failed</h2><ul>{items}</ul>")
    plotly_js: bool | str = True  # once, inside the page
    for heading, content, note in sections:
        body.append(f"<h2>{heading}</h2>")
        if not isinstance(content, str):
            content.update_layout(font_color="#333")
            content = content.to_html(full_html=False, include_plotlyjs=plotly_js)
            plotly_js = False
        body.append(content + (f"<p>{note}</p>" if note else ""))
    report = out / "report.html"
    page = PAGE.replace("{title}", html.escape(title)).replace("{body}", "\n".join(body))
    write_atomically(report, page.encode("utf-8"))
    return report


def _accuracies(found: list[History]) -> str:
    page = html_table(figures.accuracy_table(found))
    best = statistics.best(found) if any(h.status == "complete" for h in found) else None
    label = next((h.label for h in found if h.experiment.name == best), None)
    return page.replace(f"<td>{label}</td>", f"<td><b>{label}</b></td>") if label else page


def _claims(found: list[History]) -> tuple:
    table = claims.table(found)
    words = table.astype(str).map(html.escape)
    words["numbers"] = words["numbers"].str.replace("; ", "<br>")
    with pd.option_context("display.max_colwidth", None):
        content = words.to_html(index=False, border=0, classes="words", escape=False)
    return f"The report's claims on {html.escape(table.index.name)}", content, CLAIMS_NOTE


def _over_seeds(found: list[History]) -> Iterator[tuple]:
    """The sections that ask how sure the order of the methods is, as far as there are runs."""
    finished = [h for h in found if h.status == "complete"]
    names = list(statistics.group_by_method(found))
    if not finished or len(names) < 2:
        return
    yield "Rank", figures.final_accuracies(found), RANK_NOTE
    if len({h.experiment.seed for h in finished}) > 1:
        baseline = "sgd" if "sgd" in names else names[0]
        table = statistics.pairs(found, baseline)
        heading = f"Test accuracy minus that of {html.escape(_label(found, baseline))}, equal seeds"
        yield heading, html_table(table.rename(lambda name: _label(found, name))), PAIRS_NOTE
    accuracy = statistics.typical_accuracy(finished)
    table = statistics.time_to(found, accuracy).rename(lambda name: _label(found, name))
    yield f"Time to a test accuracy of {accuracy:.2f}", html_table(table), TIME_TO_NOTE


def _label(found: list[History], name: str) -> str:
    return next(h.label for h in found if h.experiment.name == name)


def html_table(table) -> str:
    """A table for :func:`write_page`."""
    return table.reset_index().to_html(index=False, float_format="%.4f", na_rep="–", border=0)
