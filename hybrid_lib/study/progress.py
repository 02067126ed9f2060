"""How far the runs of a study are: a line that changes where somebody looks, else a log."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from hybrid_lib.training.experiments import Experiment
from hybrid_lib.training.history import History

Event = int | History | str  # of a run: its epochs so far; how it ended; why it failed
Job = tuple[Experiment, Path]
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


def is_interactive() -> bool:
    """Whether a person may be looking: false under papermill and nbconvert, and without IPython."""
    from IPython import get_ipython

    shell = get_ipython()
    asks = getattr(getattr(shell, "kernel", None), "_allow_stdin", True)
    # Voilà asks nothing either, but has somebody looking; it says so in the environment.
    return shell is not None and (asks or "voila" in os.environ.get("SERVER_SOFTWARE", "").lower())


class Progress:
    """Shows events of runs, and keeps how they ended, by number: a history, or why it failed."""

    def __init__(self, experiments: Sequence[Experiment]):
        self.names = [f"{e.label}, seed {e.seed}" for e in experiments]
        self.of, self.cost = [e.epochs for e in experiments], [*map(epoch_cost, experiments)]
        self.epochs, self.begun = [0] * len(experiments), {}
        self.ended: dict[int, History | str] = {}
        self.start = self.said = time.monotonic()
        watched = sys.stderr.isatty() or ("IPython" in sys.modules and is_interactive())
        self.line = tqdm(bar_format="{desc}", disable=not watched, leave=False)

    def __call__(self, number: int, event: Event) -> None:
        """Take note of what happened to a run, and show it."""
        now, text, n = time.monotonic(), self.names[number], len(self.of)
        if isinstance(event, int):
            self.begun.setdefault(number, event)
            self.epochs[number] = event
            text += f" (run {number + 1} of {n}): epoch {event} of {self.of[number]}"
            quiet = not self.line.disable or now < self.said + QUIET
        else:
            self.ended[number] = event
            text += f": {outcome(event)}"
            quiet = number not in self.begun and isinstance(event, History)  # there already
        text += f"; {len(self.ended)} of {n} done"
        done = sum(self.cost[i] * (self.epochs[i] - before) for i, before in self.begun.items())
        todo = sum(self.cost[i] * (self.of[i] - self.epochs[i]) for i in range(n)
                   if i not in self.ended)  # fmt: skip
        if done and todo:
            left = (now - self.start) * todo / done
            text += f", about {f'{left / 60:.0f} min' if left > 90 else f'{left:.0f} s'} left"
        self.line.set_description_str(text)
        if not quiet:
            self.said = now
            tqdm.write(text)


def one_line(error: BaseException) -> str:
    """The type of an exception and the last line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"
