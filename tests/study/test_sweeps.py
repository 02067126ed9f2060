"""A sweep runs every possible point, names the others, and its table says what was run."""

import itertools
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lib.study import planning, sweeps
from hybrid_lib.study.__main__ import sweep
from hybrid_lib.study.sweeps import Sweep, read
from hybrid_lib.training.experiments import EXPERIMENTS, get_experiment
from hybrid_lib.training.history import History

TOY = "{optimizer: atmo, scale: toy, grid: {lr: [0.003, 0.03], lambda_sgd: [0, 0.5, 1]}}"


# --- Points. ---


def test_a_grid_is_every_combination_with_every_seed():
    experiments, refused = read(TOY, seeds="0-1").plan()
    assert refused == []
    points = {(e.lr, e.lambda_start, e.seed) for e in experiments}
    wanted = itertools.product((0.003, 0.03), (0, 0.5, 1), (0, 1))
    assert points == {(lr, (1 - w, w), s) for lr, w, s in wanted}
    assert len({planning.run_folder("x", e) for e in experiments}) == len(experiments) == 12
    assert all((e.epochs, e.width, e.dataset) == (2, 4, "digits") for e in experiments)


def test_any_setting_and_the_method_itself_can_be_varied_and_fixed():
    fixed = "optimizer: dyn_padam_sgd, scale: toy, fixed: {epochs: 4, momentum: 0.5}"
    grid = '{lambda_epochs: [1, 3], partial: [0.125], lambda_start: ["1, 0", [0.75, 0.25]]}'
    experiments, _ = read(f"{{{fixed}, grid: {grid}}}").plan()
    assert {(e.lambda_epochs, e.lambda_start) for e in experiments} == {
        (h, start) for h in (1, 3) for start in ((1.0, 0.0), (0.75, 0.25))
    }
    assert {(e.epochs, e.momentum, e.partial) for e in experiments} == {(4, 0.5, 0.125)}
    methods = "{scale: toy, grid: {optimizer: [sgd, dyn_atmo, adam+adahessian]}}"
    experiments, _ = read(methods).plan()
    assert [e.optimizer for e in experiments] == ["sgd", "atmo", "adam+adahessian"]
    assert len({e.name for e in experiments}) == 3


@given(st.floats(1e-6, 1), st.floats(1.5, 1e4), st.booleans(), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_draws_lie_in_their_range_repeat_and_run_at_each_point_of_the_grid(low, factor, log, seed):
    rates = {"low": low, "high": low * factor, "log": log}
    spec = {"random": {"lr": rates}, "draws": 7, "draw_seed": seed, "grid": {"width": [2, 4]}}
    points = Sweep(**spec).points()
    assert (len(points), len({p["lr"] for p in points})) == (14, 7)
    assert all(low * 0.999999 <= p["lr"] <= low * factor * 1.000001 for p in points)
    assert points == Sweep(**spec).points()
    assert points != Sweep(**{**spec, "draw_seed": seed + 1}).points()


def test_few_draws_are_spread_over_all_settings_at_once():
    """Of 16 draws, every quarter of either range has 3 to 5; independent draws rarely manage."""
    ranges = {"lr": {"low": 1e-4, "high": 1, "log": True}, "momentum": {"low": 0.0, "high": 0.8}}
    for seed in range(5):
        points = Sweep(random=ranges, draws=16, draw_seed=seed).points()
        for shares in ([math.log10(p["lr"]) / 4 + 1 for p in points],
                       [p["momentum"] / 0.8 for p in points]):  # fmt: skip
            counts = Counter(int(4 * share) for share in shares)
            assert all(3 <= counts[quarter] <= 5 for quarter in range(4))


def test_draws_are_log_uniform_if_asked_and_whole_between_whole_numbers():
    spec = {"random": {"lr": {"low": "1e-4", "high": 1, "log": True}}, "draws": 400}
    logs = sorted(math.log10(p["lr"]) for p in Sweep(**spec).points())
    assert logs[200] == pytest.approx(-2, abs=0.3)
    widths = {p["width"] for p in Sweep(random={"width": {"low": 2, "high": 4}}, draws=60).points()}
    assert widths == {2, 3, 4}, "both ends can be drawn"


def test_names_of_points_are_unique_and_valid_for_folders():
    many = {f: [1.0 + i / 7 for i in range(2)] for f in ("lr", "eps", "weight_decay")}
    many |= {"betas": ["0.91234, 0.91234", "0.91234, 0.91235"], "train_limit": [1000]}
    names = {e.name for e in Sweep(optimizer="adam", grid=many).plan()[0]}
    assert len(names) == 16
    assert all(re.fullmatch(r"[\w.-]{1,80}", name) for name in names)
    alike = {"optimizer": ["lion_sgd", "lion+sgd"], "lr": [0.1, 0.1 + 1e-9]}
    names = [e.name for e in Sweep(grid=alike).plan()[0]]
    assert len(set(names)) == 4
    alike = {"lr": [0.1 + 1e-9, 0.1], "optimizer": ["lion+sgd", "lion_sgd"]}
    assert {*names} == {e.name for e in Sweep(grid=alike).plan()[0]}, "whatever their order"
    twice = Sweep(random={"width": [4]}, draws=3).plan()[0]
    assert [e.name for e in twice] == ["sgd-width4"], "one run for points that are equal"


def test_impossible_points_are_named_and_the_others_run():
    experiments, refused = read("{scale: toy, grid: {batch_size: [32, 500], lr: [0.1, -1]}}").plan()
    assert [(e.batch_size, e.lr) for e in experiments] == [(32, 0.1)]
    assert [line.count("refused, ") for line in refused] == [1, 1, 1]
    why = "refused, batch_size=500 is larger than train_limit=160"
    assert f"sgd-batch_size500-lr0.1: {why}" in refused[1]
    (line,) = read("{grid: {optimizer: [sgd, null]}}").plan()[1]
    assert line.startswith("None: refused")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{grid: {lrr: [1]}}", r"lrr is not a setting \(did you mean lr\?\)"),
        ("{optimizer: adma, grid: {lr: [1]}}", r"'adma'.*did you mean adam\?"),
        ("{optimizer: sgd}", "name at least one setting"),
        ("{random: {lr: {low: 1, high: 0.1}}}", "low < high"),
        ("{random: {lr: {low: 0, high: 0.1, log: true}}}", "above 0 for log"),
        ("{grid: {lr: [1]}, random: {lr: [1]}}", "lr is given more than once"),
        ("{grid: {lr: [0.1], width: 4}}", r"grid\.width.*=4: "),
        ("{random: {lr: {low: 1}}}", r"random\.lr\..*high="),
        ("{grid: {lr: [-1]}}", "every point .* impossible: sgd-lr-1: refused, lr="),
        (
            "{optimizer: sgd+adam, grid: {lambda_sgd: [1]}}",
            r"sgd\+adam is not a rule merged",
        ),
        ("{optimizer: adam, grid: {lambda_sgd: [1]}}", "adam is not a rule merged"),
        ("{grid: {lambda_sgd: [1], lambda_start: ['1, 0']}}", "the same weights: give one"),
        (
            "{optimizer: sgd, grid: {hessian_every: [10]}}",
            "hessian_every=10: sgd has no such setting",
        ),
        ("{grid: {lr: [1]", "not YAML"),
        ("grid", r"give FILE\.yaml, or text"),
        ("nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_an_invalid_sweep_is_refused_in_one_line_writing_nothing(text, message, tmp_path, capsys):
    assert sweep([text, "--out", str(tmp_path / "new")]) == 2
    shown, errors = capsys.readouterr()
    assert (shown, len(errors.splitlines())) == ("", 1)
    assert re.search(message, errors)
    assert not (tmp_path / "new").exists()


def test_a_notebook_s_parameters_override_the_file_unless_they_are_none(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("{scale: toy, fixed: {width: 3}, grid: {lr: [0.1]}}")
    params = SimpleNamespace(space=str(file), scale=None, dataset=None, epochs=None)
    assert sweeps.sweep_from(params) == read(file)
    assert sweeps.default_out(file, None, None, None).name == "sweep-x"
    assert sweeps.default_out(file, "toy", None, 3).name == "sweep-x-toy-3"
    params = SimpleNamespace(space=str(file), scale="demo", dataset="mnist", epochs=5)
    ((e,), _) = sweeps.sweep_from(params).plan()
    assert (e.width, e.epochs, e.dataset, e.batch_size) == (3, 5, "mnist", 64)


# --- Tables of made-up runs. ---


def run(seed=0, accuracy=0.5, status="complete", **changes):
    e = replace(EXPERIMENTS["atmo"], seed=seed, **changes)
    e = replace(e, name=f"atmo-{e.lr:g}-{e.lambda_start[1]:g}")
    rows = [
        {"epoch": i, "test_accuracy": a, "test_loss": i, "train_accuracy": i / 9,
         "train_loss": i / 8, "train_seconds": i} for i, a in ((1, accuracy + 0.2), (2, accuracy))
    ]  # fmt: skip
    return History(e, rows, {"dataset": "dots"}, status)


RUNS = [
    run(seed, lr + sgd + seed / 10, "diverged" if (lr, sgd) == (0.1, 0.5) else "complete",
        lr=lr, lambda_start=(1 - sgd, sgd))
    for lr in (0.001, 0.1) for sgd in (0, 0.5) for seed in (0, 1)
]  # fmt: skip


def test_the_table_has_the_settings_that_differ_and_the_last_epoch_of_finished_runs():
    table = sweeps.table(RUNS)
    assert list(table) == ["lr", "lambda_sgd", *sweeps.MEASURED]
    failed = table[table["status"] == "diverged"]
    assert table["test_accuracy"].isna().sum() == len(failed) == 2
    assert list(failed["epochs done"]) == [2, 2]
    row = sweeps.table([run(4, 0.5, lr=0.1), run(lr=0.2)]).loc["atmo-0.1-0.5"]
    assert row[["seed", *sweeps.LAST]].tolist() == [4, 0.5, 2, 2 / 9, 2 / 8]
    assert row[["best_test_accuracy", "train_seconds"]].tolist() == [0.7, 3]


@pytest.mark.parametrize(
    ("weights", "column", "values"),
    [([(1, 0), (0.5, 0.5)], "lambda_sgd", [0, 0.5]),
     ([(1, 1), (0.5, 1)], "lambda_start", [(1, 1), (0.5, 1)])],
)  # fmt: skip
def test_weights_that_do_not_sum_to_one_are_shown_as_pairs(weights, column, values):
    table = sweeps.table([run(lambda_start=w, lr=lr) for w in weights for lr in (0.1, 0.2)])
    assert list(table[column]) == [v for v in values for _ in range(2)]


def test_a_weight_of_sgd_is_shown_only_where_there_is_one():
    runs = [run(lambda_start=(0.5, 0.5)), run(lr=0.2), run(lr=0.3)]
    for h, name in zip(runs[1:], ("sgd", "adam+adahessian")):
        h.experiment = replace(get_experiment(name), name=name.replace("+", "-"))
    table = sweeps.table(runs)
    assert table["lambda_sgd"].tolist() == [0.5, None, None]
    assert table["lambda_start"].tolist() == [None, None, (0.5, 0.5)]


def test_a_setting_that_is_none_stays_none_beside_numbers():
    table = sweeps.table([run(lambda_epochs=n, lr=lr) for n, lr in ((None, 0.1), (2, 0.2))])
    assert table["lambda_epochs"].tolist() == [None, 2]
    assert table["lr"].dtype == float


def test_points_are_means_over_seeds_with_failed_ones_last():
    points = sweeps.over_seeds(sweeps.table(RUNS))
    assert list(points.index) == ["atmo-0.001-0.5", "atmo-0.1-0", "atmo-0.001-0", "atmo-0.1-0.5"]
    assert points["test_accuracy"].tolist()[:3] == pytest.approx([0.551, 0.15, 0.051])
    assert points["±"].tolist()[:3] == pytest.approx([12.706 * 0.05] * 3, rel=1e-3)
    assert (list(points["seeds"]), list(points["diverged"])) == ([2, 2, 2, 0], [0, 0, 0, 2])
    lucky = [run(0, 0.99, lr=0.1), run(1, status="diverged", lr=0.1), run(0, 0.2, lr=0.2)]
    points = sweeps.over_seeds(sweeps.table(lucky))
    assert points["lr"].tolist() == [0.2, 0.1]
    assert points["±"].isna().all(), "one seed has no interval"


def test_points_are_ordered_by_the_validation_set_where_there_is_one():
    runs = [run(0, test, lr=lr) for lr, test in ((0.1, 0.9), (0.2, 0.8))]
    for h, validated in zip(runs, (0.5, 0.6)):
        h.rows[-1]["validation_accuracy"] = validated
    points = sweeps.over_seeds(sweeps.table(runs))
    assert points[["lr", "test_accuracy", "validation_accuracy"]].values.tolist() == [
        [0.2, 0.8, 0.6], [0.1, 0.9, 0.5]]  # fmt: skip


# --- Examples. ---

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("sweep*.yaml"))


def test_the_examples_are_a_grid_and_a_random_sweep_without_impossible_points():
    assert {file.stem for file in EXAMPLES} >= {"sweep_grid", "sweep_random"}
    for file in EXAMPLES:
        experiments, refused = read(file).plan()
        assert (len(experiments) > 1, refused) == (True, [])
        assert yaml.safe_load(file.read_text("utf-8"))[file.stem.removeprefix("sweep_")]
