"""The command lines: ``hybrid-study`` (or ``python -m hybrid_lib.study``) and ``hybrid-sweep``."""

import argparse
import contextlib
import signal
import sys
from pathlib import Path

from hybrid_lib.study import planning  # slow modules are imported where used
from hybrid_lib.study.parameters import reason, seed_list
from hybrid_lib.study.running import run_many
from hybrid_lib.training import data
from hybrid_lib.training.history import write_atomically
from hybrid_lib.training.tasks import load_task


def study(arguments: list[str] | None = None) -> int:
    """Train many experiments, execute the notebooks on them and write one report."""
    parser = argparse.ArgumentParser("hybrid-study", description=study.__doc__)
    option, methods = parser.add_argument, ",".join(planning.PAPER_METHODS)
    option("--scale", choices=planning.SCALES, default="demo", help="default: demo")
    option("--dataset", default="digits", help=f"{', '.join(data.NAMES)} or folder:PATH")
    option("--only", default=methods, help="methods, separated by commas")
    option("--seeds", default="0", help="as in 0,3 or 0-4; default: 0")
    option("--protocol", default="clean", help="clean or released")
    option("--epochs", type=int, help="default: the scale's; schedules keep their shape")
    option("--out", type=Path, help="default: runs/SCALE[-DATASET][-PROTOCOL]")

    def plan(args) -> tuple:
        only, seeds = args.only.split(","), seed_list(args.seeds)
        how = {"epochs": args.epochs, "protocol": args.protocol}
        experiments = planning.plan(args.scale, args.dataset, only, seeds, **how)
        for experiment in {e.batch_size: e for e in experiments}.values():
            # Report faulty data before training starts; a cluster's login node may have no GPU.
            load_task(experiment, "cpu" if args.cluster else args.device)
        return experiments, [], planning.default_out(args.scale, args.dataset, args.protocol)

    def results(args, found, out: Path) -> tuple:
        from hybrid_lib.study import notebooks, tables

        given = {"dataset": args.dataset, "seeds": args.seeds, "out": str(out)}
        given |= {"epochs": args.epochs} if args.epochs else {}
        jobs = notebooks.for_study(found, args.scale, **given)
        table = tables.accuracies(found).sort_values("final", ascending=False)
        return table, "Hybrid optimizers", notebooks.RESULTS, jobs

    return _command(parser, arguments, plan, results)


def sweep(arguments: list[str] | None = None) -> int:
    """Train a grid or random draws of settings, and write one table and one report."""
    parser = argparse.ArgumentParser("hybrid-sweep", description=sweep.__doc__)
    parser.add_argument("space", help="FILE.yaml, or its text: '{grid: {lr: [0.01, 0.1]}}'")
    parser.add_argument("--out", type=Path, help="default: runs/sweep-FILE")

    from hybrid_lib.study import notebooks, sweeps

    def plan(args) -> tuple:
        experiments, refused = sweeps.read(args.space).plan()
        with contextlib.suppress(ValueError):  # an impossible run reports that itself
            load_task(experiments[0], args.device)
        return experiments, refused, sweeps.default_out(args.space)

    def results(args, found, out: Path) -> tuple:
        runs = sweeps.table(found)
        write_atomically(out / "table.csv", runs.to_csv().encode())
        print(f"table: {out / 'table.csv'}")
        source = notebooks.NOTEBOOKS / f"{notebooks.SWEEP}.ipynb"
        jobs = {source: {"space": args.space, "out": str(out), "train": False}}
        return sweeps.over_seeds(runs), "Sweep", notebooks.SWEEP, jobs

    return _command(parser, arguments, plan, results)


def _command(parser: argparse.ArgumentParser, arguments, plan, results) -> int:
    """Parse, plan, train and report. Exit code: 1 if something failed, 2 if nothing ran."""
    option, number = parser.add_argument, {"type": int, "metavar": "N"}
    option("--device", help="cpu, cuda, …; default: a GPU if there is one")
    option("--workers", **number, help="runs at once; default: one per core, one on a GPU")
    option("--threads", **number, help="CPU threads per run; default: 1")
    option("--cluster", help="tcp://… or tls://HOST:PORT of a Dask scheduler, or slurm:FILE.yaml")
    compiling = "fuse the training step with torch.compile; default: if a run is long enough"
    option("--compile", action=argparse.BooleanOptionalAction, help=compiling)
    args = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # an ASCII locale has no "±"
    with contextlib.suppress(ValueError):  # raised outside the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as cleanly as on Ctrl-C
    names = ("device", "compile", "workers", "threads", "cluster")
    try:
        experiments, failures, default_out = plan(args)
        out = (args.out or default_out).resolve()
        found, failed = run_many(experiments, out, **{name: getattr(args, name) for name in names})
        if not any(h.rows for h in found):  # beside others, one that diverged at once is ranked
            raise RuntimeError("; ".join(failures + failed))
        from hybrid_lib.study import notebooks, tables

        table, title, main, jobs = results(args, found, out)
        title = f"{title} on {tables.subject(found)}"
        failures += failed + notebooks.report(out, title, jobs, main, found, failures + failed)
    except KeyboardInterrupt:
        print("stopped; repeat the same command to resume", file=sys.stderr)
        return 130
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        print(f"{parser.prog}: {reason(error)}", file=sys.stderr)
        return 2
    print(f"\n{table.round(4).to_string(na_rep='-')}\n")
    for failure in failures:
        print(f"failed: {failure}")
    print(f"report: {out / 'report.html'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(study())
