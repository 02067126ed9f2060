"""Do the speed-ups change the curves? Final accuracies with and without each, on equal seeds.

    python -m benchmarks.curves [--seeds 3] [--method adahessian] [--epochs 12] [--json]

Demo scale on the handwritten digits. Each seed is trained plainly (eager, float32, exact Hessian),
compiled, with convolutions in bfloat16, and with the Hessian diagonal every 10 steps, from all and
from a quarter of each batch, with the same initial weights, data order and probes. ± is half of
the 95 % interval (Student) of the accuracies and of the seed-by-seed differences, without the seeds
that diverged.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import pandas as pd

from benchmarks.timing import machine
from hybrid_lib import run
from hybrid_lib.study import statistics
from hybrid_lib.study.planning import plan

VARIANTS = {
    "eager": ({}, False),
    "compiled": ({}, True),
    "bfloat16": ({"precision": "bfloat16"}, False),
    "every_10": ({"hessian_every": 10}, False),
    "every_10_quarter": ({"hessian_every": 10, "hessian_fraction": 0.25}, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", default="adahessian")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    chosen = parser.parse_args()
    experiments = plan("demo", only=[chosen.method], seeds=range(chosen.seeds),
                       epochs=chosen.epochs)  # fmt: skip
    rows, reference = [], None
    for name, (changes, compile) in VARIANTS.items():
        if "hessian_every" in changes and not experiments[0].needs_hessian:
            continue
        variants = [dataclasses.replace(e, **changes) for e in experiments]
        found = [run(e, progress=False, compile=compile) for e in variants]
        done = pd.DataFrame({h.experiment.seed: h.final for h in found if h.status == "complete"}).T
        done = done.reindex(columns=["test_accuracy", "train_loss"])  # if all diverged
        accuracies = done["test_accuracy"].astype(float)
        reference = accuracies if reference is None else reference
        differences = (accuracies - reference).dropna()
        row = {
            "name": name, "accuracy": accuracies.mean(), "margin": statistics.margin(accuracies),
            "train_loss": done["train_loss"].astype(float).mean(),
            "difference": differences.mean(), "difference_margin": statistics.margin(differences),
            "diverged": len(found) - len(done),
        }  # fmt: skip
        rows.append(row)
        if chosen.json:
            # JSON has no NaN, the margin of one seed.
            print(json.dumps({k: None if v != v else v for k, v in row.items()}), flush=True)
    if chosen.json:
        return
    print(f"{machine()}\n{chosen.method}, handwritten digits, {chosen.epochs} epochs, "
          f"{chosen.seeds} seeds; last epoch")  # fmt: skip
    for row in rows:
        margin, paired = (f" ± {row[k]:.4f}" if chosen.seeds > 1 else ""
                          for k in ("margin", "difference_margin"))  # fmt: skip
        print(f"{row['name']:18s} test accuracy {row['accuracy']:.4f}{margin} "
              f"({row['difference']:+.4f}{paired}), loss {row['train_loss']:.4f}, "
              f"diverged: {row['diverged']}")  # fmt: skip


if __name__ == "__main__":
    main()
