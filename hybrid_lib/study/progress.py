"""Progress of a study's runs: a live status line in a terminal or notebook, else a plain log."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.history import History

Event = int | History | str  # of a run: its epochs so far, its history, or why it failed
Job = tuple[Experiment, Path]
QUIET = 10  # seconds between epoch lines in a log


def epoch_cost(experiment: Experiment) -> int:
    """About how long an epoch takes, relative to the study's other experiments."""
    return 4 if experiment.needs_hessian else 1


def outcome(event: History | str) -> str:
    """How a run ended, on one line."""
    if isinstance(event, str):
        return event
    if event.status == "diverged":
        return f"diverged, {event.note}"
    return f"{event.status}, test accuracy {event.final['test_accuracy']:.4f}"


def is_interactive() -> bool:
    """Whether a person may be watching: false under papermill or nbconvert, or without IPython."""
    from IPython import get_ipython

    shell = get_ipython()
    allows_input = getattr(getattr(shell, "kernel", None), "_allow_stdin", True)
    voila = "voila" in os.environ.get("SERVER_SOFTWARE", "").lower()  # no input, but a viewer
    return shell is not None and (allows_input or voila)


class Progress:
    """Show events of runs; keep each outcome by the run's number: a history, or why it failed."""

    def __init__(self, experiments: Sequence[Experiment]):
        self.names = [f"{e.label}, seed {e.seed}" for e in experiments]
        self.planned, self.cost = [e.epochs for e in experiments], [*map(epoch_cost, experiments)]
        self.epochs, self.begun = [0] * len(experiments), {}
        self.ended: dict[int, History | str] = {}
        self.start = self.last_logged = time.monotonic()
        live = sys.stderr.isatty() or ("IPython" in sys.modules and is_interactive())
        self.line = tqdm(bar_format="{desc}", disable=not live, leave=False)

    def __call__(self, number: int, event: Event) -> None:
        """Record an event of a run, and show it."""
        now, text, n = time.monotonic(), self.names[number], len(self.planned)
        if isinstance(event, int):
            self.begun.setdefault(number, event)
            self.epochs[number] = event
            text += f" (run {number + 1} of {n}): epoch {event} of {self.planned[number]}"
            quiet = not self.line.disable or now < self.last_logged + QUIET
        else:
            self.ended[number] = event
            text += f": {outcome(event)}"
            quiet = number not in self.begun and isinstance(event, History)  # over already
        text += f"; {len(self.ended)} of {n} done"
        done = sum(self.cost[i] * (self.epochs[i] - before) for i, before in self.begun.items())
        todo = sum(self.cost[i] * (self.planned[i] - self.epochs[i]) for i in range(n)
                   if i not in self.ended)  # fmt: skip
        if done and todo:
            left = (now - self.start) * todo / done
            text += f", about {f'{left / 60:.0f} min' if left > 90 else f'{left:.0f} s'} left"
        self.line.set_description_str(text)
        if not quiet:
            self.last_logged = now
            tqdm.write(text)


def one_line(error: BaseException) -> str:
    """The type of an exception and the last line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"
