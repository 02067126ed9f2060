"""How far the runs of a study are: a line in a terminal, a table in a notebook, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.history import History

Event = int | History | str  # of a run: its epochs so far; how it ended; why it failed
QUIET = 10  # seconds between two lines of epochs in a log


def epoch_cost(experiment: Experiment) -> int:
    """About how long an epoch takes, against the others of a study."""
    return 4 if experiment.needs_hessian else 1


def outcome(event: History | str) -> str:
    """How a run ended, in a line."""
    if isinstance(event, str):
        return event
    if event.status == "diverged":
        return f"diverged, {event.note}"
    return f"{event.status}, test accuracy {event.final['test_accuracy']:.4f}"


class Progress:
    """Shows events of runs; what is left is estimated from the time so far and the epochs' costs.

    Attributes:
        names: of the runs, with their seeds.
        ended: the runs that have, by number: with their history, or with why they failed.
    """

    def __init__(self, experiments: Sequence[Experiment]):
        self.names = [f"{e.label}, seed {e.seed}" for e in experiments]
        self.of, self.cost = [e.epochs for e in experiments], [*map(epoch_cost, experiments)]
        self.epochs, self.begun = [0] * len(experiments), {}
        self.ended: dict[int, History | str] = {}
        self.start = self.said = time.monotonic()
        self.line = tqdm(bar_format="{desc}", disable=not sys.stderr.isatty(), leave=False)
        self.display = None  # the table's place in a notebook, where it is drawn again
        if "IPython" in sys.modules:
            from hybrid_lib.study import figures

            if figures.is_interactive():
                from IPython.display import display

                self.display = display(self._table(), display_id=True)

    def __call__(self, number: int, event: Event) -> None:
        """Take note of what happened to a run, and show it."""
        now, text, n = time.monotonic(), self.names[number], len(self.of)
        if isinstance(event, int):
            self.begun.setdefault(number, event)
            self.epochs[number] = event
            text += f" (run {number + 1} of {n}): epoch {event} of {self.of[number]}"
            quiet = self.display or not self.line.disable or now < self.said + QUIET
        else:
            self.ended[number] = event
            text += f": {outcome(event)}"
            quiet = number not in self.begun and isinstance(event, History)  # there already
        text += f"; {len(self.ended)} of {n} done{self._left(now)}"
        self.line.set_description_str(text)
        if not quiet:
            self.said = now
            tqdm.write(text)
        if self.display:
            self.display.update(self._table())

    def _table(self):
        import pandas as pd

        return pd.DataFrame({"epoch": self.epochs, "of": self.of}, index=self.names)

    def _left(self, now: float) -> str:
        done = sum(self.cost[i] * (self.epochs[i] - before) for i, before in self.begun.items())
        runs = enumerate(zip(self.cost, self.of, self.epochs))
        todo = sum(cost * (of - n) for i, (cost, of, n) in runs if i not in self.ended)
        if not done or not todo:
            return ""
        seconds = (now - self.start) * todo / done
        time_left = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
        return f", about {time_left} left"
