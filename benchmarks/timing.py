"""Time candidates in turns, as ratios to one of them in the same round."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable

import torch

from hybrid_lib.training.loop import cpu_name, now

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def interleaved(
    candidates: dict[str, Callable[[], object]], reference: str | dict[str, str], rounds: int
) -> list[dict]:
    """Time every candidate once per round, so that a slowing machine slows all of them.

    Args:
        candidates: what to time, by name.
        reference: the candidate whose time in a round counts as 1, or one per candidate.
        rounds: counted rounds, at least 2; two warm-up rounds come first.

    Returns:
        A row per candidate: ``name``, ``ratio`` (median over rounds), ``low`` and ``high`` (its
        quartiles) and ``ms`` (median).
    """
    if rounds < 2:
        raise ValueError(f"rounds={rounds}: quartiles need at least 2")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 2):
        for name, run in candidates.items():
            start = now(DEVICE)
            run()
            end = now(DEVICE)
            if round_ > 1:
                seconds[name].append(end - start)
    rows = []
    for name, taken in seconds.items():
        base = seconds[reference if isinstance(reference, str) else reference[name]]
        low, middle, high = statistics.quantiles([a / b for a, b in zip(taken, base)], n=4)
        rows.append({"name": name, "ratio": middle, "low": low, "high": high,
                     "ms": 1000 * statistics.median(taken)})  # fmt: skip
    return rows


def show(rows: list[dict], title: str, unit: str, as_json: bool) -> None:
    """Print machine, title and a line per row, or one JSON object per row."""
    if as_json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    print(f"{machine()}\n{title}")
    for row in rows:
        print(f"{row['name']:28s} {row['ms']:9.2f} ms  {row['ratio']:6.2f} x {unit}"
              f"  ({row['low']:.2f} to {row['high']:.2f})")  # fmt: skip


def machine() -> str:
    """Processor, threads, graphics card and versions, in one line."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{cpu_name()}, {torch.get_num_threads()} threads{gpu}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
